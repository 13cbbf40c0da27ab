"""Points as a binary PLY file: x, y, z, red, green, blue, and confidence where there is one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from restrike.export.scene import ScenePoints

_NAMES = {"<f4": "float", "u1": "uchar"}


def write_ply(path: Path, points: ScenePoints) -> Path:
    """Write the file; OpenCV's axes, as everything here."""
    fields = [(name, "<f4") for name in "xyz"] + [(name, "u1") for name in ("red", "green", "blue")]
    values = [*points.points.T.numpy(), *points.colors.T.numpy()]
    if points.confidence is not None:
        fields.append(("confidence", "<f4"))
        values.append(points.confidence.numpy())
    table = np.zeros(len(points.points), fields)
    for (name, _), column in zip(fields, values, strict=True):
        table[name] = column
    properties = "".join(f"property {_NAMES[kind]} {name}\n" for name, kind in fields)
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(table)}\n{properties}end_header\n"
    path.write_bytes(header.encode("ascii") + table.tobytes())
    return path
