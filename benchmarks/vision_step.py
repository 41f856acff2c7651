"""A distillation step of a ViT-L/16 student at 432 pixels with three frozen teachers, beside the ideal of its parts.

    python -m benchmarks.vision_step                     one GPU, bf16; about a minute
    python -m benchmarks.vision_step --images made       the same, decoding photographs of 1,500 pixels that it makes (needs scikit-image)
    python -m benchmarks.vision_step --images PATH       or those of a folder or shards
    python -m benchmarks.vision_step --size tiny         a small one anywhere, to see that it runs

Teachers (random weights): CLIP ViT-H/14, SigLIP SO400M/14 and DINOv2-g/14 with registers, each at 378 pixels: 27 x 27 patches like the
student's. The ideal is 1 / (t_student + sum of t_teacher) with every part measured apart in the same process: forward and backward of the
student's blocks alone (no heads, losses, optimizer or data), and each teacher's forward alone. PHI-S statistics are frozen, as they are for
all but the first steps of a run. Every figure is the mean of steps that follow each other without a pause; with images to decode these are
three times as many as the decoders may have ready beforehand.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.images import make_shards
from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.substrate.exit_codes import ExitCode
from megatron_hybrid.substrate.launch import run_on_ranks
from megatron_hybrid.substrate.quiet import silence_known_warnings
from megatron_hybrid.train.optimizer import build_optimizer, wrap_data_parallel
from megatron_hybrid.train.step import train_step
from megatron_hybrid.train.task import StepData
from megatron_hybrid.train.trainer import connect_schedules
from vision_agglom.config.load import load_config
from vision_agglom.config.schema import VisionConfig
from vision_agglom.config.teachers import TeacherConfig
from vision_agglom.contract import ImageBatch, Teacher
from vision_agglom.students.build import build_transformer_config
from vision_agglom.task import Distillation
from vision_agglom.teachers import load_teacher

TEACHERS: dict[str, list[dict[str, Any]]] = {
    "full": [
        {
            "name": "clip",
            "model": "clip",
            "options": {
                "hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120, "patch_size": 14,
                "image_size": 378, "projection_dim": 1024,
            },
        },
        {
            "name": "siglip",
            "model": "siglip",
            "options": {
                "hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304, "patch_size": 14,
                "image_size": 378,
            },
        },
        {
            "name": "dino",
            "model": "dinov2_with_registers",
            "options": {
                "hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True, "patch_size": 14,
                "image_size": 378,
            },
        },
    ],
    "tiny": [
        {
            "name": name,
            "model": model,
            "options": {
                "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128, "patch_size": 14,
                "image_size": 56,
            },
        }
        for name, model in (("clip", "clip"), ("siglip", "siglip"), ("dino", "dinov2_with_registers"))
    ],
}  # fmt: skip
STUDENTS: dict[str, Any] = {
    "full": "vit-l-16",
    "tiny": {"hidden_size": 64, "num_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 128, "max_image_size": 128},
}
RESOLUTIONS = {"full": 432, "tiny": 64}
BATCHES_AHEAD = 2
"""Batches that each decoder may have ready."""


class SameBatch:
    """Noise in device memory, the same micro-batch again and again; ``ImageStream``'s arguments."""

    def __init__(self, config: Any, *, resolution: Any, micro_batch: int, first_sample: int, device: torch.device, **_: Any) -> None:
        side = resolution(first_sample)
        images = torch.rand(micro_batch, 3, side, side, device=device)
        self.batch = ImageBatch(images, torch.arange(first_sample, first_sample + micro_batch), side)

    def __iter__(self) -> Iterator[ImageBatch]:
        return self

    def __next__(self) -> ImageBatch:
        return self.batch

    def close(self) -> None:
        """Nothing is open."""

    def fingerprint(self) -> dict[str, Any]:
        """Nothing is read."""
        return {}


def main() -> int:
    """Measure on one rank and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(STUDENTS), default="full", help="of student and teachers")
    parser.add_argument("--batch", type=int, default=32, help="images per step, in one micro-batch (default: 32)")
    parser.add_argument("--steps", type=int, default=20, help="steps measured, after three for warming up (default: 20)")
    parser.add_argument("--images", help="folder or shards to read, or made for photographs; noise in device memory otherwise")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="decoding processes (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="options of the run, such as parallel.recompute=selective")
    arguments = parser.parse_intermixed_args()
    silence_known_warnings()
    with TemporaryDirectory() as folder:
        if arguments.images == "made":
            arguments.images = make_shards(Path(folder))
        return run_on_ranks(Measurement(arguments), make_run(arguments, Path(folder)))


def make_run(arguments: argparse.Namespace, folder: Path) -> VisionConfig:
    """The run that is measured."""
    sides = {"library": "transformers", "pretrained": False, "sides": "any"}
    run = {
        "run_dir": str(folder / "run"),
        "student": STUDENTS[arguments.size],
        "teachers": [{**sides, **teacher} for teacher in TEACHERS[arguments.size]],
        "images": {
            "sources": {"images": {"path": arguments.images or "noise"}},
            "num_workers": arguments.workers,
            "batches_ahead": BATCHES_AHEAD,
        },
        "stages": [
            {
                "steps": 1000,
                "partitions": [
                    {
                        "resolutions": [RESOLUTIONS[arguments.size]],
                        "batch_size": arguments.batch,
                        "micro_batch_size": arguments.batch,
                    }
                ],
            }
        ],
        "statistics": {"steps": 1},
        "optimizer": {"lr": 1e-4},
        "runtime": {"deterministic": False},
    }
    for teacher in run["teachers"]:
        if teacher["model"].startswith("dinov2"):
            teacher["options"] = {key: value for key, value in teacher["options"].items() if key != "intermediate_size"}
    file = folder / "run.yaml"
    # JSON is YAML.
    file.write_text(json.dumps(run))
    return load_config(file, arguments.overrides)


class Measurement:
    """What each rank does (picklable)."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments

    def __call__(self, run: VisionConfig, substrate: Substrate) -> ExitCode:
        """Measure the step and its parts."""
        config = build_transformer_config(run, substrate)
        streams = {} if self.arguments.images else {"open_stream": SameBatch}
        task = Distillation(run, config, substrate, load=load_on_device, **streams)
        chunks = wrap_data_parallel(task.build_chunks(), run, config)
        optimizer = build_optimizer(chunks, run)
        connect_schedules(config, chunks, optimizer)
        data = task.training_data(0)
        num_ready = BATCHES_AHEAD * self.arguments.workers if self.arguments.images else 0
        steps = max(self.arguments.steps, 3 * num_ready)
        whole_s = self._time(lambda: train_step(task, chunks, optimizer, next(data), substrate), substrate.device, steps)
        step: StepData = next(data)
        data.close()
        images = step.micro_batches[0].batch.images_BCHW
        model = chunks[0].module
        model.train()

        def student() -> None:
            chunks[0].zero_grad_buffer()
            features = model(images, samples=step.micro_batches[0].samples, step=0)
            (features.patches_BTD.float().square().mean() + features.prefix_BSD.float().square().mean()).backward()

        parts_s = {"student": self._time(student, substrate.device)}
        side = images.shape[2] // run.student.patch_size
        for name in run.teacher_names:
            parts_s[name] = self._time(lambda name=name: task.panel.describe({name: images}, side), substrate.device)
        ideal_s, batch = sum(parts_s.values()), self.arguments.batch
        result = {
            "device": torch.cuda.get_device_name() if substrate.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "size": self.arguments.size,
            "batch": batch,
            "images_per_s": round(batch / whole_s, 2),
            "ideal_images_per_s": round(batch / ideal_s, 2),
            "share_of_ideal": round(ideal_s / whole_s, 4),
            "step_ms": round(1e3 * whole_s, 2),
            "parts_ms": {name: round(1e3 * part_s, 2) for name, part_s in parts_s.items()},
            "steps": steps,
            "decoders": self.arguments.workers if self.arguments.images else 0,
            "student_tflops": round(batch * task.flops_per_sample / whole_s / 1e12, 2),
            "memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if substrate.device.type == "cuda" else None,
        }
        print(json.dumps(result), flush=True)
        return ExitCode.FINISHED

    def _time(self, work: Callable[[], Any], device: torch.device, steps: int | None = None) -> float:
        """Mean seconds of a call among ``steps`` in a row, after three."""
        for _ in range(3):
            work()
        steps = steps or self.arguments.steps
        _wait(device)
        start_s = time.perf_counter()
        for _ in range(steps):
            work()
        _wait(device)
        return (time.perf_counter() - start_s) / steps


def load_on_device(spec: TeacherConfig, device: torch.device, dtype: torch.dtype) -> Teacher:
    """A twin whose random weights are drawn where it will run: two billion of them take a minute on a host."""
    with device:
        return load_teacher(spec, device, dtype)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
