"""Image sizes, windows, and the order of carrier tokens."""

import pytest
import torch

from restrike.models import build
from restrike.models.fastervit.windows import (
    GlobalTokenizer,
    carriers_to_raster,
    carriers_to_windows,
    from_windows,
    to_windows,
    upsample_carriers,
)
from tiny_models import random_images, tiny_fastervit


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (97, 130), (230, 230), (232, 224), (64, 256), (300, 40)])
@pytest.mark.parametrize("resolution", [128, (96, 160), 32])
def test_any_res_models_take_any_size_in_training_and_evaluation(size, resolution):
    model = tiny_fastervit("faster_vit_3_any_res", resolution=resolution)
    model.train()(random_images(2, 3, *size)).sum().backward()
    with torch.no_grad():
        assert model.eval()(random_images(1, 3, *size)).shape == (1, 10)
        stages = model.forward_intermediates(random_images(1, 3, *size), intermediates_only=True)
    height, width = size
    for stage, stride in zip(stages, (4, 8, 16, 32), strict=True):
        assert stage.shape[-2:] == (-(-height // stride), -(-width // stride))


def test_at_its_own_resolution_an_any_res_model_is_the_fixed_one():
    fixed, any_res = tiny_fastervit("faster_vit_3_224").eval(), tiny_fastervit("faster_vit_3_any_res").eval()
    assert list(fixed.state_dict()) == list(any_res.state_dict())
    images = random_images(1, 3, 128, 128)
    with torch.no_grad():
        assert torch.equal(fixed(images), any_res(images))


@pytest.mark.parametrize("as_released", [True, False])
@pytest.mark.parametrize("size", [(128, 192), (192, 128), (64, 64), (192, 192)])
def test_the_input_decides_as_the_constructor_would(size, as_released):
    images = random_images(1, 3, *size)
    built_so = tiny_fastervit("faster_vit_3_any_res", resolution=size, as_released=as_released).eval()
    built_otherwise = tiny_fastervit("faster_vit_3_any_res", resolution=256, as_released=as_released).eval()
    if not as_released and size[0] != size[1]:  # here the square model's carriers have an embedding to use
        for block in built_otherwise.levels[2].blocks:
            block.hat_pos_embed = None
    with torch.no_grad():
        assert torch.equal(built_so(images), built_otherwise(images))


def test_fixed_models_refuse_sizes_that_windows_do_not_divide():
    model = tiny_fastervit()
    with pytest.raises(ValueError, match=r"10x10 does not divide into windows of 4x4.*any_res"):
        model(random_images(1, 3, 160, 160))
    assert model(random_images(2, 3, 256, 128)).shape == (2, 10)


def test_constructor_refuses_what_windows_do_not_divide():
    with pytest.raises(ValueError, match=r"resolution 160 gives stage 2 a feature map of side 10.*window_size\[2\]"):
        tiny_fastervit(resolution=160)
    with pytest.raises(ValueError, match=r"window_size has 2 entries, depths has 4"):
        tiny_fastervit(window_size=(7, 7))
    with pytest.raises(ValueError, match="num_heads=3"):
        tiny_fastervit(num_heads=(1, 1, 3, 4))


def test_resolution_may_be_called_img_size_and_reaches_the_data_settings():
    model = build("faster_vit_0_any_res", img_size=(256, 320), dim=8, in_dim=8, num_heads=(1, 1, 1, 1))
    assert model.resolution == (256, 320) and model.default_cfg["input_size"] == (3, 256, 320)


def test_an_unused_tokenizer_has_no_gradient_to_wait_for():
    model = tiny_fastervit("faster_vit_3_any_res", resolution=32)
    assert any(".global_tokenizer." in name for name, _ in model.named_parameters())
    model.train()(random_images(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_corrected_order_makes_carriers_follow_a_mirrored_image():
    # Mirrored rows and columns swap the roles of a and b; only the released order treats them differently.
    carriers = torch.arange(2 * 3 * 4).view(1, -1, 1).float()
    raster = carriers_to_raster(carriers, (2, 3), 2)
    assert torch.equal(carriers_to_windows(raster, (2, 3), 2, as_released=False), carriers)
    assert not torch.equal(carriers_to_windows(raster, (2, 3), 2, as_released=True), carriers)
    square = torch.arange(3 * 3 * 4).view(1, -1, 1).float()
    assert torch.equal(carriers_to_windows(carriers_to_raster(square, (3, 3), 2), (3, 3), 2, True), square)


def test_windows_and_back():
    x = random_images(2, 6, 9, 4)
    windows = to_windows(x, 3)
    assert torch.equal(windows[1], x[0, :3, 3:6].reshape(9, 4)) and torch.equal(windows[6], x[1, :3, :3].reshape(9, 4))
    assert torch.equal(from_windows(windows, (2, 3), 3), x)


def test_carriers_grow_as_nearest_neighbours_do():
    carriers = random_images(5, 4, 3)
    grid = carriers.transpose(1, 2).unflatten(2, (2, 2))
    expected = torch.nn.functional.interpolate(grid, size=(7, 7), mode="nearest").flatten(2).transpose(1, 2)
    assert torch.equal(upsample_carriers(carriers, 2, 7), expected)


def test_tokenizer_makes_the_same_number_of_carriers_for_every_window():
    tokenizer = GlobalTokenizer(dim=3, window_size=7, carrier_size=2)
    for rows, columns in ((1, 1), (2, 2), (2, 3), (5, 1)):
        assert tokenizer(random_images(2, 3, 7 * rows, 7 * columns)).shape == (2, rows * columns * 4, 3)
    ones = torch.ones(1, 3, 14, 14)
    torch.nn.init.dirac_(tokenizer.pos_embed.weight, groups=3)
    torch.nn.init.zeros_(tokenizer.pos_embed.bias)
    assert torch.allclose(tokenizer(ones), torch.ones(1, 16, 3))


def test_stochastic_depth_drops_windows_of_an_image_one_by_one():
    model = tiny_fastervit(drop_path_rate=0.5, num_heads=(1, 1, 1, 1)).train()
    stage = model.levels[3]
    block = stage.blocks[-1]
    block.drop_path.drop_prob = 0.5
    (position,) = [p for i, p in enumerate(stage.positions(None)) if i == len(stage.blocks) - 1]
    torch.manual_seed(0)
    windows = random_images(64, 16, 128)
    out, _ = block(windows, None, position, (8, 8))
    torch.nn.init.zeros_(block.gamma3)
    torch.nn.init.zeros_(block.gamma4)
    plain, _ = block(windows, None, position, (8, 8))
    untouched = (out == plain).all(-1).all(-1)
    assert 5 <= untouched.sum() <= 30  # both branches dropped: a quarter of 64 windows
