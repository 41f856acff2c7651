"""One aligned line per step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_hybrid.config import RunConfig
from megatron_hybrid.substrate.exit_codes import ExitCode
from megatron_hybrid.train.callback import Callback
from megatron_hybrid.train.progress import StepRecord

if TYPE_CHECKING:
    from megatron_hybrid.train.trainer import Trainer


class ConsoleLog(Callback):
    """Prints the run's progress."""

    def __init__(self, run: RunConfig, unit: str = "tok") -> None:
        self.every_steps, self.unit = run.logging.every_steps, unit

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        if record.warm_up is not None or record.step % self.every_steps == 0 or record.step == record.total_steps:
            print(format_record(record, self.unit), flush=True)

    def after_validation(self, trainer: Trainer, losses: dict[str, float]) -> None:
        sources = "  ".join(f"{source} {loss:.4f}" for source, loss in losses.items())
        print(f"{'validation':>{_step_width(trainer.run.total_steps)}}  {sources}", flush=True)

    def on_report(self, trainer: Trainer, kind: str, values: dict[str, Any]) -> None:
        if kind == "fp8_shadow":
            width = _step_width(trainer.run.total_steps)
            print(f"{'without float8':>{width}}  loss {values['exact_loss']:8.4f}  relative gap {values['relative_gap']:+.2e}", flush=True)

    def on_end(self, trainer: Trainer, exit_code: ExitCode) -> None:
        state = trainer.state
        print(
            f"{exit_code.name.lower()} at step {state.step}, data position {state.samples}; run directory {trainer.run.run_dir}", flush=True
        )


def format_record(record: StepRecord, unit: str = "tok") -> str:
    """The line of one step; every field has a fixed width, so that lines align. A step of the warm-up has its time instead of rates."""
    fields = [
        f"{f'step {record.step}/{record.total_steps}':>{_step_width(record.total_steps)}}",
        *(f"{name} {value:8.4f}" for name, value in record.metrics.items()),
        f"grad {record.grad_norm:8.3f}",
        f"lr {record.learning_rate:.2e}",
    ]
    if record.warm_up is not None:
        return "  ".join([*fields, f"warm-up: {record.step_s:.1f} s ({record.warm_up})"])
    fields += [
        f"{_scaled(record.tokens_per_s):>6} {unit}/s",
        f"{record.tflops_per_rank:7.3f} TFLOP/s" + ("" if record.mfu is None else f" ({record.mfu:5.1%})"),
        f"{record.memory_gib:6.2f} GiB",
        f"data {record.samples:<{len(str(record.total_samples))}}",
        f"eta {format_duration(record.eta_s)}",
    ]
    return "  ".join(fields)


def format_duration(seconds: float) -> str:
    """Seconds as a person says them.

    >>> format_duration(59), format_duration(3725), format_duration(200000)
    ('0:59', '1:02:05', '2d 07:33')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours_left = divmod(hours, 24)
    if days:
        return f"{days}d {hours_left:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _step_width(total_steps: int) -> int:
    return len("step /") + 2 * len(str(total_steps))


def _scaled(number: float) -> str:
    for factor, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= factor:
            return f"{number / factor:.1f}{suffix}"
    return f"{number:.0f}"
