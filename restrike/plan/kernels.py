"""Autocast and attention kernels of a real device, for tensors of the meta device, which has neither.

PyTorch's autocast is a dispatch key of each backend, and the meta backend has none; its attention is the plain formula,
where a GPU takes a fused kernel that keeps no scores. A step that is traced on meta inside `device_kernels` casts and
keeps the same tensors as one on the device: a test compares the casts with PyTorch's own dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

DeviceKind = Literal["cuda", "cpu"]
# Meta has no autocast state. The CPU's means nothing to meta tensors, and activation checkpointing restores it.
_STATE: DeviceKind = "cpu"

# The lists of PyTorch's "CUDA Op-Specific Behavior" (torch.amp documentation), by the names that Python code calls.
_LOWER = frozenset(
    """
    __matmul__ __rmatmul__ addbmm addmm addmv addr baddbmm bmm chain_matmul conv1d conv2d conv3d
    conv_transpose1d conv_transpose2d conv_transpose3d einsum linear matmul mm multi_dot
    multi_head_attention_forward mv prelu vecdot
    """.split()  # noqa: SIM905
)
_FLOAT32 = frozenset(
    """
    __pow__ __rdiv__ __rpow__ __rtruediv__ acos asin binary_cross_entropy_with_logits cdist cosh
    cosine_embedding_loss cosine_similarity cross_entropy cumprod cumsum dist erfinv exp expm1 group_norm
    hinge_embedding_loss huber_loss interpolate kl_div l1_loss layer_norm log log10 log1p log2 log_softmax
    logsumexp margin_ranking_loss mse_loss nll_loss norm normalize pow prod reciprocal renorm rsqrt sinh
    smooth_l1_loss soft_margin_loss softmax softmin softplus sum tan triplet_margin_loss upsample vector_norm
    """.split()  # noqa: SIM905
)
_WIDEST = frozenset(
    "atan2 bilinear cross dot grid_sample index_put index_put_ scatter_add tensordot".split()  # noqa: SIM905
)


@contextmanager
def device_kernels(kind: DeviceKind, autocast: torch.dtype | None) -> Iterator[None]:
    """Compute on meta as that kind of device does, under autocast to that type, or without.

    The backward pass belongs into a context without autocast, for what activation checkpointing computes again.
    """
    before = torch.is_autocast_enabled(_STATE), torch.get_autocast_dtype(_STATE)
    torch.set_autocast_enabled(_STATE, autocast is not None)
    torch.set_autocast_dtype(_STATE, autocast or before[1])
    try:
        with _Kernels(kind, keeps_casts=autocast is not None):
            yield
    finally:
        torch.set_autocast_enabled(_STATE, before[0])
        torch.set_autocast_dtype(_STATE, before[1])


class _Kernels(TorchFunctionMode):
    def __init__(self, kind: DeviceKind, keeps_casts: bool) -> None:
        super().__init__()
        self._kind, self._keeps_casts = kind, keeps_casts
        self._weights: dict[int, tuple[Tensor, Tensor]] = {}  # autocast keeps its casts of weights, too

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("generator") is not None:  # meta has none; what is drawn has no values there
            kwargs = {**kwargs, "generator": None}
            if isinstance(kwargs.get("device"), torch.device):
                kwargs["device"] = torch.device("meta")
        rule = _RULES.get(func)
        if rule is None:
            rule = _RULES[func] = _rule(func)
        if rule == "plain":
            return func(*args, **kwargs)
        if torch.is_autocast_enabled(_STATE):
            if rule in ("attention", "lower"):
                args, kwargs = self._cast((args, kwargs), torch.get_autocast_dtype(_STATE))
            elif rule == "float32":
                args, kwargs = self._cast((args, kwargs), torch.float32)
            else:
                types_given = [t.dtype for t in tree_leaves((args, kwargs)) if _is_castable(t)]
                if torch.float32 in types_given:
                    args, kwargs = self._cast((args, kwargs), torch.float32)
        if rule == "attention":
            return _attention(self._kind, *args, **kwargs)
        return func(*args, **kwargs)

    def _cast(self, values: Any, dtype: torch.dtype) -> Any:
        return tree_map(lambda value: self._cast_one(value, dtype) if _is_castable(value) else value, values)

    def _cast_one(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        is_weight = isinstance(value, torch.nn.Parameter) and value.requires_grad and value.dtype == torch.float32
        if not (is_weight and self._keeps_casts and dtype != torch.float32 and torch.is_grad_enabled()):
            return value.to(dtype)
        if id(value) not in self._weights:
            self._weights[id(value)] = value, value.to(dtype)
        return self._weights[id(value)][1]


_RULES: dict[Any, str] = {}


def _rule(func: Callable[..., Any]) -> str:
    """What autocast does with a function's arguments."""
    if func is F.scaled_dot_product_attention:
        return "attention"
    name = getattr(func, "__name__", "")
    lists = {"lower": _LOWER, "float32": _FLOAT32, "widest": _WIDEST}
    return next((rule for rule, names in lists.items() if name in names), "plain")


def _is_castable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta and value.is_floating_point() and value.dtype != torch.float64


def _attention(
    kind: DeviceKind,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel that PyTorch would choose: flash without a mask, memory-efficient with one; on a CPU flash, or the
    formula where the mask needs a gradient."""
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(repeats, dim=-3) for t in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if kind == "cpu":
        return _attention_on_cpu(query, key, value, attn_mask, dropout_p, is_causal, scale)
    head_dim = query.shape[-1]
    query, key, value = (F.pad(t, (0, -head_dim % 8)) if head_dim % 8 else t for t in (query, key, value))
    if attn_mask is None and query.dtype in (torch.float16, torch.bfloat16):
        out = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)
    else:
        bias = _as_bias(attn_mask, query, key)
        keeps_scores_sum = torch.is_grad_enabled()
        out = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, keeps_scores_sum, dropout_p, is_causal, scale=scale
        )
    return out[0][..., :head_dim]


def _as_bias(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    if mask is None:
        return None
    bias = mask.to(query.dtype) if mask.dtype == torch.bool else mask
    return bias.expand(*query.shape[:-1], key.shape[-2])


def _attention_on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> Tensor:
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        scores = (query * scale) @ key.mT + mask
        return F.dropout(scores.softmax(dim=-1), dropout_p) @ value
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, key, value, dropout_p, is_causal, attn_mask=_as_bias(mask, query, key), scale=scale)[0]
