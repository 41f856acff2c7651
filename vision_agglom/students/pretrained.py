"""Starting the student from a Vision Transformer that timm, DINOv2 or RADIO saved.

Names are RADIO's without ``base_model.``: ``patch_generator.embedder``, ``blocks.N.attn.qkv``, ``norm``, ...; plain/files.py brings timm's
there.
What a file holds either has a place in the student, or is passed over on purpose and said to be, or is an error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hybrid.substrate.context import Substrate
from vision_agglom.config.schema import VisionConfig
from vision_agglom.config.student import StudentConfig
from vision_agglom.plain.files import BACKBONE, FEATURE_NORMALIZER, VitFile, is_behind_backbone, read_vit_file
from vision_agglom.plain.vit import RGB
from vision_agglom.resample import resize_grid
from vision_agglom.students.layers import CutLinear
from vision_agglom.students.vit import StudentModel

_TOKENS = "patch_generator.cls_token.token"


@dataclass(frozen=True)
class PretrainedWeights:
    """A file's tensors for a student."""

    tensors: dict[str, Tensor]
    """Under the student's names, whole, in its arrangement, fp32."""
    tokens_SD: Tensor
    """Class tokens, then registers."""
    num_cls_tokens: int | None
    """None where the file does not say which are which."""
    passed_over: tuple[str, ...]
    """Names in the file."""


@torch.no_grad()
def load_pretrained(chunks: Sequence[StudentModel], run: VisionConfig, substrate: Substrate) -> None:
    """Fill the backbone from ``student.initialize_from``; heads stay as they were drawn.

    Spectral scales are set anew, so that the reparametrized weights are the file's. For tokens see ``start_tokens``.

    Raises:
        ValueError: the file is no such ViT's, lacks a tensor, has one of another shape, or one that the student has no place for.
    """
    path = run.student.initialize_from
    assert path is not None
    try:
        pretrained = arrange_for_student(read_vit_file(path), run.student)
        for chunk in chunks:
            _fill(chunk, pretrained.tensors, substrate)
            if chunk.pre_process and len(pretrained.tokens_SD):
                tokens = chunk.embedding.prefix_tokens
                tokens.copy_(start_tokens(tokens, pretrained.tokens_SD, len(run.teachers), pretrained.num_cls_tokens))
    except (ValueError, OSError) as error:
        raise ValueError(f"student.initialize_from={path}: {error}") from None
    if pretrained.passed_over and substrate.rank == 0:
        print(f"student.initialize_from={path}: passed over {_first(pretrained.passed_over)}", flush=True)


def _fill(chunk: StudentModel, tensors: dict[str, Tensor], substrate: Substrate) -> None:
    for name, parameter in chunk.named_global_parameters():
        if name not in tensors:
            if not name.startswith(("heads.", "embedding.prefix_tokens")) and not name.endswith("spectral.scale"):
                raise ValueError(f"it has nothing for the student's {name}; it holds another architecture")
            continue
        whole = tensors[name]
        declaration = parameter.declaration
        if tuple(whole.shape) != declaration.global_shape:
            raise ValueError(f"{name} has shape {tuple(whole.shape)}, the student's is {declaration.global_shape}")
        if declaration.axis is not None:
            whole = whole.chunk(substrate.tensor_size, declaration.axis)[substrate.tensor_rank]
        parameter.copy_(whole)
    for module in chunk.modules():
        if isinstance(module, CutLinear) and module.spectral is not None:
            module.spectral.start_at_identity(module.weight)


def arrange_for_student(file: VitFile, student: StudentConfig) -> PretrainedWeights:
    """A file's tensors under the student's names.

    Raises:
        ValueError: one has no place in the student, or the file was trained on images of another normalisation.
    """
    left = {name.removeprefix(BACKBONE): tensor.float() for name, tensor in file.state.items()}
    passed_over = [name for name in left if name.startswith(student.initialize_skip)]
    for name in passed_over:
        del left[name]
    for kind, own in (("mean", student.mean), ("std", student.std)):
        _check_normalisation(kind, left.pop(f"input_conditioner.norm_{kind}", None), own)
    if "patch_generator.embedder.weight" not in left or "patch_generator.pos_embed" not in left:
        raise ValueError("expected patches and positions (patch_generator.embedder.weight, patch_generator.pos_embed)")
    table_TD = _resize_positions(left.pop("patch_generator.pos_embed")[0], student)
    if "patch_generator.embedder.bias" in left:
        # This student's patch embedding has no bias: every patch's position carries it instead.
        table_TD = table_TD + left.pop("patch_generator.embedder.bias")
    tensors = {"embedding.patch_weight": left.pop("patch_generator.embedder.weight"), "embedding.position_table": table_TD}
    tokens_SD = left.pop(_TOKENS, torch.empty(0, student.hidden_size))
    for index in range(student.num_layers):
        for theirs, ours in _BLOCK_NAMES.items():
            if student.layer_scale is None and theirs.startswith("ls"):
                continue
            if f"blocks.{index}.{theirs}" in left:
                tensors[f"blocks.{index}.{ours}"] = _arrange(theirs, left.pop(f"blocks.{index}.{theirs}"), student)
    if student.final_norm:
        tensors |= {f"final_norm.{kind}": left.pop(f"norm.{kind}") for kind in ("weight", "bias") if f"norm.{kind}" in left}
    unread = []
    for name in left:
        # The student has its own of these, or none.
        has_own = is_behind_backbone(name) or name.startswith(FEATURE_NORMALIZER)
        (passed_over if has_own else unread).append(name)
    if unread:
        raise ValueError(
            f"the student (num_layers={student.num_layers}, mlp={student.mlp}, layer_scale={student.layer_scale}, "
            f"final_norm={str(student.final_norm).lower()}) has no place for {_first(unread)}; change the student, or name their "
            "beginnings in student.initialize_skip"
        )
    return PretrainedWeights(tensors, tokens_SD, file.num_cls_tokens, tuple(passed_over))


def start_tokens(drawn_SD: Tensor, given_SD: Tensor, num_class_tokens: int, num_given_class_tokens: int | None) -> Tensor:
    """Class tokens and registers of a student from a file's.

    As many class tokens are taken over as they are, in order; of a single one each of several begins with a copy, and keeps what
    distinguishes it, its own initial noise. Registers are taken over in order; the student's further ones stay as they were drawn.

    Args:
        drawn_SD: the student's, as they were drawn.
        given_SD: the file's.
        num_class_tokens: how many of the student's are class tokens, one per teacher.
        num_given_class_tokens: how many of the file's; None where it does not say.

    Raises:
        ValueError: the numbers do not fit, or nothing says which of the file's are registers.
    """
    skip = "begin with new ones by student.initialize_skip=[patch_generator.cls_token]"
    if num_given_class_tokens is None:
        if len(given_SD) not in (1, len(drawn_SD)):
            raise ValueError(
                f"it does not say which of its {len(given_SD)} tokens before the patches are class tokens, and the student has "
                f"{len(drawn_SD)}; give it as many registers, or {skip}"
            )
        num_given_class_tokens = 1 if len(given_SD) == 1 else num_class_tokens
    num_given_registers, num_registers = len(given_SD) - num_given_class_tokens, len(drawn_SD) - num_class_tokens
    if num_given_class_tokens not in (0, 1, num_class_tokens):
        raise ValueError(f"it has {num_given_class_tokens} class tokens, the student {num_class_tokens}, one per teacher; {skip}")
    if num_given_registers > num_registers:
        raise ValueError(f"it has {num_given_registers} registers, the student {num_registers}; raise student.num_registers, or {skip}")
    tokens_SD = drawn_SD.clone()
    given_SD = given_SD.to(drawn_SD)
    if num_given_class_tokens == num_class_tokens:
        tokens_SD[:num_class_tokens] = given_SD[:num_class_tokens]
    else:
        tokens_SD[:num_class_tokens] += given_SD[:num_given_class_tokens].sum(0)
    tokens_SD[num_class_tokens : num_class_tokens + num_given_registers] = given_SD[num_given_class_tokens:]
    return tokens_SD


def _check_normalisation(kind: str, given: Tensor | None, own: RGB) -> None:
    if given is not None and not torch.allclose(given.flatten(), torch.tensor(own), rtol=0, atol=1e-4):
        values = [round(float(value), 6) for value in given.flatten()]
        raise ValueError(f"it takes images normalised with {kind} {values}, the student's is {list(own)}; set student.{kind}={values}")


def _first(names: Sequence[str], count: int = 6) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


_BLOCK_NAMES = {
    "norm1.weight": "self_attention.linear_qkv.layer_norm_weight",
    "norm1.bias": "self_attention.linear_qkv.layer_norm_bias",
    "attn.qkv.weight": "self_attention.linear_qkv.weight",
    "attn.qkv.bias": "self_attention.linear_qkv.bias",
    "attn.proj.weight": "self_attention.linear_proj.weight",
    "attn.proj.bias": "self_attention.linear_proj.bias",
    "ls1.gamma": "self_attention.linear_proj.layer_scale",
    "ls1.grandma": "self_attention.linear_proj.layer_scale",
    "norm2.weight": "mlp.linear_fc1.layer_norm_weight",
    "norm2.bias": "mlp.linear_fc1.layer_norm_bias",
    "mlp.fc1.weight": "mlp.linear_fc1.weight",
    "mlp.fc1.bias": "mlp.linear_fc1.bias",
    "mlp.w12.weight": "mlp.linear_fc1.weight",
    "mlp.w12.bias": "mlp.linear_fc1.bias",
    "mlp.fc2.weight": "mlp.linear_fc2.weight",
    "mlp.fc2.bias": "mlp.linear_fc2.bias",
    "mlp.w3.weight": "mlp.linear_fc2.weight",
    "mlp.w3.bias": "mlp.linear_fc2.bias",
    "ls2.gamma": "mlp.linear_fc2.layer_scale",
    "ls2.grandma": "mlp.linear_fc2.layer_scale",
}
"""timm's name (grandma: DINOv2's in RADIO) -> the student's, within a block."""


def _arrange(name: str, tensor: Tensor, student: StudentConfig) -> Tensor:
    """Rows of qkv head by head instead of q, k, v; of a gated fc1 gate and value alternating instead of gates, values."""
    if name.startswith("attn.qkv"):
        return tensor.unflatten(0, (3, student.num_attention_heads, student.head_dim)).transpose(0, 1).flatten(0, 2)
    if student.mlp == "swiglu" and name.startswith(("mlp.fc1", "mlp.w12")):
        return tensor.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)
    return tensor


def _resize_positions(table_TD: Tensor, student: StudentConfig) -> Tensor:
    """[side^2, D] of any side to the student's table."""
    side = math.isqrt(len(table_TD))
    if side**2 != len(table_TD):
        raise ValueError(f"its {len(table_TD)} positions are no square of patches")
    return resize_grid(table_TD[None].double(), (side, side), (student.table_side, student.table_side))[0].float()
