"""The Mamba-2 layer (Dao and Gu 2024, section 7), tensor-parallel over heads and groups.

    z, x, B, C, dt = in_proj(norm(hidden));  x, B, C = silu(conv1d(x, B, C));  y = ssd(x, dt, A, B, C, D);  out = out_proj(norm(y *
    silu(z)))

Every rank holds its own heads and groups: its rows of in_proj are its part of z, then of x, B, C and dt, which is no contiguous run of the
whole matrix.
"""

from __future__ import annotations

import math

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.layers.linear import NormColumnParallelLinear, ResidualRowParallelLinear
from megatron_hybrid.layers.parameters import Component, declare, inverse_softplus_time_step, log_uniform_decay, ones, uniform
from megatron_hybrid.layers.recompute import recompute_between
from megatron_hybrid.layers.sequence import MambaCache, Sequence
from megatron_hybrid.layers.specs import Ops

_NO_STEP = -1e4
"""A time step before softplus, after which it is exactly 0: the state stays as it was."""


class MambaLayer(torch.nn.Module):
    """hidden + mixer(hidden)."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, ops: Ops, *, recompute_core: bool) -> None:
        super().__init__()
        self.mixer = MambaMixer(model, config, ops, recompute_core=recompute_core)

    def forward(self, hidden_LBD: Tensor, sequence: Sequence, cache: MambaCache | None = None) -> Tensor:
        """Map [L or L/tp, B, D] to the same shape; with a cache, continue from it and advance it."""
        return hidden_LBD + self.mixer(hidden_LBD, sequence, cache)


class MambaMixer(torch.nn.Module):
    """The mixer with the norm before it."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, ops: Ops, *, recompute_core: bool) -> None:
        super().__init__()
        self.ops, self.recompute_core = ops, recompute_core
        tensor_ranks = config.tensor_model_parallel_size
        inner, group_states = model.mamba_inner_size, model.mamba_num_groups * model.mamba_state_dim
        x_B_C = (Component("x", inner), Component("B", group_states), Component("C", group_states))
        components = (Component("z", inner), *x_B_C, Component("dt", model.mamba_num_heads))

        self.num_heads, self.head_dim = model.mamba_num_heads // tensor_ranks, model.mamba_head_dim
        self.num_groups, self.state_dim = model.mamba_num_groups // tensor_ranks, model.mamba_state_dim
        self.conv_sizes = [component.size // tensor_ranks for component in x_B_C]
        self.in_proj_sizes = [inner // tensor_ranks, sum(self.conv_sizes), self.num_heads]

        self.in_proj = NormColumnParallelLinear(
            model.hidden_size, sum(component.size for component in components), config=config, ops=ops, components=components
        )
        self.conv1d = DepthwiseConv1d(x_B_C, model.mamba_conv_width, config)
        # fp32 whatever the working precision: A and dt are exponentiated, and their updates are below bf16's resolution.
        self.A_log = torch.nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32))
        self.D = torch.nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32))
        self.dt_bias = torch.nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32))
        declare(self.A_log, initializer=log_uniform_decay, tensor_ranks=tensor_ranks, axis=0)
        declare(self.D, initializer=ones, tensor_ranks=tensor_ranks, axis=0)
        declare(self.dt_bias, initializer=inverse_softplus_time_step, tensor_ranks=tensor_ranks, axis=0)
        self.norm = GatedNorm(inner, model.mamba_num_groups, model.norm_eps, config, ops)
        self.out_proj = ResidualRowParallelLinear(inner, model.hidden_size, config=config, ops=ops)

    def forward(self, hidden_LBD: Tensor, sequence: Sequence, cache: MambaCache | None = None) -> Tensor:
        """Map [L or L/tp, B, D] to the same shape, summed over the tensor ranks."""
        zxBCdt_LBE = self.in_proj(hidden_LBD)
        if cache is not None:
            return self.out_proj(self._continue(zxBCdt_LBE, sequence, cache))
        if not (self.recompute_core and self.training):
            return self.out_proj(self._core(zxBCdt_LBE, sequence.segment_ids_BL))
        return recompute_between(lambda projected: self._core(projected, sequence.segment_ids_BL), self.out_proj, zxBCdt_LBE)

    def _core(self, zxBCdt_LBE: Tensor, segment_ids_BL: Tensor | None) -> Tensor:
        """Convolution, scan and gated norm over whole sequences: [L, B, in_proj rows] to [L, B, inner]."""
        return self.ops.mamba_core(
            zxBCdt_LBE,
            # The parameter itself, so that its gradient can be added to its buffer.
            self.conv1d.weight,
            self.conv1d.bias,
            self.A_log,
            self.D,
            self.dt_bias,
            self.norm.weight,
            num_groups=self.num_groups,
            eps=self.norm.eps,
            segment_ids_BL=segment_ids_BL,
        )

    def _continue(self, zxBCdt_LBE: Tensor, sequence: Sequence, cache: MambaCache) -> Tensor:
        """The same from the cache's state on, which is replaced by the state after the last token."""
        length, batch_size = zxBCdt_LBE.shape[:2]
        z_BLI, xBC_BLC, dt_BLH = zxBCdt_LBE.transpose(0, 1).split(self.in_proj_sizes, dim=-1)
        before_BTC = cache.recent_inputs(sequence.offset)
        if sequence.num_valid_B is None:
            num_valid_B = torch.full((batch_size,), length, device=dt_BLH.device)
        else:
            num_valid_B = sequence.num_valid_B
            is_padding_BL = torch.arange(length, device=dt_BLH.device) >= num_valid_B[:, None]
            dt_BLH = dt_BLH.masked_fill(is_padding_BL[..., None], _NO_STEP)
        convolved_BLC, recent_BTC = self.ops.causal_conv1d(
            xBC_BLC, self.conv1d.weight.squeeze(1), self.conv1d.bias, initial_state_BTC=before_BTC
        )
        if sequence.num_valid_B is not None:
            recent_BTC = _inputs_before(num_valid_B, before_BTC, xBC_BLC)
        cache.keep_inputs(recent_BTC, sequence.offset + num_valid_B)
        x_BLHP, B_BLGN, C_BLGN = self._split_conv(convolved_BLC)
        y_BLHP, state_BHPN = self.ops.ssd(
            x_BLHP, dt_BLH, self.A_log, B_BLGN, C_BLGN, self.D, self.dt_bias, initial_state_BHPN=cache.ssm_state_BHPN
        )
        cache.ssm_state_BHPN.copy_(state_BHPN)
        return self.norm(y_BLHP.flatten(2), z_BLI).transpose(0, 1)

    def _split_conv(self, xBC_BLC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_BLI, B_BLS, C_BLS = xBC_BLC.split(self.conv_sizes, dim=-1)
        groups = (self.num_groups, self.state_dim)
        return x_BLI.unflatten(-1, (self.num_heads, self.head_dim)), B_BLS.unflatten(-1, groups), C_BLS.unflatten(-1, groups)

    def new_cache(self, batch_size: int) -> MambaCache:
        """The state before the first token: zeros."""
        weight = self.conv1d.weight
        return MambaCache(
            conv_ring_BWC=weight.new_zeros(batch_size, weight.shape[-1], weight.shape[0]),
            ssm_state_BHPN=self.A_log.new_zeros(batch_size, self.num_heads, self.head_dim, self.state_dim),
        )


def _inputs_before(end_B: Tensor, before_BTC: Tensor, x_BLC: Tensor) -> Tensor:
    """The T inputs before position ``end`` of each sequence, [B, T, C]; ``before`` holds those before position 0."""
    num_inputs = before_BTC.shape[1]
    index_BT = end_B[:, None] + torch.arange(num_inputs, device=end_B.device)
    return torch.cat((before_BTC, x_BLC), dim=1).gather(1, index_BT[..., None].expand_as(before_BTC))


class DepthwiseConv1d(torch.nn.Module):
    """The parameters of the causal convolution, under torch's names and shapes for Conv1d; the op runs them."""

    def __init__(self, components: tuple[Component, ...], width: int, config: TransformerConfig) -> None:
        super().__init__()
        tensor_ranks = config.tensor_model_parallel_size
        channels = sum(component.size for component in components) // tensor_ranks
        self.weight = torch.nn.Parameter(torch.empty(channels, 1, width, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.empty(channels, dtype=config.params_dtype))
        # torch's own default for a convolution with a fan-in of `width`.
        bound = 1 / math.sqrt(width)
        for parameter in (self.weight, self.bias):
            declare(parameter, initializer=uniform(-bound, bound), tensor_ranks=tensor_ranks, axis=0, components=components)


class GatedNorm(torch.nn.Module):
    """RMSNorm of y * silu(z) over groups of channels; a rank holds whole groups, so the ranks need not talk."""

    def __init__(self, size: int, num_groups: int, eps: float, config: TransformerConfig, ops: Ops) -> None:
        super().__init__()
        tensor_ranks = config.tensor_model_parallel_size
        self.gated_rms_norm, self.num_groups, self.eps = ops.gated_rms_norm, num_groups // tensor_ranks, eps
        self.weight = torch.nn.Parameter(torch.empty(size // tensor_ranks, dtype=config.params_dtype))
        declare(self.weight, initializer=ones, tensor_ranks=tensor_ranks, axis=0)

    def forward(self, y_BLI: Tensor, z_BLI: Tensor) -> Tensor:
        """Map two [B, L, inner / tp] tensors to one."""
        return self.gated_rms_norm(y_BLI, z_BLI, self.weight, self.num_groups, self.eps)
