"""Throughput of the image stream: decoding, cropping and batching of JPEG, against Pillow decoding whole images.

    python -m benchmarks.images [--workers 0 1 2] [--resolutions 224 432] [--shards "data/*.tar"] [--device cuda]

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
from PIL import Image

from vision_agglom.config.images import ImagesConfig
from vision_agglom.images.framing import frame_sample
from vision_agglom.images.open_source import open_source
from vision_agglom.images.pack import encode_jpeg, write_shards
from vision_agglom.images.photographs import load_photographs
from vision_agglom.images.records import Record
from vision_agglom.images.stream import ImageStream


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


def measure_stream(config: ImagesConfig, resolution: int, micro_batch: int, device: str, seconds: float) -> float:
    """Return images/s of the stream once its workers are at work."""
    with ImageStream(config, resolution=resolution, micro_batch=micro_batch, device=device) as stream:
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
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="default: %(default)s")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[224, 432, 1024], help="default: %(default)s")
    parser.add_argument("--micro-batch", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement (default: %(default)s)")
    parser.add_argument("--shards", help="webdataset shards or a folder of your own")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.shards or make_shards(Path(folder))
        print(f"{'resolution':>10} {'workers':>22} {'images/s':>9}")
        for resolution in arguments.resolutions:
            config = ImagesConfig.model_validate({"sources": {"x": {"path": path}}, "num_workers": 0})
            print(f"{resolution:10} {'Pillow, whole images':>22} {measure_plain(config, resolution, arguments.seconds):9.1f}", flush=True)
            for num_workers in arguments.workers:
                config = ImagesConfig.model_validate({"sources": {"x": {"path": path}}, "num_workers": num_workers})
                rate = measure_stream(config, resolution, arguments.micro_batch, arguments.device, arguments.seconds)
                print(f"{resolution:10} {num_workers:22} {rate:9.1f}", flush=True)


if __name__ == "__main__":
    main()
