"""Photographs as people have them: any size, turned by EXIF, HEIC from telephones, transparent PNGs."""

from __future__ import annotations

import os
import re
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from restrike.data.decode import MAX_PIXELS, DecodeError
from restrike.data.folder import is_image
from restrike.data.index import IMAGE_EXTENSIONS

_HEIC = (".heic", ".heif")
_ORIENTATION = 0x0112
_KEPT = {"JPEG": (".jpg", ".jpeg"), "PNG": (".png",)}  # formats that every other tool reads, by their endings
_QUALITY = 95


def list_photos(place: Path, setting: str = "data.images") -> list[str]:
    """Photos below a folder, relative to it; numbers in names count as numbers, so frame2 comes before frame10.

    Args:
        place: A folder, or one photo.
        setting: The option that named it, for messages.

    Raises:
        ValueError: no such place, no photo there, or HEIC without the library for it.
    """
    if place.is_file():
        names = [place.name]
    elif place.is_dir():
        found = (Path(folder) / file for folder, _, files in os.walk(place, followlinks=True) for file in files)
        names = [str(file.relative_to(place)) for file in found if is_image(file.name) or _is_heic(file.name)]
    else:
        raise ValueError(f"{setting}: no such file or folder: {place}")
    if not names:
        kinds = ", ".join((*IMAGE_EXTENSIONS, "heic"))
        raise ValueError(f"{setting}: no photo ({kinds}) in {place}")
    heic = [name for name in names if _is_heic(name)]
    if heic and not _can_read_heic():
        raise ValueError(
            f"{setting}: {len(heic)} of {len(names)} photos in {place} are HEIC, the first {heic[0]}: "
            "pip install pillow-heif, or convert them to JPEG"
        )
    return sorted(names, key=_natural)


def open_photo(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A photo in RGB, the right way up, over white where it is transparent.

    Raises:
        DecodeError: missing, damaged, too large, or no picture; the message is the reason.
    """
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height > max_pixels:
                raise DecodeError(
                    f"{picture.height} x {picture.width} pixels are more than {max_pixels:,} (max_pixels)"
                )
            upright = ImageOps.exif_transpose(picture)
            if upright.mode not in ("RGBA", "LA", "PA") and "transparency" not in upright.info:
                return upright.convert("RGB")
            opaque = upright.convert("RGBA")
    except DecodeError:
        raise
    except FileNotFoundError:
        raise DecodeError("no such file") from None
    except UnidentifiedImageError:
        raise DecodeError("no picture that Pillow can read" if path.stat().st_size else "the file is empty") from None
    except Exception as error:  # Pillow's plug-ins raise OSError, SyntaxError, struct.error … on damage
        raise DecodeError(f"damaged: {error}") from error
    return Image.alpha_composite(Image.new("RGBA", opaque.size, (255, 255, 255, 255)), opaque).convert("RGB")


def copy_upright(source: Path, target: Path) -> None:
    """Copy a photo for tools that ignore EXIF: byte by byte where it stands upright, else turned and written anew."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(source) as picture:
        is_plain = picture.getexif().get(_ORIENTATION, 1) == 1 and picture.mode in ("RGB", "L")
        is_kept = is_plain and target.suffix.lower() in _KEPT.get(picture.format or "", ())
    if is_kept:
        target.write_bytes(source.read_bytes())
    else:
        open_photo(source).save(target, quality=_QUALITY)


def plain_names(names: list[str]) -> list[str]:
    """File names for copies, in order: .jpg or .png, unique, and without blanks, which COLMAP's text cannot hold."""
    taken: set[str] = set()
    result = []
    for name in names:
        stem, suffix = os.path.splitext(re.sub(r"[^\w./-]", "_", name))
        suffix = suffix.lower() if suffix.lower() in (".jpg", ".jpeg", ".png") else ".jpg"
        candidate, number = f"{stem}{suffix}", 2
        while candidate.lower() in taken:  # one name on disks that do not know case
            candidate, number = f"{stem}_{number}{suffix}", number + 1
        taken.add(candidate.lower())
        result.append(candidate)
    return result


def _is_heic(name: str) -> bool:
    return name.lower().endswith(_HEIC)


def _can_read_heic() -> bool:
    try:
        from pillow_heif import register_heif_opener  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        return False
    register_heif_opener()
    return True


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts digits by value, other text by itself; the folder before its files."""
    words = re.split(r"(\d+)", name.replace(os.sep, "/"))
    return [(0, int(word), word) if word.isdecimal() else (1, 0, word) for word in words if word]
