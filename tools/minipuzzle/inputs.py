"""What the files of a compression were made from, as each of them records it, and whether that still holds.

Every file has a ``made_from``: the options that decide its content, by the names they have in the YAML, and digests of what was read. What
only says where the work is done and how it is shared (device, layout, micro-batches, threads, kernels) is not in it, except for times. A
file that no longer holds is made anew, or refused where it cost a training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_hybrid.config import DataConfig, RunConfig
from tools.minipuzzle.config import MiniPuzzleConfig
from tools.minipuzzle.files import WorkFiles
from tools.minipuzzle.latency import load_latency
from tools.minipuzzle.parent import Parent, weights_digest
from tools.minipuzzle.scores import Scores
from tools.minipuzzle.search import ffn_choices, width_choices

Inputs = dict[str, Any]
"""Plain JSON, so that it is equal to itself read back."""


def differences(recorded: Inputs, present: Inputs) -> list[str]:
    """Return what differs between two records, each by its dotted name.

    >>> differences({"seed": 1, "search": {"top_k": 3, "solver": True}}, {"seed": 1, "search": {"top_k": 2, "solver": True}})
    ['search.top_k was 3, is 2']
    """
    then, now = _flat(recorded), _flat(present)
    changed = [name for name in dict.fromkeys([*now, *then]) if then.get(name) != now.get(name)]
    return [f"{name} was {_text(then, name)}, is {_text(now, name)}" for name in changed]


def require_same(recorded: Inputs, present: Inputs, source: Path, advice: str) -> None:
    """Refuse what was made from other inputs than the present ones.

    Raises:
        ValueError: names ``source``, all that differs, and what to do (``advice``).
    """
    changed = differences(recorded, present)
    if changed:
        raise ValueError(f"{source} was made from something else: {'; '.join(changed)}. {advice}")


def scoring_inputs(parent: Parent) -> Inputs:
    """What decides the scores."""
    config = parent.config
    return _weights_and_precision(parent) | {
        "seed": config.seed,
        "data": _text_of(parent.data),
        "score": config.score.model_dump(mode="json"),
    }


def search_inputs(parent: Parent, scores: Scores) -> Inputs:
    """What decides the candidates; of a parent without weights, which is not run, what was read and the options alone.

    Times of layers count by what ``latency.json`` holds, wherever it was measured: candidates hold on every machine.

    Raises:
        ValueError: ``latency.json`` is damaged.
    """
    search, file = parent.config.search, WorkFiles(parent.config.work_dir).latency
    is_limited = search.latency.limit_ms is not None
    inputs: Inputs = {"scores": scores.digest, "search": search.model_dump(mode="json", exclude=None if is_limited else {"latency"})}
    if is_limited:
        inputs["latency"] = load_latency(file).digest if file.exists() else None
    return inputs if parent.checkpoint is None else evaluation_inputs(parent) | inputs


def latency_inputs(parent: Parent) -> Inputs:
    """What decides the times of layers."""
    config, setting = parent.config, parent.config.search.latency
    return _device_and_its_use(config) | {
        "model": parent.model.model_dump(mode="json", exclude={"pattern"}),
        "batch": {"precision": parent.batch.precision},
        "parallel": {"tensor": config.parallel.tensor},
        "widths": [list(vars(widths).values()) for widths in width_choices(parent.model, config.search)],
        "ffn_hidden_sizes": sorted({min(ffn_choices(parent.model, config.search)), max(ffn_choices(parent.model, config.search))}),
        "search": {"latency": setting.model_dump(mode="json", exclude={"limit_ms"})},
    }


def evaluation_inputs(parent: Parent) -> Inputs:
    """What decides a model's figures on held-out text, its own weights apart. The seed is the order that text is read in."""
    return _weights_and_precision(parent) | {
        "seed": parent.config.seed,
        "data": parent.data.model_dump(mode="json", include={"sequence_length", "reset_at_documents"}),
        "validation": parent.validation.model_dump(mode="json", include={"sources"}),
        "search": {"num_tokens": parent.config.search.num_tokens},
    }


def training_inputs(parent: Parent, run: RunConfig, *, is_distilled: bool) -> Inputs:
    """What decides a training's outcome, but for the weights that it starts from; the candidate is in its name.

    Args:
        parent: the teacher.
        run: of the training.
        is_distilled: whether it has a teacher.
    """
    inputs: Inputs = {
        "seed": run.seed,
        "data": _text_of(run.data),
        "batch": {"global_batch_size": run.train.global_batch_size, "precision": run.train.precision},
        "tokens": run.total_tokens,
        "optimizer": run.optimizer.model_dump(mode="json"),
        "schedule": run.schedule.model_dump(mode="json"),
        "fp8": run.fp8.model_dump(mode="json", exclude={"telemetry_every_steps", "shadow_every_steps"}),
    }
    if is_distilled:
        assert parent.config.distill is not None
        losses = {"temperature", "lm_loss_weight", "hidden_loss_weight", "layer_loss"}
        inputs |= {"parent": parent.digest, "distill": parent.config.distill.model_dump(mode="json", include=losses)}
    return inputs


def initial_weights(run: RunConfig) -> Inputs:
    """The weights that a training starts from, where it does not start from random ones."""
    from megatron_hybrid.convert.native import NativeSource

    start = run.checkpoint.initialize_from
    return {} if start is None else {"pruned weights": weights_digest(NativeSource(start))}


def timing_inputs(parent: Parent, winner: str) -> Inputs:
    """What decides the speed of parent and child; the child's shape is in the winner's name."""
    return _device_and_its_use(parent.config) | {
        "model": parent.model.architecture(),
        "winner": winner,
        "batch": {"precision": parent.batch.precision},
        "search": {"latency": parent.config.search.latency.model_dump(mode="json", exclude={"limit_ms"})},
    }


def _weights_and_precision(parent: Parent) -> Inputs:
    return {"parent": parent.digest, "batch": {"precision": parent.batch.precision}}


def _text_of(data: DataConfig) -> Inputs:
    return data.model_dump(mode="json", include={"sources", "phases", "sequence_length", "reset_at_documents"})


def _device_and_its_use(config: MiniPuzzleConfig) -> Inputs:
    """What decides any time, whatever is timed. CPU threads do nothing for a GPU's."""
    import torch

    from megatron_hybrid.substrate.environment import device_name

    has_cuda = config.runtime.device != "cpu" and torch.cuda.is_available()
    inputs = {
        "device": device_name(torch.device("cuda", 0) if has_cuda else torch.device("cpu")),
        "kernels": config.kernels.model_dump(mode="json"),
    }
    return inputs if has_cuda else inputs | {"runtime": {"threads_per_rank": config.runtime.threads_per_rank}}


def _flat(value: Any, name: str = "") -> Inputs:
    if not isinstance(value, dict):
        return {name: value}
    return {flat: leaf for key, inner in value.items() for flat, leaf in _flat(inner, f"{name}.{key}" if name else key).items()}


def _text(inputs: Inputs, name: str) -> str:
    return "unset" if inputs.get(name) is None else str(inputs[name])
