"""A test set's own protocol: which answers count, and which list of files a number is about."""

from __future__ import annotations

import json
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.protocols import CountsAccuracy, HasEvaluationSet, require
from restrike.metrics.label_maps import label_map_metrics

_STAGES = {"validate": "val", "test": "test"}


class Benchmark(Callback):
    """Counts top-1 and top-5 as the datamodule's `evaluation_set` says, and prints the protocol beside the numbers.

    The numbers, the protocol's name, the number of images and the hash of their list go to `<run>/benchmark.json`.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the protocol's metrics in the place of the module's."""
        require(trainer.datamodule, HasEvaluationSet, "benchmark")
        require(pl_module, CountsAccuracy, "benchmark")
        if stage not in _STAGES:
            raise ValueError("callbacks.benchmark is for test and validate only")
        chosen, name = trainer.datamodule.evaluation_set, _STAGES[stage]
        for suffix in ("", "_ema"):
            pl_module.metrics[name + suffix] = label_map_metrics(
                f"{name}/", suffix, classes=chosen.classes, label_sets=chosen.label_sets
            )

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print and write."""
        self._report(trainer, "test")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print and write."""
        self._report(trainer, "val")

    def _report(self, trainer: Trainer, name: str) -> None:
        if not trainer.is_global_zero:
            return
        data = trainer.datamodule
        chosen = data.evaluation_set
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith(f"{name}/")}
        record = {
            "protocol": data.protocol,
            "title": chosen.protocol.title,
            "images": len(chosen.paths),
            "is_whole": chosen.is_whole,
            "file_list_sha256": chosen.sha256,
            "checkpoint": Path(str(trainer.ckpt_path)).name if trainer.ckpt_path else None,
            **metrics,
        }
        root = Path(trainer.default_root_dir)
        root.mkdir(parents=True, exist_ok=True)
        (root / "benchmark.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(f"\n{chosen.description}")
        for suffix, title in (("", "raw"), ("_ema", "EMA")):
            if f"{name}/top1{suffix}" in metrics:
                top1, top5 = (100 * metrics[f"{name}/top{k}{suffix}"] for k in (1, 5))
                print(f"{title} weights: top-1 {top1:.2f} %, top-5 {top5:.2f} %")
