"""ONNX: backbone and every head in one graph, for one image size and any batch, compared with torch in onnxruntime."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from megatron_hybrid.substrate.exit_codes import RunError
from vision_agglom.plain.radio import PlainRadio

OPSET = 18
LARGEST_FILE_BYTES = 1_500_000_000
"""Weights beyond this lie in FILE.data beside the graph: protobuf ends at 2 GB."""

TOLERANCE = 1e-4
"""Largest difference to torch allowed, relative to the output's largest value: both run in fp32 and sum in different orders."""


class _Flat(nn.Module):
    """Named outputs in a fixed order, as a graph has them."""

    def __init__(self, radio: PlainRadio) -> None:
        super().__init__()
        self.radio = radio

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.radio.features(images)
        adaptors = [part for out in features.adaptors.values() for part in (out.summary_BC, out.spatial_BTC) if part is not None]
        return features.summary_BC, features.spatial_BTC, *adaptors


def output_names(radio: PlainRadio) -> list[str]:
    """Return the graph's outputs: summary, features, then NAME.summary (where there is one) and NAME.features of each teacher."""
    names = ["summary", "features"]
    for head in radio.head_shapes:
        names += [f"{head.name}.summary"] if head.summary_channels is not None else []
        names.append(f"{head.name}.features")
    return names


def write_onnx(radio: PlainRadio, path: Path, *, image_side: int) -> float:
    """Write the graph, run it in onnxruntime on noise, and return the largest relative difference to torch.

    Input ``images``: float32 [batch, 3, image_side, image_side], RGB in [0, 1]; the batch is free, the side is not, since the position
    table is resampled to it when the graph is made.

    Raises:
        ValueError: the side is no multiple of the patch.
        RunError: onnxruntime says something else than torch; then no graph is left under ``path``, an older one neither.
    """
    if image_side % radio.shape.patch_size:
        raise ValueError(f"image_side={image_side} is no multiple of the patch of {radio.shape.patch_size} pixels")
    radio = radio.cpu().eval()
    partial = path.with_name(path.name + ".partial") / path.name
    shutil.rmtree(partial.parent, ignore_errors=True)
    partial.parent.mkdir(parents=True)
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in radio.parameters())
    names = output_names(radio)
    example = torch.rand(2, 3, image_side, image_side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), _quiet():
        torch.onnx.export(
            _Flat(radio),
            (example,),
            str(partial),
            input_names=["images"],
            output_names=names,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            dynamo=True,
            external_data=num_bytes > LARGEST_FILE_BYTES,
            verbose=False,
        )
    difference = compare_onnx(radio, partial, image_side)
    for stale in (path, path.with_name(path.name + ".data")):
        stale.unlink(missing_ok=True)
    if not difference <= TOLERANCE:
        shutil.rmtree(partial.parent)
        raise RunError(f"{path}: onnxruntime's outputs differ from torch's by {difference:.1e} of the largest, more than {TOLERANCE}")
    for file in partial.parent.iterdir():
        file.replace(path.parent / file.name)
    partial.parent.rmdir()
    return difference


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of torchvision's operators, which no student has."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def compare_onnx(radio: PlainRadio, path: Path, image_side: int) -> float:
    """Return the largest difference of any output to torch's, relative to that output's largest value, for batches of 1 and 3."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    largest = 0.0
    for batch in (1, 3):
        images = torch.rand(batch, 3, image_side, image_side, generator=torch.Generator().manual_seed(batch))
        got = session.run(output_names(radio), {"images": images.numpy()})
        with torch.no_grad():
            expected = _Flat(radio)(images)
        for ours, theirs in zip(expected, got, strict=True):
            scale = max(float(ours.abs().max()), 1e-12)
            largest = max(largest, float(np.abs(ours.numpy() - theirs).max()) / scale)
    return largest
