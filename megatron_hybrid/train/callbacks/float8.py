"""What a float8 run says of itself: which linears take part, what the casts do to tensors, and how far off the loss is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.parallel_state import get_tensor_and_data_parallel_group
from torch import distributed

from megatron_hybrid.config import RunConfig
from megatron_hybrid.fp8.backends import choose_implementation
from megatron_hybrid.fp8.linear import ROLES
from megatron_hybrid.fp8.statistics import describe_statistics, reduce_statistics
from megatron_hybrid.layout.float8 import DIMENSION_UNIT, LINEARS, plan_float8, unfit_linears
from megatron_hybrid.train.callback import Callback
from megatron_hybrid.train.float8 import float8_linears
from megatron_hybrid.train.progress import StepRecord
from megatron_hybrid.train.step import evaluate
from megatron_hybrid.train.task import StepData

if TYPE_CHECKING:
    from megatron_hybrid.train.trainer import Trainer


class Float8Summary(Callback):
    """Prints at the start what runs in float8, and which linears that were asked for do not."""

    def on_start(self, trainer: Trainer) -> None:
        print("\n".join(describe_float8(trainer.run, trainer.substrate.device)), flush=True)


class Float8Telemetry(Callback):
    """Every ``fp8.telemetry_every_steps``, reports amax, saturated and flushed shares of what each linear casts. Runs on every rank."""

    def before_step(self, trainer: Trainer, data: StepData) -> None:
        if _is_due(trainer.state.step + 1, trainer.run.fp8.telemetry_every_steps):
            for linear in float8_linears(trainer.chunks):
                linear.observe(trainer.substrate.device)

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        if _is_due(record.step, trainer.run.fp8.telemetry_every_steps):
            trainer.report("fp8", {"linears": self._collect(trainer)})

    def _collect(self, trainer: Trainer) -> dict[str, Any]:
        """Linear's name -> role -> statistics, over all ranks."""
        linears = float8_linears(trainer.chunks)
        own = {}
        if linears:
            statistics_NRS = torch.stack([linear.statistics_RS for linear in linears])
            reduce_statistics(statistics_NRS, get_tensor_and_data_parallel_group())
            own = {
                linear.name: {role: describe_statistics(statistics_S) for role, statistics_S in zip(ROLES, statistics_RS, strict=True)}
                for linear, statistics_RS in zip(linears, statistics_NRS.cpu(), strict=True)
            }
        for linear in linears:
            linear.observe(None)
        stages: list[dict[str, Any]] = [{}] * trainer.substrate.pipeline_size
        distributed.all_gather_object(stages, own, group=trainer.substrate.pipeline_group)
        return {name: described for stage in stages for name, described in stage.items()}


class ShadowLoss(Callback):
    """Every ``fp8.shadow_every_steps``, evaluates the step's batch, with the step's weights, without float8 too. Runs on every rank.

    Reports the relative gap (exact - float8) / exact, which is negative where float8 is worse, as Nemotron-H's figures 5 and 6 show it.
    """

    def __init__(self) -> None:
        self.exact_loss = float("nan")

    def before_step(self, trainer: Trainer, data: StepData) -> None:
        if not _is_due(trainer.state.step + 1, trainer.run.fp8.shadow_every_steps):
            return
        _set_float8(trainer, False)
        metrics = evaluate(trainer.task, trainer.chunks, [data], trainer.substrate, stop_requested=lambda: False)
        self.exact_loss = metrics["loss"]
        _set_float8(trainer, True)

    def after_step(self, trainer: Trainer, record: StepRecord) -> None:
        if _is_due(record.step, trainer.run.fp8.shadow_every_steps):
            loss = record.metrics["loss"]
            trainer.report(
                "fp8_shadow", {"loss": loss, "exact_loss": self.exact_loss, "relative_gap": (self.exact_loss - loss) / self.exact_loss}
            )


def float8_callbacks(run: RunConfig, *, is_first_rank: bool) -> list[Callback]:
    """The callbacks that the float8 options of a run ask for."""
    if run.fp8.recipe == "off":
        return []
    callbacks: list[Callback] = [Float8Summary()] if is_first_rank else []
    if run.fp8.telemetry_every_steps is not None:
        callbacks.append(Float8Telemetry())
    if run.fp8.shadow_every_steps is not None:
        callbacks.append(ShadowLoss())
    return callbacks


def describe_float8(run: RunConfig, device: torch.device) -> list[str]:
    """Say in a few lines which linears run in float8, how, and what stays in the working precision."""
    fp8, model = run.fp8, run.model
    plan = plan_float8(model, run.parallel.tensor, fp8)
    num_linears = sum(len(LINEARS[kind]) for kind in model.layer_kinds)
    scaling = "current scaling"
    if fp8.recipe == "delayed":
        delayed, ranks = fp8.delayed, fp8.delayed.reduction.replace("_", " and ")
        window = f"{delayed.amax_algorithm} of {delayed.history_length} steps, margin {delayed.margin}"
        scaling = f"delayed scaling ({window}, amaxes over {ranks} ranks)"
    implementation = choose_implementation(fp8.implementation, device)
    working = run.train.precision
    lines = [
        f"float8: {sum(map(len, plan))} of {num_linears} linears, {fp8.format}, {scaling}, {implementation} products; "
        f"the first {fp8.bf16_layers_at_start} and last {fp8.bf16_layers_at_end} layers, embedding and output layer stay in {working}"
    ]
    # Where MLP layers differ in width, some may fit and others not.
    where = "" if isinstance(model.ffn_hidden_size, int) else " where it does not fit"
    for name, (rows, columns) in unfit_linears(model, run.parallel.tensor).items():
        if name in fp8.linears:
            at = f"per rank at parallel.tensor={run.parallel.tensor}"
            lines.append(f"float8: {name} stays in {working}{where}: {rows} x {columns} {at}, not multiples of {DIMENSION_UNIT}")
    return lines


def _set_float8(trainer: Trainer, enabled: bool) -> None:
    """Train in float8, or evaluate without."""
    for chunk in trainer.chunks:
        chunk.train(enabled)
    for linear in float8_linears(trainer.chunks):
        linear.enabled = enabled


def _is_due(step: int, every_steps: int | None) -> bool:
    return every_steps is not None and step % every_steps == 0
