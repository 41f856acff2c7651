"""The student: a Vision Transformer's shape and what is done to its weights and positions while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_hybrid.config.section import Section


class WindowConfig(Section):
    """ViTDet windows (Li et al. 2022): most blocks attend inside squares of patches, some over the whole image.

    Off while sizes is empty."""

    sizes: tuple[int, ...] = ()
    """Sides of a window in patches; each step draws one of those that divide the image's rows and columns."""
    num_global_blocks: int = Field(4, gt=0)
    """Blocks that attend over the whole image: evenly spaced, the last block among them."""

    @model_validator(mode="after")
    def _check(self) -> WindowConfig:
        if any(size < 1 for size in self.sizes) or len(set(self.sizes)) < len(self.sizes):
            raise ValueError(f"sizes={list(self.sizes)}: expected different positive numbers of patches")
        if not self.sizes and self.num_global_blocks != WindowConfig.model_fields["num_global_blocks"].default:
            raise ValueError(f"num_global_blocks={self.num_global_blocks} is not read without sizes; drop it or give sizes")
        return self


class StudentConfig(Section):
    """A pre-norm Vision Transformer with one class token per teacher and cropped position embeddings (CPE)."""

    patch_size: int = Field(16, gt=0)
    """Side of a patch in pixels."""
    hidden_size: int = Field(gt=0)
    """Width of the residual stream."""
    num_layers: int = Field(gt=0)
    """Transformer blocks."""
    num_attention_heads: int = Field(gt=0)
    """Attention heads; divides hidden_size."""
    ffn_hidden_size: int = Field(gt=0)
    """Inner width of the MLP."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """gelu: fc2(gelu(fc1)). swiglu: fc2(silu(gate) x value), as in DINOv2-g."""
    layer_scale: float | None = Field(None, gt=0)
    """Initial value of a learned factor per channel on each block's output (CaiT). Unset: none."""
    final_norm: bool = False
    """LayerNorm behind the last block. RADIO's backbones have none."""
    norm_eps: float = Field(1e-6, gt=0)
    """Epsilon of every LayerNorm."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of the initial weights; linears into the residual stream are scaled by 1 / sqrt(2 num_layers)."""
    num_registers: int = Field(0, ge=0)
    """Register tokens behind the class tokens."""
    register_multiple: int | None = Field(None, gt=0)
    """Instead of num_registers: as many as fill class and register tokens up to a multiple of this number."""
    max_image_size: int = Field(2048, gt=0)
    """Side in pixels that the table of position embeddings spans."""
    position_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the training samples that get no position embedding."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Mean of the input normalisation, RGB in [0, 1] (CLIP's)."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """Standard deviation of the input normalisation (CLIP's)."""
    windows: WindowConfig = WindowConfig()
    spectral_reparam: bool = False
    """Divide each linear of the blocks by its largest singular value and learn that apart (Zhai et al. 2023); q, k and v by themselves."""
    damp_std: float = Field(0.0, ge=0, lt=1)
    """DAMP (Trinh et al. 2024): standard deviation of Gaussian noise that multiplies the blocks' weights in training, drawn per step."""
    initialize_from: Path | None = None
    """A ViT in timm's or RADIO's names (.safetensors, .pth, .pt) that the backbone starts from: blocks, patches, positions, tokens."""
    initialize_skip: tuple[str, ...] = ()
    """Beginnings of names in initialize_from that are passed over on purpose, such as norm.; else a tensor without a place is an error."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def table_side(self) -> int:
        """Rows and columns of the table of position embeddings."""
        return self.max_image_size // self.patch_size

    def num_register_tokens(self, num_class_tokens: int) -> int:
        """Registers beside so many class tokens."""
        if self.register_multiple is None:
            return self.num_registers
        return -num_class_tokens % self.register_multiple

    def is_global_block(self, index: int) -> bool:
        """Whether block ``index`` attends over the whole image."""
        if not self.windows.sizes:
            return True
        period = self.num_layers / self.windows.num_global_blocks
        return int((index + 1) / period) > int(index / period)

    def architecture(self) -> dict[str, Any]:
        """What decides the weights' names and shapes and what they mean, as plain JSON."""
        beginnings = {"init_std", "initialize_from", "initialize_skip"}
        training = {"damp_std", "position_dropout", "windows"}
        return self.model_dump(mode="json", exclude=beginnings | training | {"num_registers", "register_multiple"})

    @model_validator(mode="after")
    def _check(self) -> StudentConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size={self.hidden_size} does not divide by num_attention_heads={self.num_attention_heads}")
        if self.max_image_size % self.patch_size:
            raise ValueError(f"max_image_size={self.max_image_size} does not divide by patch_size={self.patch_size}; change one of them")
        if self.register_multiple is not None and self.num_registers:
            raise ValueError(f"num_registers={self.num_registers} and register_multiple={self.register_multiple} exclude each other")
        if self.initialize_skip and self.initialize_from is None:
            raise ValueError(f"initialize_skip={list(self.initialize_skip)} is not read without initialize_from; drop it")
        if self.windows.sizes and self.windows.num_global_blocks > self.num_layers:
            raise ValueError(f"windows.num_global_blocks={self.windows.num_global_blocks} exceeds num_layers={self.num_layers}")
        return self
