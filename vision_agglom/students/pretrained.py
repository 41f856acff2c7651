"""Starting the student from a Vision Transformer that timm (or RADIO's releases) saved.

Names on the left are timm's: ``patch_embed.proj``, ``cls_token``, ``pos_embed``, ``blocks.N.norm1``, ``attn.qkv``, ... RADIO's
``base_model.`` prefix and ``patch_generator.*`` names are understood as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_hybrid.substrate.context import Substrate
from vision_agglom.config.schema import VisionConfig
from vision_agglom.config.student import StudentConfig
from vision_agglom.resample import resize_grid
from vision_agglom.students.layers import CutLinear
from vision_agglom.students.vit import StudentModel


@torch.no_grad()
def load_pretrained(chunks: Sequence[StudentModel], run: VisionConfig, substrate: Substrate) -> None:
    """Fill the blocks, the patch embedding, the position table and the final norm from ``student.initialize_from``.

    Class tokens start from the file's one class token, each with what distinguishes them: their own initial noise. Registers and heads stay
    as they were drawn. Spectral scales are set anew, so that the reparametrized weights are the file's.

    Raises:
        ValueError: the file is no such state dict, lacks a tensor, or has one of another shape.
    """
    path = run.student.initialize_from
    assert path is not None
    weights = rename_timm(read_state_dict(path), run.student, path)
    for chunk in chunks:
        for name, parameter in chunk.named_global_parameters():
            if name not in weights:
                if not name.startswith(("heads.", "embedding.prefix_tokens")) and not name.endswith("spectral.scale"):
                    raise ValueError(f"{path} has nothing for the student's {name}; it holds another architecture")
                continue
            whole = weights[name]
            declaration = parameter.declaration
            if tuple(whole.shape) != declaration.global_shape:
                raise ValueError(f"{path}: {name} has shape {tuple(whole.shape)}, the student's is {declaration.global_shape}")
            if declaration.axis is not None:
                whole = whole.chunk(substrate.tensor_size, declaration.axis)[substrate.tensor_rank]
            parameter.copy_(whole)
        if chunk.pre_process and "class_token" in weights:
            chunk.embedding.prefix_tokens[: len(run.teachers)] += weights["class_token"].to(chunk.embedding.prefix_tokens)
        for module in chunk.modules():
            if isinstance(module, CutLinear) and module.spectral is not None:
                module.spectral.start_at_identity(module.weight)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors, .pth or .pt file, on the CPU; of a training checkpoint its ``state_dict`` or ``model``.

    Raises:
        ValueError: the file cannot be read as one.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"student.initialize_from={path} cannot be read: {type(error).__name__}: {error}") from None
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    return {name.removeprefix("base_model."): tensor for name, tensor in loaded.items() if isinstance(tensor, Tensor)}


def rename_timm(state: dict[str, Tensor], student: StudentConfig, path: Path) -> dict[str, Tensor]:
    """timm's tensors under the student's names, whole, in the student's arrangement, fp32; ``class_token`` beside them.

    Raises:
        ValueError: the patch embedding or the positions are not those of such a ViT.
    """
    renamed: dict[str, Tensor] = {}
    patch = state.get("patch_embed.proj.weight", state.get("patch_generator.embedder.weight"))
    positions = state.get("pos_embed", state.get("patch_generator.pos_embed"))
    if patch is None or positions is None:
        raise ValueError(f"{path} has no patch_embed.proj.weight and pos_embed (or patch_generator.*): expected a timm ViT's state dict")
    renamed["embedding.patch_weight"] = patch.float().flatten(1)
    renamed["embedding.position_table"] = _resize_positions(positions.float(), student, path)
    if "patch_embed.proj.bias" in state:
        # This student's patch embedding has no bias: every patch's position carries it instead.
        renamed["embedding.position_table"] += state["patch_embed.proj.bias"].float()
    if "cls_token" in state:
        tokens_D = state["cls_token"].float().flatten()
        # Class token first, if the positions have one for it.
        has_position = positions.dim() == 3 and int(positions.shape[1] ** 0.5) ** 2 == positions.shape[1] - 1
        renamed["class_token"] = tokens_D + positions[0, 0].float() if has_position else tokens_D
    for index in range(student.num_layers):
        source, target = f"blocks.{index}.", f"blocks.{index}."
        for theirs, ours in _BLOCK_NAMES.items():
            if source + theirs in state:
                renamed[target + ours] = _arrange(theirs, state[source + theirs].float(), student)
    for name in ("weight", "bias"):
        if student.final_norm and f"norm.{name}" in state:
            renamed[f"final_norm.{name}"] = state[f"norm.{name}"].float()
    return renamed


_BLOCK_NAMES = {
    "norm1.weight": "self_attention.linear_qkv.layer_norm_weight",
    "norm1.bias": "self_attention.linear_qkv.layer_norm_bias",
    "attn.qkv.weight": "self_attention.linear_qkv.weight",
    "attn.qkv.bias": "self_attention.linear_qkv.bias",
    "attn.proj.weight": "self_attention.linear_proj.weight",
    "attn.proj.bias": "self_attention.linear_proj.bias",
    "ls1.gamma": "self_attention.linear_proj.layer_scale",
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
}
"""timm's name -> the student's, within a block."""


def _arrange(name: str, tensor: Tensor, student: StudentConfig) -> Tensor:
    """Rows of qkv head by head instead of q, k, v; of a gated fc1 gate and value alternating instead of gates, values."""
    if name.startswith("attn.qkv"):
        return tensor.unflatten(0, (3, student.num_attention_heads, student.head_dim)).transpose(0, 1).flatten(0, 2)
    if student.mlp == "swiglu" and name.startswith(("mlp.fc1", "mlp.w12")):
        return tensor.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)
    return tensor


def _resize_positions(positions: Tensor, student: StudentConfig, path: Path) -> Tensor:
    """[1, (prefix +) side^2, D] of any side to the student's table; positions of a class token or registers are dropped."""
    positions_TD = positions.reshape(-1, positions.shape[-1])
    side = int(len(positions_TD) ** 0.5)
    if len(positions_TD) - side**2 > 8:
        raise ValueError(f"{path}: {len(positions_TD)} position embeddings are no square of patches with at most 8 tokens before it")
    table_TD = positions_TD[len(positions_TD) - side**2 :]
    target = (student.table_side, student.table_side)
    return resize_grid(table_TD[None].double(), (side, side), target)[0].float()
