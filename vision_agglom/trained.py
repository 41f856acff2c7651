"""From a run directory to the student it trained, in plain torch, on one rank, whatever layout trained it.

Spectral scales are multiplied into the weights, and each teacher's denormaliser is folded into the last linear of its spatial head, so
the heads speak the teachers' own spaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.checkpoint import CheckpointError, CheckpointStore, load, read_header
from megatron_hybrid.checkpoint.sharding import shard_copies, shard_parameters
from megatron_hybrid.checkpoint.store import complete_steps, step_name
from megatron_hybrid.config.run_directory import CHECKPOINTS_NAME, CONFIG_NAME
from megatron_hybrid.substrate.context import Substrate
from vision_agglom.config.load import load_config
from vision_agglom.config.schema import VisionConfig, loss_terms
from vision_agglom.config.student import StudentConfig
from vision_agglom.heads import HeadShape
from vision_agglom.plain.radio import PlainHeadShape, PlainRadio
from vision_agglom.plain.vit import PlainViTShape
from vision_agglom.students.build import build_transformer_config
from vision_agglom.students.layers import CutLinear
from vision_agglom.students.ops import vision_ops
from vision_agglom.students.vit import StudentModel
from vision_agglom.targets.standardizers import Transformation

_ONE_RANK = ("parallel={data: 1}", "runtime.device=auto", "runtime.threads_per_rank=null", "fp8={recipe: off}", "loss.mesa={weight: 0}")
"""Overrides that replace what the configuration says about where and how it was trained."""


@dataclass(frozen=True)
class TrainedStudent:
    """What a run made."""

    run: VisionConfig
    radio: PlainRadio
    """In fp32, in eval mode, on the rank's device."""
    checkpoint: Path
    """Where the weights came from."""
    step: int


def load_run(run_dir: Path, overrides: Sequence[str] = ()) -> VisionConfig:
    """Return a run's configuration, with further options replaced, for one rank of this host.

    Raises:
        ValueError: ``run_dir`` holds no configuration, or one that cannot be used.
    """
    file = run_dir / CONFIG_NAME
    if not file.is_file():
        raise ValueError(f"{run_dir} is no run directory: it has no {CONFIG_NAME}; give the run_dir of a distillation run")
    return load_config(file, (*_ONE_RANK, *overrides))


def load_trained(run: VisionConfig, run_dir: Path, substrate: Substrate, *, step: int | None = None) -> TrainedStudent:
    """Load the student of a run's newest sound checkpoint, or of the one after ``step`` steps.

    Args:
        run: as ``load_run`` returned it; its ``run_dir`` is not read, so a run directory may have moved.
        substrate: one rank.

    Raises:
        ValueError: there is no such checkpoint, it is damaged, or it is of another student than the configuration's.
    """
    checkpoint = _find_checkpoint(run_dir / CHECKPOINTS_NAME, step, substrate)
    header = read_header(checkpoint)
    heads = _saved_heads(checkpoint, header, run)
    model = _build_model(run, heads, header["model"]["balance"], substrate)
    transformations = _load_state(checkpoint, model, heads, substrate)
    radio = to_plain(model, run, heads, transformations)
    return TrainedStudent(run, radio.to(substrate.device).eval(), checkpoint, header["state"]["step"])


@torch.no_grad()
def to_plain(
    model: StudentModel, run: VisionConfig, heads: list[HeadShape], transformations: dict[str, Transformation], step: int = 0
) -> PlainRadio:
    """Return a whole student, on one rank, as plain torch in fp32.

    Args:
        model: all stages in one; its spectral estimates are those of evaluation.
        transformations: teacher -> the normalisation in whose space its spatial head's output is.
    """
    student = run.student
    shape = plain_shape(student, heads)
    plain_heads = tuple(
        PlainHeadShape(head.name, index, head.summary_channels, head.spatial_channels, head.hidden_size, head.num_inner)
        for index, head in enumerate(heads)
    )
    radio = PlainRadio(shape, plain_heads)
    state = {name: tensor.float() for name, tensor in radio.state_dict().items() if name.startswith("input_conditioner.")}
    state |= _backbone_state(model, student, step) | _heads_state(model, transformations)
    radio.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return radio


def plain_shape(student: StudentConfig, heads: Sequence[HeadShape]) -> PlainViTShape:
    """A student's shape, from its configuration and its teachers' heads."""
    return PlainViTShape(
        hidden_size=student.hidden_size,
        num_layers=student.num_layers,
        num_heads=student.num_attention_heads,
        patch_size=student.patch_size,
        mlp_hidden_size=student.ffn_hidden_size,
        mlp=student.mlp,
        norm_eps=student.norm_eps,
        num_cls_tokens=len(heads),
        num_registers=student.num_register_tokens(len(heads)),
        summary_idxs=tuple(index for index, head in enumerate(heads) if head.summary_channels is not None),
        table_side=student.table_side,
        final_norm=student.final_norm,
        layer_scale=student.layer_scale is not None,
        mean=student.mean,
        std=student.std,
    )


def _backbone_state(model: StudentModel, student: StudentConfig, step: int) -> dict[str, Tensor]:
    embedding, generator = model.embedding, "base_model.patch_generator"
    state = {
        f"{generator}.embedder.weight": embedding.patch_weight,
        f"{generator}.pos_embed": embedding.position_table[None],
        f"{generator}.cls_token.token": embedding.prefix_tokens,
    }
    first, second = ("mlp.fc1", "mlp.fc2") if student.mlp == "gelu" else ("mlp.w12", "mlp.w3")
    for index, block in enumerate(model.blocks):
        name = f"base_model.blocks.{index}"
        attention, mlp = block.self_attention, block.mlp
        for norm, linear in (("norm1", attention.linear_qkv), ("norm2", mlp.linear_fc1)):
            state |= {f"{name}.{norm}.weight": linear.layer_norm_weight, f"{name}.{norm}.bias": linear.layer_norm_bias}
        linears = {"attn.qkv": attention.linear_qkv, "attn.proj": attention.linear_proj, first: mlp.linear_fc1, second: mlp.linear_fc2}
        for role, linear in linears.items():
            state[f"{name}.{role}.weight"] = _arrange(role, linear.effective_weight(step), student)
            state[f"{name}.{role}.bias"] = _arrange(role, linear.bias, student)
        if student.layer_scale is not None:
            state |= {f"{name}.ls1.gamma": attention.linear_proj.layer_scale, f"{name}.ls2.gamma": mlp.linear_fc2.layer_scale}
    if model.final_norm is not None:
        state |= {"base_model.norm.weight": model.final_norm.weight, "base_model.norm.bias": model.final_norm.bias}
    return state


def _arrange(role: str, rows: Tensor, student: StudentConfig) -> Tensor:
    """Rows of qkv from head by head to q, k, v; of a gated first linear from gate and value alternating to gates, values."""
    if role == "attn.qkv":
        return rows.unflatten(0, (student.num_attention_heads, 3, student.head_dim)).transpose(0, 1).flatten(0, 2)
    if role == "mlp.w12":
        return rows.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)
    return rows


def _heads_state(model: StudentModel, transformations: dict[str, Transformation]) -> dict[str, Tensor]:
    state = {f"_heads.{name}": tensor for name, tensor in model.heads.summary.state_dict().items()}
    state |= {f"_feature_projections.{name}": tensor for name, tensor in model.heads.spatial.state_dict().items()}
    for name, transformation in transformations.items():
        last = f"_feature_projections.{name}.final.2"
        state[f"{last}.weight"], state[f"{last}.bias"] = transformation.fold(state[f"{last}.weight"], state[f"{last}.bias"])
    return state


def _find_checkpoint(directory: Path, step: int | None, substrate: Substrate) -> Path:
    steps = complete_steps(directory)
    there = f"it has those of steps {', '.join(map(str, steps))}" if steps else "it has none"
    if step is not None:
        if step not in steps:
            raise ValueError(f"{directory} has no checkpoint of step {step}; {there}")
        return directory / step_name(step)
    newest = CheckpointStore(directory, keep_last=None, asynchronous=False, group=substrate.control_group).newest()
    if newest is None:
        raise ValueError(f"{directory} has no sound checkpoint ({there}); let the run save one first")
    return newest


def _saved_heads(checkpoint: Path, header: dict[str, Any], run: VisionConfig) -> list[HeadShape]:
    """The heads' widths, which the teachers decided when the run began."""
    saved = header["model"]
    expected = run.architecture()
    different = sorted(name for name, value in expected.items() if saved.get(name) != value)
    if different or "heads" not in saved:
        what = f"{', '.join(different)} differ" if different else "it has no heads"
        raise ValueError(f"{checkpoint} is of another student than its {CONFIG_NAME} says: {what}")
    return [HeadShape(name, *saved["heads"][name]) for name in run.teacher_names]


def _build_model(run: VisionConfig, heads: list[HeadShape], learns_uncertainty: bool, substrate: Substrate) -> StudentModel:
    config = build_transformer_config(run, substrate)
    model = StudentModel(
        run.student,
        heads,
        run.num_prefix_tokens,
        config,
        vision_ops(substrate.device, config.params_dtype),
        seed=run.seed,
        layer_range=(0, run.student.num_layers),
        is_first_stage=True,
        is_last_stage=True,
        num_uncertainties=len(loss_terms(run)) if learns_uncertainty else 0,
    )
    return model.to(substrate.device).eval()


def _load_state(checkpoint: Path, model: StudentModel, heads: list[HeadShape], substrate: Substrate) -> dict[str, Transformation]:
    """Read the weights and the singular vectors into the model; return the normalisations of the heads' spaces."""
    groups = (substrate.tensor_group, substrate.data_group)
    task: dict[str, Tensor] = {}
    for head in heads:
        identity = Transformation.identity(head.spatial_channels)
        parts = {"forward": identity.forward_CC, "inverse": identity.inverse_CC, "offset": identity.mean_C}
        task |= {f"targets.{head.name}.head.{part}": tensor for part, tensor in parts.items()}
    vectors = {
        f"spectral.{name}.{side}": getattr(module.spectral, buffer)
        for name, module in model.named_modules()
        if isinstance(module, CutLinear) and module.spectral is not None
        for side, buffer in (("left", "left_KO"), ("right", "right_KI"))
    }
    wanted = {
        "model": shard_parameters(model.named_global_parameters(), *groups),
        "task": shard_copies(task | vectors, *groups, differ_by_data_rank=False),
    }
    try:
        loaded = load(checkpoint, wanted, group=substrate.control_group)
    except CheckpointError as error:
        raise ValueError(f"{error}; use another checkpoint") from error
    with torch.no_grad():
        for name, parameter in model.named_global_parameters():
            parameter.copy_(loaded["model"][name])
        for name, vector in vectors.items():
            vector.copy_(loaded["task"][name].view_as(vector))
    saved = loaded["task"]
    return {
        head.name: Transformation(*(saved[f"targets.{head.name}.head.{part}"] for part in ("forward", "inverse", "offset")))
        for head in heads
    }
