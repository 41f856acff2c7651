"""Stand-ins, on a CPU, for the functions of GPU libraries that ``ops/libraries`` calls: their arguments, checks and results, computed by
the specifications.

They hold what Transformer Engine 2.11.0, mamba_ssm 2.3.2.post1 and causal_conv1d 1.7.0 ask of their callers. Whether the libraries compute
what is written here is for a GPU to say (``test_library_kernels.py``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_hybrid.ops.attention import attention_reference
from megatron_hybrid.ops.conv1d import causal_conv1d_reference
from megatron_hybrid.ops.mamba_core import mamba_core_reference
from megatron_hybrid.ops.norm import gated_rms_norm_reference
from megatron_hybrid.ops.ssd import ssd_reference

LIBRARIES = "megatron_hybrid.ops.libraries."
PACKAGES = ("transformer_engine", "transformer_engine_torch", "causal_conv1d", "mamba_ssm")


def general_gemm(
    A: Tensor, B: Tensor, *, out_dtype: torch.dtype, layout: str = "TN", out: Tensor | None = None, accumulate: bool = False
) -> tuple[Tensor, None, None, None]:
    """Transformer Engine's: reads memory in rows, whatever the strides."""
    assert A.is_contiguous() and B.is_contiguous() and A.dim() == B.dim() == 2 and A.dtype == B.dtype
    product = ((B.t() if layout[1] == "T" else B) @ (A.t() if layout[0] == "T" else A)).to(out_dtype)
    if out is None:
        return product, None, None, None
    assert out.is_contiguous() and out.dtype == out_dtype and out.shape == product.shape
    return out.add_(product) if accumulate else out.copy_(product), None, None, None


def rmsnorm_fwd(
    input: Tensor, weight: Tensor, eps: float, ln_out: None, quantizer: None, otype: str, sm_margin: int, zero_centered_gamma: bool
) -> tuple[Tensor, None, Tensor]:
    assert input.is_contiguous() and input.dim() == 2 and input.dtype == weight.dtype and otype == str(input.dtype)
    assert ln_out is quantizer is None and sm_margin == 0 and not zero_centered_gamma
    rsigma = torch.rsqrt(input.square().mean(-1) + eps)
    return input * rsigma[:, None] * weight, None, rsigma


def rmsnorm_bwd(dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool) -> list[Tensor]:
    assert dz.is_contiguous() and dz.shape == x.shape and sm_margin == 0 and not zero_centered_gamma
    normalised = x * rsigma[:, None]
    scaled = dz * gamma
    return [rsigma[:, None] * (scaled - normalised * (scaled * normalised).mean(-1, keepdim=True)), (dz * normalised).sum(0)]


class DotProductAttention:
    """Transformer Engine's, causal."""

    def __init__(self, num_attention_heads: int, kv_channels: int, *, num_gqa_groups: int, qkv_format: str, attn_mask_type: str) -> None:
        assert qkv_format == "bshd" and attn_mask_type == "causal"
        self.shapes = (num_attention_heads, kv_channels), (num_gqa_groups, kv_channels)
        self.deterministic = torch.are_deterministic_algorithms_enabled()

    def __call__(self, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor) -> Tensor:
        assert (query_layer.shape[2:], key_layer.shape[2:]) == self.shapes and key_layer.shape == value_layer.shape
        return attention_reference(query_layer, key_layer, value_layer).flatten(2)


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """x [B, C, L] with channels last in memory."""
    assert x.stride(1) == 1 and x.stride(0) % 8 == x.stride(2) % 8 == x.shape[1] % 8 == 0 and 2 <= weight.shape[1] <= 4
    assert x.data_ptr() % 16 == 0 and activation == "silu" and (bias is None or bias.dtype == weight.dtype)
    assert seq_idx is None or (seq_idx.dtype == torch.int32 and seq_idx.is_contiguous())
    assert initial_states is None or (initial_states.stride(1) == 1 and initial_states.dtype == x.dtype)
    before = None if initial_states is None else initial_states.transpose(1, 2)
    y, _ = causal_conv1d_reference(x.transpose(1, 2), weight, bias, segment_ids_BL=seq_idx, initial_state_BTC=before)
    return y.transpose(1, 2)


def mamba_chunk_scan_combined(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor, *, dt_bias: Tensor, initial_states: Tensor | None,
    seq_idx: Tensor | None, dt_softplus: bool, return_final_states: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    assert dt_softplus and return_final_states and chunk_size > 0 and (seq_idx is None or seq_idx.dtype == torch.int32)
    return ssd_reference(x, dt, (-A).log(), B, C, D, dt_bias, segment_ids_BL=seq_idx, initial_state_BHPN=initial_states)


def rmsnorm_fn(x: Tensor, weight: Tensor, bias: None, z: Tensor, eps: float, group_size: int, norm_before_gate: bool = True) -> Tensor:
    assert bias is None and not norm_before_gate
    return gated_rms_norm_reference(x, z, weight, x.shape[-1] // group_size, eps)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor, dt_bias: Tensor, A: Tensor, D: Tensor, chunk_size: int, *,
    seq_idx: Tensor | None, activation: str, rmsnorm_weight: Tensor, rmsnorm_eps: float, headdim: int, ngroups: int, norm_before_gate: bool,
) -> Tensor:  # fmt: skip
    """zxbcdt [B, L, E]. Its backward loses a gradient where the batch does not lie outermost in memory."""
    assert zxbcdt.is_contiguous() and activation == "silu" and not norm_before_gate and chunk_size > 0
    assert headdim * D.shape[0] == rmsnorm_weight.shape[0] and (seq_idx is None or seq_idx.dtype == torch.int32)
    out = mamba_core_reference(
        zxbcdt.transpose(0, 1), conv1d_weight, conv1d_bias, (-A).log(), D, dt_bias, rmsnorm_weight,
        num_groups=ngroups, eps=rmsnorm_eps, segment_ids_BL=seq_idx,
    )  # fmt: skip
    return out.transpose(0, 1)


@contextmanager
def stand_ins(without: str | None = None) -> Iterator[None]:
    """The libraries' modules, made of the functions above, for as long as this lasts; one library may be absent."""
    dtypes = {dtype: str(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    contents: dict[str, dict[str, Any]] = {
        "transformer_engine": {},
        "transformer_engine.pytorch": {"DotProductAttention": DotProductAttention},
        "transformer_engine.pytorch.constants": {"TE_DType": dtypes},
        "transformer_engine.pytorch.cpp_extensions": {},
        "transformer_engine.pytorch.cpp_extensions.gemm": {"general_gemm": general_gemm},
        "transformer_engine_torch": {"rmsnorm_fwd": rmsnorm_fwd, "rmsnorm_bwd": rmsnorm_bwd},
        "causal_conv1d": {"causal_conv1d_fn": causal_conv1d_fn},
        "mamba_ssm": {},
        "mamba_ssm.ops": {},
        "mamba_ssm.ops.triton": {},
        "mamba_ssm.ops.triton.layernorm_gated": {"rmsnorm_fn": rmsnorm_fn},
        "mamba_ssm.ops.triton.ssd_combined": {
            "mamba_chunk_scan_combined": mamba_chunk_scan_combined,
            "mamba_split_conv1d_scan_combined": mamba_split_conv1d_scan_combined,
        },
    }
    modules = {name: ModuleType(name) for name in contents}
    for name, content in contents.items():
        vars(modules[name]).update(content)
    # Of what is imported meanwhile only the wrappers, which hold these functions, must not stay.
    present = _take_out()
    sys.modules.update(modules)
    if without is not None:
        for name in [name for name in sys.modules if name.startswith(f"{without}.")]:
            del sys.modules[name]
        sys.modules[without] = None
    try:
        yield
    finally:
        _take_out()
        sys.modules.update(present)


def _take_out() -> dict[str, ModuleType]:
    """The libraries' modules and their wrappers, no longer among the imported ones."""
    names = [name for name in sys.modules if name.startswith(LIBRARIES) or name.split(".")[0] in PACKAGES]
    return {name: sys.modules.pop(name) for name in names}
