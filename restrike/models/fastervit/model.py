"""FasterViT: convolutional stages, then windowed attention whose windows talk through carrier tokens.

Paper: "FasterViT: Fast Vision Transformers with Hierarchical Attention", arXiv 2306.06189. What is unusual:
  - one class serves all released variants: at a fixed resolution windows must divide the feature maps, with
    `any_res` maps are padded and every image size is taken, whatever the constructor's resolution;
  - the last normalisation is a BatchNorm before pooling;
  - stochastic depth drops windows, not images, in the attention stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from timm.layers import LayerNorm2d, calculate_drop_path_rates, create_classifier
from timm.models import named_apply
from timm.models._features import feature_take_indices  # where timm keeps it: its own models import it so
from torch import Tensor, nn
from torch.nn import functional as F

from restrike.models.fastervit.blocks import PatchEmbed
from restrike.models.fastervit.deploy import fold
from restrike.models.fastervit.stages import AttentionStage, ConvStage, Stage
from restrike.models.layers.derived import exclude_derived_from_ddp

Resolution = int | Sequence[int]


class FasterViT(nn.Module):
    """The classifier and feature extractor; `restrike.models.build` knows the released sizes.

    Args:
        dim: channels of the first stage, doubled by each of the next.
        in_dim: channels inside the stem.
        depths: blocks of each stage. Stages 0 and 1 are convolutional, so of the next lists they use nothing.
        ct_size: side of each window's square of carrier tokens.
        resolution: side or (height, width) of the images that decide which parameters exist.
        any_res: pad feature maps to whole windows.
        layer_scale: initial factor of the attention stages' residual branches; None for no such parameters.
        layer_scale_conv: the same for convolutional stages.
        layer_norm_last: a LayerNorm instead of the last BatchNorm.
        hat: which stages have carrier tokens, where their feature map has more than one window.
        do_propagation: add the carriers, upsampled, to the tokens at the end of a hierarchical stage.
        as_released: at unequal numbers of window rows and columns compute what the release computes, which is not
            what was meant (see `AttentionStage`).
        drop_rate: dropout before the classifier; `proj_drop_rate` and `attn_drop_rate` act in attention and MLPs.
    """

    family = "fastervit"

    def __init__(
        self,
        dim: int,
        in_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: Sequence[int] = (7, 7, 7, 7),
        ct_size: int = 2,
        mlp_ratio: float = 4.0,
        resolution: Resolution = 224,
        any_res: bool = False,
        drop_path_rate: float = 0.2,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        layer_scale: float | None = None,
        layer_scale_conv: float | None = None,
        layer_norm_last: bool = False,
        hat: Sequence[bool] = (False, False, True, False),
        do_propagation: bool = False,
        as_released: bool = True,
    ) -> None:
        super().__init__()
        self.is_deployed = False
        for name, value in (("num_heads", num_heads), ("window_size", window_size), ("hat", hat)):
            if len(value) != len(depths):
                raise ValueError(f"{name} has {len(value)} entries, depths has {len(depths)}: give one a stage")
        height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.resolution, self.any_res = (height, width), any_res
        self.num_features = self.head_hidden_size = dim * 2 ** (len(depths) - 1)
        self.feature_info = [
            {"num_chs": dim * 2**i, "reduction": 4 * 2**i, "module": f"levels.{i}"} for i in range(len(depths))
        ]
        self.patch_embed = PatchEmbed(in_chans, in_dim, dim)
        rates: list[list[float]] = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)  # type: ignore
        levels: list[Stage] = []
        for i, drop_paths in enumerate(rates):
            downsample = i < len(depths) - 1
            if i < 2:
                levels.append(ConvStage(dim * 2**i, downsample, drop_paths, layer_scale_conv))
                continue
            window = window_size[i]
            size = _feature_side(height, i, window, any_res), _feature_side(width, i, window, any_res)
            levels.append(
                AttentionStage(
                    dim * 2**i,
                    num_heads[i],
                    window,
                    size,
                    hat=hat[i],
                    pad=any_res,
                    downsample=downsample,
                    drop_paths=drop_paths,
                    carrier_size=ct_size,
                    propagate=do_propagation,
                    as_released=as_released,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    layer_scale=layer_scale,
                )
            )
        self.levels = nn.ModuleList(levels)
        self.norm = LayerNorm2d(self.num_features) if layer_norm_last else nn.BatchNorm2d(self.num_features)
        self.global_pool, self.head = create_classifier(self.num_features, num_classes, pool_type=global_pool)
        self.optional_keys = _optional_keys(levels, hat)
        named_apply(_initialise, self)
        exclude_derived_from_ddp(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, num_features, ceil(H/32), ceil(W/32)], normalised."""
        x = self._stem(x)
        for level in self.levels:
            x = level(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature map -> logits [B, num_classes], or with `pre_logits` the pooled features."""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def switch_to_deploy(self) -> FasterViT:
        """Turn this model, in place and for good, into its inference form: outputs within 1e-4, no more training."""
        if not self.is_deployed:
            self.eval()
            fold(self)
            self.is_deployed = True
        return self

    def train(self, mode: bool = True) -> FasterViT:
        if mode and self.is_deployed:
            raise RuntimeError("this model was switched to its inference form, which cannot be trained: build it again")
        return super().train(mode)

    def load_pretrained(self, path: str | PathLike[str], prefix: str = "") -> None:
        """timm's hook for `pretrained=True`; a classifier of another size and other input channels are adapted."""
        # Here, not above: restrike.checkpoints is a layer that knows models, not the other way round.
        from restrike.checkpoints import load_released

        load_released(self, path, adapt=True)

    def _stem(self, x: Tensor) -> Tensor:
        return self.patch_embed(x.contiguous(memory_format=torch.channels_last))

    def _stages(self) -> list[Stage]:
        return list(self.levels)  # type: ignore[arg-type]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's interface; an intermediate is a stage's map before its downsampling (strides 4, 8, 16, 32)."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.levels), indices)
        intermediates = []
        x = self._stem(x)
        end = len(self.levels) - 1
        for i, level in enumerate(self._stages()[: last + 1] if stop_early else self._stages()):
            x = level.forward_blocks(x)
            if i in take:
                intermediates.append(self.norm(x) if norm and i == end else x)
            if level.downsample is not None and not (stop_early and i == last):
                x = level.downsample(x)
        if intermediates_only:
            return intermediates
        return (self.norm(x) if i == end else x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's interface: drop the stages that the given intermediates do not need."""
        take, last = feature_take_indices(len(self.levels), indices)
        is_shortened = last < len(self.levels) - 1
        self.levels = self.levels[: last + 1]
        if is_shortened:
            self._stages()[-1].downsample = None
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if is_shortened or prune_norm:
            self.norm = nn.Identity()  # type: ignore[assignment]
        if is_shortened or prune_head:
            self.reset_classifier(0, "")
        return take

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Nothing: the release decays every tensor of two or more dimensions, positional MLPs included."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups, for layer-wise learning rates."""
        blocks = [
            (r"^levels\.(\d+)\.global_tokenizer", (0,)),
            (r"^levels\.(\d+)\.downsample", (9999,)),
            (r"^levels\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": r"^levels\.(\d+)" if coarse else blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass."""
        for level in self._stages():
            level.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier; `num_classes=0` leaves pooled features, `global_pool=""` the feature map."""
        reference = next(self.parameters())
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self.num_classes = num_classes
        self.global_pool, self.head = create_classifier(
            self.num_features, num_classes, pool_type=pool, device=reference.device, dtype=reference.dtype
        )
        _initialise(self.head)
        self.train(self.training)


def _feature_side(side: int, stage: int, window: int, any_res: bool) -> int:
    """Side of a stage's feature map in pixels, whole windows, as the constructor counts it."""
    size = int(side / 2 ** (stage + 2))
    if any_res:
        return -(-size // window) * window
    if size % window or not size:
        raise ValueError(
            f"resolution {side} gives stage {stage} a feature map of side {size}, which windows of {window} do not "
            f"divide; choose window_size[{stage}] among the divisors of {size}, another resolution, or any_res=True"
        )
    return size


def _optional_keys(levels: Sequence[Stage], hat: Sequence[bool]) -> tuple[str, ...]:
    """Patterns of parameters that exist at some resolutions of a variant only, so that files may differ in them."""
    flat = [str(i) for i, level in enumerate(levels) if hat[i] and not getattr(level, "is_hierarchical", True)]
    carriers = [rf"^levels\.({'|'.join(flat)})\.(global_tokenizer\.|blocks\.\d+\.(hat_|gamma[12]$))"] if flat else []
    return (r"\.hat_pos_embed\.", *carriers)


def _initialise(module: nn.Module, name: str = "") -> None:
    """Convolutions keep PyTorch's defaults; normalisation layers start as the identity."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
