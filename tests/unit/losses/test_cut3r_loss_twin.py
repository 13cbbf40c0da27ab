"""The objective against a slow twin written from its definition, sample by sample and view by view, over all flags."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from cut3r_cases import recorded_predictions, recorded_targets
from restrike.geometry import encode_pose
from restrike.losses.recurrent import RecurrentTargets, recurrent_loss
from restrike.models.cut3r import Predictions

FLAGS = ("is_metric", "is_camera_only", "is_single_view", "is_depth_only")
# A sample of cameras alone has no relative depth: all of its depths are 1.
KINDS = [row for row in itertools.product([False, True], repeat=4) if not (row[1] and row[3])]


def drawn(samples: int, views: int = 3) -> tuple[Predictions, RecurrentTargets]:
    meta = {"tag": "twin", "V": views, "B": samples, "H": 5, "W": 6, "flags": {"metric": [False] * samples}}
    return Predictions(*(x.detach() for x in recorded_predictions(meta))), recorded_targets(meta)


def unit(points: list[Tensor], valid: list[Tensor], confidence: list[Tensor]) -> Tensor:
    weights = torch.cat([c[m].log().clamp(min=1e-3) for c, m in zip(confidence, valid, strict=True)]).detach()
    lengths = torch.cat([p[m].norm(dim=-1) for p, m in zip(points, valid, strict=True)])
    return ((weights * lengths).sum() / (weights.sum() + 1e-8)).clamp(min=1e-3)


def twin(p: Predictions, t: RecurrentTargets, is_mixed: bool, released_pose_mask: bool) -> Tensor:
    samples, views = t.valid.shape[:2]
    true_pose, terms, shifts, turns = encode_pose(t.poses), {}, [], []
    for b in range(samples):
        metric, camera, single, relative = (bool(getattr(t, name)[b]) for name in FLAGS)
        valid = [t.valid[b, v] for v in range(views)]
        confidence = [x[b, v] for x in (p.confidence_camera, p.confidence_world) for v in range(views)]
        true = [x[b, v] for x in (t.points_camera, t.points_world) for v in range(views)]
        own = [x[b, v] for x in (p.points_camera, p.points_world) for v in range(views)]
        true_unit, own_unit = (unit(x, valid * 2, confidence) for x in (true, own))
        own_unit = true_unit if metric else own_unit
        true_shift, own_shift = true_unit, own_unit
        if camera:
            true_shift, own_shift = (x[b, :, :3].norm(dim=-1).mean() for x in (true_pose, p.poses))
            own_shift = true_shift if metric else own_shift
        for v in range(views):
            for frame, i in (("camera", v), ("world", views + v)):
                if frame == "world" and camera:
                    continue
                a, c = own[i] / own_unit, true[i] / true_unit
                if camera:
                    a, c = ((x / x[..., 2:].clamp(min=1e-6)).clamp(-2, 2) for x in (a, c))
                used, sky = t.valid[b, v] | t.sky[b, v], t.sky[b, v]
                a, c, sky, trust = a[used], c[used], sky[used], confidence[i][used]
                if is_mixed and relative:
                    a, c = (x[:, 2] - x[:, 2].mean() for x in (a, c))
                    distance = (a / a.abs().mean() - c / c.abs().mean()).abs()
                elif is_mixed and single and not metric:
                    distance = (a / a.norm(dim=-1).mean() - c / c.norm(dim=-1).mean()).norm(dim=-1)
                else:
                    distance = (a - c).norm(dim=-1)
                distance = torch.where(sky, 2.0, distance)
                terms.setdefault((frame, v), []).append(distance * trust - 0.2 * trust.log())
        for v in range(views):
            seen = t.image_mask[b, -1 if released_pose_mask else v] if is_mixed else True
            if true_shift > 1e-3 and own_shift > 1e-3 and seen:
                shifts.append((p.poses[b, v, :3] / own_shift - true_pose[b, v, :3] / true_shift).norm())
                turns.append((p.poses[b, v, 3:] - true_pose[b, v, 3:]).norm())
    points = sum(torch.cat(terms[key]).mean() for key in terms) / (2 * views)
    pose = (torch.stack(shifts).mean() + torch.stack(turns).mean()) if shifts else 0.0
    color = torch.stack([(p.colors[:, v] - t.images[:, v].movedim(1, -1)).square().mean() for v in range(views)]).mean()
    return 2 * points + pose + color


def flagged(t: RecurrentTargets, rows: list[tuple[bool, ...]]) -> RecurrentTargets:
    return t._replace(
        **{name: torch.tensor(column) for name, column in zip(FLAGS, zip(*rows, strict=True), strict=True)}
    )


def compare(p: Predictions, t: RecurrentTargets, **how: bool) -> None:
    inputs = Predictions(*(x.clone().requires_grad_() for x in p))
    others = Predictions(*(x.clone().requires_grad_() for x in p))
    got, want = recurrent_loss(inputs, t, **how)["loss"], twin(others, t, **how)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(got, inputs), torch.autograd.grad(want, others, allow_unused=True)
    for name, a, b in zip(p._fields, *gradients, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("is_mixed", [True, False])
@pytest.mark.parametrize("released_pose_mask", [True, False])
def test_all_flags_side_by_side(is_mixed, released_pose_mask):
    """Every combination of the four flags is a sample, so each meets the others in the pooled means."""
    p, t = drawn(len(KINDS))
    mask = torch.rand(len(KINDS), 3, generator=torch.Generator().manual_seed(0)) < 0.7
    compare(p, flagged(t, KINDS)._replace(image_mask=mask), is_mixed=is_mixed, released_pose_mask=released_pose_mask)


@pytest.mark.parametrize("row", KINDS)
def test_a_single_sample_of_each_kind(row):
    p, t = drawn(1, views=2)
    compare(p, flagged(t, [row]), is_mixed=True, released_pose_mask=False)


def test_one_view_and_frames_without_a_pixel():
    p, t = drawn(2, views=1)
    compare(p, t, is_mixed=True, released_pose_mask=False)
    p, t = drawn(2)
    t.valid[0, 1] = t.sky[0, 1] = False
    compare(p, t, is_mixed=False, released_pose_mask=False)


@pytest.mark.parametrize("metric", [False, True])
def test_a_camera_that_does_not_move_has_finite_gradients(metric):
    """The unit of a sample without depth is the mean path of its camera: zero here, so its pose does not count."""
    p, t = drawn(2)
    still = t._replace(poses=torch.eye(3, 4).expand_as(t.poses), points_world=t.points_camera)
    still = flagged(still, [(metric, True, False, False), (False, False, False, False)])
    for poses in (p.poses, torch.cat([torch.zeros_like(p.poses[..., :3]), p.poses[..., 3:]], dim=-1)):
        inputs = Predictions(*(x.clone().requires_grad_() for x in p._replace(poses=poses)))
        loss = recurrent_loss(inputs, still)["loss"]
        assert loss.isfinite()
        assert all(x.isfinite().all() for x in torch.autograd.grad(loss, inputs))


def test_a_sample_without_any_pixel_does_not_spoil_the_others():
    p, t = drawn(2)
    t.valid[0] = t.sky[0] = False
    inputs = Predictions(*(x.clone().requires_grad_() for x in p))
    loss = recurrent_loss(inputs, t)["loss"]
    gradients = torch.autograd.grad(loss, inputs)
    assert loss.isfinite() and all(x.isfinite().all() for x in gradients)
    assert not gradients[0][0].any() and not gradients[5][0].any()
