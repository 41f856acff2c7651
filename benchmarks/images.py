"""Throughput of the image stream: decoding, cropping and batching of JPEG, against Pillow decoding whole images.

    python -m benchmarks.images [--workers 0 1 2] [--resolutions 224 432] [--shards "data/*.tar"] [--device cuda] [--picture images.png]

Without --shards it makes one of the photographs that scikit-image and scikit-learn ship, enlarged to 1,500 x 1,000 pixels or so, about the
size of SA-1B's and larger than most of DataComp's. The first line is one process that decodes every image whole, converts and resizes it,
as a plain Dataset would.
"""

from __future__ import annotations

import argparse
import io
import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.options import device, not_negative, picture, positive
from vision_agglom.config.images import ImagesConfig
from vision_agglom.images.framing import frame_sample
from vision_agglom.images.open_source import open_source
from vision_agglom.images.pack import encode_jpeg, write_shards
from vision_agglom.images.photographs import load_photographs
from vision_agglom.images.records import Record
from vision_agglom.images.stream import ImageStream

PLAIN = "Pillow, whole images"
"""One process that decodes every image whole."""


def make_shards(folder: Path) -> str:
    """Write the photographs, enlarged, and return the pattern of their shard."""

    def enlarge(image: np.ndarray) -> np.ndarray:
        scale = 1500 / max(image.shape[:2])
        size = round(image.shape[1] * scale), round(image.shape[0] * scale)
        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))

    records = (Record("x.jpg", encode_jpeg(enlarge(image), quality=90)) for image in load_photographs().values())
    return str(write_shards(records, folder / "photographs", 1000)[0])


def measure_plain(config: ImagesConfig, resolution: int, seconds: float) -> float:
    """Return images/s of one process that decodes whole images."""
    (source,) = (open_source(source.path) for source in config.sources.values())
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        image = Image.open(io.BytesIO(source.read(count % len(source)).image)).convert("RGB")
        box = frame_sample(image.width, image.height, config, count).box
        square = np.asarray(image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box))
        torch.from_numpy(square.copy()).permute(2, 0, 1).float().div_(255)
        count += 1
    return count / elapsed


def measure_stream(config: ImagesConfig, resolution: int, micro_batch: int, place: torch.device, seconds: float) -> float:
    """Return images/s of the stream once its workers are at work."""
    with ImageStream(config, resolution=resolution, micro_batch=micro_batch, device=place) as stream:
        for _ in itertools.islice(stream, 1 + config.num_workers * config.batches_ahead):
            pass
        start, count = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < seconds:
            batch = next(stream)
            count += len(batch.sample_indices_B)
        if batch.images_BCHW.is_cuda:
            torch.cuda.synchronize()
    return count / elapsed


def main() -> None:
    """Print one line per resolution and number of workers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=not_negative, nargs="+", default=[0, 1, 2], help="default: %(default)s")
    parser.add_argument("--resolutions", type=positive, nargs="+", default=[224, 432, 1024], help="default: %(default)s")
    parser.add_argument("--micro-batch", type=positive, default=16, help="default: %(default)s")
    parser.add_argument("--seconds", type=positive, default=5, help="of each measurement (default: %(default)s)")
    parser.add_argument("--shards", help="webdataset shards or a folder of your own")
    parser.add_argument("--device", type=device, default="cpu", help="default: %(default)s")
    parser.add_argument("--picture", type=picture, help="PNG to draw; none unless given")
    arguments = parser.parse_args()
    rates: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.shards or make_shards(Path(folder))
        try:
            open_source(path)
        except ValueError as error:
            parser.error(f"--shards: {error}")
        print(f"{'resolution':>10} {'workers':>22} {'images/s':>9}", flush=True)
        for resolution in arguments.resolutions:
            rates[resolution] = {}
            for num_workers in (None, *arguments.workers):
                config = ImagesConfig.model_validate({"sources": {"x": {"path": path}}, "num_workers": num_workers or 0})
                if num_workers is None:
                    label, rate = PLAIN, measure_plain(config, resolution, arguments.seconds)
                else:
                    label, rate = (
                        str(num_workers),
                        measure_stream(config, resolution, arguments.micro_batch, arguments.device, arguments.seconds),
                    )
                rates[resolution][label] = rate
                print(f"{resolution:10} {label:>22} {rate:9.1f}", flush=True)
    if arguments.picture is not None:
        draw(rates, arguments.picture)


def draw(rates: dict[int, dict[str, float]], path: Path) -> None:
    """Images/s of each way, side by side, one panel per resolution."""
    figure = Figure(figsize=(3.4 * len(rates), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (resolution, by_way) in zip(figure.subplots(1, len(rates), squeeze=False)[0], rates.items(), strict=True):
        ways = ["plain" if way == PLAIN else f"{way} workers" for way in by_way]
        axes.bar_label(axes.bar(ways, list(by_way.values())), fmt="%.0f")
        axes.set(title=f"{resolution} pixels", ylabel="images/s")
        axes.tick_params(axis="x", labelrotation=30)
        axes.margins(y=0.1)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
