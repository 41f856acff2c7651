"""TensorBoard events."""

from __future__ import annotations

import importlib.util
import math
from typing import TYPE_CHECKING, Any

from megatron_hybrid.config import RunConfig
from megatron_hybrid.substrate.exit_codes import ExitCode
from megatron_hybrid.train.callback import Callback
from megatron_hybrid.train.progress import StepRecord

if TYPE_CHECKING:
    from megatron_hybrid.train.trainer import Trainer


class TensorBoardLog(Callback):
    """Writes scalars into RUN_DIR/tensorboard; what a resumed run repeats replaces what was there.

    Raises:
        ValueError: at construction, when tensorboard is not installed.
    """

    def __init__(self, run: RunConfig) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise ValueError("logging.tensorboard=true needs the tensorboard package: pip install tensorboard, or set it to false")
        self.directory = run.run_dir / "tensorboard"

    def on_start(self, trainer: Trainer) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(self.directory, purge_step=trainer.state.step + 1)

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        for name, value in scalars(record).items():
            self.writer.add_scalar(name, value, record.step)

    def after_validation(self, trainer: Trainer, losses: dict[str, float]) -> None:
        for source, loss in losses.items():
            self.writer.add_scalar(f"validation/{source}", loss, trainer.state.step)

    def on_report(self, trainer: Trainer, kind: str, values: dict[str, Any]) -> None:
        for name, value in report_scalars(kind, values).items():
            self.writer.add_scalar(name, value, trainer.state.step)

    def on_end(self, trainer: Trainer, exit_code: ExitCode) -> None:
        self.writer.close()


def scalars(record: StepRecord) -> dict[str, float]:
    """A step's numbers under the names that both TensorBoard and Weights & Biases show."""
    values = {f"train/{name}": value for name, value in record.metrics.items()}
    values |= {
        "train/grad_norm": record.grad_norm,
        "train/learning_rate": record.learning_rate,
        "speed/memory_gib": record.memory_gib,
    }
    rates = {"speed/tokens_per_s": record.tokens_per_s, "speed/tflops_per_rank": record.tflops_per_rank, "speed/mfu": record.mfu}
    return values | {name: rate for name, rate in rates.items() if rate is not None}


def report_scalars(kind: str, values: dict[str, Any]) -> dict[str, float]:
    """A report's numbers under their paths in metrics.jsonl, joined by /; NaN for what has no finite value.

    >>> report_scalars("fp8", {"linears": {"layers.0.out_proj": {"input": {"amax": 2.5, "scale": None}}}})
    {'fp8/linears/layers.0.out_proj/input/amax': 2.5, 'fp8/linears/layers.0.out_proj/input/scale': nan}
    """
    flat: dict[str, float] = {}
    for name, value in values.items():
        path = f"{kind}/{name}"
        flat |= report_scalars(path, value) if isinstance(value, dict) else {path: math.nan if value is None else value}
    return flat
