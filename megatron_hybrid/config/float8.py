"""The options of float8 products."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field, model_validator

from megatron_hybrid.config.section import Section

LARGEST_MARGIN: Final = 18
"""448 / 2^18 still rounds to E4M3's least number, 2^-9; 448 / 2^19 rounds to zero."""


class DelayedScalingConfig(Section):
    """Delayed scaling: scales come from the largest magnitudes (amaxes) of past steps."""

    margin: int = Field(0, ge=0, le=LARGEST_MARGIN)
    """Powers of two left free above amax: scale = (largest number of the format / amax) / 2^margin. From 19 on E4M3 would flush even amax
    to zero, and with it every input and weight."""
    history_length: int = Field(1024, gt=0)
    """Optimizer steps in the amax window."""
    amax_algorithm: Literal["max", "most_recent"] = "max"
    """Which amax of the window makes the scale: the largest, or the last step's."""
    reduction: Literal["tensor_data", "tensor"] = "tensor_data"
    """Ranks that share amaxes: tensor- and data-parallel ones, so that all copies use the same scales, or tensor-parallel ones alone."""


class Fp8Config(Section):
    """Float8 products in the layers' linears (docs/fp8.md), never in the embedding and the output layer. Without a recipe every other
    option must stay at its default."""

    recipe: Literal["off", "delayed", "current"] = "off"
    """off; delayed: scales from past steps; current: the scale of each tensor from its own largest magnitude."""
    format: Literal["hybrid", "e4m3"] = "hybrid"
    """hybrid: E4M3 for inputs and weights, E5M2 for gradients. e4m3: E4M3 for all."""
    delayed: DelayedScalingConfig = DelayedScalingConfig()
    """Options of recipe=delayed."""
    linears: tuple[Literal["in_proj", "out_proj", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"], ...] = Field(
        ("in_proj", "out_proj", "linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"), min_length=1
    )
    """Linears that take part: those of Mamba, attention and MLP layers, into and out of the block."""
    bf16_layers_at_start: int = Field(0, ge=0)
    """First layers of the whole pattern that stay in the working precision; every character of the pattern counts."""
    bf16_layers_at_end: int = Field(0, ge=0)
    """Last layers of the whole pattern that stay in the working precision."""
    implementation: Literal["auto", "emulated", "scaled_mm", "cublaslt", "transformer_engine"] = "auto"
    """emulated: fp32 products of float8 numbers, on any device. scaled_mm, cublaslt, transformer_engine: float8 tensor cores through torch,
    cuBLASLt itself, or Transformer Engine. auto: emulated on a CPU, cublaslt on a GPU."""
    telemetry_every_steps: int | None = Field(None, gt=0)
    """Steps between reports of each linear's amaxes, scales, saturated and flushed shares. Unset: none. On a GPU such a step runs
    beside the CUDA graph and needs a micro-batch's activations once more."""
    shadow_every_steps: int | None = Field(None, gt=0)
    """Steps between evaluations of the same batch in the working precision, which report the relative loss gap. Unset: none."""

    @model_validator(mode="after")
    def _check(self) -> Fp8Config:
        changed = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
        if self.recipe == "off" and changed:
            raise ValueError(
                f"recipe=off reads no other option, and {', '.join(changed)} {'is' if len(changed) == 1 else 'are'} set; set "
                "recipe=delayed or current to train in float8, or drop the whole section (on the command line: 'fp8={recipe: off}')"
            )
        if self.recipe == "current" and self.delayed != DelayedScalingConfig():
            raise ValueError(
                "recipe=current keeps no history and reads none of the options under delayed; drop them, or set recipe=delayed"
            )
        if len(set(self.linears)) < len(self.linears):
            raise ValueError(f"linears={list(self.linears)} names one twice")
        return self
