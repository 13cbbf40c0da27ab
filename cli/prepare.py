"""`python -m cli prepare`: raw data to shards, the sets that ship with Restrike, and verification. No torch needed."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

from cli.errors import EXIT_USER_ERROR
from restrike.data.catalogue import Catalogue
from restrike.data_prep.errors import PrepareError
from restrike.data_prep.imagenet import prepare_imagenet
from restrike.data_prep.pack import PackOptions
from restrike.data_prep.verify import verify

EXIT_DAMAGED = 1
_INTERRUPTED = 130


def main(argv: list[str]) -> int:
    """Run one subcommand; returns the exit code: 0, 1 (verify found damage), 2 (a mistake, said in one message)."""
    try:
        arguments = _parser().parse_args(argv)
        return arguments.run(arguments)
    except PrepareError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on: finished shards are kept", file=sys.stderr)
        return _INTERRUPTED
    except SystemExit as left:  # argparse: --help
        return int(left.code or 0)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise PrepareError(f"{message}; see {self.prog} --help")


def _parser() -> _Parser:
    parser = _Parser(prog="python -m cli prepare", description="Make, or check, a set of shards.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="imagenet|digits|photos|verify", dest="command")

    imagenet = commands.add_parser("imagenet", help="DIR/train/<class>/<image> and DIR/val/<class>/<image> to shards")
    imagenet.add_argument("--src", type=Path, required=True, help="folder with train/ and val/")
    _add_packing(imagenet, name="imagenet1k", train_shards=1024, val_shards=64, max_bad=20)
    imagenet.set_defaults(run=_imagenet)

    digits = commands.add_parser("digits", help="1,797 handwritten digits that ship with Restrike")
    _add_packing(digits, name="digits", train_shards=4, val_shards=2, max_bad=0)
    digits.set_defaults(run=_embedded)

    photos = commands.add_parser("photos", help="crops of 16 photographs that ship with Restrike")
    _add_packing(photos, name="photos", train_shards=8, val_shards=2, max_bad=0)
    photos.add_argument("--train-per-class", type=_at_least(1), default=100, metavar="N", help="crops (%(default)s)")
    photos.add_argument("--val-per-class", type=_at_least(1), default=25, metavar="N", help="crops (%(default)s)")
    photos.set_defaults(run=_embedded)

    check = commands.add_parser("verify", help="compare a set with its catalogue, byte by byte")
    check.add_argument("--data", type=Path, required=True, help="folder of a prepared set")
    check.add_argument("--decode", action="store_true", help="decode every image too")
    _add_workers(check)
    check.set_defaults(run=_verify)
    return parser


def _add_packing(parser: argparse.ArgumentParser, name: str, train_shards: int, val_shards: int, max_bad: int) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder for shards, indices and catalogue")
    parser.add_argument("--name", default=name, help="prefix of the shards' names (%(default)s)")
    shards = _at_least(1)
    parser.add_argument("--train-shards", type=shards, default=train_shards, metavar="N", help="(%(default)s)")
    parser.add_argument("--val-shards", type=shards, default=val_shards, metavar="N", help="(%(default)s)")
    parser.add_argument("--seed", type=_at_least(0), default=0, metavar="N", help="of the permutation (%(default)s)")
    parser.add_argument(
        "--max-bad", type=_at_least(0), default=max_bad, metavar="N",
        help="go on past so many unreadable images, which are left out and named in bad_images.txt (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--max-side", type=_at_least(1), metavar="PX",
        help="shrink larger images: smaller shards, but no longer the original bytes",
    )  # fmt: skip
    parser.add_argument("--no-decode-check", action="store_true", help="do not decode each image once")
    _add_workers(parser)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=_at_least(1), default=cores, metavar="N", help="processes (%(default)s)")


def _at_least(least: int) -> type[int]:
    def convert(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {value}")
        return value

    convert.__name__ = "whole number"  # argparse prints it
    return convert  # type: ignore[return-value]


def _options(arguments: argparse.Namespace) -> PackOptions:
    if not arguments.name.replace("-", "").replace("_", "").isalnum():
        raise PrepareError(f"--name: letters, digits, - and _ only, got '{arguments.name}'")
    return PackOptions(
        name=arguments.name,
        shards={"train": arguments.train_shards, "validation": arguments.val_shards},
        seed=arguments.seed,
        workers=arguments.workers,
        max_bad=arguments.max_bad,
        max_side=arguments.max_side,
        check_decode=not arguments.no_decode_check,
    )


def _imagenet(arguments: argparse.Namespace) -> int:
    return _done(prepare_imagenet(arguments.src, arguments.out, _options(arguments)), arguments)


def _embedded(arguments: argparse.Namespace) -> int:
    from restrike.data_prep.embedded import prepare_digits, prepare_photos

    if arguments.command == "digits":
        return _done(prepare_digits(arguments.out, _options(arguments)), arguments)
    per_class = (arguments.train_per_class, arguments.val_per_class)
    return _done(prepare_photos(arguments.out, _options(arguments), *per_class), arguments)


def _done(catalogue: Catalogue, arguments: argparse.Namespace) -> int:
    splits = ", ".join(f"{split.samples:,} {name}" for name, split in catalogue.splits.items())
    size = sum(shard.bytes for split in catalogue.splits.values() for shard in split.shards)
    shards = sum(len(split.shards) for split in catalogue.splits.values())
    what = f"{splits} images of {len(catalogue.classes):,} classes in {shards} shards"
    print(f"{arguments.out}: {what}, {size / 1e6:,.1f} MB")
    if left_out := _left_out(arguments.out):
        print(f"{left_out} unreadable images were left out; they are named in {arguments.out / 'bad_images.txt'}")
    return 0


def _left_out(out: Path) -> int:
    from restrike.data_prep.pack import REPORT_NAME

    return len((out / REPORT_NAME).read_text().splitlines()[2:])


def _verify(arguments: argparse.Namespace) -> int:
    problems = verify(arguments.data, arguments.workers, arguments.decode)
    for problem in problems:
        print(problem)
    print(f"{len(problems)} problems" if problems else f"{arguments.data}: every byte is as the catalogue says")
    return EXIT_DAMAGED if problems else 0
