"""The loop: resume, step, report, save, stop.

Everything random in a run is addressed by the seed and a position (a parameter's row, a sample's index), never drawn from a running
generator. A checkpoint therefore holds weights, optimizer state and two numbers, and a resumed run repeats the uninterrupted one bit for
bit.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer import TransformerConfig

from megatron_hybrid.checkpoint import CheckpointStore, check_header, load, read_header
from megatron_hybrid.checkpoint.sharding import shard_parameters
from megatron_hybrid.config import RunConfig
from megatron_hybrid.config.run_directory import CHECKPOINTS_NAME
from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.substrate.exit_codes import ExitCode
from megatron_hybrid.substrate.signals import StopRequest
from megatron_hybrid.train.callback import Callback
from megatron_hybrid.train.float8 import ScalingCheckpoint, is_observed, with_scale_update
from megatron_hybrid.train.graph import MicroBatchGraph, make_graph
from megatron_hybrid.train.mended_optimizers import sharded_state
from megatron_hybrid.train.optimizer import apply_options, build_optimizer, gradient_finisher, set_learning_rate, wrap_data_parallel
from megatron_hybrid.train.progress import Progress
from megatron_hybrid.train.schedule import learning_rate
from megatron_hybrid.train.step import NonFiniteError, StepResult, train_step
from megatron_hybrid.train.task import StatefulTask, StepData, Task

_log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Where the run stands. ``samples`` is the data position; everything else follows from it and the configuration."""

    step: int = 0
    """Optimizer steps done."""
    samples: int = 0
    """Samples consumed: the global index of the next one."""


class Trainer:
    """Trains one task in one run directory.

    Args:
        run: the run; another room's configuration serves as well, where it has the same options for what the trainer reads.
        task: what is trained.
        config: megatron-core's settings of this rank.
        substrate: where this rank stands.
        callbacks: what watches the run, in order.
        rate_at: samples seen at a step's end -> its learning rate. Unset: ``run.schedule`` over tokens.
    """

    def __init__(
        self,
        run: RunConfig,
        task: Task,
        config: TransformerConfig,
        substrate: Substrate,
        callbacks: Sequence[Callback] = (),
        rate_at: Callable[[int], float] | None = None,
    ) -> None:
        self.run, self.task, self.config, self.substrate, self.callbacks = run, task, config, substrate, callbacks
        self.rate_at = rate_at or self._scheduled_rate
        self.state = TrainState()
        self.stop = StopRequest(substrate)
        self.chunks = wrap_data_parallel(task.build_chunks(), run, config)
        self.optimizer = build_optimizer(self.chunks, run)
        self.store = CheckpointStore(
            run.run_dir / CHECKPOINTS_NAME,
            keep_last=run.checkpoint.keep_last,
            asynchronous=run.checkpoint.asynchronous,
            group=substrate.control_group,
        )
        self.saved_step: int | None = None
        self.has_stepped = False
        connect_schedules(config, self.chunks, self.optimizer)
        self.scaling = ScalingCheckpoint(run.fp8, self.chunks, substrate)
        self.graph = make_graph(run, task, self.chunks, substrate)

    @property
    def is_finished(self) -> bool:
        """Whether all samples of the run were seen."""
        return self.state.samples >= self.run.total_samples

    def train(self) -> ExitCode:
        """Run from where ``resume`` left the state to the end, or until asked to stop; the weights are saved in either case."""
        progress = Progress(self.run, self.task.flops_per_sample, self.substrate)
        exit_code = ExitCode.FINISHED
        self._notify("on_start")
        with contextlib.closing(self.task.training_data(self.state.samples)) as data:
            while not self.is_finished:
                if self._should_leave(progress.num_steps):
                    exit_code = ExitCode.STOPPED
                    break
                step_data = next(data)
                rate = self._set_learning_rate(step_data.num_samples)
                self._notify("before_step", step_data)
                graph = self._graph_of_step()
                warm_up = self._warm_up(graph)
                result = self._step(step_data, graph)
                self.state.step += 1
                self.state.samples += step_data.num_samples
                self._notify("after_step", progress.record(self.state, result, rate, step_data.num_samples, warm_up))
                self.store.finish_pending(blocking=False)
                if self.run.checkpoint.every_steps and self.state.step % self.run.checkpoint.every_steps == 0:
                    self.save()
        self.save()
        self.store.finish_pending(blocking=True)
        self.stop.close()
        self._notify("on_end", exit_code)
        return exit_code

    def resume(self) -> None:
        """Continue from the newest sound checkpoint of the run directory, or start from the given weights, or from scratch."""
        newest = self.store.newest()
        if newest is None:
            if self.run.checkpoint.initialize_from is not None:
                self._load_weights()
            return
        if not self.run.checkpoint.resume:
            raise ValueError(
                f"checkpoint.resume=false, but {self.store.directory} already holds {newest.name}; "
                "choose another run_dir, or let the run resume"
            )
        header = read_header(newest)
        check_header(header, model=self.task.architecture(), training=self._training_kind())
        self.task.check_fingerprint(header["data"])
        wanted = {**self._sharded_state(is_loading=True), **self._task_state(), **self.scaling.wanted(header)}
        loaded = load(newest, wanted, group=self.substrate.control_group)
        self._take_weights(loaded["model"])
        self.optimizer.load_state_dict(loaded["optimizer"])
        apply_options(self.optimizer, self.run.optimizer)
        if self.run.parallel.distributed_optimizer:
            # Loading wrote this rank's shards of the weights, which may be rounded otherwise than the other ranks' copies of them.
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)
        self.scaling.take(loaded)
        if isinstance(self.task, StatefulTask):
            self.task.take_state(loaded.get("task", {}))
        self.state = TrainState(**header["state"])
        self.saved_step = self.state.step
        _log.info("resumed from %s at step %d", newest, self.state.step)

    def gather_parameters(self) -> None:
        """Make every rank's weights those of the last update; needed before they are read outside a forward pass.

        With overlap_param_gather a rank holds others' shards of the step before until the next forward gathers them.
        """
        if self.run.parallel.overlap_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)

    def save(self) -> None:
        """Write a checkpoint of the present step, once; before the first step there is nothing that the seed does not give."""
        if self.state.step in (0, self.saved_step):
            return
        self.gather_parameters()
        header = {
            "state": asdict(self.state),
            "model": self.task.architecture(),
            "data": self.task.data_fingerprint(),
            "training": self._training_kind(),
            **self.scaling.header(),
        }
        state = {**self._sharded_state(is_loading=False), **self._task_state(), **self.scaling.sharded()}
        self.store.save(self.state.step, state, header)
        self.saved_step = self.state.step

    def report(self, kind: str, values: dict[str, Any]) -> None:
        """Tell all callbacks what one of them measured; called on every rank."""
        self._notify("on_report", kind, values)

    def _step(self, step_data: StepData, graph: MicroBatchGraph | None) -> StepResult:
        self.has_stepped = True
        try:
            return train_step(self.task, self.chunks, self.optimizer, step_data, self.substrate, graph)
        except NonFiniteError as error:
            # Every rank is here; a save that is still being written is not given up.
            self.store.finish_pending(blocking=True)
            last = "there is no checkpoint yet" if self.saved_step is None else f"the last checkpoint is of step {self.saved_step}"
            raise NonFiniteError(f"step {self.state.step + 1}, samples from {self.state.samples}: {error}; {last}") from None

    def _graph_of_step(self) -> MicroBatchGraph | None:
        """The first step of a process compiles kernels, and a step that float8 is observed in launches others: both without the graph."""
        return self.graph if self.has_stepped and not is_observed(self.chunks) else None

    def _warm_up(self, graph: MicroBatchGraph | None) -> str | None:
        """What the coming step does once for all later ones, for people; None if nothing."""
        if not self.has_stepped:
            return "kernels are compiled or loaded, memory is taken"
        return "the CUDA graph is captured" if graph is not None and not graph.is_captured else None

    def _should_leave(self, num_steps: int) -> bool:
        """Asked to by a signal to any rank, or after as many steps as this process was given."""
        return self.stop.requested() or num_steps == self.run.train.exit_after_steps

    def _set_learning_rate(self, num_samples: int) -> float:
        rate = self.rate_at(self.state.samples + num_samples)
        set_learning_rate(self.optimizer, rate)
        return rate

    def _scheduled_rate(self, samples_after: int) -> float:
        run = self.run
        return learning_rate(run.schedule, run.optimizer, samples_after * run.tokens_per_sample, run.total_tokens)

    def _task_state(self) -> dict[str, Any]:
        """The section of checkpoints that a task with a state of its own adds; none on ranks that hold nothing of it."""
        state = self.task.sharded_state() if isinstance(self.task, StatefulTask) else {}
        return {"task": state} if state else {}

    def _sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        model = self._sharded_model()
        return {"model": model, "optimizer": sharded_state(self.optimizer, model, is_loading=is_loading)}

    def _sharded_model(self) -> dict[str, Any]:
        sharded: dict[str, Any] = {}
        for chunk in self.chunks:
            sharded |= shard_parameters(chunk.module.named_global_parameters(), self.substrate.tensor_group, self.substrate.data_group)
        return sharded

    def _take_weights(self, loaded: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for chunk in self.chunks:
                for name, parameter in chunk.module.named_global_parameters():
                    parameter.copy_(loaded[name])

    def _load_weights(self) -> None:
        path = self.run.checkpoint.initialize_from
        header = read_header(path)
        check_header(header, model=self.task.architecture())
        state = self.task.weight_state(header["data"]) if isinstance(self.task, StatefulTask) else {}
        wanted = {"model": self._sharded_model()} | ({"task": state} if state else {})
        loaded = load(path, wanted, group=self.substrate.control_group)
        self._take_weights(loaded["model"])
        if isinstance(self.task, StatefulTask):
            self.task.take_weight_state(loaded.get("task", {}))
        # The fp32 masters were made from what stood in the weights before.
        self.optimizer.reload_model_params()
        _log.info("initialised the weights from %s", path)

    def _training_kind(self) -> dict[str, Any]:
        """What decides the shape of the optimizer state, and so cannot change on resume."""
        return {"precision": self.run.train.precision, "distributed_optimizer": self.run.parallel.distributed_optimizer}

    def _notify(self, event: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *arguments)


def connect_schedules(config: TransformerConfig, chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Tell megatron-core's schedules how to scale the loss, when to hold gradient reductions back, and how to finish gradients."""
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = with_scale_update(gradient_finisher(optimizer), chunks)
    if chunks[0].ddp_config.overlap_grad_reduce:
        holds = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = holds if len(holds) > 1 else holds[0]
