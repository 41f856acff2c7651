"""TensorBoard events."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

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
