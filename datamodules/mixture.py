"""A published mixture of data sets, "N @ data set" for each, of which those with a reader can be trained on.

CUT3R (arXiv 2501.12387) mixes up to 32 data sets. The recipe says which and how much of each; what of them is used is
another key, so a run on CO3D alone says by its config that it is one.
"""

from __future__ import annotations

import difflib
from typing import Any

from datamodules.co3d import CO3DDataModule

CO3D = "Co3d_Multi"


class MixtureDataModule(CO3DDataModule):
    """CO3D's part of a mixture.

    Args:
        mixture: Data set → samples per epoch, as published.
        use: Data sets of the mixture to train on.
        data: Everything else; see `CO3DDataModule`.

    Raises:
        ValueError: a data set that is not in the mixture, or that nothing here can read; or an epoch of another length
            than the mixture says.
    """

    def __init__(self, mixture: dict[str, int], use: list[str] | None = None, **data: Any) -> None:
        super().__init__(**data)
        use = [CO3D] if use is None else use
        for name in use:
            if name not in mixture:
                near = difflib.get_close_matches(name, mixture, n=3)
                raise ValueError(f"data.use: {name!r} is not in data.mixture; nearest: {', '.join(near or mixture)}")
        if others := [name for name in use if name != CO3D]:
            raise ValueError(
                f"data.use: nothing here reads {', '.join(others)} yet; only {CO3D} (and the toy tree in its form) "
                "streams. To add one, lay it out as a CO3D v2 tree (images, depth, masks, cameras: docs/co3d.md), pack "
                "it with `python -m cli prepare co3d`, and train on that folder as "
                f"data.data with data.use=[{CO3D}] and model.is_metric=true where its lengths are metres "
                "(docs/models/cut3r.md has the published settings of each); to mix several in one run, extend "
                "datamodules/mixture.py"
            )
        if use != [CO3D]:
            raise ValueError(f"data.use: expected [{CO3D}], got {use}")
        if self.epoch_length not in (None, mixture[CO3D]):
            raise ValueError(
                f"data.epoch_length is {self.epoch_length}, but data.mixture has {mixture[CO3D]} samples of {CO3D}"
            )
        self.mixture = dict(mixture)
        self.epoch_length = mixture[CO3D]
