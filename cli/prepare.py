"""`python -m cli prepare`: raw data to shards, the sets that ship with Restrike, and verification. No torch needed."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

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
    known = "imagenet|digits|photos|co3d|scenes|toy|verify"
    commands = parser.add_subparsers(required=True, metavar=known, dest="command")

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

    _add_multiview(commands)

    check = commands.add_parser("verify", help="compare a set with its catalogue, byte by byte")
    check.add_argument("--data", type=Path, required=True, help="folder of a prepared set")
    check.add_argument("--decode", action="store_true", help="decode every image too")
    _add_workers(check)
    check.set_defaults(run=_verify)
    return parser


def _add_multiview(commands: Any) -> None:
    co3d = commands.add_parser("co3d", help="a CO3D v2 tree to shards that serve every multi-view family")
    co3d.add_argument("--src", type=Path, required=True, help="folder with <category>/frame_annotations.jgz")
    co3d.add_argument("--out", type=Path, required=True, help="folder for shards, indices and catalogue")
    co3d.add_argument("--name", default="co3d", help="prefix of the shards' names (%(default)s)")
    co3d.add_argument(
        "--profile", choices=("S", "L", "full"), default="S",
        help="short side 384 px (CUT3R, DiffusionSfM), 640 px (VGGT at 518), or as it is (%(default)s)",
    )  # fmt: skip
    co3d.add_argument("--categories", nargs="+", default=[], metavar="NAME", help="only these (all)")
    co3d.add_argument("--sequences-per-shard", type=_at_least(1), metavar="N", help="(about 1 GB of CO3D)")
    co3d.add_argument("--max-bad", type=_at_least(0), default=1000, metavar="N",
                      help="go on past so many unusable frames; bad_frames.txt names them (%(default)s)")  # fmt: skip
    co3d.add_argument("--raydiffusion-annotations", type=Path, metavar="DIR", help="its <category>_<train|test>.jgz")
    co3d.add_argument("--vggt-annotations", type=Path, metavar="DIR", help="co3d_anno's <category>_<train|test>.jgz")
    _add_workers(co3d)
    co3d.set_defaults(run=_co3d)

    _add_scenes(commands)

    toy = commands.add_parser("toy", help="write a small CO3D v2 tree of ray-cast scenes, exact to the last bit")
    toy.add_argument("--out", type=Path, required=True, help="folder of the tree; give it to `prepare co3d --src`")
    toy.add_argument("--categories", nargs="+", metavar="NAME", help="(four seen ones and an unseen one)")
    toy.add_argument("--sequences", type=_at_least(1), default=12, metavar="N", help="per category (%(default)s)")
    toy.add_argument("--frames", type=_at_least(1), default=30, metavar="N", help="per sequence (%(default)s)")
    toy.add_argument("--size", type=_at_least(16), default=192, metavar="PX", help="short side (%(default)s)")
    toy.add_argument("--fps", type=_at_least(1), default=10, metavar="N", help="of the time stamps (%(default)s)")
    toy.add_argument("--seed", type=_at_least(0), default=0, metavar="N", help="of everything (%(default)s)")
    toy.add_argument("--rooms", choices=("own", "category"), default="own",
                     help="one for each sequence, or one for all of a category (%(default)s)")  # fmt: skip
    _add_workers(toy)
    toy.set_defaults(run=_toy)


def _add_scenes(commands: Any) -> None:
    scenes = commands.add_parser("scenes", help="your photos, COLMAP models or transforms.json to the same shards")
    scenes.add_argument("--src", type=Path, required=True, help="a scene's folder, or one that holds several")
    scenes.add_argument("--out", type=Path, required=True, help="folder for shards, indices and catalogue")
    scenes.add_argument("--name", default="scenes", help="prefix of the shards' names (%(default)s)")
    scenes.add_argument("--category", default="own", help="of all scenes, for filter.categories (%(default)s)")
    scenes.add_argument("--layout", choices=("auto", "photos", "colmap", "transforms"), default="auto",
                        help="auto: transforms.json before a COLMAP model before photos")  # fmt: skip
    scenes.add_argument("--images", metavar="DIR", help="folder of the pictures inside a scene (images)")
    scenes.add_argument("--profile", choices=("S", "L", "full"), default="S",
                        help="short side 384 px, 640 px, or as it is (%(default)s)")  # fmt: skip
    scenes.add_argument("--depth-unit", type=float, default=1e-3, metavar="X",
                        help="scene units per count of a 16-bit depth PNG (%(default)s: of millimetres)")  # fmt: skip
    scenes.add_argument("--scale", type=float, default=1.0, metavar="X", help="of the scene (%(default)s)")
    scenes.add_argument("--val-scenes", nargs="+", default=[], metavar="NAME", help="hold these out whole")
    scenes.add_argument("--val-every", type=_at_least(0), default=8, metavar="N",
                        help="hold out every N-th frame of the other scenes, 0 = none (%(default)s)")  # fmt: skip
    scenes.add_argument("--scenes-per-shard", type=_at_least(1), default=8, metavar="N", help="(%(default)s)")
    scenes.add_argument("--max-bad", type=_at_least(0), default=10, metavar="N",
                        help="go on past so many unusable frames; bad_frames.txt names them (%(default)s)")  # fmt: skip
    _add_workers(scenes)
    scenes.set_defaults(run=_scenes)


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


def _plain_name(name: str) -> str:
    if not name.replace("-", "").replace("_", "").isalnum():
        raise PrepareError(f"--name: letters, digits, - and _ only, got '{name}'")
    return name


def _options(arguments: argparse.Namespace) -> PackOptions:
    return PackOptions(
        name=_plain_name(arguments.name),
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


def _co3d(arguments: argparse.Namespace) -> int:
    from restrike.data_prep.co3d import SceneOptions, prepare_co3d
    from restrike.data_prep.scene_set import bad_frame_counts

    folders = {"raydiffusion": arguments.raydiffusion_annotations, "vggt": arguments.vggt_annotations}
    options = SceneOptions(
        name=_plain_name(arguments.name),
        profile=arguments.profile,
        categories=tuple(arguments.categories),
        sequences_per_shard=arguments.sequences_per_shard or 0,
        workers=arguments.workers,
        max_bad=arguments.max_bad,
        derived=tuple((name, folder) for name, folder in folders.items() if folder is not None),
    )
    catalogue = prepare_co3d(arguments.src, arguments.out, options)
    size = sum(shard.bytes for shard in catalogue.shards)
    what = f"{catalogue.frames:,} frames of {catalogue.sequences:,} sequences, {len(catalogue.categories)} categories"
    print(f"{arguments.out}: {what} in {len(catalogue.shards)} shards, {size / 1e6:,.1f} MB")
    print(f"{bad_frame_counts(arguments.out)} ({arguments.out / 'bad_frames.txt'})")
    return 0


def _scenes(arguments: argparse.Namespace) -> int:
    from restrike.data_prep.own_scenes import ReadOptions
    from restrike.data_prep.own_set import OwnSetOptions, prepare_scenes
    from restrike.data_prep.scene_set import bad_frame_counts

    read = ReadOptions(
        layout=arguments.layout,
        images=arguments.images,
        depth_unit=arguments.depth_unit,
        scale=arguments.scale,
        val_scenes=tuple(arguments.val_scenes),
        val_every=arguments.val_every,
    )
    options = OwnSetOptions(
        name=_plain_name(arguments.name),
        category=_plain_name(arguments.category),
        profile=arguments.profile,
        read=read,
        scenes_per_shard=arguments.scenes_per_shard,
        workers=arguments.workers,
        max_bad=arguments.max_bad,
    )
    catalogue = prepare_scenes(arguments.src, arguments.out, options)
    size = sum(shard.bytes for shard in catalogue.shards)
    what = f"{catalogue.frames:,} frames of {catalogue.sequences:,} scenes in {len(catalogue.shards)} shards"
    print(f"{arguments.out}: {what}, {size / 1e6:,.1f} MB")
    print(f"{bad_frame_counts(arguments.out)} ({arguments.out / 'bad_frames.txt'})")
    return 0


def _toy(arguments: argparse.Namespace) -> int:
    from restrike.data_prep.toy import DEFAULT_CATEGORIES, ToyOptions, prepare_toy

    options = ToyOptions(
        categories=tuple(arguments.categories or DEFAULT_CATEGORIES),
        sequences=arguments.sequences,
        frames=arguments.frames,
        size=arguments.size,
        fps=arguments.fps,
        seed=arguments.seed,
        rooms=arguments.rooms,
        workers=arguments.workers,
    )
    frames = prepare_toy(arguments.out, options)
    print(f"{arguments.out}: {frames:,} frames of {len(options.categories)} categories, a CO3D v2 tree")
    return 0


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
    from restrike.data_prep.co3d_verify import is_multiview_set, verify_multiview

    if is_multiview_set(arguments.data):
        problems = verify_multiview(arguments.data, arguments.workers)
    else:
        problems = verify(arguments.data, arguments.workers, arguments.decode)
    for problem in problems:
        print(problem)
    print(f"{len(problems)} problems" if problems else f"{arguments.data}: every byte is as the catalogue says")
    return EXIT_DAMAGED if problems else 0
