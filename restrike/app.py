"""Console script of the wheel: `restrike fit …` is `python -m cli fit …`."""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> int:
    """Put the application's folders first on `sys.path` and hand over to the command line.

    In a wheel they lie in `restrike/_app`; in a checkout beside the package.
    """
    here = Path(__file__).resolve().parent
    root = here / "_app" if (here / "_app").is_dir() else here.parent
    sys.path.insert(0, str(root))
    from cli.__main__ import main as cli_main

    return cli_main()
