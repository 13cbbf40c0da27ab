"""The file that users download: raw and EMA weights in the layout of the release."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from callbacks.protocols import HasNetwork, require


class PublishWeights(Callback):
    """Writes `<run>/weights/<model>.pth.tar` at each new best validation, and at the end if there was none.

    The file holds no code, optimiser or paths of this run. `load_released(model, file, use_ema=True)` picks the EMA.

    Args:
        monitor: Metric that decides; null takes `val/top1_ema` where it is logged, else `val/top1`.
        mode: Whether the best is the "max" or the "min".
        name: Name of the file; null takes the module's `model_name`.
    """

    def __init__(
        self, monitor: str | None = None, mode: Literal["max", "min"] = "max", name: str | None = None
    ) -> None:
        self.monitor = monitor
        self.mode = mode
        self.name = name
        self.best = -math.inf  # of the metric, or of its negative under "min"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module without a network."""
        require(pl_module, HasNetwork, "publish")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write on a new best."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        metrics = trainer.callback_metrics
        monitor = self.monitor or ("val/top1_ema" if "val/top1_ema" in metrics else "val/top1")
        if monitor not in metrics:
            if self.monitor is not None:
                raise ValueError(f"callbacks.publish.monitor '{monitor}' is not logged; there is {', '.join(metrics)}")
            return
        value = float(metrics[monitor])
        score = value if self.mode == "max" else -value
        if score > self.best:
            self.best = score
            self._write(trainer, pl_module, {"name": monitor, "value": value})

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what there is, if no validation has."""
        if self.best == -math.inf and not trainer.fast_dev_run:
            self._write(trainer, pl_module, None)

    def state_dict(self) -> dict[str, Any]:
        """The best so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing."""
        self.best = state_dict["best"]

    def _write(self, trainer: Trainer, pl_module: LightningModule, metric: dict[str, Any] | None) -> None:
        if not trainer.is_global_zero:
            return
        from restrike.checkpoints import save_released

        name = self.name or pl_module.hparams.get("model_name", type(pl_module).__name__)
        averaged = getattr(pl_module, "averaged", None)
        path = Path(trainer.default_root_dir) / "weights" / f"{name}.pth.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_released(
            path,
            pl_module.net,
            ema=None if averaged is None else averaged(),
            epoch=trainer.current_epoch,
            arch=name,
            metric=None if metric is None else metric["value"],
        )
        rank_zero_info(f"wrote {path}" + ("" if metric is None else f" ({metric['name']} {metric['value']:.4f})"))
