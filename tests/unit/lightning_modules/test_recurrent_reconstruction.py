"""CUT3R's module: long sequences in chunks, on one process and on two, and what evaluation reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch import Tensor

from callbacks import FiniteGuard, StagedFreezing
from cut3r_training import SceneData, fit, random_batch, rows, tiny_module
from distributed import run_ranks
from lightning_modules.recurrent_reconstruction import batch_targets, trivial_predictions
from restrike.geometry import encode_pose, invert_se3
from restrike.losses.recurrent import recurrent_loss
from restrike.models.cut3r.truncation import TruncatedSequence, chunks_of
from restrike.optim import clip_gradients, create_optimizer, param_groups
from training_tools import differing, toy_trainer, weights

LONG = {"long_context": True, "chunk_views": 2}
VIEWS = [12, 5]
FROZEN = ["net.patch_embed*", "net.masked_*_token", "net.enc_blocks*", "net.enc_norm*"]


class Steps(Callback):
    """Gradient norms and learning rates of all updates, and the steps that Lightning counts."""

    def __init__(self) -> None:
        self.lrs: list[float] = []
        self.counted: list[int] = []
        self.dtypes: set[torch.dtype] = set()

    def on_train_start(self, trainer, pl_module) -> None:
        pl_module.net.dec_blocks[0].mlp.fc1.register_forward_hook(lambda *a: self.dtypes.add(a[-1].dtype))
        pl_module.net.dec_blocks[0].attn.proj.register_forward_hook(lambda *a: self.dtypes.add(a[-1].dtype))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.lrs.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, *_) -> None:
        self.counted.append(trainer.global_step)


def beyond_rounding(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names whose tensors differ by more than rounding; it may turn the sign of a few of AdamW's steps.

    A bias of all keys shifts all logits alike, so where no position turns the keys its gradient is rounding alone
    (1e-9), and AdamW makes a part of a step of it.
    """

    def is_off(name: str) -> bool:
        is_rounding = name.startswith("net.pose_retriever.") and name.endswith("projk.bias")
        close = torch.isclose(a[name], b[name], atol=5e-4 if is_rounding else 2e-5, rtol=1e-4)
        return float((~close).float().mean()) > 1e-3

    return [name for name in a if is_off(name)]


def by_hand(views: list[int]) -> dict[str, Tensor]:
    """The weights after the published loop, without any trainer."""
    module = tiny_module()
    net, optimizer = (
        module.net.train(),
        create_optimizer("adamw", param_groups(module.net, 0.05), 1e-3, 0.0, (0.9, 0.95)),
    )
    for index, count in enumerate(views):
        batch = random_batch(index, views=count)
        targets = batch_targets(batch, torch.zeros(2, dtype=torch.bool))
        with torch.no_grad():
            encoded = net.encode(batch.images)
        sequence = TruncatedSequence(
            net, encoded, lambda p, start, stop, t=targets: recurrent_loss(p, t.views(start, stop)), size=2
        )
        while not sequence.is_done:
            optimizer.zero_grad()
            sequence.next_losses()["loss"].backward()
            clip_gradients(net.parameters(), 1.0)
            optimizer.step()
    return weights(module)


def test_long_sequences_take_a_step_per_trained_chunk_as_the_published_loop_does(tmp_path):
    steps = Steps()
    module = fit(tmp_path, VIEWS, steps, **LONG)
    assert not beyond_rounding(weights(module), by_hand(VIEWS))
    assert steps.counted == [1, 2]  # a batch is one step, whatever its chunks
    assert len(steps.lrs) == 4 + 3


def test_what_only_starts_a_sequence_does_not_train_in_long_context(tmp_path):
    changed = differing(weights(fit(tmp_path, [12], **LONG)), weights(tiny_module()))
    start = {n for n in weights(tiny_module()) if n.startswith(("net.register", "net.decoder_embed_state", "net.enc"))}
    assert not start & set(changed)
    assert "net.pose_retriever.mem" not in changed and "net.pose_token" not in changed
    assert "net.dec_blocks_state.0.attn.qkv.weight" in changed
    short = differing(weights(fit(tmp_path, [8], **LONG)), weights(tiny_module()))
    assert "net.pose_token" in short  # the first chunk is among the last four


@pytest.mark.parametrize("long", [{}, LONG], ids=["plain", "long"])
def test_a_batch_in_parts_gives_the_same_step_as_the_whole(long, tmp_path):
    whole = fit(tmp_path, [6], scenes=4, **long)
    parts = fit(tmp_path, [6], scenes=4, accum_steps=2, **long)
    assert not beyond_rounding(weights(whole), weights(parts))


def test_parts_of_a_batch_are_shown_the_ray_maps_of_the_whole():
    batch = random_batch(0, scenes=4, views=5)
    whole, parts = (tiny_module(is_metric=True, accum_steps=n) for n in (1, 2))
    (one,), (two, three) = ([m._inputs(part) for part in m._parts(batch)[0]] for m in (whole, parts))
    for joined, want in zip(zip(two, three, strict=True), one, strict=True):
        assert torch.equal(torch.cat(joined), want)


def test_the_sky_lies_behind_the_camera_as_published():
    """Its size counts where a single view's points are divided by their mean."""
    batch = random_batch(0)
    batch.depth[:, :, :4] = -1
    targets = batch_targets(batch, torch.zeros(2, dtype=torch.bool))
    assert torch.equal(targets.sky, batch.depth < 0) and not (targets.sky & targets.valid).any()
    torch.testing.assert_close(targets.points_camera[targets.sky][:, 2], -torch.ones(2 * 4 * 4 * 32))


@pytest.mark.parametrize("long", [{}, LONG], ids=["plain", "long"])
def test_checkpointing_changes_no_number(long, tmp_path):
    kept = fit(tmp_path, [6], **long)
    again = fit(tmp_path, [6], grad_checkpointing=True, **long)
    assert not beyond_rounding(weights(kept), weights(again))


def test_chunks_run_in_the_trainers_precision(tmp_path):
    steps = Steps()
    fit(tmp_path, [6], steps, trainer={"precision": "bf16-mixed"}, **LONG)
    assert steps.dtypes == {torch.bfloat16}


def test_accumulation_over_batches_is_refused_in_long_context(tmp_path):
    with pytest.raises(ValueError, match="model.accum_steps"):
        fit(tmp_path, [6], trainer={"accumulate_grad_batches": 2}, **LONG)


@pytest.mark.parametrize(
    "views, size, trained, want",
    [
        (12, 2, 4, [(0, 2, False), (2, 4, False), (4, 6, True), (6, 8, True), (8, 10, True), (10, 12, True)]),
        (5, 4, 4, [(0, 4, True), (4, 5, True)]),
        (4, 4, 1, [(0, 4, True)]),
    ],
)
def test_chunks(views, size, trained, want):
    assert chunks_of(views, size, trained) == want


# Two processes


def on_a_rank(root: Path, views: list[int], *callbacks: Callback, **arguments: Any) -> dict[str, Tensor]:
    settings = {
        "devices": 2,
        "strategy": "ddp_find_unused_parameters_true",
        "plugins": [TorchElasticEnvironment()],
    }
    return weights(fit(root, views, *callbacks, scenes=4, trainer=settings, **arguments))


def ddp_runs(rank: int, folder: str) -> dict[str, Any]:
    root = Path(folder)
    frozen = StagedFreezing({0: FROZEN})
    return {
        "plain": on_a_rank(root, [4, 3]),
        "long": on_a_rank(root, VIEWS, frozen, FiniteGuard(), **LONG),
        "parts": on_a_rank(root, VIEWS, StagedFreezing({0: FROZEN}), **LONG, accum_steps=2),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(ddp_runs, str(tmp_path_factory.mktemp("ranks")))


@pytest.mark.parametrize("kind", ["plain", "long", "parts"])
def test_two_ranks_stay_identical_and_equal_one_process_with_both_batches(kind, ranks, tmp_path):
    assert not differing(ranks[0][kind], ranks[1][kind])
    settings = {"plain": ([4, 3], (), {}), "long": (VIEWS, (StagedFreezing({0: FROZEN}),), LONG)}
    views, callbacks, arguments = settings["plain" if kind == "plain" else "long"]
    alone = fit(tmp_path, views, *callbacks, scenes=4, **arguments)
    assert not beyond_rounding(ranks[0][kind], weights(alone))
    assert differing(ranks[0][kind], weights(tiny_module()))


# Evaluation


def test_a_test_reports_baselines_and_shorter_sequences(tmp_path):
    module = tiny_module(test_untrained=True, test_lengths=[3, 40], test_points=200)
    (logged,) = toy_trainer(tmp_path).test(module, datamodule=SceneData([6]), verbose=False)
    for name in (
        "ate",
        "rpe_rotation",
        "abs_rel_scale_shift",
        "abs_rel_frame",
        "accuracy",
        "normal_consistency",
        "loss",
    ):
        for suffix in ("", "_untrained", "_trivial"):
            assert torch.tensor(logged[f"test/{name}{suffix}"]).isfinite(), name
        assert f"test/3_views/{name}" in logged
        assert f"test/40_views/{name}" not in logged
    assert logged["test/3_views/ate"] != logged["test/ate"]


def test_what_is_said_of_the_first_views_does_not_depend_on_later_ones():
    module, batch = tiny_module().eval(), random_batch(0, views=6)
    with torch.no_grad():
        whole, part = module(batch.images), module(batch.images[:, :3])
    for a, b in zip(whole, part, strict=True):
        torch.testing.assert_close(a[:, :3], b, atol=1e-5, rtol=1e-4)


def test_perfect_predictions_have_no_error():
    batch = random_batch(3)
    targets = batch_targets(batch, torch.zeros(2, dtype=torch.bool))
    perfect = trivial_predictions(batch)._replace(
        points_camera=targets.points_camera, points_world=targets.points_world, poses=encode_pose(targets.poses)
    )
    losses = recurrent_loss(perfect, targets, color_weight=0.0)
    assert float(losses["loss"]) == pytest.approx(0, abs=1e-5)
    assert float(recurrent_loss(trivial_predictions(batch), targets)["loss"]) > 0.5


def test_padding_rows_do_not_count(tmp_path):
    module, batch = tiny_module(), random_batch(0, scenes=3)
    padded = batch._replace(valid=torch.tensor([True, True, False]))
    values = []
    for given in (padded, rows(batch, 0, 2)):
        module.metrics["val"].reset()
        with torch.no_grad():
            module.validation_step(given, 0)
        values.append(module.metrics["val"].compute())
    assert {n for n in values[0] if not torch.equal(values[0][n], values[1][n])} == set()


def test_images_of_another_range_are_refused(tmp_path):
    data = SceneData([4])
    data.mean = (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="data.mean"):
        toy_trainer(tmp_path).fit(tiny_module(), datamodule=data)


@torch.no_grad()
def test_a_prediction_has_cameras_in_the_projects_conventions():
    module, batch = tiny_module().eval(), random_batch(0, views=3)
    said = module.predict_step(batch, 0)
    assert said["world_to_camera"].shape == (2, 3, 3, 4) and said["intrinsics"].shape == (2, 3, 3, 3)
    assert torch.equal(said["intrinsics"][..., :2, 2], torch.tensor([16.0, 16.0]).expand(2, 3, 2))
    torch.testing.assert_close(encode_pose(invert_se3(said["world_to_camera"])), said["poses"], atol=1e-4, rtol=1e-4)
