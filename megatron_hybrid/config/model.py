"""The options of a language model."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from megatron_hybrid.config.section import Section, require_divides
from megatron_hybrid.layout.pattern import MLP, parse_pattern


class ModelConfig(Section):
    """A hybrid language model: one character of ``pattern`` per layer, pre-norm residual around every layer."""

    pattern: str
    """Layer kinds in order: M (Mamba-2), * (attention), - (MLP); | marks a pipeline-stage cut and is no layer."""
    hidden_size: int = Field(gt=0)
    """Width of the residual stream."""
    ffn_hidden_size: int | tuple[int, ...]
    """Inner width of the MLP layers (squared ReLU, not gated): one number for all, or a list with one for each in model order."""
    num_attention_heads: int = Field(gt=0)
    """Query heads of the attention layers."""
    num_kv_heads: int = Field(gt=0)
    """Key/value heads (groups of grouped-query attention); divides num_attention_heads."""
    head_dim: int = Field(gt=0)
    """Width of one attention head (Megatron's kv_channels); need not be hidden_size / num_attention_heads."""
    mamba_num_heads: int = Field(gt=0)
    """Heads of the Mamba-2 mixer; its inner width is mamba_num_heads x mamba_head_dim."""
    mamba_head_dim: int = Field(gt=0)
    """Width of one Mamba-2 head."""
    mamba_num_groups: int = Field(gt=0)
    """Groups that share B and C; divides mamba_num_heads."""
    mamba_state_dim: int = Field(gt=0)
    """State size of the SSM, per head channel."""
    mamba_conv_width: int = Field(4, ge=2)
    """Taps of the depthwise causal convolution."""
    mamba_chunk_size: int | None = Field(None, gt=0)
    """Chunk length of the CPU's SSD scan and of mamba_ssm's, a matter of speed alone; the Triton scan pins its own. Unset: what is fastest
    on the host."""
    vocab_size: int = Field(gt=0)
    """Vocabulary the model predicts; the embedding is padded up to a multiple of vocab_divisible_by."""
    vocab_divisible_by: int = Field(128, gt=0)
    """Padding unit of the embedding and output rows. Independent of the layout, so that weights are too."""
    norm_eps: float = Field(1e-5, gt=0)
    """Epsilon of every RMSNorm."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of the initial weights; residual projections are scaled by 1 / sqrt(layers)."""
    position_embedding: Literal["none", "rope"] = "none"
    """Nemotron-H uses none; rope is there for Transformer baselines."""
    rope_theta: float = Field(10000.0, gt=0)
    """Base period of the rotary embedding."""
    tie_embeddings: Literal[False] = False
    """Input and output embeddings are separate, as in Nemotron-H; tying them is not supported."""

    @property
    def ffn_hidden_sizes(self) -> tuple[int, ...]:
        """Inner width of each MLP layer, in model order."""
        widths = self.ffn_hidden_size
        return (widths,) * self.layer_kinds.count(MLP) if isinstance(widths, int) else widths

    def of_layer(self, layer: int) -> ModelConfig:
        """The model as one of its layers sees it: of an MLP layer, ``ffn_hidden_size`` is that layer's own width."""
        if isinstance(self.ffn_hidden_size, int) or self.layer_kinds[layer] != MLP:
            return self
        return self.model_copy(update={"ffn_hidden_size": self.ffn_hidden_size[self.layer_kinds[:layer].count(MLP)]})

    def architecture(self) -> dict[str, Any]:
        """What decides the weights' names and shapes and what they mean, as plain JSON: how a checkpoint says whose it is."""
        return self.model_dump(mode="json", exclude={"mamba_chunk_size", "init_std"}) | {"pattern": self.layer_kinds}

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the output layer."""
        unit = self.vocab_divisible_by
        return -(-self.vocab_size // unit) * unit

    @property
    def mamba_inner_size(self) -> int:
        """Inner width of the Mamba-2 mixer: heads x head_dim, which need not be 2 x hidden_size."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def layer_kinds(self) -> str:
        """The pattern without its stage marks: one character per layer."""
        return self.pattern.replace("|", "")

    @property
    def num_layers(self) -> int:
        """Layers of every kind together."""
        return len(self.layer_kinds)

    @field_validator("ffn_hidden_size", mode="before")
    @classmethod
    def _is_one_width_or_one_for_each_mlp(cls, value: object, info: ValidationInfo) -> int | tuple[int, ...]:
        is_list = isinstance(value, (list, tuple))
        widths = tuple(value) if is_list else (value,)
        if not widths or any(type(width) is not int or width < 1 for width in widths):
            raise ValueError(f"expected a whole number above 0, or a list of them, got {list(widths) if is_list else value!r}")
        num_mlp = info.data.get("pattern", "").count(MLP)
        if is_list and "pattern" in info.data and len(widths) != num_mlp:
            raise ValueError(f"{list(widths)} names {len(widths)} widths, but the pattern has {num_mlp} MLP layers; give one for each")
        # Of equal widths one number remains, so that one model is written in one way.
        return widths[0] if len(set(widths)) == 1 else widths

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        parse_pattern(self.pattern)
        require_divides("num_kv_heads", self.num_kv_heads, "num_attention_heads", self.num_attention_heads)
        require_divides("mamba_num_groups", self.mamba_num_groups, "mamba_num_heads", self.mamba_num_heads)
        if self.position_embedding == "rope" and self.head_dim % 2:
            raise ValueError(f"position_embedding=rope turns pairs of channels and needs an even head_dim, got {self.head_dim}")
        if self.position_embedding == "none" and self.rope_theta != ModelConfig.model_fields["rope_theta"].default:
            raise ValueError(f"rope_theta={self.rope_theta} is not read with position_embedding=none; drop it or choose rope")
        return self
