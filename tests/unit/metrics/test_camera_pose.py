"""Pose metrics: recorded numbers of the three families, and what must not matter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distributed import run_ranks
from multiview_cases import move_world, random_scene, random_similarity
from parity_tools import load_case, normal, relative_error
from restrike import geometry as g
from restrike.metrics import reconstruction
from restrike.metrics.camera_pose import (
    CameraCenterAccuracy,
    PoseAccuracy,
    TrajectoryError,
    camera_scene_scale,
    center_errors,
    pairwise_pose_errors,
    trajectory_errors,
)

seeds = st.integers(0, 10**6)


def cameras_and_guess(seed: int, views: int = 5, batch: int = 4, noise: float = 0.1) -> tuple[Tensor, Tensor]:
    true = random_scene(seed, views, batch).world_to_camera
    generator = torch.Generator().manual_seed(seed)
    turn, shift = noise * torch.randn(2, batch, views, 3, generator=generator, dtype=torch.float64)
    return g.compose_se3(g.make_se3(g.axis_angle_to_matrix(turn), shift), true), true


@pytest.mark.parametrize(("variant", "relative"), [("A", "released"), ("B", "camera")])
def test_vggts_recorded_pair_errors_and_auc_match(variant: str, relative: str) -> None:
    _, want = load_case("vggt", "pose_metrics")
    quaternion, shift = normal("pm-vis-q", 8, 4), normal("pm-vis-t", 8, 3)
    true = g.make_se3(g.quaternion_to_matrix(quaternion, "xyzw"), shift)
    quaternion, shift = quaternion + 0.02 * normal("pm-vis-dq", 8, 4), shift + 0.03 * normal("pm-vis-dt", 8, 3)
    predicted = g.make_se3(g.quaternion_to_matrix(quaternion, "xyzw"), shift)
    errors = pairwise_pose_errors(predicted, true, relative)  # type: ignore[arg-type]
    assert relative_error(torch.rad2deg(errors.rotation), want[f"rot_deg_{variant}"]) < 1e-5
    assert relative_error(torch.rad2deg(errors.translation), want[f"trans_deg_{variant}"]) < 1e-5
    metric = PoseAccuracy(auc=(3, 5, 15, 30), relative=relative)  # type: ignore[arg-type]
    metric.update(predicted[None], true[None])
    result = metric.compute()
    for threshold in (3, 5, 15, 30):
        assert relative_error(result[f"auc@{threshold}"], want[f"auc{threshold}_{variant}"]) < 1e-6


@pytest.mark.parametrize("n", range(2, 9))
def test_diffusionsfms_recorded_rotation_and_centre_accuracies_match(n: int) -> None:
    meta, want = load_case("diffusionsfm", "pose_metrics")

    def cameras(name: str) -> Tensor:
        r, t = (torch.from_numpy(want[f"in_{x}_{name}"]).reshape(meta["shapes"][f"in_{x}_{name}"]) for x in "RT")
        return g.from_pytorch3d_pose(r, t)

    predicted, true, scale = cameras("pred")[:n], cameras("gt")[:n], camera_scene_scale(cameras("all"))
    assert relative_error(scale, want["scene_scale"]) < 1e-6
    rotation = torch.zeros(n, n, dtype=torch.float64)
    rotation[tuple(torch.triu_indices(n, n, offset=1))] = pairwise_pose_errors(predicted, true).rotation
    ordered = (rotation + rotation.mT)[~torch.eye(n, dtype=torch.bool)]  # recorded: both orders of each pair
    assert relative_error(torch.rad2deg(ordered), want[f"R_err_{n}"]) < 1e-5
    centers = center_errors(predicted, true, scale)
    if n == 2:
        assert (centers < 1e-9).all()  # two centres always align
    else:
        assert relative_error(centers, want[f"CC_err_{n}"]) < 1e-5
    pose, center = PoseAccuracy(average="sequence"), CameraCenterAccuracy()
    pose.update(predicted[None], true[None])
    center.update(predicted[None], true[None], scale[None])
    got = torch.stack([pose.compute()["rra@15"], *center.compute().values()])
    assert relative_error(got, want[f"acc_{n}"]) < 1e-6


@pytest.mark.parametrize("i", range(2))
def test_cut3rs_recorded_trajectory_errors_match(i: int) -> None:
    meta, want = load_case("cut3r", "eval_relpose")
    tag, n = f"cut3r/er/{i}", meta["lengths"][i]

    def draw(name: str) -> Tensor:
        return normal(f"{tag}/{name}", n, 3).double()

    position = (0.2 * draw("dt") + torch.tensor([0.3, 0.05, -0.1], dtype=torch.float64)).cumsum(0)
    rotation = g.axis_angle_to_matrix((0.1 * draw("da")).cumsum(0))
    noisy = g.multiply(g.axis_angle_to_matrix(0.02 * draw("rn")), rotation)
    turn = g.axis_angle_to_matrix(torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64))
    shift = torch.tensor([4, -2, 1], dtype=torch.float64)
    predicted = g.make_se3(g.multiply(turn, noisy), g.rotate(turn, 0.37 * (position + 0.05 * draw("n"))) + shift)
    true = g.make_se3(rotation, position)
    metric = TrajectoryError()
    metric.update(predicted[None], true[None])
    got = torch.stack(list(metric.compute().values()))
    assert relative_error(got, want[f"{i}.ate_rpet_rper"]) < 1e-6


def test_perfect_cameras_score_one_and_random_ones_do_not() -> None:
    true = random_scene(0, views=6, batch=5).world_to_camera
    for guess, low, high in ((true, 1.0, 1.0), (random_scene(1, views=6, batch=5).world_to_camera, 0.0, 0.5)):
        pose, center = PoseAccuracy(), CameraCenterAccuracy(thresholds=(0.1,))
        pose.update(guess, true)
        center.update(guess, true)
        for name, value in (pose.compute() | center.compute()).items():
            assert low <= value <= high, name


@given(seeds)
def test_world_and_unit_of_the_prediction_do_not_matter(seed: int) -> None:
    predicted, true = cameras_and_guess(seed)
    moved = move_world(predicted, random_similarity(seed, 4))
    for got, want in zip(pairwise_pose_errors(moved, true), pairwise_pose_errors(predicted, true), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(center_errors(moved, true), center_errors(predicted, true))
    a, b = (trajectory_errors(g.invert_se3(x), g.invert_se3(true)) for x in (moved, predicted))
    for got, want in zip(a, b, strict=True):
        torch.testing.assert_close(got, want)


@given(seeds)
def test_the_released_relative_pose_depends_on_the_first_camera_and_ours_on_no_order(seed: int) -> None:
    predicted, true = cameras_and_guess(seed)
    order = torch.tensor([3, 1, 4, 0, 2])

    def angles(relative: str) -> tuple[Tensor, Tensor]:
        a = pairwise_pose_errors(predicted, true, relative).translation  # type: ignore[arg-type]
        b = pairwise_pose_errors(predicted[:, order], true[:, order], relative).translation  # type: ignore[arg-type]
        return a.sort(-1).values, b.sort(-1).values

    rotations = [
        pairwise_pose_errors(p, t).rotation.sort(-1).values
        for p, t in ((predicted, true), (predicted[:, order], true[:, order]))
    ]
    torch.testing.assert_close(*rotations, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(*angles("released"), atol=1e-3)


def test_the_sign_of_a_baseline_is_not_held_against_the_prediction() -> None:
    predicted, true = cameras_and_guess(0)
    mirrored = g.make_se3(predicted[..., :3], -predicted[..., 3])
    want = pairwise_pose_errors(predicted, true).translation
    torch.testing.assert_close(pairwise_pose_errors(mirrored, true).translation, want)


def test_accuracies_are_shares_of_pairs_and_areas_their_means() -> None:
    predicted, true = cameras_and_guess(3, noise=0.3)
    metric = PoseAccuracy(rra=(7,), rta=(11,), maa=(20,), auc=(20,))
    metric.update(predicted, true)
    got = metric.compute()
    rotation, translation = (torch.rad2deg(x).flatten() for x in pairwise_pose_errors(predicted, true))
    steps = range(1, 21)
    both = torch.maximum(rotation, translation)
    want = {
        "rra@7": (rotation < 7).double().mean(),
        "rta@11": (translation < 11).double().mean(),
        "maa@20": sum(min((rotation < t).double().mean(), (translation < t).double().mean()) for t in steps) / 20,
        "auc@20": sum((both < t).double().mean() for t in steps) / 20,
    }
    assert 0 < want["auc@20"] < want["maa@20"] < 1
    torch.testing.assert_close(got, want)


def test_sequences_weigh_alike_or_pairs_do() -> None:
    good, bad = random_scene(0, views=3, batch=1).world_to_camera, cameras_and_guess(1, views=6, batch=1, noise=3.0)
    for average, weights in (("pair", (3, 15)), ("sequence", (1, 1))):
        metric = PoseAccuracy(rra=(15,), average=average)  # type: ignore[arg-type]
        metric.update(good, good)
        metric.update(*bad)
        share = (torch.rad2deg(pairwise_pose_errors(*bad).rotation) < 15).double().mean()
        want = (weights[0] + weights[1] * share) / sum(weights)
        torch.testing.assert_close(metric.compute()["rra@15"], want)


def test_groups_weigh_alike_unseen_ones_not_at_all_and_padding_never() -> None:
    predicted, true = cameras_and_guess(0, noise=0.4)
    names = ["apple", "apple", "bench", "bench"]
    metric = PoseAccuracy(groups=["apple", "bench", "car"])
    center = CameraCenterAccuracy(groups=["apple", "bench", "car"])
    valid = torch.tensor([True, True, True, False])
    metric.update(predicted, true, names, valid)
    center.update(predicted, true, group=names, valid=valid)
    for whole, part in ((metric, PoseAccuracy), (center, CameraCenterAccuracy)):
        results = []
        for rows in ([0, 1], [2]):
            one = part()
            one.update(predicted[rows], true[rows])
            results.append(one.compute())
        for name, value in whole.compute().items():
            torch.testing.assert_close(value, (results[0][name] + results[1][name]) / 2)
    assert metric.compute_groups()["auc@30"][2].isnan()


def test_a_diverged_view_counts_as_wrong_and_not_as_missing() -> None:
    predicted, true = cameras_and_guess(0, views=3, batch=1, noise=0.0)
    predicted[0, 1] = torch.nan
    pose, center = PoseAccuracy(rra=(15,)), CameraCenterAccuracy(thresholds=(0.1,))
    pose.update(predicted, true)
    center.update(predicted, true)
    torch.testing.assert_close(pose.compute()["rra@15"], torch.tensor(1 / 3, dtype=torch.float64))
    assert center.compute()["center_acc@0.1"] == 0


def test_float32_cameras_are_scored_in_float64() -> None:
    predicted, true = (x.float() for x in cameras_and_guess(0))
    assert pairwise_pose_errors(predicted, true).rotation.dtype == torch.float64
    assert center_errors(predicted, true).dtype == torch.float64


def test_mistakes_of_the_caller_are_named() -> None:
    predicted, true = cameras_and_guess(0)
    with pytest.raises(ValueError, match="V >= 2"):
        pairwise_pose_errors(predicted[:, :1], true[:, :1])
    with pytest.raises(ValueError, match="whole degrees from 1 to 180"):
        PoseAccuracy(auc=(2.5,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\['pear'\] not among"):
        PoseAccuracy(groups=["apple"]).update(predicted, true, ["pear"] * 4)
    with pytest.raises(ValueError, match="without groups"):
        PoseAccuracy().update(predicted, true, ["pear"] * 4)
    with pytest.raises(ValueError, match="expected 4 names"):
        PoseAccuracy(groups=["apple"]).update(predicted, true)
    with pytest.raises(ValueError, match="'camera' or 'released'"):
        pairwise_pose_errors(predicted, true, "world")  # type: ignore[arg-type]


def score(rank: int, predicted: Tensor, true: Tensor, world_size: int) -> dict[str, Tensor]:
    """Every metric whose states differ in kind, over this rank's scenes; rank 1 has one scene of four."""
    if world_size > 1:
        torch.distributed.init_process_group("gloo")
    rows = [0, 1, 2, 3] if world_size == 1 else [[0, 1, 2], [3]][rank]
    names = ["apple", "bench", "apple", "bench"]
    pose, center, track = PoseAccuracy(groups=["apple", "bench"]), CameraCenterAccuracy(), TrajectoryError()
    chamfer, empty = reconstruction.Chamfer(groups=["apple", "bench"]), reconstruction.Chamfer()
    points = (predicted[..., 3], true[..., 3])
    for row in rows:
        one = slice(row, row + 1)
        pose.update(predicted[one], true[one], names[one])
        center.update(predicted[one], true[one])
        track.update(g.invert_se3(predicted[one]), g.invert_se3(true[one]))
        mask = torch.ones(1, true.shape[1], dtype=torch.bool)
        chamfer.update(points[0][one], points[1][one], mask, names[one])
        if row < 3:  # so that rank 1 has nothing
            empty.update(points[0][one], points[1][one], mask)
    result = pose.compute() | center.compute() | track.compute() | chamfer.compute()
    return result | {"chamfer of three": empty.compute()["chamfer"]}


def test_two_ranks_with_uneven_scenes_score_like_one() -> None:
    predicted, true = cameras_and_guess(0, noise=0.3)
    alone = score(0, predicted, true, 1)
    for result in run_ranks(score, predicted, true, 2):
        torch.testing.assert_close(result, alone, rtol=1e-12, atol=0)
