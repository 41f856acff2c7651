"""``describe``: what a run is made of and what it costs, without torch."""

from __future__ import annotations

from collections.abc import Sequence

from vision_agglom.commands.arguments import add_config, read_config, verb_parser
from vision_agglom.config.schema import VisionConfig, block_ranges
from vision_agglom.flops import backbone_parameters, training_flops_per_image

_EPILOG = """examples:
  python -m vision_agglom describe examples/radio/photographs.yaml
  python -m vision_agglom describe examples/radio/radio_v2.5.yaml parallel.tensor=2 parallel.pipeline=2
"""


def main(argv: Sequence[str]) -> int:
    """Parse the command line and print; returns the exit code."""
    parser = verb_parser("describe", "Print a run's student, teachers, stages and layout.", _EPILOG)
    add_config(parser)
    arguments = parser.parse_intermixed_args(argv)
    run = read_config(arguments.config, arguments.overrides)
    if run is None:
        return 2
    print(describe(run))
    return 0


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
                    f"{training_flops_per_image(student, tokens, ()) / 1e9:>12,.1f}  {', '.join(partition.teachers or run.teacher_names)}"
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
