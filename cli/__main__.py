"""`python -m cli`: answers what needs no library at once, and hands the rest over."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from cli.arguments import SUBCOMMANDS
from cli.errors import EXIT_USER_ERROR, UserError, did_you_mean

# Subcommands with a `main(argv)` of their own.
TOOLS = {
    "prepare": "cli.prepare",
    "doctor": "cli.doctor",
    "plan": "cli.plan",
    "export": "cli.export",
    "view": "cli.view",
}

HELP = """\
usage: python -m cli SUBCOMMAND [options] [overrides]

Train, evaluate and use published vision models from one recipe file.

run a recipe:
  fit        train:                   python -m cli fit --config conf/fastervit_0.yaml
  validate   the validation split:    python -m cli validate --config conf/fastervit_0.yaml --ckpt_path last
  test       the test split:          python -m cli test --config conf/fastervit_0.yaml --ckpt_path best
  predict    a folder of images:      python -m cli predict --config conf/predict.yaml --data.images DIR …
             photos to a scene:       … --config conf/smoke_vggt.yaml --ckpt_path last --data.images DIR --data.out DIR

before a run:
  doctor     what would go wrong:     python -m cli doctor --config conf/fastervit_0.yaml trainer=slurm
  plan       what it will take:       python -m cli plan --config conf/fastervit_0.yaml --device a100-40
  prepare    raw data into shards:    python -m cli prepare imagenet --src DIR --out DIR

after a run:
  view       look at it:              python -m cli view RUN_OR_SCENE_DIR
  export     for other tools:         python -m cli export --config conf/fastervit_0.yaml --format onnx …

options of a run:
  --config FILE       a recipe of conf/, or a run's saved config; several are layered, the later over the earlier
  --model.lr 0.004    any argument of the model, the data module, the trainer, a callback or a logger
  model=fastervit_4   another choice from a group of conf/;  ~callbacks.mesa  takes a part out
  -m key=1,2          one run per value
  --print_config      show the whole composed and checked config, run nothing
  --run_dir DIR       where the run writes
  --ckpt_path PATH    a checkpoint, or 'last' or 'best' of the run folder

`python -m cli SUBCOMMAND --help` lists every option of one subcommand; --version prints the version.
"""


def _guard_against_namesakes() -> None:
    """Packages called `callbacks` exist on PyPI: one that shadows ours must not be imported unnoticed."""
    root = Path(__file__).resolve().parent.parent
    for name in ("callbacks", "datamodules", "lightning_modules"):
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin is None or origin.parent.parent != root:
            raise UserError(
                f"the package '{name}' is found at {origin}, not in {root}: start from the checkout's folder"
            )


def main(argv: list[str] | None = None) -> int:
    """Run one command line; returns its exit code (2 for a user's mistake)."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if argv[0] == "--version":
        from restrike import __version__

        print(f"restrike {__version__}")
        return 0
    try:
        if argv[0] not in (*SUBCOMMANDS, *TOOLS):
            names = [*SUBCOMMANDS, *TOOLS]
            raise UserError(f"unknown subcommand '{argv[0]}': one of {', '.join(names)}.{did_you_mean(argv[0], names)}")
        if argv[0] != "prepare":
            _guard_against_namesakes()
        if argv[0] in TOOLS:
            return int(importlib.import_module(TOOLS[argv[0]]).main(argv[1:]) or 0)
        from cli.main import run

        return run(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
