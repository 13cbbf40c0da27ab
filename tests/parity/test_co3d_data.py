"""CO3D data of the three multi-view families: choices of views, crops, resizes, depth and colours, as recorded."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from multiview_cases import cut3r_poses
from parity_tools import image, load_case, normal, relative_error
from restrike import geometry as g
from restrike.data.color_jitter import Adjustments, ColorJitter
from restrike.data.depth_png import decode_depth
from restrike.data.multiview_plan import DynamicShape, aspect_height, draw_aspect, pooled_batches, tiled_order
from restrike.data.multiview_source import RawView
from restrike.data.multiview_transforms import (
    CUT3RViews,
    DiffusionSfMViews,
    Frame,
    VGGTViews,
    drop_farthest,
    resize_picture,
)
from restrike.data.views import RandomViews, WindowViews, nearby_positions, replace_empty

PICTURES = 2e-3  # resized by another library
TIGHT = 1e-5


def check(want: dict[str, np.ndarray], bound: float, **got: Tensor | np.ndarray) -> None:
    for name, value in got.items():
        error = relative_error(torch.as_tensor(np.asarray(value)).float(), want[name])
        assert error <= bound, f"{name}: relative error {error:.2e} > {bound:.0e}"


class Recorded:
    """A generator that answers with the recorded draws, in order, and takes offence at any other request."""

    def __init__(self, draws: list[Any]) -> None:
        self.draws = list(draws)

    def _next(self, kind: str) -> Any:
        assert self.draws, f"a {kind} too many"
        name, value = self.draws.pop(0)
        assert name.startswith(kind), f"asked for {kind}, the release drew {name}"
        return value

    def uniform(self, low: float, high: float, size: int | None = None) -> Any:
        return np.array(self._next("uniform"))

    def triangular(self, left: float, mode: float, right: float) -> float:
        return self._next("triangular")

    def random(self) -> float:
        return self._next("rand")


# Choices of views and batches


def test_vggt_batches_have_the_recorded_counts_aspects_and_scenes() -> None:
    import random

    _, want = load_case("vggt", "batch_sampler")
    counts, aspects = np.random.RandomState(840), random.Random((0 + 42) * 100)

    class Both:
        choice = staticmethod(counts.choice)
        random = staticmethod(aspects.random)

    policy = DynamicShape(views=24, width=10_000, patch=1)
    shapes = [policy.draw(Both) for _ in range(60)]
    rows = [[shape.views, shape.size[0] / 10_000, shape.scenes] for shape in shapes]
    np.testing.assert_allclose(np.array(rows), want["rows"].reshape(60, 3), atol=1e-4)


def test_vggt_target_heights_match() -> None:
    meta, want = load_case("vggt", "crop_resize")
    check(want, 0, target_short=np.array([aspect_height(518, aspect, 14) for aspect in meta["aspects"]]))
    assert draw_aspect(np.random.RandomState(0), 0.33, 1.0) == round(0.33 + 0.67 * 0.5488135039273248, 2)


def test_vggt_nearby_views_match() -> None:
    meta, want = load_case("vggt", "nearby_ids")
    for n, request in enumerate(meta["requests"]):
        reach = request["expand_range"] or int(request["count"] * request["expand_ratio"])
        random = np.random.RandomState(request["np_seed"])
        ids = nearby_positions(request["length"], request["first"], request["count"], reach, random)
        check(want, 0, **{f"ids_{n}": ids})


def test_cut3r_views_match_draw_for_draw() -> None:
    meta, want = load_case("cut3r", "sampling")
    for n, case in enumerate(meta["cases"]):
        options = dict(case.get("kw", {}))
        sampler = WindowViews(**options)
        random = np.random.default_rng(meta["seed"] + n)
        got = [sampler.in_order(case["n"], case["start"], case["views"], random) for _ in range(case["reps"])]
        positions = np.stack([views.positions for views in got])
        check(want, 0, **{f"pos{n}": positions, f"video{n}": np.array([views.is_video for views in got])})


def test_cut3r_epochs_and_batches_match() -> None:
    meta, want = load_case("cut3r", "sampling")
    s = meta["sampler"]
    check(want, 0, resized_index=tiled_order(s["n"], s["resize"], 777 + s["epoch"]))
    items, pool, views = pooled_batches(
        s["resize"], s["batch"], s["pools"], s["views"], not s["fixed"], 788 + s["epoch"]
    )
    rows = np.stack([items, *(np.repeat(x[:, None], s["batch"], 1) for x in (pool, views))], axis=-1)
    check(want, 0, batches=rows)


# VGGT


def vggt_view(key: str, size: tuple[int, int], dcx: float, dcy: float, mask: np.ndarray | None = None) -> RawView:
    h, w = size
    picture = (255 * image(f"{key}-i", 3, h, w)).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    depth = torch.exp(0.5 * image(f"{key}-d", 3, h, w)[0])
    depth[normal(f"{key}-h", h, w) > 1.2] = 0
    camera = g.make_se3(g.quaternion_to_matrix(normal(f"{key}-q", 4), "xyzw"), normal(f"{key}-t", 3))
    intrinsics = g.make_intrinsics(torch.tensor([1.1 * w, 1.15 * w]), torch.tensor([w / 2 + dcx, h / 2 + dcy]))
    mask = np.ones(size, bool) if mask is None else mask
    return RawView(picture, depth.numpy(), mask, np.zeros(size, np.uint8), intrinsics.numpy(), camera.numpy(), 0)


@pytest.mark.parametrize("n", range(5))
def test_vggt_frames_match_from_picture_to_points(n: int) -> None:
    meta, want = load_case("vggt", "process_frame")
    case = meta["frames"][n]
    view = vggt_view(f"pf-vis{n}", tuple(case["source_hw"]), case["dcx"], case["dcy"])
    start = Frame(
        view.image,
        view.depth,
        view.foreground,
        torch.from_numpy(view.intrinsics),
        torch.from_numpy(view.world_to_camera),
    )
    transform = VGGTViews(is_training=case["training"], landscape_check=case["landscape_check"])
    recorded = Recorded(case["draws"])
    frame = transform.process(start, tuple(case["target_hw"]), recorded)
    assert not recorded.draws
    check(want, PICTURES, **{f"{n}_image": frame.image})
    got = {"depth": frame.depth, "extrinsics": frame.world_to_camera, "intrinsics": frame.intrinsics}
    check(want, TIGHT, **{f"{n}_{name}": value for name, value in got.items()})


def test_vggt_resizes_of_pictures_and_depth_thresholds_match() -> None:
    meta, want = load_case("vggt", "crop_resize")
    view = vggt_view("cr-vis", tuple(meta["source_hw"]), 0, 0)
    for n, (target, margin) in enumerate([((28, 42), 4), ((84, 70), 4), ((56, 56), 0)]):
        size, _ = g.covering_size(view.depth.shape, target, margin)
        check(want, PICTURES, **{f"resize{n}_image": resize_picture(view.image, size)})
        resized = cv2.resize(view.depth, size[::-1], interpolation=cv2.INTER_NEAREST)
        check(want, 1e-6, **{f"resize{n}_depth": resized})
    check(want, 1e-6, thr_co3d=drop_farthest(view.depth, 98.0))


def test_half_float_depth_reads_as_recorded() -> None:
    _, want = load_case("vggt", "depth_png")
    bits = torch.exp(normal("png-vis", 9, 11)).numpy().astype(np.float16)
    bits[0, 0], bits[1, 1], bits[2, 2] = np.inf, np.nan, 0
    png = cv2.imencode(".png", bits.view(np.uint16))[1].tobytes()
    check(want, TIGHT, depth=decode_depth(png))


@pytest.mark.parametrize("case", ["co3d_sample_test", "co3d_sample_train"])
def test_vggt_co3d_samples_match(case: str) -> None:
    meta, want = load_case("vggt", case)
    prefix = "c3t" if case.endswith("test") else "c3v"
    for n, request in enumerate(meta["requests"]):
        _, first, *_ = request["seq_name"].split("_")
        category, s = ["apple", "bench"][int(first) // 10], int(first) % 10
        draws = [draw for draw in request["draws"] if draw[0] != "randint"]
        ids = draws.pop(0)[1]
        views = []
        for f in ids:
            key = f"{prefix}-{category}-{s}-{f}"
            mask = (normal(f"{key}-mk", 72, 60) > -1).numpy()
            view = vggt_view(key, (72, 60), 1.5 * (f % 3), -0.7 * (f % 2), mask)
            half = view.depth.astype(np.float16).astype(np.float32)
            views.append(view._replace(depth=half, number=f))
        is_training = meta["config"]["training"]
        draw = draws.pop()[1] if is_training else 0.0
        height = aspect_height(56, request["aspect"], 14)
        recorded = Recorded(draws)
        sample = VGGTViews(is_training=is_training)(views, (height, 56), np.zeros(len(ids)), recorded)
        assert not recorded.draws
        images = sample.images.float() / 255
        if is_training:
            torch.manual_seed(request["seed"])
            images = vggt_colors(images, is_same=draw > 0.3)
        intrinsics = g.shift_pixel_center(sample.intrinsics, g.PIXEL_CENTER, g.OPENCV_PIXEL_CENTER)
        to_world = g.invert_se3(sample.world_to_camera)
        got = {
            "depths": sample.depth,
            "extrinsics": sample.world_to_camera,
            "intrinsics": intrinsics,
            "cam_points": g.unproject_depth(sample.depth, intrinsics, pixel_center=g.OPENCV_PIXEL_CENTER),
            "world_points": g.unproject_depth(sample.depth, intrinsics, to_world, pixel_center=g.OPENCV_PIXEL_CENTER),
            "point_masks": sample.valid_depth,
            "ids": sample.frame_numbers,
        }
        check(want, PICTURES, **{f"{n}_images": images})
        check(want, 1e-4, **{f"{n}_{name}": value for name, value in got.items()})


def vggt_colors(images: Tensor, is_same: bool) -> Tensor:
    """The release's draws from torch's global generator."""
    jitter = ColorJitter(prob=0.9, gray_prob=0.05)
    return jitter(images, is_same, torch.default_generator)


# CUT3R


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_cut3r_color_jitter_matches(seed: int) -> None:
    _, want = load_case("cut3r", "color_jitter")
    pictures = torch.stack([(255 * image(f"cut3r/jv/{k}", 3, 40, 56)).floor().to(torch.uint8) for k in (0, 1)])
    jitter = ColorJitter(as_uint8=True)
    adjustments: Adjustments = jitter.draw(torch.manual_seed(seed))
    got = jitter.apply(pictures, adjustments).float() / 127.5 - 1
    for k in (0, 1):
        check(want, TIGHT, **{f"seed{seed}.img{k}": got[k]})


def cut3r_view(tag: str, number: int, is_empty: bool) -> RawView:
    h, w = 72, 96
    rgb = (255 * image(f"{tag}/rgb", 3, h, w)).floor().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    depth = torch.exp(0.3 * normal(f"{tag}/d", h, w))
    depth[normal(f"{tag}/hole", h, w) < -1] = 0
    depth = 0 * depth if is_empty else depth
    largest = np.float32(depth.max() if depth.max() > 0 else 1)
    stored = np.floor(65535 * (depth.numpy() / largest)).astype(np.uint16)
    depth_map = stored.astype(np.float32) / 65535 * largest
    foreground = (255 * (normal(f"{tag}/mask", h, w) > 0)).to(torch.uint8).numpy()
    intrinsics = np.array([[1.1 * w, 0, w / 2 + 1.3], [0, 1.1 * w, h / 2 - 2.2], [0, 0, 1]], dtype=np.float32)
    pose = cut3r_poses(f"{tag}/pose", 1, angle=0.5, shift=1.0)[0]
    camera = g.invert_se3(pose).numpy()
    return RawView(rgb, depth_map, np.ones((h, w), bool), foreground, intrinsics, camera, number)


def test_cut3r_co3d_items_match() -> None:
    meta, want = load_case("cut3r", "co3d_items")
    scenes, sampler = meta["scenes"], WindowViews(reverse=False)
    empty = {(f"{c}/{s}", k) for c, s, k in meta["all_zero_depth_frames"]}
    views = meta["dataset_args"]["num_views"]
    starts = [(name, k) for name, frames in scenes.items() for k in range(sampler.items(len(frames), views))]
    assert len(starts) == int(want["length"][0])
    for n, (index, pool, count) in enumerate(meta["items"]):
        name, start = starts[index]
        frames = scenes[name]
        random = np.random.default_rng(meta["dataset_args"]["seed"] + index)
        chosen = sampler.in_order(len(frames), start, count, random)
        is_object_only = float(random.random()) >= 0.9
        usable = np.array([(name, number) not in empty for number in frames])
        positions, keep_video = replace_empty(chosen.positions[::-1], usable, random)
        width, height = meta["dataset_args"]["resolution"][pool]
        transform = CUT3RViews(aug_crop=meta["dataset_args"]["aug_crop"])
        raw = [cut3r_view(f"{meta['tag']}/{name}/{frames[p]}", frames[p], not usable[p]) for p in positions]
        processed = [transform.process(view, (height, width), is_object_only, random) for view in raw]
        check(want, 0, **{f"{n}.frames": np.array([view.number for view in raw])})
        is_video = np.arange(count) < keep_video if chosen.is_video else np.zeros(count)
        pose = torch.stack([g.invert_se3(frame.world_to_camera) for frame in processed])
        depth = torch.from_numpy(np.stack([frame.depth for frame in processed]))
        got = {"is_video": is_video, "K": torch.stack([frame.intrinsics for frame in processed]),
               "pose": g.homogeneous(pose), "depth": depth, "valid": depth > 0}  # fmt: skip
        check(want, TIGHT, **{f"{n}.{key}": value for key, value in got.items()})
        images = np.stack([frame.image for frame in processed]).transpose(0, 3, 1, 2) / 127.5 - 1
        check(want, 5e-3, **{f"{n}.img": images})


# DiffusionSfM


@pytest.mark.parametrize("case", ["co3d_item_test_dense", "co3d_item_train_sparse"])
def test_diffusionsfm_co3d_items_match(case: str) -> None:
    meta, want = load_case("diffusionsfm", case)
    options = meta["constructor"]
    w, h, prefix = (160, 120, "dsfm.co2") if case == "co3d_item_test_dense" else (120, 160, "dsfm.co")
    given = {
        key: torch.from_numpy(want[f"in_{key}_all"]).reshape(meta["shapes"][f"in_{key}_all"])
        for key in ("R", "T", "focal", "pp")
    }
    cameras, intrinsics = g.from_pytorch3d(
        g.PyTorch3DCameras(given["R"], given["T"], given["focal"], given["pp"]), torch.tensor([h, w])
    )
    key = f"{prefix}.{options['category']}.{options['sequence']}"
    views = []
    for i in options["frame_ids"]:
        picture = (255 * image(f"{key}.{i}.rgb", 3, h, w)).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        depth = (2 + 2 * image(f"{key}.{i}.depth", 3, h, w)[0]).half().float()
        hole = image(f"{key}.{i}.hole", 3, h, w)[0]
        depth[(hole > 0.7) | (hole < 0.15)] = 0
        mask = (255 * (image(f"{key}.{i}.mask", 3, h, w)[0] > 0.5)).to(torch.uint8).numpy()
        views.append(
            RawView(picture, depth.numpy(), np.ones((h, w), bool), mask, intrinsics[i].numpy(), cameras[i].numpy(), i)
        )
    transform = DiffusionSfMViews(is_training=options["apply_augmentation"], depth_size=options["depth_size"])
    random = np.random.RandomState(options["numpy_seed"])
    size = (options["img_size"],) * 2
    sample = transform(views, size, np.zeros(len(views)), random)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    check(want, 0, depth_masks=sample.valid_depth, object_masks=sample.foreground)
    check(
        want,
        TIGHT,
        image=(sample.images - mean[:, None, None]) / std[:, None, None],
        crop_parameters=g.crop_parameters(sample.crop_boxes, sample.source_sizes),
        depth=sample.depth,
    )
    back = g.to_pytorch3d(sample.world_to_camera, full_intrinsics(sample), torch.tensor([h, w]))
    check(want, TIGHT, R=back.R, T=back.T, focal_length=back.focal_length)
    check(want, 1e-4, principal_point=back.principal_point)


def full_intrinsics(sample: Any) -> Tensor:
    """Of the whole stored picture, from those of the crop."""
    zoom = (sample.crop_boxes[:, 2] - sample.crop_boxes[:, 0]) / sample.images.shape[-1]
    grown = g.resize_intrinsics(sample.intrinsics, zoom, zoom)
    return g.crop_intrinsics(grown, -sample.crop_boxes[:, 0], -sample.crop_boxes[:, 1])


def test_diffusionsfm_views_are_distinct_unless_a_sequence_is_short() -> None:
    random = np.random.default_rng(0)
    assert len(set(RandomViews().draw(20, 0, 8, random).positions.tolist())) == 8
    assert RandomViews().draw(5, 0, 8, random).positions.shape == (8,)
