"""A ViT in plain torch with RADIO's position embedding, in the parameter names of NVlabs' checkpoints.

It reads what this project exports and what NVlabs publishes for plain ViTs, and says what they mean in the fewest lines: the
specification that the student and the exports are compared with. It has no dropout, no windows and no training behaviour.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, scaled_dot_product_attention, silu

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class PlainViTShape:
    """What decides a ViT's parameters."""

    hidden_size: int
    num_layers: int
    num_heads: int
    patch_size: int = 16
    mlp_hidden_size: int | None = None
    """Unset: 4 x hidden_size."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """gelu: fc2(gelu(fc1)). swiglu: w3(silu(gate) x value), gate and value the two halves of w12."""
    norm_eps: float = 1e-6
    num_cls_tokens: int = 1
    num_registers: int = 0
    summary_idxs: tuple[int, ...] = (0,)
    """Class tokens that make the summary, one after the other."""
    table_side: int = 128
    """Rows and columns of the position table."""
    final_norm: bool = False
    layer_scale: bool = False
    qkv_bias: bool = True
    patch_bias: bool = False
    mean: RGB = (0.48145466, 0.4578275, 0.40821073)
    std: RGB = (0.26862954, 0.26130258, 0.27577711)


class PlainViT(nn.Module):
    """Images in [0, 1] to (summary [B, C x summary tokens], patch tokens [B, T, C])."""

    def __init__(self, shape: PlainViTShape) -> None:
        super().__init__()
        self.shape = shape
        self.input_conditioner = nn.Module()
        for name, values in (("norm_mean", shape.mean), ("norm_std", shape.std)):
            self.input_conditioner.register_buffer(name, torch.tensor(values).view(3, 1, 1))
        self.base_model = _Backbone(shape)

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Describe images in [0, 1] whose sides are multiples of the patch."""
        conditioner = self.input_conditioner
        return self.describe((images_BCHW - conditioner.norm_mean) / conditioner.norm_std)

    def describe(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Describe images that are normalised already."""
        tokens = self.base_model(pixels_BCHW)
        return self.summary(tokens), self.patches(tokens)

    def summary(self, tokens: Tensor) -> Tensor:
        """The chosen class tokens, one after the other."""
        return tokens[:, list(self.shape.summary_idxs)].flatten(1)

    def patches(self, tokens: Tensor) -> Tensor:
        """The tokens after class tokens and registers."""
        return tokens[:, self.shape.num_cls_tokens + self.shape.num_registers :]


class _Backbone(nn.Module):
    def __init__(self, shape: PlainViTShape) -> None:
        super().__init__()
        self.patch_generator = _PatchGenerator(shape)
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.num_layers))
        self.norm = nn.LayerNorm(shape.hidden_size, eps=shape.norm_eps) if shape.final_norm else nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.patch_generator(pixels)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


class _PatchGenerator(nn.Module):
    """Patches, flattened channel first, projected; the position table resampled; class and register tokens in front."""

    def __init__(self, shape: PlainViTShape) -> None:
        super().__init__()
        width = shape.hidden_size
        self.patch_size, self.table_side = shape.patch_size, shape.table_side
        self.embedder = nn.Linear(3 * shape.patch_size**2, width, bias=shape.patch_bias)
        self.pos_embed = nn.Parameter(torch.randn(1, shape.table_side**2, width) * 0.02)
        self.cls_token = nn.Module()
        self.cls_token.token = nn.Parameter(torch.randn(shape.num_cls_tokens + shape.num_registers, width) * 0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        batch, channels, height, width = pixels.shape
        patch, grid = self.patch_size, (height // self.patch_size, width // self.patch_size)
        cut = pixels.view(batch, channels, grid[0], patch, grid[1], patch).permute(0, 2, 4, 1, 3, 5)
        patches = cut.reshape(batch, grid[0] * grid[1], channels * patch**2)
        tokens = self.embedder(patches) + self.positions(grid).to(patches.dtype)
        return torch.cat([self.cls_token.token.expand(batch, -1, -1), tokens], dim=1)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The table resampled to a square of the grid's longer side, cut to the grid from the top left."""
        side = max(grid)
        table = self.pos_embed.float().view(1, self.table_side, self.table_side, -1).permute(0, 3, 1, 2)
        if side != self.table_side:
            table = interpolate(table, size=(side, side), mode="bilinear", align_corners=False)
        return table[:, :, : grid[0], : grid[1]].flatten(2).mT


class _Block(nn.Module):
    def __init__(self, shape: PlainViTShape) -> None:
        super().__init__()
        width = shape.hidden_size
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=shape.norm_eps) for _ in range(2))
        self.attn = _Attention(width, shape.num_heads, shape.qkv_bias)
        self.mlp = (_Mlp if shape.mlp == "gelu" else _SwiGlu)(width, shape.mlp_hidden_size or 4 * width)
        self.ls1, self.ls2 = (_LayerScale(width) if shape.layer_scale else nn.Identity() for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.ls1(self.attn(self.norm1(tokens)))
        return tokens + self.ls2(self.mlp(self.norm2(tokens)))


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length, width = tokens.shape
        q, k, v = self.qkv(tokens).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width))


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(tokens)))


class _SwiGlu(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        gate, value = self.w12(tokens).chunk(2, dim=-1)
        return self.w3(silu(gate) * value)


class _LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.gamma
