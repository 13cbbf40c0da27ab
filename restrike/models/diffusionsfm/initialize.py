"""From the weights of a sparse model to the start of a dense one (arXiv 2505.05473, training in two stages)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

_EMBEDDING = "scratch.input_conv.weight"
_PATCH = 16


def dense_from_sparse(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A sparse model's state dict with the ray embedding that a dense one needs.

    The linear layer [D, 9] becomes a 16x16 convolution [D, 9, 16, 16] with 1/256 of it at every pixel, so that it
    starts as average pooling plus the linear layer. The decoder is not in it: load it with strict=False.

    Raises:
        ValueError: no sparse model's state dict.
    """
    weight = state.get(_EMBEDDING)
    if weight is None or weight.ndim != 2:
        found = "none" if weight is None else list(weight.shape)
        raise ValueError(f"expected the weights of a sparse model, with {_EMBEDDING} of two dimensions; found {found}")
    tiled = weight[:, :, None, None].expand(-1, -1, _PATCH, _PATCH) / _PATCH**2
    return {**state, _EMBEDDING: tiled.contiguous()}
