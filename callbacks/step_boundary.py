"""Where within Lightning's loops a checkpoint may be taken so that a resumed run misses nothing.

Lightning takes a checkpoint from `on_train_batch_end` for one whose validation and epoch's end have already happened.
The names with an underscore are Lightning's own; a test notices when they go.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer


def may_save(trainer: Trainer) -> bool:
    """Whether this is a real training run, past its sanity check."""
    return trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.fast_dev_run


def ends_epoch(trainer: Trainer) -> bool:
    """Whether the current training batch is the epoch's last."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def validation_follows(trainer: Trainer) -> bool:
    """Whether a validation comes right after the current training batch."""
    fetcher: Any = trainer.fit_loop._data_fetcher
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)
