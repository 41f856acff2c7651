"""``describe``: what a run is made of and what it costs, without torch; with the teachers loaded, also what each of them is shown."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vision_agglom.commands.arguments import add_config, read_config, verb_parser
from vision_agglom.config.schema import VisionConfig, block_ranges
from vision_agglom.flops import backbone_parameters, training_flops_per_image

if TYPE_CHECKING:
    from vision_agglom.contract import TeacherFacts

_EPILOG = """examples:
  python -m vision_agglom describe examples/radio/photographs.yaml
  python -m vision_agglom describe examples/radio/photographs.yaml --load-teachers
  python -m vision_agglom describe examples/radio/radio_v2.5.yaml parallel.tensor=2 parallel.pipeline=2

Answers at once, from the configuration alone. What a teacher takes is known once it is built: --load-teachers builds them one after the
other on the CPU, with their weights, and refuses what train would refuse of them.
"""


def main(argv: Sequence[str]) -> int:
    """Parse the command line and print; returns the exit code."""
    parser = verb_parser("describe", "Print a run's student, teachers, stages and layout.", _EPILOG)
    add_config(parser)
    parser.add_argument("--load-teachers", action="store_true", help="build the teachers, and check and print what each is shown")
    arguments = parser.parse_intermixed_args(argv)
    run = read_config(arguments.config, arguments.overrides)
    if run is None:
        return 2
    print(describe(run))
    if not arguments.load_teachers:
        return 0
    print("\nbuilding the teachers", flush=True)
    from megatron_hybrid.substrate.quiet import silence_known_warnings

    silence_known_warnings()
    from vision_agglom.muster import check_facts, load_facts
    from vision_agglom.teachers import load_teacher

    try:
        facts = load_facts(run, load_teacher)
        check_facts(run, facts)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(describe_showings(run, facts))
    return 0


def describe_showings(run: VisionConfig, facts: Mapping[str, TeacherFacts]) -> str:
    """What each teacher takes, gives and is shown, as aligned text; ``check_facts`` has passed."""
    from vision_agglom.costs import count_workloads
    from vision_agglom.panel import plan_showing

    resolutions = sorted({side for stage in run.stages for part in stage.partitions for side in part.resolutions})
    columns = f"{'teacher':<12} {'patch':>5} {'side':>5} {'sides':<6} {'summary':>7} {'spatial':>7}"
    lines = [f"{columns}  shown at {', '.join(map(str, resolutions))}"]
    for teacher in run.teachers:
        fact = facts[teacher.name]
        met = {workload.resolution for workload in count_workloads(run, teacher.name)}
        shown = [str(plan_showing(teacher, fact, side // run.student.patch_size).side) if side in met else "-" for side in resolutions]
        lines.append(
            f"{fact.name:<12} {fact.patch_size:>5} {fact.resolution:>5} {'fixed' if fact.fixed_resolution else 'any':<6} "
            f"{fact.summary_channels or '-':>7} {fact.spatial_channels:>7}  {', '.join(shown)}"
        )
    return "\n".join(lines)


def describe(run: VisionConfig) -> str:
    """The run as aligned text."""
    student = run.student
    lines = [
        f"student   {student.num_layers} blocks, width {student.hidden_size}, {student.num_attention_heads} heads, "
        f"MLP {student.ffn_hidden_size} ({student.mlp}), patch {student.patch_size}; "
        f"{backbone_parameters(student, run.num_prefix_tokens):,} parameters without heads",
        f"tokens    {len(run.teachers)} class, {run.num_prefix_tokens - len(run.teachers)} registers, then patches",
        "",
        f"{'teacher':<12} {'library':<12} {'view':<7} {'standardizer':<12} {'spatial loss':<17} {'weight':>6}  {'summary loss':<12} "
        f"{'weight':>6}",
    ]
    for teacher in run.teachers:
        lines.append(
            f"{teacher.name:<12} {teacher.library:<12} {teacher.view:<7} {teacher.standardizer:<12} {teacher.spatial_loss:<17} "
            f"{teacher.spatial_weight:>6g}  {teacher.summary_loss:<12} {teacher.summary_weight:>6g}"
        )
    header = f"{'stage':<6} {'steps':>8} {'images/step':>11} {'rate':>5} {'resolution':>10} {'tokens':>7} {'GFLOP/image':>12}  teachers"
    lines += ["", header]
    for index, stage in enumerate(run.stages):
        for partition in stage.partitions:
            for resolution in partition.resolutions:
                tokens = run.num_prefix_tokens + (resolution // student.patch_size) ** 2
                lines.append(
                    f"{index:<6} {stage.steps:>8,} {partition.batch_size:>11,} {partition.rate:>5g} {resolution:>10} {tokens:>7,} "
                    f"{training_flops_per_image(student, tokens, ()) / 1e9:>12,.1f}  {', '.join(run.teachers_of(partition))}"
                )
    parallel = run.parallel
    blocks = ", ".join(f"{first}-{end - 1}" for first, end in block_ranges(student.num_layers, parallel))
    lines += [
        "",
        f"layout    tensor {parallel.tensor}, pipeline {parallel.pipeline} x {parallel.virtual_pipeline} (blocks {blocks}), "
        f"data {parallel.data or 'what the ranks leave'}; teachers on {run.train.teacher_ranks} ranks",
        f"run       {run.total_steps:,} steps, {run.total_samples:,} images; GFLOP are the student's, forward and backward, without heads",
    ]
    return "\n".join(lines)
