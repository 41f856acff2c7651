"""The layers of a ViT block: LayerNorm and linears with biases, bidirectional attention, MLP, LayerScale.

They stand on the seams of megatron_hybrid.layers: parameters declared once, products from a record of ops, megatron-core's region mappings
around the tensor-parallel cut. Parameter names are Megatron-LM's.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region, reduce_scatter_to_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_hybrid.layers.float8 import runs_in_float8
from megatron_hybrid.layers.linear import whole_sequence
from megatron_hybrid.layers.parameters import Initializer, declare, normal, ones
from megatron_hybrid.layers.recompute import recompute_between
from vision_agglom.config.student import StudentConfig
from vision_agglom.students.damp import DampNoise
from vision_agglom.students.ops import VisionOps
from vision_agglom.students.sequence import ImageSequence
from vision_agglom.students.spectral import SpectralScale


def zeros(_: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """All zeros: biases."""
    return np.zeros(shape)


def constant(value: float) -> Initializer:
    """One number everywhere."""
    return lambda _, shape: np.full(shape, value)


class CutLinear(torch.nn.Module):
    """A weight cut over the tensor ranks, and what training may do to it on the way into the product."""

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        axis: int,
        std: float,
        student: StudentConfig,
        config: TransformerConfig,
        ops: VisionOps,
        chunks: int = 1,
        run: int | None = None,
    ) -> None:
        super().__init__()
        ranks = config.tensor_model_parallel_size
        self.product, self.biased_product = ops.linear, ops.biased_linear
        self.sequence_parallel, self.axis = config.sequence_parallel, axis
        local = [size // ranks if dimension == axis else size for dimension, size in enumerate(shape)]
        self.weight = torch.nn.Parameter(torch.empty(local, dtype=config.params_dtype))
        declare(self.weight, initializer=normal(std), tensor_ranks=ranks, axis=axis)
        self.spectral: SpectralScale | None = None
        if student.spectral_reparam:
            run = run or local[0] // chunks
            group = get_tensor_model_parallel_group()
            self.spectral = SpectralScale(shape, axis=axis, chunks=chunks, run=run, config=config, group=group)
        self.damp: DampNoise | None = None

    def effective_weight(self, step: int) -> Tensor:
        """The weight that multiplies in this pass."""
        weight_OI = self.weight if self.spectral is None else self.spectral(self.weight)
        return self.damp(weight_OI, step) if self.damp is not None and self.training else weight_OI

    def affine(self, x: Tensor, bias_O: Tensor, step: int) -> Tensor:
        """x W^T + b."""
        weight_OI = self.effective_weight(step)
        if runs_in_float8(self.product):
            return self.product(x, weight_OI) + bias_O
        return self.biased_product(x, weight_OI, bias_O)


class LayerNormColumnParallelLinear(CutLinear):
    """LayerNorm, then a linear with bias whose output rows are cut over the tensor ranks."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        student: StudentConfig,
        config: TransformerConfig,
        ops: VisionOps,
        chunks: int = 1,
        run: int | None = None,
    ) -> None:
        super().__init__(
            (output_size, input_size), axis=0, std=config.init_method_std, student=student, config=config, ops=ops, chunks=chunks, run=run
        )
        self.layer_norm, self.eps = ops.layer_norm, config.layernorm_epsilon
        self.layer_norm_weight = torch.nn.Parameter(torch.empty(input_size, dtype=config.params_dtype))
        self.layer_norm_bias = torch.nn.Parameter(torch.empty(input_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.empty(self.weight.shape[0], dtype=config.params_dtype))
        declare(self.layer_norm_weight, initializer=ones, sequence_parallel=config.sequence_parallel)
        declare(self.layer_norm_bias, initializer=zeros, sequence_parallel=config.sequence_parallel)
        declare(self.bias, initializer=zeros, tensor_ranks=config.tensor_model_parallel_size, axis=0)

    def forward(self, hidden_LBD: Tensor, step: int) -> Tensor:
        """Map [L or L/tp, B, input_size] to [L, B, output_size / tp]."""
        normed_LBD = self.layer_norm(hidden_LBD, self.layer_norm_weight, self.layer_norm_bias, self.eps)
        return self.affine(whole_sequence(normed_LBD, self.sequence_parallel), self.bias, step)


class ResidualRowParallelLinear(CutLinear):
    """The linear with bias that writes into the residual stream, times LayerScale; its input columns are cut over the tensor ranks."""

    def __init__(self, input_size: int, output_size: int, *, student: StudentConfig, config: TransformerConfig, ops: VisionOps) -> None:
        std = config.init_method_std / math.sqrt(2 * config.num_layers)
        super().__init__((output_size, input_size), axis=1, std=std, student=student, config=config, ops=ops)
        self.bias = torch.nn.Parameter(torch.empty(output_size, dtype=config.params_dtype))
        declare(self.bias, initializer=zeros, sequence_parallel=config.sequence_parallel)
        self.is_whole = config.tensor_model_parallel_size == 1
        self.layer_scale: torch.nn.Parameter | None = None
        if student.layer_scale is not None:
            self.layer_scale = torch.nn.Parameter(torch.empty(output_size, dtype=config.params_dtype))
            declare(self.layer_scale, initializer=constant(student.layer_scale), sequence_parallel=config.sequence_parallel)

    def forward(self, input_LBC: Tensor, step: int) -> Tensor:
        """Map [L, B, input_size / tp] to [L or L/tp, B, output_size], summed over the tensor ranks."""
        if self.is_whole:
            output_LBD = self.affine(input_LBC, self.bias, step)
        else:
            # The bias once, after the ranks' sum.
            partial_LBD = self.product(input_LBC, self.effective_weight(step))
            reduce = reduce_scatter_to_sequence_parallel_region if self.sequence_parallel else reduce_from_tensor_model_parallel_region
            output_LBD = reduce(partial_LBD, group=get_tensor_model_parallel_group()) + self.bias
        return output_LBD if self.layer_scale is None else output_LBD * self.layer_scale


class SelfAttention(torch.nn.Module):
    """Attention of every token to every other, or within windows. Rows of linear_qkv run head by head: query, key, value."""

    def __init__(self, student: StudentConfig, config: TransformerConfig, ops: VisionOps, *, is_global: bool, recompute_core: bool) -> None:
        super().__init__()
        self.attention, self.is_global, self.recompute_core = ops.attention, is_global, recompute_core
        self.head_dim = student.head_dim
        shared = {"student": student, "config": config, "ops": ops}
        width = student.hidden_size
        self.linear_qkv = LayerNormColumnParallelLinear(width, 3 * width, chunks=3, run=student.head_dim, **shared)
        self.linear_proj = ResidualRowParallelLinear(width, width, **shared)

    def forward(self, hidden_LBD: Tensor, sequence: ImageSequence) -> Tensor:
        """Map [L or L/tp, B, D] to the same shape, L the padded length."""
        qkv_LBE = self.linear_qkv(hidden_LBD, sequence.step)
        if self.recompute_core and self.training:
            return recompute_between(lambda qkv: self._core(qkv, sequence), lambda out: self.linear_proj(out, sequence.step), qkv_LBE)
        return self.linear_proj(self._core(qkv_LBE, sequence), sequence.step)

    def _core(self, qkv_LBE: Tensor, sequence: ImageSequence) -> Tensor:
        """[L, B, linear_qkv rows of this rank] to [L, B, heads x head_dim]; filling tokens are left out and come out as zeros."""
        num_padding = len(qkv_LBE) - sequence.length
        qkv_BLH3P = qkv_LBE[: sequence.length].transpose(0, 1).unflatten(-1, (-1, 3, self.head_dim))
        q_BLHP, k_BLHP, v_BLHP = qkv_BLH3P.unbind(3)
        if self.is_global or sequence.window is None:
            out_BLHP = self.attention(q_BLHP, k_BLHP, v_BLHP)
        else:
            out_BLHP = self._windowed(q_BLHP, k_BLHP, v_BLHP, sequence)
        out_LBD = out_BLHP.flatten(2).transpose(0, 1)
        # A filling of nothing would still copy.
        return F.pad(out_LBD, (0, 0, 0, 0, 0, num_padding)) if num_padding else out_LBD

    def _windowed(self, q_BLHP: Tensor, k_BLHP: Tensor, v_BLHP: Tensor, sequence: ImageSequence) -> Tensor:
        """Attention inside square windows; class and register tokens take part in every window, and their results are averaged."""
        batch, windows = len(q_BLHP), sequence.grid[0] * sequence.grid[1] // sequence.window**2
        q, k, v = (_into_windows(tensor, sequence) for tensor in (q_BLHP, k_BLHP, v_BLHP))
        out_NSHP = self.attention(q, k, v)
        prefix_NSHP, patches_NSHP = out_NSHP.split([sequence.num_prefix, sequence.window**2], dim=1)
        prefix_BSHP = prefix_NSHP.unflatten(0, (batch, windows)).mean(1)
        return torch.cat([prefix_BSHP, _out_of_windows(patches_NSHP, sequence)], 1)


class Mlp(torch.nn.Module):
    """linear_fc2(gelu(linear_fc1(norm(hidden)))), or with rows of linear_fc1 alternating gate and value, fc2(silu(gate) value)."""

    def __init__(self, student: StudentConfig, config: TransformerConfig, ops: VisionOps, *, recompute_core: bool) -> None:
        super().__init__()
        self.recompute_core, self.gated = recompute_core, student.mlp == "swiglu"
        shared = {"student": student, "config": config, "ops": ops}
        chunks = 2 if self.gated else 1
        inner = student.ffn_hidden_size
        self.linear_fc1 = LayerNormColumnParallelLinear(student.hidden_size, chunks * inner, chunks=chunks, run=1, **shared)
        self.linear_fc2 = ResidualRowParallelLinear(inner, student.hidden_size, **shared)

    def forward(self, hidden_LBD: Tensor, sequence: ImageSequence) -> Tensor:
        """Map [L or L/tp, B, D] to the same shape."""
        inner_LBF = self.linear_fc1(hidden_LBD, sequence.step)
        if self.recompute_core and self.training:
            return recompute_between(self._activate, lambda out: self.linear_fc2(out, sequence.step), inner_LBF)
        return self.linear_fc2(self._activate(inner_LBF), sequence.step)

    def _activate(self, inner_LBF: Tensor) -> Tensor:
        if not self.gated:
            return F.gelu(inner_LBF)
        gate_LBF, value_LBF = inner_LBF.unflatten(-1, (-1, 2)).unbind(-1)
        return F.silu(gate_LBF) * value_LBF


class Block(torch.nn.Module):
    """hidden + attention, then hidden + MLP, each behind its norm."""

    def __init__(self, student: StudentConfig, config: TransformerConfig, ops: VisionOps, *, is_global: bool, recompute_core: bool) -> None:
        super().__init__()
        self.self_attention = SelfAttention(student, config, ops, is_global=is_global, recompute_core=recompute_core)
        self.mlp = Mlp(student, config, ops, recompute_core=recompute_core)

    def forward(self, hidden_LBD: Tensor, sequence: ImageSequence) -> Tensor:
        """Map [L or L/tp, B, D] to the same shape."""
        hidden_LBD = hidden_LBD + self.self_attention(hidden_LBD, sequence)
        return hidden_LBD + self.mlp(hidden_LBD, sequence)


def _into_windows(tokens_BLHP: Tensor, sequence: ImageSequence) -> Tensor:
    """[B, L, H, P] to [B x windows, prefix + window^2, H, P]."""
    (rows, columns), side = sequence.grid, sequence.window
    prefix_BSHP, patches_BTHP = tokens_BLHP.split([sequence.num_prefix, rows * columns], dim=1)
    blocks = patches_BTHP.unflatten(1, (rows // side, side, columns // side, side)).transpose(2, 3)
    windows_NSHP = blocks.flatten(3, 4).flatten(0, 2)
    repeated_NSHP = prefix_BSHP.repeat_interleave(len(windows_NSHP) // len(prefix_BSHP), 0)
    return torch.cat([repeated_NSHP, windows_NSHP], 1)


def _out_of_windows(windows_NSHP: Tensor, sequence: ImageSequence) -> Tensor:
    """The patches of ``_into_windows``, back in rows: [B, rows x columns, H, P]."""
    (rows, columns), side = sequence.grid, sequence.window
    blocks = windows_NSHP.unflatten(0, (-1, rows // side, columns // side)).unflatten(3, (side, side))
    return blocks.transpose(2, 3).flatten(1, 4)
