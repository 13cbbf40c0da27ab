"""Tiny trees of ray-cast frames in the genuine layouts and file formats of evaluation sets, written from the formats'
own documentation and not with the readers' code."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from own_scene_layouts import Shot, shots
from restrike.data.evaluation_sets import PROTOCOLS

SIZE = (72, 96)
WIDE = (32, 96)  # KITTI's proportions


@dataclass
class Truth:
    """depth [H, W] as stored, 0 where unknown; camera_to_world [3, 4]; intrinsics [3, 3] with a corner origin."""

    depth: np.ndarray | None = None
    camera_to_world: np.ndarray | None = None
    intrinsics: np.ndarray | None = None


@dataclass
class Tree:
    """A root, and by sequence and picture, in the order to be shown, what its reader has to find."""

    root: Path
    sequences: dict[str, dict[str, Truth]] = field(default_factory=dict)

    def add(self, sequence: str, image: str, truth: Truth) -> None:
        self.sequences.setdefault(sequence, {})[image] = truth

    @property
    def frames(self) -> dict[str, Truth]:
        return {image: truth for frames in self.sequences.values() for image, truth in frames.items()}


def write_tree(protocol: str, root: Path) -> Tree:
    """The smallest tree that the protocol takes."""
    writers = {
        "sintel": sintel, "tum-pose": tum, "scannet-pose": scannet, "bonn": bonn, "kitti-depth": kitti_video,
        "kitti-mono": kitti_selection, "nyu-mono": nyu, "seven-scenes": seven_scenes, "nrgbd": nrgbd, "re10k": re10k,
    }  # fmt: skip
    assert protocol in PROTOCOLS
    tree = Tree(root)
    writers[protocol if protocol in writers else protocol.partition("-")[0]](tree)
    return tree


def sintel(tree: Tree) -> None:
    k = np.array([[112.0, 0, 48], [0, 112.0, 36], [0, 0, 1]])
    for sequence in ("alley_2", "temple_3"):
        for number, shot in enumerate(shots(4), start=1):
            depth = shot.depth.copy()
            depth[:3] = 1e10  # sky
            name = f"{sequence}/frame_{number:04d}"
            image = f"training/final/{name}.png"
            save(tree.root / image, shot)
            dpt = struct.pack("<fii", 202021.25, SIZE[1], SIZE[0]) + depth.astype("<f4").tobytes()
            write(tree.root / f"training/depth/{name}.dpt", dpt)
            cam = struct.pack("<f", 202021.25) + k.astype("<f8").tobytes()
            cam += shot.world_to_camera.astype("<f8").tobytes()
            write(tree.root / f"training/camdata_left/{name}.cam", cam)
            tree.add(sequence, image, Truth(depth, inverse(shot.world_to_camera), k))


def tum(tree: Tree) -> None:
    k = np.array([[535.4, 0, 320.6], [0, 539.2, 248.1], [0, 0, 1]])
    for sequence in ("rgbd_dataset_freiburg3_sitting_xyz", "rgbd_dataset_freiburg3_walking_xyz"):
        folder = tree.root / sequence
        rgb, poses = ["# color images", "# timestamp filename"], ["# timestamp tx ty tz qx qy qz qw"]
        taken = shots(4)
        # Frame 2 has no pose within 20 ms and is not counted; of the others every third is shown.
        counted = [number for number in range(11) if number != 2]
        for number in range(11):
            time = 1341845688.0 + number / 30
            stamp = f"{time:.6f}"
            rgb.append(f"{stamp} rgb/{stamp}.png")
            place = counted.index(number) if number in counted else -1
            shot = taken[place // 3] if place >= 0 else taken[0]
            save(folder / f"rgb/{stamp}.png", shot)
            pose = inverse(shot.world_to_camera)
            if number != 2:
                tx, ty, tz = pose[:, 3]
                for offset, blur in ((0.004, 0.0), (-0.01, 5.0)):  # the nearer one is the truth
                    quaternion = " ".join(f"{x:.9f}" for x in xyzw(pose[:, :3]))
                    poses.append(f"{time + offset:.4f} {tx + blur:.9f} {ty:.9f} {tz:.9f} {quaternion}")
                if place % 3 == 0:
                    tree.add(sequence, f"{sequence}/rgb/{stamp}.png", Truth(None, pose, k))
        write(folder / "rgb.txt", "\n".join(rgb).encode())
        write(folder / "groundtruth.txt", "\n".join(poses).encode())


def bonn(tree: Tree) -> None:
    k = np.array([[542.822841, 0, 316.09352], [0, 542.57687, 238.256098], [0, 0, 1]])
    for sequence in ("rgbd_bonn_balloon2", "rgbd_bonn_crowd3"):
        folder, rgb, depths = tree.root / sequence, [], []
        for number in range(34):
            stamp, depth_stamp = f"{1548266000 + number / 25:.5f}", f"{1548266000.006 + number / 25:.5f}"
            rgb.append(f"{stamp} rgb/{stamp}.png")
            depths.append(f"{depth_stamp} depth/{depth_stamp}.png")
            if number < 30:
                continue
            shot = shots(4)[number - 30]
            save(folder / f"rgb/{stamp}.png", shot)
            depth = depth_png(folder / f"depth/{depth_stamp}.png", shot.depth, 5000)
            tree.add(sequence, f"{sequence}/rgb/{stamp}.png", Truth(depth, None, k))
        write(folder / "rgb.txt", "\n".join(rgb).encode())
        write(folder / "depth.txt", ("# depth maps\n" + "\n".join(reversed(depths))).encode())


def kitti_video(tree: Tree) -> None:
    for drive, place in (("2011_09_26_drive_0002_sync", ""), ("2011_10_03_drive_0047_sync", "raw/")):
        for number, shot in enumerate(wide_shots(3), start=5):
            image = f"{place}{drive[:10]}/{drive}/image_02/data/{number:010d}.png"
            save(tree.root / image, shot)
            truth = tree.root / f"val/{drive}/proj_depth/groundtruth/image_02/{number:010d}.png"
            tree.add(drive, image, Truth(depth_png(truth, sparse(shot.depth), 256)))


def kitti_selection(tree: Tree) -> None:
    base = "depth_selection/val_selection_cropped"
    for number, shot in enumerate(wide_shots(3)):
        stem = f"2011_09_26_drive_0002_sync_{{}}_{number:010d}_image_0{2 + number % 2}"
        image = f"{base}/image/{stem.format('image')}.png"
        save(tree.root / image, shot)
        truth = tree.root / base / "groundtruth_depth" / f"{stem.format('groundtruth_depth')}.png"
        write(tree.root / base / "intrinsics" / f"{stem.format('image')}.txt", b"721.5 0 609.5 0 721.5 172.8 0 0 1 \n")
        k = np.array([[721.5, 0, 610.0], [0, 721.5, 173.3], [0, 0, 1]])
        tree.add(image, image, Truth(depth_png(truth, sparse(shot.depth), 256), None, k))


def nyu(tree: Tree) -> None:
    k = np.array([[518.85790117, 0, 326.08244941], [0, 519.46961112, 254.23616633], [0, 0, 1]])
    for number, shot in enumerate(shots(3)):
        folder = f"official_splits/test/{('bathroom', 'kitchen')[number % 2]}"
        image = f"{folder}/rgb_{number:05d}.jpg"
        save(tree.root / image, shot)
        truth = tree.root / folder / f"sync_depth_{number:05d}.png"
        tree.add(image, image, Truth(depth_png(truth, shot.depth, 1000), None, k))


def seven_scenes(tree: Tree) -> None:
    k = np.array([[525.0, 0, 320.5], [0, 525.0, 240.5], [0, 0, 1]])
    write(tree.root / "chess/TrainSplit.txt", b"sequence1\n")
    write(tree.root / "chess/TestSplit.txt", b"sequence3\nsequence5\n")
    for name in ("seq-01", "seq-03", "seq-05"):
        folder = tree.root / "chess" / name
        for number in range(201):
            stem = folder / f"frame-{number:06d}"
            if number % 200 or name == "seq-01":
                write(Path(f"{stem}.color.png"), b"x")
                continue
            shot = shots(3)[number // 200]
            save(Path(f"{stem}.color.png"), shot)
            stored = np.where(sparse(shot.depth) > 0, shot.depth, 65.535)  # 65535 = unknown
            stored[-1] = 12.0  # beyond the sensor's reach
            is_projected = name == "seq-05"
            kind = "depth.proj" if is_projected else "depth"
            depth = depth_png(Path(f"{stem}.{kind}.png"), stored, 1000)
            if is_projected:  # which is taken in place of the sensor's
                depth_png(Path(f"{stem}.depth.png"), 0 * stored, 1000)
            depth[depth > 10] = 0
            pose = inverse(shot.world_to_camera)
            write(Path(f"{stem}.pose.txt"), matrix_text(pose))
            tree.add(f"chess/{name}", f"chess/{name}/frame-{number:06d}.color.png", Truth(depth, pose, k))


def nrgbd(tree: Tree) -> None:
    focal = 540.5
    k = np.array([[focal, 0, 320.5], [0, focal, 240.5], [0, 0, 1]])
    for scene in ("staircase",):
        folder, poses = tree.root / scene, []
        write(folder / "focal.txt", f"{focal}\n".encode())
        for number in range(501):
            if number % 500:
                write(folder / f"images/img{number}.png", b"x")
                poses.append(b"nan nan nan nan\n" * 4)
                continue
            shot = shots(3)[number // 500]
            save(folder / f"images/img{number}.png", shot)
            depth = depth_png(folder / f"depth/depth{number}.png", shot.depth, 1000)
            pose = inverse(shot.world_to_camera)
            poses.append(matrix_text(pose * np.array([1, -1, -1, 1])))  # OpenGL: y up, z backwards
            tree.add(scene, f"{scene}/images/img{number}.png", Truth(depth, pose, k))
        write(folder / "poses.txt", b"".join(poses))


def scannet(tree: Tree) -> None:
    k = np.array([[1170.2, 0, 648.25], [0, 1170.2, 484.25], [0, 0, 1]])
    stored = b"1170.2 0 647.75 0\n0 1170.2 483.75 0\n0 0 1 0\n0 0 0 1\n"
    for scene in ("scene0707_00", "scene0707_01", "scene0806_00", "scene0706_00"):
        folder = tree.root / "scans_test" / scene
        write(folder / "intrinsic/intrinsic_color.txt", stored)
        for number in range(13):
            shot = shots(5)[number // 3]
            save(folder / f"color/{number}.jpg", shot)
            is_lost = number == 3
            pose = inverse(shot.world_to_camera)
            write(folder / f"pose/{number}.txt", b"-inf -inf -inf -inf\n" * 4 if is_lost else matrix_text(pose))
            if number % 3 == 0 and scene in ("scene0707_00", "scene0806_00"):
                tree.add(scene, f"scans_test/{scene}/color/{number}.jpg", Truth(None, None if is_lost else pose, k))


def re10k(tree: Tree) -> None:
    for clip, count, place in (
        ("000c3ab189999a83", 12, "frames/test"),
        ("ffe17d5c94b0b1e3", 10, "test"),
        ("00few", 9, "test"),
    ):
        lines = [f"https://www.youtube.com/watch?v={clip}"]
        for number, shot in enumerate(shots(12)[:count]):
            stamp = f"{52553000 + 33000 * number}"
            image = f"{place}/{clip}/{stamp}.png"
            save(tree.root / image, shot)
            pose = " ".join(f"{x:.9f}" for x in shot.world_to_camera.flatten())
            lines.append(f"{stamp} 0.5 0.75 0.5 0.25 0.0 0.0 {pose}")
            if count >= 10:
                k = np.array([[48.0, 0, 48.0], [0, 54.0, 18.0], [0, 0, 1]])
                tree.add(clip, image, Truth(None, inverse(shot.world_to_camera), k))
        write(tree.root / f"test/{clip}.txt", "\n".join(lines).encode())


def wide_shots(count: int) -> list[Shot]:
    return [
        Shot(s.image[: WIDE[0]], s.depth[: WIDE[0]], s.is_object[: WIDE[0]], s.world_to_camera) for s in shots(count)
    ]


def sparse(depth: np.ndarray) -> np.ndarray:
    """A laser's share of it."""
    rows, columns = np.indices(depth.shape)
    return np.where((rows + 2 * columns) % 3 == 0, depth, 0)


def depth_png(path: Path, depth: np.ndarray, per_meter: int) -> np.ndarray:
    """Write; returns what the file says, with 0 for 0 and for 65535."""
    steps = np.round(depth.astype(np.float64) * per_meter).astype(np.uint16)
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), steps)
    return np.where(steps == 65535, 0, steps).astype(np.float32) / np.float32(per_meter)


def save(path: Path, shot: Shot) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(shot.image).save(path)


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def matrix_text(pose: np.ndarray) -> bytes:
    rows = [*pose.tolist(), [0.0, 0.0, 0.0, 1.0]]
    return "".join(" ".join(f"{x:.9e}" for x in row) + "\n" for row in rows).encode()


def inverse(transform: np.ndarray) -> np.ndarray:
    return np.linalg.inv(np.vstack([transform, [0, 0, 0, 1]]))[:3]


def xyzw(rotation: np.ndarray) -> np.ndarray:
    """By the axis and angle that OpenCV finds."""
    vector = cv2.Rodrigues(rotation)[0][:, 0]
    angle = np.linalg.norm(vector)
    return np.append(np.sin(angle / 2) * vector / angle, np.cos(angle / 2))
