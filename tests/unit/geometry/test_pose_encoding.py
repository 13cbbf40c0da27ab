from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multiview_cases import random_scene
from restrike import geometry as g

seeds = st.integers(0, 10**6)
SIZE = (4, 6)


@given(seeds)
def test_vggts_encoding_keeps_all_but_the_principal_point(seed: int) -> None:
    scene = random_scene(seed)
    cameras, intrinsics = g.decode_pose_fov(g.encode_pose_fov(scene.world_to_camera, scene.intrinsics, SIZE), SIZE)
    torch.testing.assert_close(cameras, scene.world_to_camera)
    torch.testing.assert_close(g.split_intrinsics(intrinsics)[0], g.split_intrinsics(scene.intrinsics)[0])
    assert (g.split_intrinsics(intrinsics)[1] == torch.tensor([3.0, 2.0])).all()


@given(seeds, st.floats(0.1, 10))
def test_cut3rs_encoding_comes_back_and_quaternions_need_no_unit_length(seed: int, length: float) -> None:
    poses = g.invert_se3(random_scene(seed).world_to_camera)
    encoding = g.encode_pose(poses)
    assert (encoding[..., 3] >= 0).all()
    scaled = torch.cat([encoding[..., :3], -length * encoding[..., 3:]], dim=-1)
    torch.testing.assert_close(g.decode_pose(scaled), poses)


@given(seeds)
def test_relative_encodings_are_encodings_of_relative_poses(seed: int) -> None:
    poses = g.invert_se3(random_scene(seed).world_to_camera)
    relative = g.relative_pose_encoding(g.encode_pose(poses[:, :1]).expand(2, 3, 7), g.encode_pose(poses))
    torch.testing.assert_close(g.decode_pose(relative), g.to_first_pose(poses))


def test_gradients_of_both_encodings_equal_finite_differences() -> None:
    scene = random_scene(0, batch=1, views=2)
    cameras, intrinsics = scene.world_to_camera.requires_grad_(), scene.intrinsics.requires_grad_()
    assert torch.autograd.gradcheck(lambda e, k: g.encode_pose_fov(e, k, SIZE), (cameras, intrinsics))
    encoding = g.encode_pose_fov(cameras, intrinsics, SIZE).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: g.decode_pose_fov(x, SIZE), encoding)
    pose = g.encode_pose(cameras).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: g.encode_pose(g.decode_pose(x)), pose)


def test_encodings_of_the_wrong_length_are_named() -> None:
    with pytest.raises(ValueError, match=r"encoding: expected shape \[..., 9\], got \[2, 7\]"):
        g.decode_pose_fov(torch.zeros(2, 7), SIZE)
