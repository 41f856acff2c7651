"""transformers' own RadioModel: a folder that ``AutoModel.from_pretrained(FOLDER)`` opens. It holds the backbone, no adaptor heads."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import RadioConfig, RadioModel

from vision_agglom.export.hub import ratio_for
from vision_agglom.export.unsupported import UnsupportedStudentError
from vision_agglom.plain.radio import PlainRadio
from vision_agglom.plain.vit import PlainViT, PlainViTShape


def to_transformers(radio: PlainViT, *, image_side: int) -> RadioModel:
    """Return the backbone as a RadioModel in fp32, with the same outputs.

    Args:
        image_side: side in pixels that the configuration names as usual.

    Raises:
        UnsupportedStudentError: RadioModel cannot be such a student.
    """
    config = _config(radio.shape, image_side)
    model = RadioModel(config)
    model.load_state_dict(_rename(radio))
    return model.eval()


def write_transformers(radio: PlainRadio, folder: Path, *, image_side: int) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json.

    Raises:
        UnsupportedStudentError: see ``to_transformers``.
    """
    model = to_transformers(radio, image_side=image_side)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": image_side, "width": image_side},
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        # The model does that itself.
        "do_normalize": False,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")


def _config(shape: PlainViTShape, image_side: int) -> RadioConfig:
    if shape.final_norm:
        raise UnsupportedStudentError(
            "transformers' RadioModel has no norm behind the last block, this student has one (student.final_norm)"
        )
    if shape.patch_bias:
        raise UnsupportedStudentError("transformers' RadioModel has no bias in the patch embedding, this student has one")
    width, hidden = shape.hidden_size, shape.mlp_hidden_size or 4 * shape.hidden_size
    ratio = ratio_for(hidden, width) if shape.mlp == "gelu" else _swiglu_ratio(hidden, width)
    return RadioConfig(
        hidden_size=width,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        mlp_ratio=ratio,
        hidden_act="gelu",
        layer_norm_eps=shape.norm_eps,
        use_swiglu_ffn=shape.mlp == "swiglu",
        qkv_bias=shape.qkv_bias,
        layerscale_value=1.0,
        patch_size=shape.patch_size,
        image_size=image_side,
        max_img_size=shape.table_side * shape.patch_size,
        num_cls_tokens=shape.num_cls_tokens,
        num_registers=shape.num_registers,
        summary_idxs=list(shape.summary_idxs),
        norm_mean=list(shape.mean),
        norm_std=list(shape.std),
    )


def _swiglu_ratio(hidden: int, width: int) -> float:
    """RadioModel keeps two thirds of width x ratio, rounded up to a multiple of 8."""
    if hidden % 8:
        raise UnsupportedStudentError(
            f"transformers' RadioModel has gated MLPs of widths that are multiples of 8, this student's is {hidden}"
        )
    ratio = ratio_for(hidden * 3 // 2, width)
    assert (int(int(width * ratio) * 2 / 3) + 7) // 8 * 8 == hidden
    return ratio


def _rename(radio: PlainViT) -> dict[str, Tensor]:
    """The backbone's tensors under RadioModel's names."""
    source = {name: tensor.detach().cpu() for name, tensor in radio.state_dict().items()}
    generator = "base_model.patch_generator"
    renamed = {
        "summary_idxs": torch.tensor(radio.shape.summary_idxs, dtype=torch.long),
        "input_conditioner.norm_mean": source["input_conditioner.norm_mean"],
        "input_conditioner.norm_std": source["input_conditioner.norm_std"],
        "embeddings.position_embedding": source[f"{generator}.pos_embed"],
        "embeddings.cls_register_token": source[f"{generator}.cls_token.token"],
        "embeddings.patch_projection.weight": source[f"{generator}.embedder.weight"],
    }
    for index in range(radio.shape.num_layers):
        block = {
            name.removeprefix(f"base_model.blocks.{index}."): tensor
            for name, tensor in source.items()
            if name.startswith(f"base_model.blocks.{index}.")
        }
        renamed |= {f"encoder.layer.{index}.{name}": tensor for name, tensor in _rename_block(block, radio.shape).items()}
    return renamed


def _rename_block(block: dict[str, Tensor], shape: PlainViTShape) -> dict[str, Tensor]:
    renamed = {name: tensor for name, tensor in block.items() if name.startswith(("norm1.", "norm2.", "mlp.fc"))}
    for kind in ("weight", "bias"):
        if f"attn.qkv.{kind}" in block:
            for role, rows in zip("qkv", block[f"attn.qkv.{kind}"].chunk(3), strict=True):
                renamed[f"attention.{role}_proj.{kind}"] = rows.clone()
        renamed[f"attention.o_proj.{kind}"] = block[f"attn.proj.{kind}"]
        if shape.mlp == "swiglu":
            gate, value = block[f"mlp.w12.{kind}"].chunk(2)
            renamed |= {f"mlp.gate_proj.{kind}": gate.clone(), f"mlp.up_proj.{kind}": value.clone()}
            renamed[f"mlp.down_proj.{kind}"] = block[f"mlp.w3.{kind}"]
    for number in (1, 2):
        renamed[f"layer_scale{number}.lambda1"] = block.get(f"ls{number}.gamma", torch.ones(shape.hidden_size))
    return renamed
