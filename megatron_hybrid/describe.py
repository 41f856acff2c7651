"""What a model is in a layout, before anything runs: parameters, training FLOPs and pipeline stages, as a table or as JSON."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from megatron_hybrid.config.errors import ConfigError
from megatron_hybrid.config.load import PresetConfig, load_layout, preset_names
from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.layout.float8 import DIMENSION_UNIT, LINEARS, plan_float8, unfit_linears
from megatron_hybrid.layout.flops import head_training_flops, layer_training_flops, training_flops_per_token
from megatron_hybrid.layout.parameters import (
    num_embedding_parameters,
    num_head_parameters,
    num_layer_parameters,
    num_parameters,
    num_stage_parameters,
)
from megatron_hybrid.layout.pattern import KIND_NAMES, MLP, STAGE_CUT, count_kinds
from megatron_hybrid.layout.stages import plan_stages, stage_costs

_EXAMPLES = """\
examples:
  python -m megatron_hybrid describe nemotron-h-8b
  python -m megatron_hybrid describe nemotron-h-8b parallel.tensor=8 parallel.pipeline=4 data.sequence_length=4096
  python -m megatron_hybrid describe nemotron-h-4b parallel.tensor=2 fp8.recipe=delayed fp8.bf16_layers_at_start=2
  python -m megatron_hybrid describe run.yaml --json
"""


@dataclass(frozen=True)
class Part:
    """All layers of one kind and width, or the embedding, or the head (final norm and output layer)."""

    name: str
    count: int
    parameters_each: int
    training_flops_each: int
    """Per token."""

    @property
    def parameters(self) -> int:
        """Of all of them together."""
        return self.count * self.parameters_each

    @property
    def training_flops(self) -> int:
        """Per token, of all of them together."""
        return self.count * self.training_flops_each


@dataclass(frozen=True)
class Stage:
    """One virtual stage. The first includes the embedding, the last the head."""

    pipeline_rank: int
    chunk: int
    first_layer: int
    end_layer: int
    """One past the last layer."""
    pattern: str
    parameters: int
    parameters_per_rank: int
    """On each tensor rank."""
    training_flops: int
    """Per token, over all tensor ranks."""


@dataclass(frozen=True)
class Precision:
    """All linears of one name, and which of them run in float8."""

    linear: str
    count: int
    float8: int
    reason: str
    """Why the others stay in the working precision; empty where there are none."""


@dataclass(frozen=True)
class Report:
    """A model in a layout."""

    source: str
    pattern: str
    """With | where the stages are cut."""
    sequence_length: int
    tensor: int
    pipeline: int
    virtual_pipeline: int
    parameters: int
    training_flops: int
    """Per token."""
    parts: tuple[Part, ...]
    stages: tuple[Stage, ...]
    fp8_recipe: str
    precisions: tuple[Precision, ...]
    """Empty where the recipe is off."""


def make_report(source: str, config: PresetConfig) -> Report:
    """Return everything there is to say about a model in a layout."""
    model, parallel, sequence_length = config.model, config.parallel, config.data.sequence_length
    kinds = [part for kind in count_kinds(model.layer_kinds) for part in _layer_parts(model, kind, sequence_length)]
    embedding = Part("embedding", 1, num_embedding_parameters(model), 0)
    head = Part("head", 1, num_head_parameters(model), head_training_flops(model))
    ranges = plan_stages(model, parallel, sequence_length)
    stages = tuple(
        Stage(number % parallel.pipeline, number // parallel.pipeline, first, end, model.layer_kinds[first:end], parameters, on_rank, flops)
        for number, ((first, end), parameters, on_rank, flops) in enumerate(
            zip(
                ranges,
                num_stage_parameters(model, ranges),
                num_stage_parameters(model, ranges, parallel.tensor),
                stage_costs(model, ranges, sequence_length),
                strict=True,
            )
        )
    )
    return Report(
        source=source,
        pattern=STAGE_CUT.join(stage.pattern for stage in stages),
        sequence_length=sequence_length,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        parameters=num_parameters(model),
        training_flops=training_flops_per_token(model, sequence_length),
        parts=(*kinds, embedding, head),
        stages=stages,
        fp8_recipe=config.fp8.recipe,
        precisions=() if config.fp8.recipe == "off" else _precisions(config),
    )


def format_report(report: Report) -> str:
    """Return the report as plain text with aligned columns."""
    num_layers = report.stages[-1].end_layer
    cuts = ", cut into stages at |" if len(report.stages) > 1 else ""
    blocks = [
        f"{report.source}: {report.parameters:,} parameters, {_si(report.training_flops)}FLOP per trained token "
        f"at {report.sequence_length:,} tokens per sample",
        f"Pattern, {num_layers} layers{cuts}\n" + textwrap.indent("\n".join(_chunks(report.pattern, 80)), "  "),
        _format_parts(report),
        _format_stages(report),
        _format_ranks(report),
        *([_format_precisions(report)] if report.precisions else []),
    ]
    return "\n\n".join(blocks)


def main(argv: Sequence[str]) -> int:
    """Print the report that ``argv`` asks for; return 0, or 2 where it cannot be given, with the reason on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_hybrid describe",
        description="Show a model's pattern, stages, parameters, training FLOPs per token and, where it is asked for, what runs in float8. "
        "Needs no GPU and starts nothing.",
        epilog=f"presets: {', '.join(preset_names())}\n\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="a preset's name, or a run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help="options to change, such as parallel.tensor=8")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    arguments = parser.parse_intermixed_args(argv)
    try:
        report = make_report(arguments.source, load_layout(arguments.source, arguments.overrides))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(asdict(report), indent=2) if arguments.json else format_report(report))
    return 0


def _layer_parts(model: ModelConfig, kind: str, sequence_length: int) -> list[Part]:
    """The layers of a kind; MLP layers that differ in width are parts of their own, the widest first."""
    if kind != MLP or isinstance(model.ffn_hidden_size, int):
        shapes = [(KIND_NAMES[kind], model.layer_kinds.count(kind), model)]
    else:
        widths = sorted(Counter(model.ffn_hidden_sizes).items(), reverse=True)
        shapes = [(f"{KIND_NAMES[kind]} {width}", count, model.model_copy(update={"ffn_hidden_size": width})) for width, count in widths]
    return [
        Part(name, count, num_layer_parameters(shape, kind), layer_training_flops(shape, kind, sequence_length))
        for name, count, shape in shapes
    ]


def _precisions(config: PresetConfig) -> tuple[Precision, ...]:
    """What ``plan_float8`` comes to, linear by linear, in the order of ``LINEARS``."""
    model, fp8, tensor = config.model, config.fp8, config.parallel.tensor
    plan, unfit = plan_float8(model, tensor, fp8), unfit_linears(model, tensor)
    precisions = []
    for kind, names in LINEARS.items():
        layers = [layer for layer, other in enumerate(model.layer_kinds) if other == kind]
        num_at_ends = sum(layer < fp8.bf16_layers_at_start or layer >= model.num_layers - fp8.bf16_layers_at_end for layer in layers)
        for name in names if layers else ():
            reasons = [f"{num_at_ends} at the ends"] if num_at_ends else []
            if name in unfit:
                rows, columns = unfit[name]
                reasons.append(f"{rows:,} x {columns:,} per rank, not multiples of {DIMENSION_UNIT}")
            if name not in fp8.linears:
                reasons = ["not in fp8.linears"]
            precisions.append(Precision(name, len(layers), sum(name in planned for planned in plan), "; ".join(reasons)))
    return tuple(precisions)


def _format_parts(report: Report) -> str:
    header = ("", "count", "parameters each", "parameters", "share", "FLOP/token", "share")
    rows = [
        (
            part.name,
            f"{part.count}",
            f"{part.parameters_each:,}",
            f"{part.parameters:,}",
            _percent(part.parameters, report.parameters),
            _si(part.training_flops),
            _percent(part.training_flops, report.training_flops),
        )
        for part in report.parts
    ]
    total = ("total", "", "", f"{report.parameters:,}", _percent(1, 1), _si(report.training_flops), _percent(1, 1))
    note = "  head is the final norm and the output layer; FLOP/token are of training, forward and backward"
    return "\n".join(["By kind", _table([header, *rows, total], "<" + ">" * 6), note])


def _format_stages(report: Report) -> str:
    header = ("stage", "rank", "chunk", "layers", "count", "parameters", f"per rank (tensor {report.tensor})", "FLOP/token", "share")
    rows = [
        (
            f"{number}",
            f"{stage.pipeline_rank}",
            f"{stage.chunk}",
            f"{stage.first_layer}-{stage.end_layer - 1}",
            f"{stage.end_layer - stage.first_layer}",
            f"{stage.parameters:,}",
            f"{stage.parameters_per_rank:,}",
            _si(stage.training_flops),
            _percent(stage.training_flops, report.training_flops),
        )
        for number, stage in enumerate(report.stages)
    ]
    title = f"Stages, tensor {report.tensor} x pipeline {report.pipeline}, {report.virtual_pipeline} per pipeline rank"
    return "\n".join([title, _table([header, *rows], ">" * 9)])


def _format_ranks(report: Report) -> str:
    ranks = [[stage for stage in report.stages if stage.pipeline_rank == rank] for rank in range(report.pipeline)]
    parameters = [sum(stage.parameters_per_rank for stage in stages) for stages in ranks]
    flops = [sum(stage.training_flops for stage in stages) for stages in ranks]
    largest, busiest = parameters.index(max(parameters)), flops.index(max(flops))
    return "\n".join(
        [
            f"Most parameters on one rank: {parameters[largest]:,} (pipeline rank {largest})",
            f"Most work on one pipeline rank: {flops[busiest] * report.pipeline / report.training_flops:.3f} of an even share "
            f"(pipeline rank {busiest})",
        ]
    )


def _format_precisions(report: Report) -> str:
    header = ("", "count", "in float8", "why not all")
    rows = [(each.linear, f"{each.count}", f"{each.float8}", each.reason) for each in report.precisions]
    num_float8, count = (sum(getattr(each, name) for each in report.precisions) for name in ("float8", "count"))
    title = f"Linears, fp8.recipe={report.fp8_recipe}: {num_float8} of {count} in float8; embedding and output layer never are"
    return "\n".join([title, _table([header, *rows], "<>><")])


def _table(rows: Sequence[Sequence[str]], alignment: str) -> str:
    """Align columns to the left ("<") or to the right (">"); ``alignment`` has one character per column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    formats = [f"{{:{side}{width}}}" for side, width in zip(alignment, widths, strict=True)]
    return "\n".join(("  " + "  ".join(formats).format(*row)).rstrip() for row in rows)


def _chunks(text: str, width: int) -> list[str]:
    return [text[start : start + width] for start in range(0, len(text), width)]


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def _si(value: int) -> str:
    """Write a number with four digits or so and a decimal prefix: 46.56 G."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.2f} {prefix}"
    return f"{value} "
