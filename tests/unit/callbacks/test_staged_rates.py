"""Learning-rate factors by stage, and what the published recipes freeze, by the released parameter names."""

from __future__ import annotations

import gzip
import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from callbacks.staged_freezing import StagedFreezing
from training_tools import ToyData, differing, toy_module, toy_trainer, weights

PARITY = Path(__file__).resolve().parents[2] / "parity"
LR = 1e-3
pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),  # resumed without saving again
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),  # the data knows where
]
FACTORS: dict[str, Any] = {"net.layer1.*": 0.1, "net.fc.*": {1: 10.0, 2: 0.5}}


class Rates(Callback):
    """The rate of every group at each optimiser step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.seen.append({group["name"]: group["lr"] for group in optimizer.param_groups})


def fit(root: Path, *callbacks: Callback, ckpt_path: Path | None = None, **arguments: Any) -> tuple[Any, Rates]:
    module, rates = toy_module(lr=LR, schedule=arguments.pop("schedule", "constant")), Rates()
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = toy_trainer(root, callbacks=[*callbacks, rates], max_epochs=3, enable_checkpointing=saves)
    trainer.fit(module, datamodule=ToyData(), ckpt_path=ckpt_path)
    return module, rates


def test_factors_hold_from_their_stage_on(tmp_path: Path) -> None:
    _, rates = fit(tmp_path, StagedFreezing({0: ["net.layer1.*"], 1: []}, lr_factors=FACTORS))
    assert len(rates.seen) == 12
    for epoch, head in enumerate((1.0, 10.0, 0.5)):
        for seen in rates.seen[4 * epoch : 4 * epoch + 4]:
            assert seen["layer1/decay"] == pytest.approx(0.1 * LR), "a part that is unfrozen later has it from then on"
            assert seen["fc/decay"] == seen["fc/no_decay"] == pytest.approx(head * LR)
            assert seen["decay"] == seen["no_decay"] == LR


def test_factors_scale_the_whole_schedule(tmp_path: Path) -> None:
    _, rates = fit(tmp_path, StagedFreezing({0: []}, lr_factors=FACTORS), schedule="cosine")
    for step, seen in enumerate(rates.seen):
        assert seen["fc/decay"] == pytest.approx((1.0, 10.0, 0.5)[step // 4] * seen["decay"]), step
    assert rates.seen[-1]["decay"] < 0.1 * rates.seen[0]["decay"]


@pytest.mark.parametrize("step", [3, 4, 6, 8, 9])
def test_factors_are_kept_over_a_resume(step: int, tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    settings: dict[str, Any] = {"schedule": "cosine"}
    plain, expected = fit(tmp_path, StagedFreezing({0: []}, lr_factors=FACTORS), saves, **settings)
    freezing = StagedFreezing({0: []}, lr_factors=FACTORS)
    resumed, rates = fit(tmp_path, freezing, ckpt_path=tmp_path / f"step={step}.ckpt", **settings)
    assert rates.seen == expected.seen[step:]
    assert not differing(weights(resumed), weights(plain))


def test_a_factor_that_was_changed_holds_after_the_resume(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(tmp_path, StagedFreezing({0: []}, lr_factors={"net.fc.*": 2.0}), saves)
    changed = StagedFreezing({0: []}, lr_factors={"net.fc.*": 3.0})
    _, rates = fit(tmp_path, changed, ckpt_path=tmp_path / "step=6.ckpt")
    assert rates.seen[0]["fc/decay"] == pytest.approx(3 * LR)
    other = StagedFreezing({0: []}, lr_factors={"net.layer1.*": 3.0})
    with pytest.raises(ValueError, match=r"checkpoint has factors for \['net\.fc\.\*'\]"):
        fit(tmp_path, other, ckpt_path=tmp_path / "step=6.ckpt")


def test_a_glob_without_a_match_names_near_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lr_factors: no parameter matches 'net\.fcc\.\*'\. Near: .*net\.fc\.\*"):
        fit(tmp_path, StagedFreezing({0: []}, lr_factors={"net.fcc.*": 0.1}))


@pytest.mark.parametrize("factor", [0.0, -1.0, {-1: 1.0}, {0: float("inf")}])
def test_impossible_factors_are_refused(factor: Any) -> None:
    with pytest.raises(ValueError, match=r"staged_freezing\.lr_factors\.net\.\*: expected factors above 0"):
        StagedFreezing({0: []}, lr_factors={"net.*": factor})


def test_the_example_of_the_documentation_fits_a_vit() -> None:
    text = (PARITY.parents[1] / "docs" / "finetuning.md").read_text(encoding="utf-8")
    example = yaml.safe_load(text.partition("## Stages")[2].partition("```yaml")[2].partition("```")[0])
    module = toy_module(model_name="test_vit")
    freeze(module, **example["callbacks"]["freeze"]["init_args"])
    assert {name for name, p in module.net.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}
    assert module.lr_factor_globs == {"net.blocks.*": 0.1, "net.patch_embed.*": 1.0}


class Released(LightningModule):
    """A model's released parameters by name, on the meta device; `lr_factor_globs` as Restrike's modules have it."""

    def __init__(self, family: str, variant: str) -> None:
        super().__init__()
        self.lr_factor_globs: dict[str, float] = {}
        self.net = nn.Module()
        for name, shape, kind in json.loads(gzip.decompress((PARITY / family / "keys.json.gz").read_bytes()))[variant]:
            if kind == "param":
                self._put(name.split("."), nn.Parameter(torch.empty(shape, device="meta")))

    def _put(self, parts: list[str], parameter: nn.Parameter) -> None:
        owner = self.net
        for part in parts[:-1]:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]  # type: ignore[assignment]
        owner.register_parameter(parts[-1], parameter)

    def training_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def freeze(module: LightningModule, stages: dict[int, list[str]], **arguments: Any) -> StagedFreezing:
    freezing = StagedFreezing(stages, **arguments)
    freezing.setup(Trainer(accelerator="cpu", devices=1, logger=False, barebones=True), module, "fit")
    return freezing


CUT3R_ENCODER = [
    "net.patch_embed.*", "net.patch_embed_ray_map.*", "net.masked_*_token", "net.enc_blocks.*",
    "net.enc_blocks_ray_map.*", "net.enc_norm.*", "net.enc_norm_ray_map.*",
]  # fmt: skip


def test_cut3rs_frozen_encoder_leaves_the_published_number_of_parameters() -> None:
    module = Released("cut3r", "linear_224")
    freeze(module, {0: CUT3R_ENCODER})
    assert module.training_parameters() == 418_574_343


def test_vggts_frozen_aggregator_leaves_the_published_number_of_parameters() -> None:
    module = Released("vggt", "vggt_1b_camera_depth")
    freeze(module, {0: ["*aggregator*"]})
    assert round(module.training_parameters() / 1e6, 1) == 248.8


def test_an_unfrozen_aggregator_may_learn_at_a_tenth_and_keeps_what_the_model_itself_fixed() -> None:
    module = Released("vggt", "vggt_1b_camera_depth")
    fixed = module.net.aggregator.patch_embed.mask_token.requires_grad_(False)
    freezing = freeze(module, {0: ["*aggregator*"], 3: []}, lr_factors={"net.aggregator.*": 0.1})
    assert module.lr_factor_globs == {"net.aggregator.*": 0.1}
    freezing.load_state_dict({"stage": 3, "lr_factors": {"net.aggregator.*": 0.1}})
    assert not fixed.requires_grad
    assert module.net.aggregator.camera_token.requires_grad


def test_dense_diffusionsfm_unfreezes_encoder_and_transformer_at_step_50000() -> None:
    module = Released("diffusionsfm", "dense")
    frozen = ["net.feature_extractor.*", "net.ray_predictor.*"]
    factors = {"net.feature_extractor.*": 0.1, "net.ray_predictor.*": 0.1}  # 1e-5 beside 1e-4
    freezing = freeze(module, {0: frozen, 50_000: []}, unit="step", lr_factors=factors)
    names = {name for name, p in module.named_parameters() if p.requires_grad}
    assert names and not any(fnmatchcase(name, glob) for name in names for glob in frozen)
    freezing.load_state_dict({"stage": 50_000, "lr_factors": factors})
    assert all(p.requires_grad for p in module.parameters())
