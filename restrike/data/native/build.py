"""Build the JPEG region decoder: `python -m restrike.data.native.build`.

Needs a C compiler and libjpeg-turbo's headers (Debian and Ubuntu: `apt-get install gcc libjpeg-dev`). The library
goes into the user's cache folder under a name that carries the hash of its source, so that versions never mix.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("region_decode.c")
_FLAGS = ("-O3", "-Wall", "-Wextra", "-fPIC", "-shared")


class BuildError(RuntimeError):
    """The compiler is missing or refused the source."""


def extension_path() -> Path:
    """Where this version's library is, or would be, on this machine."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    version = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    return (
        cache / "restrike" / "native" / f"region_decode-{version}-{platform.system()}-{platform.machine()}.so".lower()
    )


def build() -> Path:
    """Compile and install the library; `CC` chooses the compiler.

    Raises:
        BuildError: with the compiler's words and what to install.
    """
    path = extension_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    compiler = shlex.split(os.environ.get("CC") or "cc")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        output = Path(folder) / path.name
        command = [*compiler, *_FLAGS, str(SOURCE), "-ljpeg", "-o", str(output)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise BuildError(f"no C compiler: {error}. Install one (Debian: apt-get install gcc) or set CC") from None
        if done.returncode != 0:
            raise BuildError(
                f"{shlex.join(command)} failed:\n{done.stderr.strip()}\n"
                "If jpeglib.h or libjpeg is missing, install libjpeg-turbo (Debian: apt-get install libjpeg-dev)"
            )
        os.replace(output, path)  # whole or not at all, also with several builders
    return path


def main() -> int:
    try:
        path = build()
    except BuildError as error:
        print(f"not built, image decoding stays in Python: {error}", file=sys.stderr)
        return 1
    print(f"built {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
