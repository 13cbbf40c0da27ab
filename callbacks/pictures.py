"""Where pictures of predictions go."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer

if TYPE_CHECKING:
    from PIL import Image


def log_picture(trainer: Trainer, picture: Image.Image, folder: str, name: str, title: str) -> None:
    """To `<run>/<folder>/<name>.png`, and to loggers that take images as "<folder>/<title>". For rank 0.

    Args:
        trainer: Of the run.
        picture: To save.
        folder: Below the run's.
        name: Slashes, as in the key of a scene, become underscores.
        title: The same after each evaluation, so that a logger shows how the picture changes.
    """
    path = Path(trainer.default_root_dir) / folder / f"{name.replace('/', '_')}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(f"{folder}/{title}", [str(path)], step=trainer.global_step)
