"""A folder of photographs without cameras: a scene for prediction, with the focal length that EXIF tells or a guess."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image

from restrike.data.folder import list_images
from restrike.data_prep.errors import PrepareError
from restrike.data_prep.own_frames import Lens, OwnFrame, OwnScene

DEFAULT_FOCAL = 1.2  # of the long side where EXIF is silent: about 45° across, COLMAP's guess too
_FULL_FRAME_DIAGONAL_MM = math.hypot(36, 24)
_EXIF_IFD, _FOCAL_35MM, _ORIENTATION = 0x8769, 0xA405, 0x0112
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap height and width


def read_photos(folder: Path, name: str, images: str | None = None) -> OwnScene:
    """The photos of a folder in sorted order, the right way up.

    Args:
        folder: of the scene.
        name: of the scene.
        images: folder of the photos inside it; None = "images" where there is one, else the folder itself.

    Raises:
        PrepareError: no photos there.
    """
    place = images or ("images" if (folder / "images").is_dir() else "")
    root = folder / place
    if not root.is_dir():
        raise PrepareError(f"--images: no folder {root}")
    paths = list_images(root)
    if not paths:
        raise PrepareError(f"--src: {root} holds no photo (jpg, png, webp, tif, bmp)")
    frames = [OwnFrame(f"{place}/{path}" if place else path, photo_lens(root / path)) for path in paths]
    return OwnScene(name, folder, "photos", frames, [])


def photo_lens(path: Path) -> Lens:
    """Size after EXIF's orientation, and intrinsics with the principal point in the middle.

    A damaged picture has size (1, 1): whoever reads its pixels names it.
    """
    try:
        with Image.open(path) as picture:
            exif = picture.getexif()
            width, height = picture.size
            focal_35mm = float(exif.get_ifd(_EXIF_IFD).get(_FOCAL_35MM, 0) or 0)
            is_turned = exif.get(_ORIENTATION, 1) in _TURNED
    except Exception:  # Pillow's plug-ins raise a dozen types; reading the pixels will name the reason
        return Lens((1, 1), np.eye(3))
    if is_turned:
        width, height = height, width
    focal = DEFAULT_FOCAL * max(width, height)
    if focal_35mm > 0:  # CIPA's definition: by the diagonals
        focal = focal_35mm / _FULL_FRAME_DIAGONAL_MM * math.hypot(width, height)
    return Lens((height, width), np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]]))
