"""CUT3R (arXiv 2501.12387): each view reads and updates a state of tokens; heads give points, colours and pose.

What is unusual: encoder and heads see all views at once, as they feed nothing back; only the two decoders and the pose
memory run view after view, so a `Carry` (state and memory) is all that a stream of any length keeps. Views may have an
image, a ray map or both. The state is replaced, not added to, where a view has an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from restrike.models.cut3r import positions as pos
from restrike.models.cut3r.blocks import NORM_EPS, DecoderBlock, HalfRotaryAttention
from restrike.models.cut3r.checks import RAY_CHANNELS, check_choices, check_widths, input_shape
from restrike.models.cut3r.gradients import with_zero_gradients
from restrike.models.cut3r.heads import DPTHead, Head, LinearHead, Predictions, Tokens, join_frames, split_frames
from restrike.models.cut3r.initialization import reset_parameters
from restrike.models.cut3r.pose_memory import PoseMemory
from restrike.models.cut3r.sequence import Carry, Encoded, updated
from restrike.models.layers.block import Block, run_blocks
from restrike.models.layers.linear import Linear
from restrike.models.layers.patch_embed import PatchEmbed, patch_grid
from restrike.models.layers.rotary import grid_positions, rotary_table

_RAY_NUM_HEADS = 16  # hard-wired in the release, whatever the image encoder has
HeadType = Literal["linear", "dpt"]
MaskedRayScope = Literal["batch", "scene"]


class CUT3R(nn.Module):
    """Defaults are those of both released models; they differ in `head_type`.

    Args:
        head_type: "linear", or "dpt" for fine maps.
        patch_size: Side of a patch; images may have any sides divisible by it.
        enc_embed_dim: Width of the encoder.
        enc_depth: Its blocks.
        enc_num_heads: Heads of each.
        dec_embed_dim: Width of both decoders, of the state and of the memory's halves.
        dec_depth: Their blocks.
        dec_num_heads: Heads of the image decoder, the memory and the heads' blocks.
        state_dec_num_heads: Heads of the state decoder.
        mlp_ratio: Hidden width of the MLPs over theirs.
        state_size: Tokens of the state.
        state_pe: Positions of state tokens, in a grid ("2d") or along its diagonal ("1d").
        local_mem_size: Slots of the pose memory.
        ray_enc_depth: Blocks of the ray maps' encoder.
        rope_base: Base of the rotary frequencies.
        dpt_features: Channels of each of the DPT head's maps.
        dpt_out_channels: Channels of its four projections.
        half_rotary: See `HalfRotaryAttention`; in the image encoder only.
        masked_ray_scope: Which views without a ray map get the masked ray token: all of a "batch" in which any view has
            one, as released weights have learnt it, or those of the same "scene", so that what is said of a scene does
            not depend on its neighbours in the batch. Of one scene at a time both say the same.
        frames_per_chunk: Frames that the heads work on at a time; changes no number.
        grad_checkpointing: In training, compute activations of blocks, of each view's pass through the decoders and of
            the heads' chunks again in the backward pass. Parts in eval mode are left alone.

    Raises:
        ValueError: sizes that do not fit.
    """

    family = "cut3r"

    def __init__(
        self,
        head_type: HeadType = "linear",
        patch_size: int = 16,
        enc_embed_dim: int = 1024,
        enc_depth: int = 24,
        enc_num_heads: int = 16,
        dec_embed_dim: int = 768,
        dec_depth: int = 12,
        dec_num_heads: int = 12,
        state_dec_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        state_size: int = 768,
        state_pe: pos.StatePositions = "2d",
        local_mem_size: int = 256,
        ray_enc_depth: int = 2,
        rope_base: float = 100.0,
        dpt_features: int = 256,
        dpt_out_channels: Sequence[int] = (96, 192, 384, 768),
        half_rotary: bool = False,
        masked_ray_scope: MaskedRayScope = "batch",
        frames_per_chunk: int = 8,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_choices(head_type, state_pe, masked_ray_scope, dec_depth, dpt_out_channels)
        check_widths(enc_embed_dim, {"enc_num_heads": enc_num_heads, "the ray encoder's heads": _RAY_NUM_HEADS})
        check_widths(dec_embed_dim, {"dec_num_heads": dec_num_heads, "state_dec_num_heads": state_dec_num_heads})
        self.patch_size, self.state_pe, self.rope_base = patch_size, state_pe, rope_base
        self.enc_head_dim = enc_embed_dim // enc_num_heads
        self.dec_head_dims = dec_embed_dim // dec_num_heads, dec_embed_dim // state_dec_num_heads
        self.taps = dec_depth // 2, dec_depth * 3 // 4
        self.masked_ray_scope = masked_ray_scope
        self.frames_per_chunk, self.grad_checkpointing = frames_per_chunk, grad_checkpointing

        self.pose_token = nn.Parameter(torch.empty(1, 1, dec_embed_dim))
        self.masked_img_token = nn.Parameter(torch.empty(1, enc_embed_dim))
        self.masked_ray_map_token = nn.Parameter(torch.empty(1, enc_embed_dim))
        self.patch_embed = PatchEmbed(patch_size, enc_embed_dim)
        self.patch_embed_ray_map = PatchEmbed(patch_size, enc_embed_dim, RAY_CHANNELS)
        self.enc_blocks = _blocks(enc_depth, enc_embed_dim, enc_num_heads, mlp_ratio, half_rotary)
        self.enc_norm = nn.LayerNorm(enc_embed_dim, eps=NORM_EPS)
        self.decoder_embed = Linear(enc_embed_dim, dec_embed_dim)

        def decoder(num_heads: int) -> nn.ModuleList:
            return nn.ModuleList(DecoderBlock(dec_embed_dim, num_heads, mlp_ratio) for _ in range(dec_depth))

        self.dec_blocks = decoder(dec_num_heads)
        self.dec_norm = nn.LayerNorm(dec_embed_dim, eps=NORM_EPS)
        self.enc_blocks_ray_map = _blocks(ray_enc_depth, enc_embed_dim, _RAY_NUM_HEADS, 4.0)
        self.enc_norm_ray_map = nn.LayerNorm(enc_embed_dim, eps=NORM_EPS)
        self.pose_retriever = PoseMemory(enc_embed_dim, dec_embed_dim, local_mem_size, dec_num_heads, mlp_ratio)
        self.register_tokens = nn.Embedding(state_size, enc_embed_dim)
        self.decoder_embed_state = Linear(enc_embed_dim, dec_embed_dim)
        self.dec_blocks_state = decoder(state_dec_num_heads)
        self.dec_norm_state = nn.LayerNorm(dec_embed_dim, eps=NORM_EPS)
        shared = enc_embed_dim, dec_embed_dim, dec_num_heads, patch_size
        self.downstream_head: Head
        if head_type == "linear":
            self.downstream_head = LinearHead(*shared)
        else:
            self.downstream_head = DPTHead(*shared, dpt_features, dpt_out_channels)
        reset_parameters(self)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See `grad_checkpointing`."""
        self.grad_checkpointing = enable

    def forward(
        self,
        images: Tensor,
        ray_maps: Tensor | None = None,
        image_mask: Tensor | None = None,
        ray_mask: Tensor | None = None,
        reset: Tensor | None = None,
        update: Tensor | None = None,
        masked_tokens: bool = True,
    ) -> Predictions:
        """Predictions of every view, each from the views before it and itself.

        Args:
            images: [B, V, 3, H, W] in [-1, 1]; sides divisible by `patch_size`.
            ray_maps: [B, V, H, W, 6], see `restrike.geometry.cut3r_ray_map`.
            image_mask: [B, V] bool, views that have an image; None: all. Others do not update the state.
            ray_mask: [B, V] bool, views that have a ray map; None: all if `ray_maps` is given.
            reset: [B, V] bool, views after which the state starts anew.
            update: [B, V] bool, views that may update the state.
            masked_tokens: See `encode`.

        Returns:
            [B, V, ...] in the weights' type.
        """
        encoded = self.encode(images, ray_maps, image_mask, ray_mask, reset, update, masked_tokens)
        tokens, _ = self.rollout(encoded, self.start(images.shape[0]), writes_last=False)
        return self.predict(tokens, encoded)

    def encode(
        self,
        images: Tensor | None,
        ray_maps: Tensor | None = None,
        image_mask: Tensor | None = None,
        ray_mask: Tensor | None = None,
        reset: Tensor | None = None,
        update: Tensor | None = None,
        masked_tokens: bool = True,
    ) -> Encoded:
        """All views through the encoders; arguments as in `forward`, `images` None where no view has one.

        With `masked_tokens`, as in training, a view without image gets the masked image token, and, if any view of the
        call (or of its scene, see `masked_ray_scope`) has a ray map, a view without one gets the masked ray token.
        Without, as in the released stream, tokens of what is there are added up.

        Raises:
            ValueError: neither images nor ray maps, or other shapes than these.
        """
        shape, size = input_shape(images, ray_maps)
        grid = patch_grid(torch.empty(size, device="meta"), self.patch_size)
        if ray_maps is not None and ray_mask is None:
            ray_mask = torch.ones(shape, dtype=torch.bool, device=ray_maps.device)
        has_rays = ray_maps is not None and ray_mask is not None and bool(ray_mask.any())
        absent = self.masked_img_token if masked_tokens else torch.zeros_like(self.masked_img_token)
        if images is None:
            image_mask = torch.zeros(shape, dtype=torch.bool, device=absent.device)
            tokens = absent.expand(*shape, grid[0] * grid[1], -1)
        else:
            tokens = self._encode_images(images.flatten(0, 1), grid).unflatten(0, shape)
            if image_mask is not None:
                tokens = torch.where(image_mask[..., None, None], tokens, absent.to(tokens.dtype))
        is_present = image_mask
        if has_rays:
            assert ray_maps is not None and ray_mask is not None
            rays = self._encode_rays(ray_maps.flatten(0, 1), grid).unflatten(0, shape)
            absent = self.masked_ray_map_token if masked_tokens else torch.zeros_like(self.masked_ray_map_token)
            if self.masked_ray_scope == "scene":
                absent = absent * ray_mask.any(dim=1)[:, None, None, None]
            tokens = tokens + torch.where(ray_mask[..., None, None], rays, absent.to(rays.dtype))
            is_present = image_mask | ray_mask if image_mask is not None else None
        tokens = with_zero_gradients(tokens, self._input_parameters())
        if is_present is not None and bool(is_present.all()):
            is_present = None
        updates = image_mask if update is None else update if image_mask is None else image_mask & update
        return Encoded(tokens, grid, updates, reset, is_present)

    def start(self, batch: int) -> Carry:
        """Before the first view of `batch` scenes."""
        state = self.decoder_embed_state(self.register_tokens.weight)[None].expand(batch, -1, -1)
        memory = self.pose_retriever.mem.expand(batch, -1, -1)
        return Carry(state, memory, state, memory)

    def rollout(self, encoded: Encoded, carry: Carry, writes_last: bool = True) -> tuple[Tokens, Carry]:
        """The decoders from view to view, on from `carry`; tokens [B, V, N, ...] are those that heads read.

        With `writes_last` False the last view only reads, for those who want nothing of the carry after it: its tokens
        are the same, and the carry is of no use.
        """
        embedded = with_zero_gradients(self.decoder_embed(encoded.tokens), self.pose_retriever.never_used())
        keys = self.pose_retriever.proj_q(encoded.tokens.mean(dim=2, keepdim=True))
        tables = self._tables(encoded)
        steps = []
        for i in range(embedded.shape[1]):
            view_tables = tuple(pos.DecoderTables(pos.of_view(t.view, i), t.state) for t in tables)
            writes = writes_last or i + 1 < embedded.shape[1]
            *outputs, state, memory = self._run_view(embedded[:, i], keys[:, i], carry, view_tables, writes)
            steps.append(outputs)
            carry = updated(carry, state, memory, encoded, i)
        early, late, last = (torch.stack(parts, dim=1) for parts in zip(*steps, strict=True))
        return Tokens(encoded.tokens, early, late, last), carry

    def predict(self, tokens: Tokens, encoded: Encoded) -> Predictions:
        """Heads over all views, `frames_per_chunk` at a time."""
        views, size = tokens.last.shape[1], tuple(side * self.patch_size for side in encoded.grid)
        positions = pos.view_positions(encoded.grid, encoded.is_present, tokens.last.device)
        tables = pos.frames(rotary_table(positions, self.dec_head_dims[0], self.rope_base))
        flat = Tokens(*(x.flatten(0, 1).to(self.pose_token.dtype) for x in tokens))
        chunks, start = [], 0
        for chunk in split_frames(flat, self.frames_per_chunk):
            stop = start + len(chunk.last)
            chunks.append(self._maybe_checkpoint(self.downstream_head, chunk, size, pos.of_frames(tables, start, stop)))
            start = stop
        return join_frames(chunks, views)

    def _encode_images(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """[F, 3, H, W] -> [F, N, enc_dim]."""
        table = rotary_table(grid_positions(*grid, device=images.device), self.enc_head_dim, self.rope_base)
        x = self.patch_embed(images)
        return self.enc_norm(run_blocks(self.enc_blocks, x, table, grad_checkpointing=self.grad_checkpointing))

    def _encode_rays(self, ray_maps: Tensor, grid: tuple[int, int]) -> Tensor:
        """[F, H, W, 6] -> [F, N, enc_dim]."""
        x = self.patch_embed_ray_map(ray_maps.movedim(-1, 1))
        positions = grid_positions(*grid, device=ray_maps.device)
        table = rotary_table(positions, x.shape[-1] // _RAY_NUM_HEADS, self.rope_base)
        blocks = self.enc_blocks_ray_map
        return self.enc_norm_ray_map(run_blocks(blocks, x, table, grad_checkpointing=self.grad_checkpointing))

    def _tables(self, encoded: Encoded) -> tuple[pos.DecoderTables, pos.DecoderTables]:
        """For the image decoder's heads and for the state decoder's."""
        device = encoded.tokens.device
        of_view = pos.with_pose_token(pos.view_positions(encoded.grid, encoded.is_present, device))
        of_state = pos.state_positions(self.register_tokens.num_embeddings, self.state_pe, device)
        image, state = (
            pos.DecoderTables(*(rotary_table(p, dim, self.rope_base) for p in (of_view, of_state)))
            for dim in self.dec_head_dims
        )
        return image, state

    def _run_view(self, embedded: Tensor, key: Tensor, carry: Carry, tables: Any, writes: bool) -> tuple[Tensor, ...]:
        arguments = embedded, key, carry.state, carry.memory, carry.is_start, tables, writes
        return self._maybe_checkpoint(self._view, *arguments)

    def _view(
        self, embedded: Tensor, key: Tensor, state: Tensor, memory: Tensor, is_start: bool, tables: Any, writes: bool
    ) -> tuple[Tensor, ...]:
        """One view [B, N, dim] against the state; its tokens for the heads, the next state, the next memory."""
        of_image, of_state = tables
        pose = self.pose_token.expand(len(key), -1, -1) if is_start else self.pose_retriever.read(key, memory)
        x, taps = torch.cat([pose.to(embedded.dtype), embedded], dim=1), []
        for depth, (image_block, state_block) in enumerate(zip(self.dec_blocks, self.dec_blocks_state, strict=True), 1):
            is_read = writes or depth < len(self.dec_blocks)  # by the next layer's image block, or the next view
            x, state = (
                image_block(x, state, of_image.view, of_image.state),
                state_block(state, x, of_state.state, of_state.view) if is_read else state,
            )
            if depth in self.taps:
                taps += [x[:, 1:]] * self.taps.count(depth)
        x = self.dec_norm(x)
        if not writes:
            return *taps, x, state, memory
        return *taps, x, self.dec_norm_state(state), self.pose_retriever.write(key, x[:, :1], memory)

    def _maybe_checkpoint(self, function: Any, *args: Any) -> Any:
        """`function(*args)`, its activations computed again in the backward pass where that is asked for."""
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            # Nothing here is random, so the generators' states need no saving.
            return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
        return function(*args)

    def _input_parameters(self) -> list[nn.Parameter]:
        """Parameters that only some calls use: what stands for a missing input, and the ray maps' encoder."""
        modules = self.patch_embed_ray_map, self.enc_blocks_ray_map, self.enc_norm_ray_map
        of_rays = [parameter for module in modules for parameter in module.parameters()]
        return [self.masked_img_token, self.masked_ray_map_token, *of_rays]


def _blocks(depth: int, dim: int, num_heads: int, mlp_ratio: float, half_rotary: bool = False) -> nn.ModuleList:
    blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio, norm_eps=NORM_EPS) for _ in range(depth))
    for block in blocks if half_rotary else ():
        block.attn = HalfRotaryAttention(dim, num_heads)
    return blocks
