"""NVlabs' torch.hub checkpoint: one file that ``torch.hub.load("NVlabs/RADIO", "radio_model", version=FILE)`` opens, heads included.

``state_dict`` holds the tensors under their names, ``args`` an argparse.Namespace of plain Python values that the loader builds the model
from. What the loader does with them decides what is written:

- it only warns of tensors that are missing or left over, so what is written must be exactly what it builds;
- it finds heads by prefix, ``_heads.NAME`` without a dot behind: no teacher's name may begin with another's;
- a summary head reads the class token at its teacher's place in the list, and ``summary_idxs`` are such places, while the number of class
  tokens is that of different names: each teacher is listed once, in the order of the class tokens, and says its ``token_slot``;
- teachers without a summary have a class token all the same;
- any ``type`` but "open_clip" and "siglip2" builds the generic adaptor, which downloads nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from vision_agglom.export.unsupported import UnsupportedStudentError
from vision_agglom.plain.radio import PlainHeadShape, PlainRadio
from vision_agglom.plain.vit import PlainViTShape

_TIMM_NAMES = {
    (192, 12, 3): "vit_tiny_patch16_224",
    (384, 12, 6): "vit_small_patch16_224",
    (768, 12, 12): "vit_base_patch16_224",
    (1024, 24, 16): "vit_large_patch16_224",
    (1152, 27, 16): "vit_so400m_patch16_224",
    (1280, 32, 16): "vit_huge_patch16_224",
}
"""(width, layers, heads) -> a model that the loader knows by name."""

_DEFAULT_MLP_SIZES = {"vit_so400m_patch16_224": 4304}
"""MLP widths of those that are not 4 x the width."""


def write_hub_checkpoint(radio: PlainRadio, path: Path, *, input_side: int, teachers: list[dict[str, Any]] | None = None) -> None:
    """Write a student and its heads as one file.

    Args:
        radio: the student.
        path: the file; appears when it is complete.
        input_side: side in pixels that ``args.input_size`` names.
        teachers: further plain facts of each teacher, in order, such as ``model`` and ``pretrained``.

    Raises:
        UnsupportedStudentError: NVlabs' loader cannot build such a student, or could not tell its heads apart.
    """
    args = hub_arguments(radio, input_side, teachers)
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in radio.state_dict().items()}
    torch.save({"arch": args.model, "epoch": 0, "state_dict": state, "args": args}, partial)
    partial.replace(path)


def hub_arguments(radio: PlainRadio, input_side: int, teachers: list[dict[str, Any]] | None = None) -> argparse.Namespace:
    """Return ``args``: plain values alone.

    Raises:
        UnsupportedStudentError: see ``write_hub_checkpoint``.
    """
    shape = radio.shape
    _check(shape, radio.head_shapes)
    model, options = _timm_model(shape)
    extras = teachers or [{} for _ in radio.head_shapes]
    listed = [
        {"type": "generic", "model": head.name, "pretrained": None, "input_size": input_side}
        | extra
        | {"name": head.name, "use_summary": head.summary_channels is not None, "token_slot": head.token}
        for head, extra in zip(radio.head_shapes, extras, strict=True)
    ]
    return argparse.Namespace(
        model=model,
        model_kwargs=options,
        in_chans=3,
        input_size=(3, input_side, input_side),
        pretrained=False,
        initial_checkpoint="",
        num_classes=None,
        drop=0.0,
        drop_path=None,
        drop_block=None,
        gp=None,
        bn_momentum=None,
        bn_eps=None,
        torchscript=False,
        model_norm=shape.final_norm,
        cpe_max_size=shape.table_side * shape.patch_size,
        cpe_num_registers=shape.num_registers,
        register_multiple=None,
        cls_token_per_teacher=True,
        teachers=listed,
        mlp_version="v2",
        spatial_mlp_version="v2",
        spectral_reparam=False,
        spectral_heads=False,
        damp=None,
    )


def _timm_model(shape: PlainViTShape) -> tuple[str, dict[str, Any]]:
    """Return a name that the loader knows and what has to be changed of that model."""
    name = _TIMM_NAMES.get((shape.hidden_size, shape.num_layers, shape.num_heads), "vit_tiny_patch16_224")
    (size,) = (size for size, known in _TIMM_NAMES.items() if known == name)
    options: dict[str, Any] = {}
    if size != (shape.hidden_size, shape.num_layers, shape.num_heads):
        options |= {"embed_dim": shape.hidden_size, "depth": shape.num_layers, "num_heads": shape.num_heads}
    if shape.patch_size != 16:
        options["patch_size"] = shape.patch_size
    mlp_size = shape.mlp_hidden_size or 4 * shape.hidden_size
    if mlp_size != _DEFAULT_MLP_SIZES.get(name, 4 * shape.hidden_size):
        options["mlp_ratio"] = ratio_for(mlp_size, shape.hidden_size)
    if not shape.qkv_bias:
        options["qkv_bias"] = False
    if shape.layer_scale:
        options["init_values"] = 1e-5
    return name, options


def ratio_for(hidden: int, width: int) -> float:
    """Return a ratio with int(width x ratio) == hidden, which hidden / width misses where it rounds down."""
    ratio = hidden / width
    while int(width * ratio) < hidden:
        ratio *= 1 + 2**-50
    assert int(width * ratio) == hidden
    return ratio


def _check(shape: PlainViTShape, heads: tuple[PlainHeadShape, ...]) -> None:
    if shape.mlp != "gelu":
        raise UnsupportedStudentError(
            "NVlabs' loader builds SwiGLU students as another architecture (dino_v2_g_student), whose files are not written here; "
            "transformers and onnx are"
        )
    if shape.norm_eps != 1e-6:
        raise UnsupportedStudentError(f"NVlabs' loader builds norms with eps 1e-6, this student's is {shape.norm_eps}")
    if shape.patch_bias:
        raise UnsupportedStudentError("NVlabs' patch embedding has no bias, this student's has one")
    names = [head.name for head in heads]
    for name in names:
        others = [other for other in names if other != name and other.startswith(name)]
        if others or names.count(name) > 1:
            raise UnsupportedStudentError(
                f"heads are looked up by prefix, and {name!r} is one of {(others or [name])[0]!r}; rename the teacher"
            )
    if [head.token for head in heads] != list(range(len(heads))) or shape.num_cls_tokens != len(heads):
        raise UnsupportedStudentError("NVlabs' loader counts one class token per teacher, in the teachers' order; this student has others")
