"""Images and labels that are broken or odd: loaded as they are meant, or counted, named and bounded."""

from pathlib import Path

import numpy as np
import pytest

from faults.cases import case
from restrike.data.batches import TooManyBadSamplesError
from restrike.data.decode import DecodeError, decode_rgb
from restrike.data.folder import list_image_folder
from restrike.data.loader import WorkerOptions, create_eval_loader, create_train_loader
from shard_tools import JPEGS, NumberedSource, number_image, picture

ALONE = WorkerOptions(num_workers=0)
ODD = {
    "a PNG under a .jpg name": ("astronaut_64x64_png_content_named", (64, 64)),
    "a CMYK JPEG": ("coffee_300x200_cmyk", (200, 300)),
    "a grey JPEG": ("chelsea_225x150_gray", (150, 225)),
    "a JPEG of 17 x 13 pixels": ("rocket_17x13_tiny", (13, 17)),
}


@case("sample", "{image}", promise="loads as RGB")
@pytest.mark.parametrize("image", ODD)
def test_an_odd_image(image: str) -> None:
    name, size = ODD[image]
    pixels = decode_rgb((JPEGS / f"{name}.jpg").read_bytes())
    assert pixels.shape == (*size, 3)
    assert pixels.dtype == np.uint8
    assert np.ptp(pixels) > 50  # a picture, not a plane


BROKEN: dict[str, tuple[bytes, str]] = {
    "a truncated JPEG": ((JPEGS / "corrupt_truncated_60pct.jpg").read_bytes(), "truncated"),
    "a truncated PNG": (picture(1, 64, "PNG")[:-5000], "Pillow"),
    "an empty file": (b"", "the file is empty"),
    "a text file": (b"<html>404 Not Found</html>", "of no known image format"),
    "a JPEG of nothing but its header": (picture(1)[:20], "Pillow|known image format"),
    "PostScript, which Pillow would hand to a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "of no known image format"),
}


@case("sample", "{image}", promise="refused with the reason, never half a picture")
@pytest.mark.parametrize("image", BROKEN)
def test_a_broken_image(image: str) -> None:
    data, message = BROKEN[image]
    with pytest.raises(DecodeError, match=message):
        decode_rgb(data)


@case("sample", "a picture of more pixels than data.max_pixels", promise="refused before its pixels are allocated")
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_huge_image(kind: str) -> None:
    with pytest.raises(DecodeError, match=r"64 x 64 pixels are more than max_pixels = 4,095"):
        decode_rgb(picture(1, 64, kind), max_pixels=4095)


@case("sample", "a bad training sample", promise="named in the log and counted; the next takes its place")
def test_a_bad_training_sample(caplog: pytest.LogCaptureFixture) -> None:
    loads = create_train_loader(
        NumberedSource(16, bad=(5,)), number_image, None, 4, 0, options=ALONE, max_bad_samples=1
    )
    keys = [key for batch in loads for key in batch.keys]
    assert len(keys) == 16
    assert keys.count("sample6") == 2
    assert "'sample5' in a source of numbers: made bad for the test" in caplog.text


@case("sample", "a label out of range", promise="a bad sample: named with the range, never trained on")
@pytest.mark.parametrize("label", [99, 4, -1])
def test_a_label_out_of_range(label: int, caplog: pytest.LogCaptureFixture) -> None:
    source = NumberedSource(8)
    source.labels[3] = label
    loads = create_train_loader(source, number_image, None, 4, 0, options=ALONE, max_bad_samples=1)
    assert all(0 <= target < 4 for batch in loads for target in batch.targets.tolist())
    assert f"'sample3' in a source of numbers: label {label} is out of range" in caplog.text


@case("sample", "more bad training samples than data.max_bad_samples", promise="the run ends and names one")
def test_too_many_in_training() -> None:
    source = NumberedSource(32, bad=(0, 8, 16, 24))
    with pytest.raises(TooManyBadSamplesError, match="^more than max_bad_samples = 3 .*made bad for the test"):
        list(create_train_loader(source, number_image, None, 4, 0, options=ALONE, max_bad_samples=3))


@case("sample", "no usable image at all", promise="the run ends; it does not search for ever")
def test_no_usable_image() -> None:
    source = NumberedSource(8, bad=tuple(range(8)))
    with pytest.raises(TooManyBadSamplesError):
        list(create_train_loader(source, number_image, None, 4, 0, options=ALONE, max_bad_samples=1000))


@case("sample", "a bad validation sample", promise="the evaluation ends and names it: no metric of fewer images")
def test_a_bad_validation_sample() -> None:
    with pytest.raises(TooManyBadSamplesError, match="'sample5' in a source of numbers"):
        list(create_eval_loader(NumberedSource(8, bad=(5,)), number_image, 2, 4, options=ALONE))


@case("sample", "a bad validation sample where data.max_bad_val_samples allows it", promise="left out of the metrics")
def test_a_bad_validation_sample_that_is_allowed() -> None:
    source = NumberedSource(8, bad=(5,))
    loads = create_eval_loader(source, number_image, 2, 4, options=ALONE, max_bad_samples=1)
    assert sum(int(batch.valid.sum()) for batch in loads) == 7
    assert loads.bad_samples.count == 1


@case("sample", "an image folder that is {state}", promise="refused before training, with the option and the layout")
@pytest.mark.parametrize("state", ["missing", "empty", "without class folders", "with an empty class"])
def test_an_empty_folder(state: str, tmp_path: Path) -> None:
    root = tmp_path / "train"
    messages = {"missing": "no folder", "empty": "it is empty", "with an empty class": "has no image"}
    if state != "missing":
        (root / "cat" if state == "with an empty class" else root).mkdir(parents=True)
    if state == "without class folders":
        (root / "a.jpg").write_bytes(picture(1))
    with pytest.raises(ValueError, match=rf"^data\.data: .*{messages.get(state, 'outside class folders')}"):
        list_image_folder(root, "data.data")
