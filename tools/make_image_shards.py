"""Make and index webdataset shards of images: ``python -m tools.make_image_shards --help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from tools.failure import EXIT_CODES, run_tool
from vision_agglom.images.folder import FolderSource
from vision_agglom.images.open_source import open_source
from vision_agglom.images.pack import encode_jpeg, encode_png, write_shards
from vision_agglom.images.photographs import load_photographs
from vision_agglom.images.randomness import sample_uniforms
from vision_agglom.images.records import Record
from vision_agglom.images.scenes import draw_scene
from vision_agglom.images.shards import write_index

EXAMPLE = """examples:
  python -m tools.make_image_shards folder photos/ --output data/photos
  python -m tools.make_image_shards samples --output data/samples --crops 2000 --scenes 1000 --side 256
  python -m tools.make_image_shards index "downloads/*.tar"

folder packs the images below a folder, bytes unchanged; its subfolders become classes, X.mask.png beside X.jpg its mask.
samples needs no input: crops of the photographs that scikit-image and scikit-learn ship (class: the photograph) into
OUTPUT/photographs-*.tar, and procedural scenes with classes and masks into OUTPUT/scenes-*.tar and OUTPUT/scenes_eval-*.tar.
index writes NAME.tar.index.npy beside shards made by others, which training otherwise scans at every start."""


def build_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.make_image_shards",
        description="Make and index webdataset shards of images.",
        epilog=f"{EXAMPLE}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    folder = verbs.add_parser("folder", help="pack a folder of images")
    folder.add_argument("folder", type=Path)
    folder.add_argument("--output", type=Path, required=True, metavar="PREFIX", help="shards become PREFIX-00000.tar and so on")
    samples = verbs.add_parser("samples", help="crops of shipped photographs, and procedural scenes with labels")
    samples.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    samples.add_argument("--crops", type=int, default=2000, help="crops of photographs (default: %(default)s)")
    samples.add_argument(
        "--scenes", type=int, default=1000, help="scenes to train on; a quarter more for evaluation (default: %(default)s)"
    )
    samples.add_argument("--side", type=int, default=256, help="side of the scenes, and least side of the crops (default: %(default)s)")
    samples.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    for verb in (folder, samples):
        verb.add_argument("--samples-per-shard", type=int, default=1000, help="default: %(default)s")
    index = verbs.add_parser("index", help="write indexes beside shards")
    index.add_argument("shards", nargs="+", type=Path)
    return parser


def read_folder(folder: Path) -> Iterator[Record]:
    """Yield a folder's images with a progress bar."""
    source = FolderSource(folder)
    for number in tqdm(range(len(source)), desc=f"pack {folder}", unit="image"):
        yield source.read(number)


def crop_photographs(count: int, side: int, seed: int) -> Iterator[Record]:
    """Yield ``count`` crops, the photographs by turns, each from ``side`` pixels (or the photograph's shorter side) to all of it."""
    photographs = sorted(load_photographs().items())
    for number in tqdm(range(count), desc="photographs", unit="image"):
        which = number % len(photographs)
        name, image = photographs[which]
        height, width = image.shape[:2]
        share, stretch, across, down = sample_uniforms(4, "photograph", seed, number)
        least = min(side, height, width)
        crop_height = round(least + (height - least) * share)
        crop_width = min(max(round(crop_height * (0.75 + 0.58 * stretch)), least), width)
        top, left = round((height - crop_height) * down), round((width - crop_width) * across)
        yield Record(f"{name}.jpg", encode_jpeg(image[top : top + crop_height, left : left + crop_width]), which)


def draw_scenes(first: int, count: int, side: int, seed: int, title: str) -> Iterator[Record]:
    """Yield scenes ``first`` to ``first + count`` with classes and masks."""
    for index in tqdm(range(first, first + count), desc=title, unit="image"):
        scene = draw_scene(index, side=side, seed=seed)
        yield Record(f"{index}.png", encode_png(scene.image), scene.class_index, encode_png(scene.mask))


def make_samples(arguments: argparse.Namespace) -> list[Path]:
    """Write the three collections and return their shards."""
    output, side, seed = arguments.output, arguments.side, arguments.seed
    num_eval = -(-arguments.scenes // 4)
    collections = {
        "photographs": crop_photographs(arguments.crops, side, seed),
        "scenes": draw_scenes(0, arguments.scenes, side, seed, "scenes"),
        "scenes_eval": draw_scenes(arguments.scenes, num_eval, side, seed, "scenes for evaluation"),
    }
    return [shard for name, records in collections.items() for shard in write_shards(records, output / name, arguments.samples_per_shard)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code: see the help."""
    arguments = build_parser().parse_args(argv)
    return run_tool(lambda: _make(arguments), "finished shards are kept; the same command writes them anew")


def _make(arguments: argparse.Namespace) -> None:
    if arguments.verb == "index":
        for shard in tqdm(arguments.shards, desc="index", unit="shard"):
            tqdm.write(f"{shard}: {write_index(shard):,} images")
        return
    if arguments.verb == "samples":
        shards = make_samples(arguments)
    else:
        shards = write_shards(read_folder(arguments.folder), arguments.output, arguments.samples_per_shard)
    for shard in shards:
        print(f"{shard}: {len(open_source(str(shard))):,} images, {shard.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
