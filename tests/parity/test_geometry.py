"""Recorded cases of VGGT, CUT3R and DiffusionSfM that are geometry alone."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from multiview_cases import cut3r_poses, cut3r_views
from parity_tools import image, load_case, normal, relative_error
from restrike import geometry as g

TIGHT = 1e-5  # README tolerance for float32 re-implementations of these cases
TOLERANCE = 1e-4
SOLVER_TOLERANCE = {"hom_R": 1e-3, "hom_T": 1e-3, "hom_f": 1e-3, "hom_pp": 5e-3}  # OpenCV refines, says the README


def check(outputs: dict[str, np.ndarray], tolerance: float, **got: Tensor) -> None:
    errors = {name: relative_error(value, outputs[name]) for name, value in got.items()}
    assert all(error <= tolerance for error in errors.values()), errors


def vggt_cameras(seed: str, *shape: int) -> Tensor:
    rotation = g.quaternion_to_matrix(normal(f"{seed}-q", *shape, 4), "xyzw")
    return g.make_se3(rotation, normal(f"{seed}-t", *shape, 3))


# VGGT


def test_vggt_pose_encoding_and_its_inverse_match() -> None:
    _, want = load_case("vggt", "pose_encoding")
    size = (294, 518)
    cameras = vggt_cameras("pose-vis", 2, 5)
    focal = torch.stack([518 * (1 + 0.2 * normal(f"pose-vis-f{axis}", 2, 5)) for axis in "xy"], dim=-1)
    center = torch.stack([518 / 2 + normal("pose-vis-cx", 2, 5), 294 / 2 + normal("pose-vis-cy", 2, 5)], dim=-1)
    encoding = g.encode_pose_fov(cameras, g.make_intrinsics(focal, center), size)
    cameras_back, intrinsics_back = g.decode_pose_fov(encoding, size)
    raw = torch.cat([normal("pose-vis-raw", 2, 5, 7), normal("pose-vis-fov", 2, 5, 2).relu() + 0.2], dim=-1)
    raw_cameras, raw_intrinsics = g.decode_pose_fov(raw, size)
    diagonals = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    check(
        want,
        TIGHT,
        R=cameras[..., :3],
        encoding=encoding,
        extrinsics_back=cameras_back,
        intrinsics_back=intrinsics_back,
        raw_extrinsics=raw_cameras,
        raw_intrinsics=raw_intrinsics,
        special_quats=g.matrix_to_quaternion(torch.diag_embed(diagonals), "xyzw"),
        inverse_se3=g.homogeneous(g.invert_se3(cameras)).flatten(0, 1),
    )


def test_vggt_unprojection_matches() -> None:
    _, want = load_case("vggt", "unproject")
    depth = torch.exp(0.3 * normal("unp-vis-d", 3, 14, 18))
    depth[:, :2] = 0
    intrinsics = g.make_intrinsics(torch.tensor([1.1 * 18, 1.2 * 18]), torch.tensor([18 / 2 + 1.5, 14 / 2 - 0.5]))
    intrinsics = intrinsics.expand(3, 3, 3)
    to_world = g.invert_se3(vggt_cameras("unp-vis", 3))
    check(
        want,
        TIGHT,
        world_points=g.unproject_depth(depth, intrinsics, to_world, pixel_center=g.OPENCV_PIXEL_CENTER),
        cam_points0=g.unproject_depth(depth, intrinsics, pixel_center=g.OPENCV_PIXEL_CENTER)[0],
        mask0=(depth[0] > 1e-8).float(),
    )


@pytest.mark.parametrize("variant", ["", "_nomask", "_noscale"])
def test_vggt_batch_normalisation_matches(variant: str) -> None:
    _, want = load_case("vggt", "normalize_batch")
    b, s, h, w = 2, 3, 14, 20
    depth = torch.exp(0.4 * image("nb-vis-d", b, s, 3, h, w)[:, :, 0] + 0.02 * normal("nb-vis-dn", b, s, h, w)) * 3
    focal = torch.stack([w * (1 + 0.1 * normal(f"nb-vis-f{axis}", b, s)) for axis in "xy"], dim=-1)
    intrinsics = g.make_intrinsics(focal, torch.tensor([w / 2, h / 2]))
    cameras = vggt_cameras("nb-vis", b, s)
    points = g.unproject_depth(depth, intrinsics, g.invert_se3(cameras), pixel_center=g.OPENCV_PIXEL_CENTER)
    valid = normal("nb-vis-m", b, s, h, w) > -0.5
    if variant == "_nomask":
        valid[0] = False
    scene = g.normalize_to_mean_distance(cameras, points, depth, valid, is_scaled=variant != "_noscale")
    got = {f"extrinsics{variant}": scene.world_to_camera}
    if variant == "_noscale":
        got["world_points_noscale"] = scene.points_world
    if not variant:
        cam_points = g.transform_points(scene.world_to_camera, scene.points_world)
        got |= {"world_points": scene.points_world, "depths": scene.depth, "scale": scene.scale}
        got |= {"cam_points": cam_points}
    check(want, TIGHT, **got)


def vggt_frame(seed: str, size: tuple[int, int], dcx: float, dcy: float) -> tuple[np.ndarray, Tensor, Tensor]:
    h, w = size
    depth = torch.exp(0.5 * image(f"{seed}-d", 3, h, w)[0])
    depth[normal(f"{seed}-h", h, w) > 1.2] = 0
    center = torch.tensor([w / 2 + dcx, h / 2 + dcy])
    return depth.numpy(), vggt_cameras(seed), g.make_intrinsics(torch.tensor([1.1 * w, 1.15 * w]), center)


def cut(array: np.ndarray, box: g.CropBox) -> np.ndarray:
    part = array[box.top : box.top + box.height, box.left : box.left + box.width]
    return np.pad(part, ((0, box.height - part.shape[0]), (0, box.width - part.shape[1])))


def principal_point(intrinsics: Tensor) -> tuple[float, float]:
    return float(intrinsics[0, 2]), float(intrinsics[1, 2])


def test_vggt_crops_resizes_and_turns_of_the_camera_match() -> None:
    meta, want = load_case("vggt", "crop_resize")
    size = tuple(meta["source_hw"])
    for n, crop in enumerate(meta["crops"]):
        depth, _, intrinsics = vggt_frame("cr-vis", size, crop["dcx"], crop["dcy"])
        box = g.principal_point_crop(size, principal_point(intrinsics), tuple(crop["target_hw"]), crop["strict"])
        assert [box.height, box.width] == crop["result_hw"]
        got = {f"crop{n}_K": g.crop_intrinsics(intrinsics, box.left, box.top)}
        check(want, 1e-6, **got, **{f"crop{n}_depth": torch.from_numpy(cut(depth, box))})
    _, cameras, intrinsics = vggt_frame("cr-vis", size, 0, 0)
    for n, (target, margin) in enumerate([((28, 42), 4), ((84, 70), 4), ((56, 56), 0)]):
        resized, scale = g.covering_size(size, target, margin)
        assert list(resized) == meta["shapes"][f"resize{n}_depth"]
        check(want, 1e-6, **{f"resize{n}_K": g.resize_intrinsics(intrinsics, scale, scale, g.OPENCV_PIXEL_CENTER)})
    for name, clockwise in {"cw": True, "ccw": False}.items():
        camera, turned = g.rotate_camera_90(cameras, intrinsics, size, clockwise)
        check(want, 1e-6, **{f"rot_{name}_E": camera, f"rot_{name}_K": turned})


@pytest.mark.parametrize("n", range(5))
def test_vggt_frame_geometry_matches_from_crop_to_points(n: int) -> None:
    meta, want = load_case("vggt", "process_frame")
    frame = meta["frames"][n]
    depth, camera, intrinsics = vggt_frame(f"pf-vis{n}", tuple(frame["source_hw"]), frame["dcx"], frame["dcy"])
    target: tuple[int, int] = tuple(frame["target_hw"])
    draws = [value for _, value in frame["draws"]]
    factors = np.minimum(draws.pop(0), 1.0) if frame["training"] else np.ones(2)
    first = tuple(int(x) for x in np.array(depth.shape) * factors)
    box = g.principal_point_crop(depth.shape, principal_point(intrinsics), first, strict=False)
    depth, intrinsics = cut(depth, box), g.crop_intrinsics(intrinsics, box.left, box.top)
    is_turned = False
    if frame["landscape_check"] and depth.shape[0] > 1.25 * depth.shape[1] and target[0] != target[1]:
        is_turned = draws.pop(0) > 0.5
    if is_turned:
        target = target[::-1]
    margin = 4 + (draws.pop(0) * max(target) if frame["training"] else 0)
    resized, scale = g.covering_size(depth.shape, target, margin)
    depth = cv2.resize(depth, resized[::-1], interpolation=cv2.INTER_NEAREST)
    intrinsics = g.resize_intrinsics(intrinsics, scale, scale, g.OPENCV_PIXEL_CENTER)
    box = g.principal_point_crop(resized, principal_point(intrinsics), target, strict=True)
    depth, intrinsics = cut(depth, box), g.crop_intrinsics(intrinsics, box.left, box.top)
    if is_turned:
        clockwise = draws.pop(0) > 0.5
        camera, intrinsics = g.rotate_camera_90(camera, intrinsics, depth.shape, clockwise)
        depth = np.ascontiguousarray(np.rot90(depth, -1 if clockwise else 1))
    final = torch.from_numpy(depth)
    got = {"depth": final, "extrinsics": camera, "intrinsics": intrinsics, "mask": (final > 1e-8).float()}
    got["cam_points"] = g.unproject_depth(final, intrinsics, pixel_center=g.OPENCV_PIXEL_CENTER)
    to_world = g.invert_se3(camera)
    got["world_points"] = g.unproject_depth(final, intrinsics, to_world, pixel_center=g.OPENCV_PIXEL_CENTER)
    check(want, TIGHT, **{f"{n}_{name}": value for name, value in got.items()})


# CUT3R


def test_cut3r_co3d_cameras_match() -> None:
    meta, want = load_case("cut3r", "co3d_camera")
    n = len(meta["sizes_hw"])
    cameras = g.PyTorch3DCameras(
        g.axis_angle_to_matrix(0.8 * normal("cut3r/cc/aa", n, 3)),
        normal("cut3r/cc/T", n, 3),
        2 + 0.3 * normal("cut3r/cc/f", n, 2),
        0.05 * normal("cut3r/cc/p", n, 2),
    )
    world_to_camera, intrinsics = g.from_pytorch3d(cameras, torch.tensor(meta["sizes_hw"]))
    to_world = g.homogeneous(g.invert_se3(world_to_camera))
    for i in range(n):
        check(want, 1e-6, **{f"{i}.K": intrinsics[i], f"{i}.cam2world": to_world[i]})


def test_cut3r_pose_encoding_matches() -> None:
    _, want = load_case("cut3r", "pose_encoding")
    axis_angle = normal("cut3r/b/aa", 6, 3)
    axis_angle[0], axis_angle[1] = 0, torch.tensor([3.1, 0, 0])
    encoding = g.encode_pose(g.make_se3(g.axis_angle_to_matrix(axis_angle), normal("cut3r/b/tt", 6, 3)))
    relative = g.relative_pose_encoding(encoding[:-1], encoding[1:])
    back = g.homogeneous(g.decode_pose(encoding))
    check(want, TIGHT, encoding=encoding, roundtrip=back, rel_trans=relative[:, :3], rel_quat=relative[:, 3:])


@pytest.mark.parametrize("i", range(3))
def test_cut3r_crops_ray_map_and_points_match(i: int) -> None:
    meta, want = load_case("cut3r", "crop_intrinsics")
    item, tag = meta["items"][i], "cut3r/cv"
    h, w = item["hw"]
    depth = 2 * torch.exp(0.3 * normal(f"{tag}/d{i}", h, w))
    depth[normal(f"{tag}/d{i}/hole", h, w) < -1.2] = 0
    intrinsics = g.make_intrinsics(torch.tensor(item["f"]), torch.tensor(item["pp"]))
    box = g.symmetric_crop((h, w), principal_point(intrinsics))
    cropped, intrinsics = cut(depth.numpy(), box), g.crop_intrinsics(intrinsics, box.left, box.top)
    extra = int(np.random.default_rng(item["seed"]).integers(0, item["aug"])) if item["aug"] else 0
    plan = g.covering_crop(cropped.shape, intrinsics, tuple(item["res"][::-1]), extra, g.OPENCV_PIXEL_CENTER)
    cropped = cv2.resize(cropped, plan.resized[::-1], interpolation=cv2.INTER_NEAREST)
    final = torch.from_numpy(cut(cropped, plan.box))
    pose1, pose2 = (cut3r_poses(f"{tag}/p{k}_{i}", 1, angle=0.5, shift=1.0)[0] for k in (1, 2))
    got = {
        "size_hw": torch.tensor(final.shape),
        "K": plan.intrinsics,
        "depth": final,
        "ray_map": g.cut3r_ray_map(plan.intrinsics, pose2, pose1, tuple(final.shape), g.OPENCV_PIXEL_CENTER),
        "pts3d": g.unproject_depth(final, plan.intrinsics, pose2, g.OPENCV_PIXEL_CENTER),
        "valid": (final > 0).float(),
    }
    check(want, TIGHT, **{f"{i}.{name}": value for name, value in got.items()})


def test_cut3r_focal_length_and_rigid_alignment_match() -> None:
    _, want = load_case("cut3r", "eval_geometry")
    b, h, w = 3, 20, 28
    z = 2 + 0.5 * torch.tanh(normal("cut3r/eg/z", b, h, w))
    center = torch.tensor([w // 2, h // 2])
    grid = g.pixel_grid(h, w, g.OPENCV_PIXEL_CENTER) - center
    xy = grid / torch.tensor([40.0, 55.0, 33.0]).view(b, 1, 1, 1) * z[..., None]
    points = torch.cat([xy, z[..., None]], dim=-1) + 0.03 * 0.2 * normal("cut3r/eg/p", b, h, w, 3)
    focal = {
        f"focal_{method}": g.focal_from_points(points, center, method, g.OPENCV_PIXEL_CENTER)  # type: ignore[arg-type]
        for method in ("weiszfeld", "median")
    }
    flat = points.flatten(1, 2)
    target = g.rotate(g.axis_angle_to_matrix(0.6 * normal("cut3r/eg/aa", b, 3)), flat) + normal("cut3r/eg/t", b, 1, 3)
    target = target + 0.02 * normal("cut3r/eg/nb", b, h * w, 3)
    rigid = g.umeyama(flat, target, normal("cut3r/eg/w", b, h * w).abs(), with_scale=False)
    procrustes = g.homogeneous(g.make_se3(rigid.rotation, rigid.translation))
    check(want, TIGHT, **focal, procrustes=procrustes)


def divide(points: Tensor, scale: Tensor) -> Tensor:
    return points / scale[:, None, None, None, None]


def test_cut3r_confidence_weighted_unit_gives_the_recorded_distances() -> None:
    meta, want = load_case("cut3r", "loss_train_static")
    views = cut3r_views(meta)
    valid = torch.stack([views["valid"]] * 2, dim=1)
    confidence = torch.stack([views["conf_self"], views["conf_cross"]], dim=1)
    true_scale, pred_scale = (
        g.confidence_weighted_distance(torch.stack([views[p + "self"], views[p + "cross"]], 1), valid, confidence)
        for p in ("", "pred_")
    )
    is_metric = torch.tensor(meta["flags"]["metric"])
    pred_scale = torch.where(is_metric, true_scale, pred_scale)
    for kind in ("self", "cross"):
        distance = (divide(views[kind], true_scale) - divide(views[f"pred_{kind}"], pred_scale)).norm(dim=-1)
        distance = torch.where(views["valid"], distance, 2.0)  # a sky pixel counts as the constant 2
        used = views["valid"] | views["sky"]
        for i in range(meta["V"]):
            check(want, TIGHT, **{f"dist_{kind}_view{i + 1}": distance[:, i][used[:, i]].mean()})


def test_cut3r_median_unit_gives_the_recorded_scale_invariant_distances() -> None:
    meta, want = load_case("cut3r", "loss_test")
    views = cut3r_views(meta)
    for kind in ("self", "cross"):
        true, pred, valid = views[kind], views[f"pred_{kind}"], views["valid"]
        pred_scale = g.distance_to_median(pred, valid).clamp(1e-3, 1e3)
        distance = (true - divide(pred, pred_scale / g.distance_to_median(true, valid))).norm(dim=-1)
        for i in range(meta["V"]):
            check(want, TIGHT, **{f"scaleinv_dist_{kind}_view{i + 1}": distance[:, i][valid[:, i]].mean()})


# DiffusionSfM


def dsfm_scene(want: dict[str, np.ndarray], meta: dict[str, Any], depth: Tensor) -> tuple[Tensor, ...]:
    """Coordinates, intrinsics and normalised scene, in PyTorch3D axes and NDC throughout."""
    given = {k: torch.from_numpy(v).reshape(meta["shapes"][k]) for k, v in want.items() if k.startswith("in_")}
    coords = g.patch_centers(given["in_crop"], depth.shape[-1])
    intrinsics = g.make_intrinsics(given["in_focal"], given["in_pp"])
    world_to_camera = g.make_se3(given["in_R"].mT, given["in_T"])  # PyTorch3D's own axes: only the transpose
    scene = g.normalize_to_first_view_median(world_to_camera, depth, intrinsics, coords)
    return coords, intrinsics, *scene


@pytest.mark.parametrize("name", ["rays_sparse", "rays_offcentre", "rays_dense"])
def test_diffusionsfm_targets_match(name: str) -> None:
    meta, want = load_case("diffusionsfm", name)
    n, p = meta["constructor"]["N"], meta["constructor"]["P"]
    seed = {"rays_sparse": "rs", "rays_offcentre": "ro", "rays_dense": "rd"}[name]
    if name == "rays_dense":
        depth = 3 + 1.5 * image("dsfm.rd.depth", n, 3, p, p)[:, 0]
    else:
        depth = 3.5 + 0.3 * normal(f"dsfm.{seed}.depth", n, p, p)
    coords, intrinsics, cameras, depth, scale = dsfm_scene(want, meta, depth)
    boxes = torch.tensor(meta["constructor"]["bbox"])
    size = torch.tensor([meta["constructor"]["H"], meta["constructor"]["W"]])
    origins, endpoints = g.ray_origins_and_endpoints(coords, depth, intrinsics, cameras)
    target = g.encode_rays(origins, endpoints)
    check(
        want,
        TOLERANCE,
        in_crop=g.crop_parameters(boxes, size),
        scale=scale.reshape(1),
        R_norm=cameras[..., :3].mT,
        T_norm=cameras[..., 3],
        depth_norm=depth,
        origins=origins.flatten(1, 2),
        endpoints=endpoints.flatten(1, 2),
        target=target,
        ndc=coords.movedim(-1, 1),
    )


@pytest.mark.parametrize("name", ["recover_exact", "recover_exact_pp", "recover_noisy"])
def test_diffusionsfm_cameras_from_rays_match(name: str) -> None:
    meta, want = load_case("diffusionsfm", name)
    n, p, noise = (meta["constructor"][key] for key in ("N", "P", "noise"))
    seed = {"recover_exact": "re", "recover_exact_pp": "rp", "recover_noisy": "rn"}[name]
    depth = 3.5 + 0.3 * normal(f"dsfm.{seed}.depth", n, p, p)
    coords, intrinsics, cameras, depth, _ = dsfm_scene(want, meta, depth)
    target = g.encode_rays(*g.ray_origins_and_endpoints(coords, depth, intrinsics, cameras))
    target = target + noise * normal(f"dsfm.{seed}.noise", n, 8, p, p)
    target = F.normalize(target.unflatten(1, (2, 4)), dim=2).flatten(1, 2)
    origins, endpoints = (x.flatten(1, 2) for x in g.decode_rays(target))
    flat = coords.flatten(1, 2)
    # OpenCV itself: in `recover_noisy` its random samples leave rays of two views out of the last fit.
    released = g.cameras_from_rays_released(origins, endpoints, flat, fit=opencv_homography)
    known = g.cameras_from_rays_known(origins, endpoints, flat, intrinsics)
    assumed = torch.diag(torch.tensor([g.DEFAULT_FOCAL, g.DEFAULT_FOCAL, 1])).expand(n, 3, 3)
    default = g.cameras_from_rays_known(origins, endpoints, flat, assumed)
    got = {
        "true_R": cameras[..., :3].mT,
        "true_T": cameras[..., 3],
        "hom_R": released.world_to_camera[..., :3].mT,
        "hom_T": released.world_to_camera[..., 3],
        "hom_f": 1 / released.intrinsics.diagonal(dim1=-2, dim2=-1)[..., :2],  # the release returns 1/f
        "hom_pp": released.intrinsics[..., :2, 2],
        "known_R": known.world_to_camera[..., :3].mT,
        "known_T": known.world_to_camera[..., 3],
        "default_R": default.world_to_camera[..., :3].mT,
        "skew_center": g.intersect_rays(origins, endpoints - origins),
    }
    for key, value in got.items():
        if key in want:
            check(want, SOLVER_TOLERANCE.get(key, TOLERANCE), **{key: value})
    assert set(want) - set(got) == {"in_R", "in_T", "in_focal", "in_pp", "in_crop"}
    batched = g.cameras_from_rays_released(origins, endpoints, flat)
    assert relative_error(batched.world_to_camera[..., :3].mT, want["hom_R"]) < SOLVER_TOLERANCE["hom_R"]
    assert relative_error(1 / batched.intrinsics.diagonal(dim1=-2, dim2=-1)[..., :2], want["hom_f"]) < 1e-3


def opencv_homography(coords: Tensor, targets: Tensor, usable: Tensor) -> Tensor:
    fits = [
        cv2.findHomography(x[keep].float().numpy(), y[keep].float().numpy(), cv2.RANSAC, g.RELEASED_INLIER)[0]
        for x, y, keep in zip(coords, targets, usable, strict=True)
    ]
    return torch.from_numpy(np.stack(fits))


def test_diffusionsfm_demo_crop_parameters_match_with_the_size_that_the_release_confuses() -> None:
    meta, want = load_case("diffusionsfm", "demo_preprocess")
    rows = []
    for width, height in meta["constructor"]["sizes_WH"]:
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        box = torch.tensor([left, top, left + side, top + side])
        rows.append(g.crop_parameters(box, torch.tensor([side, side])))
    check(want, TIGHT, crop_parameters=torch.stack(rows))


def test_diffusionsfm_similarity_alignment_matches() -> None:
    meta, want = load_case("diffusionsfm", "chamfer")
    rotation = torch.from_numpy(want["in_rot"]).reshape(3, 3)
    true = normal("dsfm.ch.gt", 2, 576, 3) + torch.tensor([0, 0, 3.0])
    pred = 0.5 * (true @ rotation) + torch.tensor([0.3, 0.1, -0.2]) + 0.1 * normal("dsfm.ch.n", 2, 576, 3)
    fit = g.umeyama(pred[0], true[0])
    check(
        want,
        TIGHT,
        umeyama_aligned=fit.apply(pred[0]),
        umeyama_scale=fit.scale,
        umeyama_R=fit.rotation.mT,  # recorded for row vectors
        umeyama_t=fit.translation,
    )
