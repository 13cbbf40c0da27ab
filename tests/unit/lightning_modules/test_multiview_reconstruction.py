"""VGGT's module: targets, parts of a batch, clipping, baselines, start weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from torch import nn

from callbacks import StagedFreezing
from distributed import run_ranks
from lightning_modules import MultiViewReconstructionModule
from lightning_modules.baselines import OnOtherImages
from lightning_modules.multiview_reconstruction import category_of, multiview_targets, scene_parts, select_scenes
from multiview_cases import random_scene
from restrike.checkpoints import CheckpointError
from restrike.data.samples import MultiViewBatch
from restrike.geometry import to_first_camera
from restrike.models import build
from restrike.optim.progress import linear_warmup_cosine
from training_tools import differing, toy_trainer, weights

SIZES: dict[str, Any] = {
    "img_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 4, "num_heads": 2, "patch_embed": "conv",
    "taps": (0, 1, 2, 3), "camera_depth": 1, "camera_num_heads": 2, "dpt_features": 16,
    "dpt_out_channels": (8, 8, 16, 16),
}  # fmt: skip


def make_batch(seed: int, scenes: int = 4, views: int = 3) -> MultiViewBatch:
    drawn = random_scene(seed, views=views, batch=scenes, size=(28, 28), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    depth = drawn.depth.abs()
    depth[:, :, :3] = 0
    shape = scenes, views
    return MultiViewBatch(
        images=torch.rand(*shape, 3, 28, 28, generator=generator),
        depth=depth,
        valid_depth=depth > 0,
        foreground=depth > 0,
        intrinsics=drawn.intrinsics,
        world_to_camera=drawn.world_to_camera,
        crop_boxes=torch.zeros(*shape, 4),
        source_sizes=torch.full((*shape, 2), 28),
        frame_numbers=torch.arange(views).expand(shape).clone(),
        is_video=torch.zeros(shape, dtype=torch.bool),
        valid=torch.ones(scenes, dtype=torch.bool),
        keys=[f"apple/{i}" for i in range(scenes)],
        seed=seed,
    )


class Loader:
    """A list that Lightning takes for one loader, not for several."""

    def __init__(self, *batches: MultiViewBatch) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        return iter(self.batches)


class Scenes(LightningDataModule):
    """The same few batches in every epoch; `sizes` are their scene counts."""

    batch_size_per_device = 4

    def __init__(self, sizes: tuple[int, ...] = (4, 3), padding: int = 0) -> None:
        super().__init__()
        self.sizes, self.padding = sizes, padding

    def train_dataloader(self) -> Any:
        return Loader(*(make_batch(i, size) for i, size in enumerate(self.sizes)))

    def val_dataloader(self) -> Any:
        batch = make_batch(9)
        batch.valid[len(batch.valid) - self.padding :] = False
        if self.padding:
            batch.depth[-self.padding :] = 1e6
        return Loader(batch)

    test_dataloader = val_dataloader


def tiny_module(**arguments: Any) -> MultiViewReconstructionModule:
    torch.manual_seed(1)
    settings = {"lr": 1e-3, "schedule": "constant", "evaluate": "raw"}
    return MultiViewReconstructionModule("vggt_1b_camera_depth", dict(SIZES), **{**settings, **arguments})


def fit(module, root, data=None, **settings):
    trainer = toy_trainer(root, **{"max_epochs": 1, "limit_val_batches": 0, **settings})
    trainer.fit(module, datamodule=data or Scenes())
    return trainer


def test_targets_have_the_first_camera_as_world_and_unit_mean_distance():
    batch = make_batch(0)
    batch.depth[0, 0, 9, 9] = torch.nan
    targets = multiview_targets(batch)
    assert not bool(targets.valid[0, 0, 9, 9]) and bool(targets.points_world.isfinite().all())
    torch.testing.assert_close(targets.world_to_camera[:, 0], torch.eye(3, 4).expand(4, 3, 4), atol=1e-5, rtol=0)
    distance = (targets.points_world.norm(dim=-1) * targets.valid).flatten(1).sum(1) / targets.valid.flatten(1).sum(1)
    torch.testing.assert_close(distance, torch.ones(4), atol=1e-3, rtol=0)
    rotation = to_first_camera(batch.world_to_camera)[..., :3]
    torch.testing.assert_close(targets.world_to_camera[..., :3], rotation, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scenes, parts, sizes", [(4, 2, [2, 2]), (3, 2, [2, 1]), (1, 2, [1]), (2, 4, [1, 1])])
def test_parts_lose_no_scene_and_none_is_empty(scenes, parts, sizes):
    batch = make_batch(0, scenes)
    found = list(scene_parts(batch, parts))
    assert [len(part.images) for part in found] == sizes
    assert [key for part in found for key in part.keys] == batch.keys
    assert torch.equal(torch.cat([part.depth for part in found]), batch.depth)


class Gradients(Callback):
    """Gradients before clipping, per optimiser step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.seen.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})


def _train_rank(rank: int, root: str) -> dict[str, torch.Tensor]:
    """The gradient of one step on the rank's own four scenes, in two parts."""

    class Own(Scenes):
        def train_dataloader(self) -> Any:
            return Loader(make_batch(rank))

    gradients = Gradients()
    settings = {"devices": 2, "strategy": "ddp", "max_epochs": 1, "limit_val_batches": 0, "callbacks": [gradients]}
    toy_trainer(Path(root), **settings).fit(tiny_module(accum_steps=2), datamodule=Own())
    return gradients.seen[0]


def test_ranks_average_the_gradients_of_all_parts(tmp_path):
    """Backward passes before the last one stay on their rank, and the last all-reduce takes the sum."""
    first, second = run_ranks(_train_rank, str(tmp_path))
    assert differing(first, second) == []
    module = tiny_module()
    for rank in range(2):
        for part in scene_parts(make_batch(rank), 2):
            (module.losses(module(part.images), multiview_targets(part))["loss"] / 4).backward()
    for name, p in module.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(first[name], p.grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_in_parts_has_the_gradient_of_its_scenes_mean(tmp_path, accumulate):
    gradients = Gradients()
    module = tiny_module(accum_steps=2, lr=1e-12, weight_decay=0.0)
    fit(module, tmp_path, callbacks=[gradients], accumulate_grad_batches=accumulate)
    assert len(gradients.seen) == 2 // accumulate
    expected: dict[str, torch.Tensor] = {}
    batches = [make_batch(0, 4), make_batch(1, 3)]
    for batch in batches if accumulate == 2 else batches[:1]:
        for part in scene_parts(batch, 2):
            module.zero_grad()
            module.losses(module(part.images), multiview_targets(part))["loss"].backward()
            for name, p in module.named_parameters():
                if p.grad is not None:
                    share = len(part.images) / len(batch.images) / accumulate
                    expected[name] = expected.get(name, 0) + share * p.grad
    for name, gradient in gradients.seen[0].items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4, msg=name)


def test_the_finetuning_rules_hold_through_the_trainer(tmp_path):
    """Frozen aggregator bitwise, one rate for all, decay on all, clipping by module, rates by progress."""

    class Look(Callback):
        rates, decays, norms = [], [], []

        def on_train_batch_end(self, trainer, pl_module, *_: Any) -> None:
            for head in (pl_module.net.camera_head, pl_module.net.depth_head):  # gradients stay until the next step
                self.norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in head.parameters()])))
            self.modes = {pl_module.net.aggregator.training, pl_module.net.aggregator.patch_embed.training}

        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            self.rates.append({group["lr"] for group in optimizer.param_groups})
            self.decays.append({group["weight_decay"] for group in optimizer.param_groups})

    look = Look()
    look.rates, look.decays, look.norms = [], [], []
    module = tiny_module(
        accum_steps=2, lr=1e-3, schedule="progress_cosine", warmup_steps=1, warmup_lr=1e-8, min_lr=1e-8,
        weight_decay=0.05, decay_all=True, clip_by_module={"aggregator": 0.1, "depth": 0.1, "camera": 0.1},
    )  # fmt: skip
    before = weights(module)
    callbacks = [StagedFreezing({0: ["net.aggregator.*"]}), look]
    fit(module, tmp_path, Scenes((4, 3, 2, 4)), callbacks=callbacks)
    moved = differing(before, weights(module))
    assert moved and all(not name.startswith("net.aggregator") for name in moved)
    assert look.modes == {False}
    expected = [linear_warmup_cosine(i / 4, lr=1e-3, warmup=0.25) for i in range(4)]
    assert [rate.pop() for rate in look.rates] == pytest.approx(expected) and look.rates == [set()] * 4
    assert look.decays == [{0.05}] * 4
    assert look.norms == pytest.approx([0.1] * 8, rel=1e-4)


def test_a_weight_decay_schedule_ends_where_it_says(tmp_path):
    class Decays(Callback):
        seen: list[list[float]] = []

        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            self.seen.append([group["weight_decay"] for group in optimizer.param_groups])

        def on_train_batch_end(self, trainer, pl_module, *_: Any) -> None:
            self.used = [group["weight_decay"] for group in trainer.optimizers[0].param_groups]
            used.append(self.used)

    used: list[list[float]] = []
    module = tiny_module(weight_decay=0.04, weight_decay_end=0.4)
    fit(module, tmp_path, Scenes((1, 1, 1)), callbacks=[Decays()])
    matrices = [max(values) for values in used]
    assert matrices == pytest.approx([0.04, 0.22, 0.4])
    assert all(min(values) == 0 for values in used)  # vectors never decay


def evaluated(root, data, **arguments) -> dict[str, float]:
    module = tiny_module(test_points=64, **arguments)
    (values,) = toy_trainer(root).test(module, datamodule=data, verbose=False)
    return values


def test_a_test_reports_the_baselines_beside_the_weights(tmp_path):
    values = evaluated(tmp_path, Scenes(), test_untrained=True, test_other_images=True)
    for metric in ("auc@3", "auc@30", "rra@15", "rta@5", "abs_rel", "delta@1.25", "point_overall"):
        for suffix in ("", "_untrained", "_other_images", "_trivial"):
            assert math.isfinite(values[f"test/{metric}{suffix}"]), metric + suffix
    assert values["test/auc@30_trivial"] == 0
    assert len({values[f"test/abs_rel{suffix}"] for suffix in ("", "_untrained", "_other_images")}) == 3
    assert math.isfinite(values["test/loss"]) and "test/loss_trivial" not in values


def test_a_misled_network_sees_the_next_scenes_images():
    images = torch.arange(3.0).view(3, 1, 1, 1, 1)
    assert OnOtherImages(nn.Identity())(images).flatten().tolist() == [2, 0, 1]


def test_padding_rows_change_nothing(tmp_path):
    whole, padded = make_batch(9), Scenes(padding=2)

    class Two(Scenes):
        def val_dataloader(self) -> Any:
            return Loader(select_scenes(whole, torch.tensor([True, True, False, False])))

        test_dataloader = val_dataloader

    assert evaluated(tmp_path, padded) == pytest.approx(evaluated(tmp_path, Two()))


def test_the_finetuning_build_takes_a_whole_model_and_leaves_unused_heads(tmp_path, caplog):
    torch.manual_seed(1)
    whole = build("vggt_1b", **SIZES, enable_track=False)
    torch.save(whole.state_dict(), tmp_path / "model.pt")
    module = tiny_module(pretrained=str(tmp_path / "model.pt"))
    assert "point_head" in caplog.text
    for name, tensor in module.net.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name
    torch.save({k: v for k, v in whole.state_dict().items() if "camera_head" not in k}, tmp_path / "less.pt")
    with pytest.raises(CheckpointError, match="only in the model: camera_head"):
        tiny_module(pretrained=str(tmp_path / "less.pt"))


def test_the_embedder_alone_can_start_from_dinov2(tmp_path):
    embedder = {"patch_embed": "dinov2_vits14_reg", "patch_embed_depth": 1, "patch_embed_num_heads": 2}
    torch.manual_seed(3)
    source = build("vggt_1b", **{**SIZES, **embedder}).aggregator.patch_embed
    torch.save(source.state_dict(), tmp_path / "dinov2.pth")
    module = MultiViewReconstructionModule(
        "vggt_1b_camera_depth", {**SIZES, **embedder}, patch_embed_pretrained=str(tmp_path / "dinov2.pth")
    )
    assert differing(weights(source), weights(module.net.aggregator.patch_embed)) == []


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="accum_steps: expected 1 or more, got 0"):
        tiny_module(accum_steps=0)
    assert category_of("apple/110_1_2") == "apple" and category_of("garden/1") == "other"


def test_grad_checkpointing_changes_no_gradient():
    batch, found = make_batch(0), []
    for grad_checkpointing in (False, True):
        module = tiny_module(grad_checkpointing=grad_checkpointing).train()
        module.losses(module(batch.images), multiview_targets(batch))["loss"].backward()
        found.append({n: p.grad for n, p in module.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-7, rtol=1e-5, msg=name)


def test_a_fit_learns_one_batch(tmp_path):
    """The loss of the same scenes falls."""

    class Losses(Callback):
        seen: list[float] = []

        def on_train_batch_end(self, trainer, *_: Any) -> None:
            losses.append(float(trainer.logged_metrics["train/loss"]))

    losses: list[float] = []
    fit(tiny_module(lr=3e-3), tmp_path, Scenes((2,)), callbacks=[Losses()], max_epochs=25)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
