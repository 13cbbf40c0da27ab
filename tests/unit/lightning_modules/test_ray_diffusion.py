"""DiffusionSfM's module: noise by seed, faithful clipping, start weights, validation, a test that goes on."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import timm
import torch
from lightning.pytorch import LightningDataModule
from torch.nn import functional as F

from callbacks import LogRays
from lightning_modules import RayDiffusionModule
from lightning_modules.ray_diffusion import coords_of, load_encoder, targets_of
from lightning_modules.ray_scores import SceneScores, fingerprint, first_views, score_scenes
from parity_tools import fill_
from restrike.data.samples import MultiViewBatch
from restrike.losses import ray_loss
from restrike.metrics.multiview import trivial_cameras
from restrike.metrics.pose_table import SceneScore
from tiny_diffusionsfm import SIZES, tiny_diffusionsfm, toy_views
from training_tools import differing, toy_trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*")


class Loader:
    """A list that Lightning takes for one loader, not for several."""

    def __init__(self, *batches: MultiViewBatch) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


class Scenes(LightningDataModule):
    """Two training batches; one evaluation batch whose last row is padding."""

    batch_size_per_device = 2
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self, depth_size: int = 4) -> None:
        super().__init__()
        self.depth_size = depth_size
        self.scene_scales = {"apple/0": 1.0}

    def train_dataloader(self) -> Loader:
        return Loader(*(toy_views(depth_size=self.depth_size, seed=seed) for seed in (1, 2)))

    def val_dataloader(self) -> Loader:
        batch = toy_views(batch=3, depth_size=self.depth_size, seed=9)
        keys = ["apple/0", "ball/1", ""]
        return Loader(batch._replace(valid=torch.tensor([True, True, False]), keys=keys))

    def test_dataloader(self) -> Loader:
        batch = toy_views(batch=3, depth_size=14, seed=9)
        keys = ["apple/0#0", "ball/1#0", ""]
        return Loader(batch._replace(valid=torch.tensor([True, True, False]), keys=keys))


def module(name: str = "diffusionsfm_sparse", **arguments: Any) -> RayDiffusionModule:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "optimizer": "adam",
        "weight_decay": 0.0,
        "schedule": "constant",
        "num_steps": 10,
        "evaluate": "raw",
        "test_views": (2, 3),
    }
    return RayDiffusionModule(name, SIZES, **{**settings, **arguments})


def test_a_step_is_the_papers_algorithm_with_noise_that_the_batch_names():
    made, batch = module(), toy_views()
    rays, mask = targets_of(batch).rays, batch.valid_depth
    generator = torch.Generator().manual_seed(batch.seed)
    times = torch.randint(100, (2,), generator=generator)
    noise = torch.randn(rays.shape, generator=generator)
    kept = made.net.noise_scheduler.alphas_cumprod[times].view(2, 1, 1, 1, 1)
    noisy = (kept.sqrt() * rays + (1 - kept).sqrt() * noise) * mask[:, :, None]
    predicted = made.net(batch.images, noisy, coords_of(batch, 4), times, mask.float())
    want = (((predicted - rays) * mask[:, :, None]) ** 2).sum() / rays.numel()
    loss = made.diffusion_loss(made.net, batch, targets_of(batch), batch.seed)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(loss, ray_loss(predicted, rays, mask))
    assert made.diffusion_loss(made.net, batch, targets_of(batch), 5) != loss


@pytest.mark.parametrize("name", ["diffusionsfm_sparse", "diffusionsfm_dense"])
def test_a_fit_trains_and_validates_cameras(name, tmp_path):
    made = module(name)
    before, size = weights(made.net), made.net.map_size
    trainer = toy_trainer(tmp_path, max_epochs=1, callbacks=[LogRays(num_scenes=5, tile=32)])
    trainer.fit(made, Scenes(size))
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    names = {"val/rra@15", "val/center_acc@0.1", "val/loss", "val/rra@15_trivial", "train/loss", "train/grad_norm"}
    assert names <= metrics.keys() and all(map(math.isfinite, metrics.values()))
    assert "scratch.input_conv.weight" in differing(before, weights(made.net))
    files = sorted(path.name for path in (tmp_path / "rays").iterdir())
    assert files == ["step_0000002_apple_0.png", "step_0000002_ball_1.png"]  # the padding row has no picture


def test_faithful_clipping_sees_gradients_that_the_loss_scale_enlarged(tmp_path):
    norms = {}
    for clipping in ("clean", "faithful"):
        made = module(clipping=clipping, loss_scale_restart=1)
        seen = norms[clipping] = []
        made.on_before_zero_grad = lambda optimizer, made=made, seen=seen: seen.append(  # type: ignore[method-assign]
            math.sqrt(sum(float(p.grad.square().sum()) for p in made.parameters() if p.grad is not None))
        )
        trainer = toy_trainer(tmp_path, max_epochs=1, gradient_clip_val=0.01, limit_val_batches=0)
        trainer.fit(made, Scenes())
        if clipping == "faithful":
            assert float(trainer.callback_metrics["train/loss_scale"]) == 65536
            assert made.loss_scale.good_steps == 1  # it began anew at the second step
    assert [norm for norm in norms["clean"] if norm] == pytest.approx([0.01], rel=1e-3)
    assert [norm for norm in norms["faithful"] if norm] == pytest.approx([0.01 / 65536], rel=1e-3)


def test_the_loss_scale_is_in_the_checkpoint(tmp_path):
    made = module(clipping="faithful")
    trainer = toy_trainer(tmp_path, max_epochs=1, gradient_clip_val=1.0, limit_val_batches=0)
    trainer.fit(made, Scenes())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    other = module(clipping="faithful")
    toy_trainer(tmp_path, max_epochs=1, gradient_clip_val=1.0, limit_val_batches=0).fit(
        other, Scenes(), ckpt_path=tmp_path / "run.ckpt", weights_only=True
    )
    assert made.loss_scale.good_steps == 2 and other.loss_scale.good_steps == 2


def test_the_encoder_takes_timms_weights_and_refuses_others(tmp_path):
    full = {**SIZES, "encoder_dim": 384, "encoder_depth": 12, "encoder_num_heads": 6, "encoder_taps": (5, 11)}
    net = tiny_diffusionsfm(**full)
    theirs = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    torch.save(theirs.state_dict(), tmp_path / "dinov2.pth")
    load_encoder(net, str(tmp_path / "dinov2.pth"))
    images = torch.randn(1, 3, 518, 518)
    with torch.no_grad():
        got, want = net.feature_extractor.model(images), theirs.eval().forward_features(images)[:, 1:]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    state = theirs.state_dict()
    del state["blocks.3.ls1.gamma"]
    torch.save(state, tmp_path / "broken.pth")
    with pytest.raises(ValueError, match="not DINOv2 ViT-S/14.*blocks.3.ls1.gamma"):
        load_encoder(net, str(tmp_path / "broken.pth"))


def test_a_dense_model_starts_from_a_sparse_run(tmp_path):
    sparse = module()
    trainer = toy_trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    trainer.fit(sparse, Scenes())
    trainer.save_checkpoint(tmp_path / "sparse.ckpt")
    dense = module("diffusionsfm_dense", sparse_pretrained=str(tmp_path / "sparse.ckpt"))
    ours, theirs = dense.net.state_dict(), sparse.net.state_dict()
    same = [key for key in theirs if key.startswith(("ray_predictor.", "feature_extractor."))]
    assert all(torch.equal(ours[key], theirs[key]) for key in same)
    folded = ours["scratch.input_conv.weight"].sum((2, 3))
    torch.testing.assert_close(folded, theirs["scratch.input_conv.weight"], atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="sparse_pretrained is for diffusionsfm_dense"):
        module(sparse_pretrained=str(tmp_path / "sparse.ckpt"))
    with pytest.raises(ValueError, match="is of another model; ray_predictor.x_embedder.proj.weight differs"):
        RayDiffusionModule(
            "diffusionsfm_dense", {**SIZES, "hidden_size": 64}, sparse_pretrained=str(tmp_path / "sparse.ckpt")
        )


def test_a_test_scores_each_scene_once_and_goes_on_where_it_stopped(tmp_path, capsys):
    made = module()
    calls = []
    made.net.ray_predictor.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    toy_trainer(tmp_path).test(made, Scenes(), verbose=False)
    text = capsys.readouterr().out
    assert "| seen R@15 |" in text and "| unseen CD_Obj |" in text and "N = 2 | N = 3" in text
    assert len(calls) == 2  # one call of ten, for two and for three views
    (folder,) = (tmp_path / "test").iterdir()
    lines = [json.loads(line) for line in (folder / "scenes_0.jsonl").read_text().splitlines() if line]
    assert [line["key"] for line in lines] == ["apple/0#0", "ball/1#0"]
    # A killed test leaves one scene and half a line.
    (folder / "scenes_0.jsonl").write_text(json.dumps(lines[0]) + "\n" + '{"key": "ball/1#0", "sco')
    toy_trainer(tmp_path).test(made, Scenes(), verbose=False)
    again = [json.loads(line) for line in (folder / "scenes_0.jsonl").read_text().splitlines() if line.endswith("}")]
    assert len(calls) == 4 and capsys.readouterr().out.count("R@15") >= 2
    assert [line["key"] for line in again] == ["apple/0#0", "ball/1#0"] and again[1]["scores"] == lines[1]["scores"]
    with torch.no_grad():
        next(made.net.parameters()).add_(1)
    toy_trainer(tmp_path).test(made, Scenes(), verbose=False)
    assert len(list((tmp_path / "test").iterdir())) == 2  # other weights, other scores


def test_a_test_prints_the_same_table_of_baselines(tmp_path, capsys):
    scenes = Scenes()
    scenes.mean_motion = trivial_cameras(torch.empty(3, 3, 4))
    made = module(test_untrained=True, test_other_images=True)
    fill_(made.net)  # as if trained
    trainer = toy_trainer(tmp_path)
    trainer.test(made, scenes, verbose=False)
    text = capsys.readouterr().out
    assert text.count("| seen R@15 |") == 4
    for title in ("Random weights:", "on another scene's images:", "mean motion of the training sequences"):
        assert title in text
    values = {key: float(value) for key, value in trainer.callback_metrics.items()}
    distances = [values[f"test/seen/chamfer_n3{suffix}"] for suffix in ("", "_untrained", "_other_images")]
    assert len(set(distances)) == 3 and all(map(math.isfinite, distances))
    assert math.isnan(values["test/seen/chamfer_n3_mean_motion"])  # it says nothing of surfaces
    assert 0 <= values["test/seen/rra@15_n3_mean_motion"] <= 1
    assert len(list((tmp_path / "test").iterdir())) == 4


def test_true_rays_score_as_perfect():
    made, batch = module(), toy_views(depth_size=16)
    rays = targets_of(batch).rays
    fine = batch._replace(
        depth=batch.depth.repeat_interleave(2, -1).repeat_interleave(2, -2),
        valid_depth=batch.valid_depth.repeat_interleave(2, -1).repeat_interleave(2, -2),
        foreground=batch.foreground.repeat_interleave(2, -1).repeat_interleave(2, -2),
    )
    scores = score_scenes(fine, rays, made.cameras(rays, batch).world_to_camera, {})
    assert [(s.category, s.sequence, s.views) for s in scores] == [("apple", "0", 3), ("apple", "1", 3)]
    assert all(s.rra == s.center_acc == 1 and s.chamfer < 0.01 for s in scores)
    pair = first_views(fine, 2)
    assert pair.images.shape[1] == pair.depth.shape[1] == 2
    lost = F.normalize(torch.randn(rays.shape).unflatten(2, (2, 4)), dim=3).flatten(2, 3)
    assert score_scenes(pair, lost[:, :2], made.cameras(lost[:, :2], pair).world_to_camera, {})[0].chamfer > 0.05


def test_scores_of_all_ranks_are_read_and_kept_apart_by_settings(tmp_path, capsys):
    row = SceneScore("apple", "0", 0, 2, 1.0, 1.0, 0.1, 0.2)
    first, second = (SceneScores(tmp_path, {"weights": "a"}, rank) for rank in (0, 1))
    first.add(["apple/0#0"], [[row]])
    second.add(["apple/1#0"], [[row._replace(sequence="1", rra=0.0)]])
    assert SceneScores(tmp_path, {"weights": "a"}, 3).has("apple/1#0")
    assert not SceneScores(tmp_path, {"weights": "b"}, 0).has("apple/1#0")
    values = first.summarize(is_writer=True)
    assert values["seen/rra@15_n2"] == 0.5 and values["seen/chamfer_object_n2"] == 0.2
    assert (first.folder / "table.md").read_text().strip() in capsys.readouterr().out
    assert fingerprint(tiny_diffusionsfm()) == fingerprint(tiny_diffusionsfm())
