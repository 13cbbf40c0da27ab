"""Checkpoints: read without running code from them, map names, load, publish."""

from restrike.checkpoints.key_maps import released_name
from restrike.checkpoints.load import LoadReport, load_released
from restrike.checkpoints.publish import save_released
from restrike.checkpoints.safe_io import CheckpointError, safe_load

__all__ = ["CheckpointError", "LoadReport", "load_released", "released_name", "safe_load", "save_released"]
