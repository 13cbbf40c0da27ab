"""Photographs as people have them, and each family's view of one."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from restrike.data.decode import DecodeError
from restrike.data.photo_views import CUT3RPhotos, DiffusionSfMPhotos, VGGTPhotos, stack_views
from restrike.data.photos import copy_upright, list_photos, open_photo, plain_names
from restrike.data.predicted_views import cell_centers, crop_pixel_intrinsics, whole_photo_intrinsics
from restrike.models.diffusionsfm.preprocess import load_images as load_diffusionsfm
from restrike.models.vggt.preprocess import load_images as load_vggt

JPEGS = Path(__file__).resolve().parents[2] / "data" / "jpegs"
TURNED = JPEGS / "astronaut_256x192_exif_orientation6.jpg"
PHOTOS = [JPEGS / "chelsea_451x300_q92_422.jpg", JPEGS / "coffee_500x333_q90_420.jpg"]


def ramp(width: int, height: int) -> Image.Image:
    """Red tells x, green tells y, each as a share of the side."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = ((np.arange(width) + 0.5) / width * 255).round()
    pixels[..., 1] = ((np.arange(height) + 0.5) / height * 255).round()[:, None]
    return Image.fromarray(pixels)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_numbers_in_names_count_as_numbers(tmp_path):
    touch(tmp_path, "img10.jpg", "img2.PNG", "img1.jpg", "b/1.jpg", "notes.txt", "clip.mp4")
    assert list_photos(tmp_path) == ["b/1.jpg", "img1.jpg", "img2.PNG", "img10.jpg"]
    assert list_photos(tmp_path / "img10.jpg") == ["img10.jpg"]


def test_a_place_without_photos_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        list_photos(tmp_path / "nowhere")
    touch(tmp_path, "notes.txt")
    with pytest.raises(ValueError, match=r"no photo \(jpg, .*heic\) in"):
        list_photos(tmp_path)


def test_heic_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    touch(tmp_path, "a.jpg", "IMG_1.HEIC")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ValueError, match="1 of 2 photos .* IMG_1.HEIC: pip install pillow-heif"):
        list_photos(tmp_path)


def test_heic_is_read_where_its_library_is(tmp_path):
    heif = pytest.importorskip("pillow_heif", reason="needs pillow-heif: pip install pillow-heif")
    heif.from_pillow(ramp(64, 48)).save(tmp_path / "a.heic", quality=90)
    assert list_photos(tmp_path) == ["a.heic"]
    photo = open_photo(tmp_path / "a.heic")
    assert photo.size == (64, 48) and np.abs(np.array(photo).astype(int) - np.array(ramp(64, 48))).mean() < 4
    copy_upright(tmp_path / "a.heic", tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as copy:
        assert copy.format == "JPEG"


def test_exif_orientation_is_applied_to_the_photo_and_to_its_copy(tmp_path):
    photo = open_photo(TURNED)
    with Image.open(TURNED) as stored:
        assert photo.size == stored.size[::-1]
    copy_upright(TURNED, tmp_path / "sub" / "copy.jpg")
    with Image.open(tmp_path / "sub" / "copy.jpg") as copy:
        assert copy.size == photo.size and copy.getexif().get(0x0112, 1) == 1
        assert np.abs(np.array(copy).astype(int) - np.array(photo)).mean() < 3


def test_an_upright_photo_is_copied_byte_by_byte(tmp_path):
    copy_upright(PHOTOS[0], tmp_path / "copy.jpg")
    assert (tmp_path / "copy.jpg").read_bytes() == PHOTOS[0].read_bytes()


def test_transparent_pixels_become_white(tmp_path):
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(tmp_path / "a.png")
    assert np.array(open_photo(tmp_path / "a.png")).min() == 255


@pytest.mark.parametrize(
    ("name", "reason"),
    [("corrupt_empty.jpg", "empty"), ("corrupt_truncated_60pct.jpg", "damaged"), ("nowhere.jpg", "no such file")],
)
def test_a_photo_that_cannot_be_read_has_a_reason(name, reason):
    with pytest.raises(DecodeError, match=reason):
        open_photo(JPEGS / name)


def test_a_photo_that_is_too_large_is_refused_before_it_is_decoded():
    with pytest.raises(DecodeError, match="more than 1,000"):
        open_photo(PHOTOS[0], max_pixels=1000)


def test_names_of_copies_are_plain_and_unique():
    assert plain_names(["a b.jpg", "a_b.JPG", "x/IMG.HEIC", "x/IMG.jpg", "c.png", "d.tiff"]) == [
        "a_b.jpg", "a_b_2.jpg", "x/IMG.jpg", "x/IMG_2.jpg", "c.png", "d.jpg",
    ]  # fmt: skip


def test_vggt_sees_what_its_release_loads():
    views = [VGGTPhotos()(open_photo(path)) for path in PHOTOS]
    assert torch.equal(stack_views(views)[0].float() / 255, load_vggt(PHOTOS))


def test_diffusionsfm_sees_what_its_release_loads():
    loaded = load_diffusionsfm(PHOTOS)
    images, boxes, sizes = stack_views([DiffusionSfMPhotos()(open_photo(path)) for path in PHOTOS])
    assert torch.equal(boxes, loaded.crop_boxes) and torch.equal(sizes, loaded.source_sizes)
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    assert (images - (loaded.images * std + mean) * 255).abs().max() <= 1  # Pillow rounds to whole levels


@pytest.mark.parametrize(
    ("photo", "expected"),
    [((1024, 768), (384, 512)), ((768, 1024), (512, 384)), ((600, 600), (384, 512)), ((1000, 333), (160, 512))],
)
def test_cut3r_takes_the_long_side_and_multiples_of_the_patch(photo, expected):
    assert tuple(CUT3RPhotos()(ramp(*photo)).image.shape[1:]) == expected


def test_cut3rs_small_models_take_a_square():
    view = CUT3RPhotos(224, is_square=True)(ramp(640, 480))
    assert tuple(view.image.shape[1:]) == (224, 224)
    assert view.crop_box.tolist() == pytest.approx([80, 0, 560, 480], abs=1.5)


def test_a_photo_too_narrow_for_a_patch_is_refused():
    with pytest.raises(DecodeError, match="10 x 600 pixels are too narrow"):
        CUT3RPhotos()(ramp(600, 10))


@pytest.mark.parametrize("transform", [VGGTPhotos(), CUT3RPhotos(), CUT3RPhotos(224, True), DiffusionSfMPhotos()])
@pytest.mark.parametrize("size", [(640, 360), (300, 500), (900, 900)])
def test_the_crop_box_says_where_every_pixel_comes_from(transform, size):
    view = transform(ramp(*size))
    centers = cell_centers(view.crop_box, tuple(view.image.shape[1:]))
    expected = (centers / torch.tensor(size) * 255).movedim(-1, 0)
    assert view.size == size[::-1]
    assert (view.image[:2] - expected)[:, 3:-3, 3:-3].abs().max() < 2.5  # of 255 levels


def test_views_of_several_sizes_stand_in_white_and_their_boxes_say_so():
    views = [VGGTPhotos(56, 14)(ramp(56, 56)), VGGTPhotos(56, 14)(ramp(112, 56))]
    images, boxes, _ = stack_views(views)
    assert images.shape == (2, 3, 56, 56) and (images[1, :, :14] == 255).all() and (images[1, :, 42:] == 255).all()
    assert boxes[1].tolist() == [0, -28, 112, 84]


def test_intrinsics_of_the_crop_and_of_the_photo_say_the_same():
    intrinsics = torch.tensor([[50.0, 0, 28], [0, 60, 20], [0, 0, 1]])
    box = torch.tensor([-10.0, 30, 102, 70])
    whole = whole_photo_intrinsics(intrinsics, box, (40, 56))
    assert whole[0].tolist() == [100, 0, 46] and whole[1].tolist() == [0, 60, 50]
    torch.testing.assert_close(crop_pixel_intrinsics(whole, box, (40, 56)), intrinsics)
