"""Start weights that fit a model in part: DUSt3R's for CUT3R, and another head's."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import Tensor, nn

from restrike.checkpoints.load import select_state_dict
from restrike.checkpoints.safe_io import CheckpointError, safe_load

_log = logging.getLogger(__name__)
_SHOWN = 5

# DUSt3R's second decoder and its heads have no place in CUT3R; its mask token served CroCo's pre-training.
DUST3R_UNUSED = ("dec_blocks2.*", "downstream_head1.*", "downstream_head2.*", "mask_token")
_DUST3R_PARTS = ("patch_embed.", "enc_blocks.", "enc_norm.", "decoder_embed.", "dec_blocks.", "dec_norm.")
_ENCODER_PARTS = ("patch_embed.", "enc_blocks.")


def load_dust3r(model: nn.Module, path: str | os.PathLike[str], encoder_only: bool = False) -> list[str]:
    """Start a CUT3R from a DUSt3R file, as its guide does (DUSt3R_ViTLarge_BaseDecoder_224_linear).

    Encoder, embedding and norm of the decoder go where their names say; the decoder's blocks start both decoders.
    Everything else in the model keeps its random start.

    Args:
        encoder_only: Take patch embedding and encoder blocks alone: not the norm after them, as published.

    Returns:
        Names of the parameters that were set.

    Raises:
        CheckpointError: no DUSt3R file, other sizes, or names in it that nobody knows.
    """
    state = select_state_dict(safe_load(path), str(path))
    unknown = [n for n in state if not n.startswith(_DUST3R_PARTS) and not _matches(n, DUST3R_UNUSED)]
    if unknown or "dec_blocks.0.norm1.weight" not in state:
        what = f"it has {_first(unknown)}" if unknown else "it lacks dec_blocks.0.norm1.weight"
        raise CheckpointError(f"{path} is no DUSt3R checkpoint: {what}; give CUT3R's own files as model.pretrained")
    parts = _ENCODER_PARTS if encoder_only else _DUST3R_PARTS
    wanted = {name: value for name, value in state.items() if name.startswith(parts)}
    for name in [n for n in wanted if n.startswith("dec_blocks.")]:
        wanted[name.replace("dec_blocks.", "dec_blocks_state.", 1)] = wanted[name]
    own = {n: p for n, p in model.state_dict().items() if n.startswith((*parts, *_state_part(parts)))}
    if missing := [n for n in own if n not in wanted]:
        raise CheckpointError(f"{path} lacks {_first(missing)}: it is a smaller model's, or damaged")
    _check(wanted, own, str(path))
    model.load_state_dict(wanted, strict=False)
    return list(wanted)


def load_with_fresh_parts(model: nn.Module, path: str | os.PathLike[str], fresh: Iterable[str]) -> list[str]:
    """Load a checkpoint strictly, but for parts that start anew.

    Args:
        fresh: Globs over names. The model may have such names that the file lacks, and the file such that the model
            lacks; where both have one, it is loaded.

    Returns:
        Names that start anew.

    Raises:
        CheckpointError: another name is missing on one side, or a shape differs.
    """
    fresh = list(fresh)
    state, own = select_state_dict(safe_load(path), str(path)), model.state_dict()
    new = [n for n in own if n not in state]
    left = [n for n in state if n not in own]
    for what, names in (("only in the model", new), ("only in the file", left)):
        if wrong := [n for n in names if not _matches(n, fresh)]:
            raise CheckpointError(
                f"{path} does not fit the model; {what}: {_first(wrong)}. Is it another variant, or is a glob missing "
                "in model.pretrained_fresh?"
            )
    state = {n: value for n, value in state.items() if n in own}
    _check(state, own, str(path))
    model.load_state_dict(state, strict=False)
    if new:
        _log.warning("%s: %d parameters start anew: %s", path, len(new), _first(new))
    return new


def _state_part(parts: tuple[str, ...]) -> tuple[str, ...]:
    return ("dec_blocks_state.",) if "dec_blocks." in parts else ()


def _check(state: dict[str, Tensor], own: dict[str, Tensor], source: str) -> None:
    wrong = [n for n, value in state.items() if n not in own or own[n].shape != value.shape]
    if wrong:
        shapes = [f"{n} is {list(state[n].shape)}, here {list(own[n].shape) if n in own else 'nothing'}" for n in wrong]
        raise CheckpointError(f"{source} is of a model of another shape: {_first(shapes)}")


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _first(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
