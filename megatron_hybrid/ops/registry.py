"""Which implementations each operation has; callers choose one by name, and only what is chosen is imported."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType

IMPLEMENTATIONS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "ssd": {
            "reference": "ssd:ssd_reference",
            "cpu": "ssd_chunked:ssd_chunked",
            "triton": "triton.ssd:ssd",
            "mamba_ssm": "libraries.mamba_ssm_scan:ssd",
        },
        "causal_conv1d": {
            "reference": "conv1d:causal_conv1d_reference",
            "cpu": "conv1d:causal_conv1d",
            "triton": "triton.conv1d:causal_conv1d",
            "causal_conv1d": "libraries.causal_conv1d:causal_conv1d",
        },
        "rms_norm": {
            "reference": "norm:rms_norm_reference",
            "cpu": "norm:rms_norm",
            "triton": "triton.norm:rms_norm",
            "transformer_engine": "libraries.transformer_engine_norm:rms_norm",
        },
        "gated_rms_norm": {
            "reference": "norm:gated_rms_norm_reference",
            "cpu": "norm:gated_rms_norm",
            "triton": "triton.norm:gated_rms_norm",
            "mamba_ssm": "libraries.mamba_ssm_norm:gated_rms_norm",
        },
        "mamba_core": {
            "reference": "mamba_core:mamba_core_reference",
            "cpu": "mamba_core:mamba_core",
            "triton": "triton.mamba_core:mamba_core",
            "mamba_ssm": "libraries.mamba_ssm_core:mamba_core",
        },
        "squared_relu": {
            "reference": "activation:squared_relu_reference",
            "cpu": "activation:squared_relu",
            "triton": "triton.activation:squared_relu",
        },
        "linear": {
            "reference": "linear:linear_reference",
            "cpu": "linear:linear",
            "cublas": "linear_accumulating:linear_cublas",
            "cublaslt": "linear_accumulating:linear_cublaslt",
            "transformer_engine": "libraries.transformer_engine_linear:linear",
        },
        "attention": {
            "reference": "attention:attention_reference",
            "cpu": "attention_blocked:attention_blocked",
            "sdpa": "attention:attention_sdpa",
            "cudnn": "attention:attention_cudnn",
            "transformer_engine": "libraries.transformer_engine_attention:attention",
        },
        "embedding": {
            "reference": "embedding:embedding_reference",
            "cpu": "embedding:embedding_reference",
            "triton": "triton.embedding:embedding",
        },
        "linear_cross_entropy": {
            "reference": "cross_entropy:linear_cross_entropy_reference",
            "cpu": "cross_entropy:linear_cross_entropy",
            "triton": "triton.cross_entropy:linear_cross_entropy",
        },
        "linear_kl_divergence": {
            "reference": "distillation:linear_kl_divergence_reference",
            "cpu": "distillation:linear_kl_divergence",
            "triton": "triton.distillation:linear_kl_divergence",
        },
    }
)
"""Operation -> implementation -> module in this package and function in it."""


def select(operation: str, implementation: str) -> Callable:
    """The function computing `operation`; all implementations of one operation take the same required arguments and return the same.

    Raises ValueError naming what there is when either name is unknown, and what is missing when the host lacks a package it needs.
    """
    if operation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown operation {operation!r}; there are: {', '.join(sorted(IMPLEMENTATIONS))}")
    implementations = IMPLEMENTATIONS[operation]
    if implementation not in implementations:
        raise ValueError(f"operation {operation!r} has no implementation {implementation!r}; it has: {', '.join(sorted(implementations))}")
    module, function = implementations[implementation].split(":")
    try:
        return getattr(importlib.import_module(f"megatron_hybrid.ops.{module}"), function)
    except ModuleNotFoundError as error:
        package = error.name.partition(".")[0]
        raise ValueError(
            f"{implementation!r} for {operation!r} needs the package {package!r}, which is not installed; "
            'install it (on a host with CUDA, after torch: pip install --no-build-isolation ".[gpu]"), or choose another implementation'
        ) from error
