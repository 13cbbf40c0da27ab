"""Loss, accuracy and learning rate of the run as one picture."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info


class Curves(Callback):
    """Draws `<run>/curves.png` from the CSV logger's file when training ends, whether it finished or failed."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw at the end."""
        self._draw(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Draw what there is: the curves are wanted most when a run has failed."""
        if trainer.state.fn == "fit":
            self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        logger = next((logger for logger in trainer.loggers if isinstance(logger, CSVLogger)), None)
        if logger is None:
            rank_zero_info("callbacks.curves draws what the CSV logger wrote, and this run has none")
            return
        logger.save()
        # A resumed run logs into a new version folder; the picture shows all of it.
        current = Path(logger.log_dir)
        folders = current.parent.glob("version_*") if current.name.startswith("version_") else [current]
        files = [file for folder in sorted(folders, key=_version) if (file := folder / "metrics.csv").is_file()]
        if files:
            from restrike.viz import plot_curves

            plot_curves(files, Path(trainer.default_root_dir) / "curves.png")


def _version(folder: Path) -> int:
    number = folder.name.rpartition("_")[2]
    return int(number) if number.isdigit() else 0
