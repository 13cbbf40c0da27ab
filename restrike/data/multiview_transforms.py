"""Stored frames to the views that each family trains on: its crops, resizes, depth rules and colours.

All three are pure in the generator that they are given, and draw in the order of their releases. Cameras come and go
in Restrike's convention (first pixel's centre at 0.5). VGGT and CUT3R put it at 0, but take CO3D's principal point,
which counts from the corner, as it stands: their cameras are half a pixel off. `exact_pixels=False` keeps that, as
published; True mends it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from restrike.data.color_jitter import ColorJitter
from restrike.data.multiview_pixels import (
    cut,
    drop_farthest,
    fill_holes,
    resize_nearest,
    resize_picture,
    sample_nearest,
)
from restrike.data.multiview_source import RawView
from restrike.data.samples import MultiViewSample
from restrike.data.source import BadSampleError
from restrike.geometry import (
    OPENCV_PIXEL_CENTER,
    PIXEL_CENTER,
    CropBox,
    covering_crop,
    covering_size,
    crop_intrinsics,
    principal_point_crop,
    resize_intrinsics,
    rotate_camera_90,
    shift_pixel_center,
    symmetric_crop,
)

_NO_DEPTH = 1e-8  # VGGT's bound of a valid depth


class ViewTransform(ABC):
    """Stored frames to a sample of one size. A class, as a config names one of its children."""

    @abstractmethod
    def __call__(
        self, views: list[RawView], size: tuple[int, int], is_video: np.ndarray, random: np.random.Generator
    ) -> MultiViewSample:
        """`size` is (H, W) of the views; whatever is drawn comes from `random`."""


class Frame(NamedTuple):
    """One view on its way: pixels as numpy arrays, the camera as tensors, and where the crop lies in the stored frame
    (left, top, and stored pixels per pixel)."""

    image: np.ndarray
    depth: np.ndarray
    foreground: np.ndarray
    intrinsics: Tensor
    world_to_camera: Tensor
    left: float = 0.0
    top: float = 0.0
    zoom: float = 1.0

    @property
    def size(self) -> tuple[int, int]:
        return self.image.shape[0], self.image.shape[1]


def _frame(view: RawView, depth: np.ndarray, exact_pixels: bool) -> Frame:
    """Into the convention of VGGT and CUT3R."""
    intrinsics = torch.from_numpy(np.array(view.intrinsics, dtype=np.float32))
    if exact_pixels:
        intrinsics = shift_pixel_center(intrinsics, PIXEL_CENTER, OPENCV_PIXEL_CENTER)
    camera = torch.from_numpy(np.array(view.world_to_camera, dtype=np.float32))
    return Frame(view.image, depth, view.foreground, intrinsics, camera)


def _crop(frame: Frame, box: CropBox) -> Frame:
    """Cut, padded with zeros where the box reaches beyond the image."""
    left, top = frame.left + box.left * frame.zoom, frame.top + box.top * frame.zoom
    return frame._replace(
        image=cut(frame.image, box),
        depth=cut(frame.depth, box),
        foreground=cut(frame.foreground, box),
        intrinsics=crop_intrinsics(frame.intrinsics, box.left, box.top),
        left=left,
        top=top,
    )


def _resize_crop(frame: Frame, size: tuple[int, int], box: CropBox, intrinsics: Tensor) -> Frame:
    """A box of the frame resized to (H, W); `intrinsics` are the result's."""
    zoom = frame.zoom * frame.size[1] / size[1]
    return frame._replace(
        image=resize_picture(frame.image, size, box),
        depth=resize_nearest(frame.depth, size, box),
        foreground=resize_nearest(frame.foreground, size, box),
        intrinsics=intrinsics,
        left=frame.left + box.left * zoom,
        top=frame.top + box.top * zoom,
        zoom=zoom,
    )


@dataclass(frozen=True)
class VGGTViews(ViewTransform):
    """VGGT's frames (section 3.4 and its supplement): crops about the principal point, isotropic resize, strict crop.

    Attributes:
        is_training: random crop and resize, and colours.
        scale: range of the crop's share of height and of width, drawn independently, capped at 1.
        max_extra: the resize exceeds the target by Tri(0, 0, max_extra) of its long side; 0 = not at all.
        landscape_check: turn a portrait picture by 90° half of the time (off in the recipe).
        depth_percentile: depth above it is dropped, zeros counted; 100 = keep all.
        jitter: of colours; None = none.
        exact_pixels: see the module.
    """

    is_training: bool = True
    scale: tuple[float, float] = (0.8, 1.2)
    max_extra: float = 0.3
    landscape_check: bool = False
    depth_percentile: float = 98.0
    jitter: ColorJitter | None = None
    exact_pixels: bool = False

    def __call__(
        self, views: list[RawView], size: tuple[int, int], is_video: np.ndarray, random: Any
    ) -> MultiViewSample:
        """Views at `size` (H, W); images float32 in [0, 1] where colours are jittered, else uint8."""
        frames = [self.process(_frame(view, self.depth(view), self.exact_pixels), size, random) for view in views]
        images = _stack_images(frames)
        if self.jitter is not None and self.is_training:
            is_same = float(random.random()) > 1 - self.jitter.same_prob
            images = self.jitter(images.float() / 255, is_same, _torch_generator(random))
        depth = torch.from_numpy(np.stack([frame.depth for frame in frames]))
        return _sample(frames, views, images, depth, depth > _NO_DEPTH, is_video)

    def depth(self, view: RawView) -> np.ndarray:
        """Depth that is consistent over views and not among the farthest."""
        depth = np.where(view.depth_mask, view.depth, 0).astype(np.float32)
        return drop_farthest(depth, self.depth_percentile)

    def process(self, frame: Frame, target: tuple[int, int], random: Any) -> Frame:
        """One frame to (H, W) = `target`."""
        factors = np.minimum(random.uniform(*self.scale, 2), 1.0) if self.is_training else np.ones(2)
        height, width = (int(x) for x in np.array(frame.size) * factors)
        box = principal_point_crop(frame.size, _principal_point(frame.intrinsics), (height, width), strict=False)
        frame = _crop(frame, box)
        is_turned = False
        if self.landscape_check and frame.size[0] > 1.25 * frame.size[1] and target[0] != target[1]:
            is_turned = float(random.random()) > 0.5
        if is_turned:
            target = target[::-1]
        # numpy refuses a triangle without width
        has_extra = self.is_training and self.max_extra > 0
        extra = float(random.triangular(0, 0, self.max_extra)) * max(target) if has_extra else 0.0
        resized, scale = covering_size(frame.size, target, 4 + extra)
        intrinsics = resize_intrinsics(frame.intrinsics, scale, scale, OPENCV_PIXEL_CENTER)
        box = principal_point_crop(resized, _principal_point(intrinsics), target, strict=True)
        frame = _resize_crop(frame, resized, box, crop_intrinsics(intrinsics, box.left, box.top))
        return _turn(frame, float(random.random()) > 0.5) if is_turned else frame


def _turn(frame: Frame, clockwise: bool) -> Frame:
    camera, intrinsics = rotate_camera_90(frame.world_to_camera, frame.intrinsics, frame.size, clockwise)
    image, depth, foreground = (
        np.ascontiguousarray(np.rot90(x, -1 if clockwise else 1)) for x in (frame.image, frame.depth, frame.foreground)
    )
    return frame._replace(
        image=image, depth=depth, foreground=foreground, world_to_camera=camera, intrinsics=intrinsics
    )


@dataclass(frozen=True)
class CUT3RViews(ViewTransform):
    """CUT3R's frames (supplement): symmetric crop about the principal point, covering resize, central crop.

    Attributes:
        is_training: random enlargement before the last crop, background masking, colours.
        aug_crop: pixels; the resize covers the target plus [0, aug_crop), drawn a view.
        background_prob: of dropping the depth outside the object, drawn a scene.
        jitter: of colours, one draw a scene; None = none.
        exact_pixels: see the module.
    """

    is_training: bool = True
    aug_crop: int = 16
    background_prob: float = 0.1
    jitter: ColorJitter | None = None
    exact_pixels: bool = False

    def __call__(
        self, views: list[RawView], size: tuple[int, int], is_video: np.ndarray, random: Any
    ) -> MultiViewSample:
        """Views at `size` (H, W), images uint8."""
        is_object_only = self.is_training and float(random.random()) >= 1 - self.background_prob
        frames = [self.process(view, size, is_object_only, random) for view in views]
        images = _stack_images(frames)
        if self.jitter is not None and self.is_training:
            images = self.jitter(images, True, _torch_generator(random))
        depth = torch.from_numpy(np.stack([frame.depth for frame in frames]))
        return _sample(frames, views, images, depth, depth > 0, is_video)

    def process(self, view: RawView, target: tuple[int, int], is_object_only: bool, random: Any) -> Frame:
        """One frame to (H, W) = `target`.

        Raises:
            BadSampleError: the principal point is too near an edge.
        """
        depth = np.where(view.foreground > 0.1 * 255, view.depth, 0) if is_object_only else view.depth
        frame = _frame(view, depth.astype(np.float32), self.exact_pixels)
        try:
            frame = _crop(frame, symmetric_crop(frame.size, _principal_point(frame.intrinsics)))
        except ValueError as error:
            raise BadSampleError(f"frame {view.number}: {error}") from error
        extra = int(random.integers(0, self.aug_crop)) if self.is_training and self.aug_crop > 1 else 0
        plan = covering_crop(frame.size, frame.intrinsics, target, extra, OPENCV_PIXEL_CENTER)
        return _resize_crop(frame, plan.resized, plan.box, plan.intrinsics)


@dataclass(frozen=True)
class DiffusionSfMViews(ViewTransform):
    """DiffusionSfM's frames: a centred square, scaled in training; depth on the model's own coarser grid.

    Attributes:
        is_training: draw the square's side.
        depth_size: P of depth and masks: 16 sparse, 256 dense, 224 in evaluation.
        scale: range of the side's factor about the (truncated) centre; the rest is black, and invalid.
        fill_holes: unknown depth takes that of the nearest valid pixel; what stays unknown is -1.
    """

    is_training: bool = True
    depth_size: int = 16
    scale: tuple[float, float] = (0.8, 1.1)
    fill_holes: bool = True

    def __call__(
        self, views: list[RawView], size: tuple[int, int], is_video: np.ndarray, random: Any
    ) -> MultiViewSample:
        """Views at `size` (H, W), a square; images float32 in [0, 1]."""
        frames, images, depths, valids = [], [], [], []
        for view in views:
            box = self.box(view.image.shape[:2], random)
            image = torch.from_numpy(np.ascontiguousarray(cut(view.image, box))).permute(2, 0, 1)[None].float() / 255
            images.append(F.interpolate(image, size, mode="bilinear", antialias=True, align_corners=False)[0])
            depth = sample_nearest(view.depth, self.depth_size, box)
            foreground = sample_nearest(view.foreground, self.depth_size, box)
            valid = np.isfinite(depth) & (depth > 0)
            depths.append(fill_holes(depth, valid) if self.fill_holes else np.where(valid, depth, -1))
            valids.append(valid)
            intrinsics = crop_intrinsics(torch.from_numpy(view.intrinsics), box.left, box.top)
            zoom = box.width / size[1]
            intrinsics = resize_intrinsics(intrinsics, 1 / zoom, 1 / zoom)
            # `_sample` speaks of the other two families' convention
            intrinsics = shift_pixel_center(intrinsics, PIXEL_CENTER, OPENCV_PIXEL_CENTER)
            camera = torch.from_numpy(np.array(view.world_to_camera, dtype=np.float32))
            place = Frame(np.empty((*size, 3)), depth, foreground, intrinsics, camera, box.left, box.top, zoom)
            frames.append(place)
        depth_stack = torch.from_numpy(np.stack(depths).astype(np.float32))
        valid_stack = torch.from_numpy(np.stack(valids))
        return _sample(frames, views, torch.stack(images), depth_stack, valid_stack, is_video)

    def box(self, image_size: tuple[int, ...], random: Any) -> CropBox:
        """The square in pixels of an image of (H, W)."""
        height, width = image_size
        half = min(height, width) / 2
        box = np.array([width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half]).astype(int)
        if self.is_training:
            side = (box[2] - box[0]) * float(random.uniform(*self.scale))
            random.uniform(0, 0, size=2)  # the release draws a shift of width 0
            center = (box[:2] + box[2:]) / 2
            box = np.round(np.concatenate([center - side / 2, center + side / 2])).astype(int)
        return CropBox(int(box[0]), int(box[1]), int(box[2] - box[0]), int(box[3] - box[1]))


def _principal_point(intrinsics: Tensor) -> tuple[float, float]:
    return float(intrinsics[0, 2]), float(intrinsics[1, 2])


def _stack_images(frames: list[Frame]) -> Tensor:
    return torch.from_numpy(np.stack([frame.image for frame in frames])).permute(0, 3, 1, 2).contiguous()


def _torch_generator(random: Any) -> torch.Generator:
    """A torch generator that the numpy one seeds: torchvision's arithmetic draws from torch."""
    return torch.Generator().manual_seed(int(random.integers(0, 2**63 - 1)))


def _sample(
    frames: list[Frame], views: list[RawView], images: Tensor, depth: Tensor, valid: Tensor, is_video: np.ndarray
) -> MultiViewSample:
    intrinsics = torch.stack([frame.intrinsics for frame in frames])
    boxes = [(f.left, f.top, f.left + f.zoom * f.image.shape[1], f.top + f.zoom * f.image.shape[0]) for f in frames]
    return MultiViewSample(
        images=images,
        depth=depth,
        valid_depth=valid,
        foreground=torch.from_numpy(np.stack([frame.foreground for frame in frames]) > 125),
        intrinsics=shift_pixel_center(intrinsics, OPENCV_PIXEL_CENTER, PIXEL_CENTER),
        world_to_camera=torch.stack([frame.world_to_camera for frame in frames]),
        crop_boxes=torch.tensor(boxes, dtype=torch.float32),
        source_sizes=torch.tensor([view.image.shape[:2] for view in views]),
        frame_numbers=torch.tensor([view.number for view in views]),
        is_video=torch.from_numpy(np.asarray(is_video, dtype=bool)),
    )
