"""A run's settings reach megatron-core's layers and schedules, with the guards that its core leaves out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.activations import squared_relu

from megatron_hybrid.substrate import Substrate
from megatron_hybrid.substrate.groups import initialize, shutdown
from megatron_hybrid.substrate.place import Place
from megatron_hybrid.substrate.transformer_config import build_transformer_config
from tests.substrate.runs import small_run


@pytest.fixture(scope="module")
def substrate() -> Iterator[Substrate]:
    threads = torch.get_num_threads()
    substrate = initialize(small_run(), Place("plain"))
    yield substrate
    shutdown(substrate)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def test_model_settings(substrate: Substrate) -> None:
    config = build_transformer_config(small_run(), substrate)
    assert (config.num_layers, config.hidden_size, config.ffn_hidden_size) == (8, 32, 64)
    assert (config.num_attention_heads, config.num_query_groups, config.kv_channels) == (4, 4, 16)
    assert (config.mamba_num_heads, config.mamba_head_dim, config.mamba_num_groups, config.mamba_state_dim) == (8, 16, 4, 16)
    assert (config.normalization, config.activation_func, config.add_bias_linear) == ("RMSNorm", squared_relu, False)
    assert config.hidden_dropout == config.attention_dropout == 0
    assert config.fp8 is None and not config.gradient_accumulation_fusion


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision(substrate: Substrate, precision: str, dtype: torch.dtype) -> None:
    config = build_transformer_config(small_run(train={"precision": precision}), substrate)
    assert config.params_dtype == config.pipeline_dtype == dtype
    assert config.bf16 == (precision == "bf16")


@pytest.mark.parametrize(
    ("parallel", "virtual", "overlap", "batched"),
    [({"pipeline": 2}, None, False, True), ({"pipeline": 2, "virtual_pipeline": 2}, 2, True, False), ({"pipeline": 3}, None, False, True)],
)
def test_interleaving_never_uses_batched_transfers(
    substrate: Substrate, parallel: dict[str, Any], virtual: int | None, overlap: bool, batched: bool
) -> None:
    config = build_transformer_config(small_run(parallel=parallel), substrate)
    assert config.virtual_pipeline_model_parallel_size == virtual
    assert (config.overlap_p2p_comm, config.batch_p2p_comm) == (overlap, batched)
    assert config.deallocate_pipeline_outputs == (virtual is None or substrate.backend == "nccl")


def test_sequence_parallel(substrate: Substrate) -> None:
    assert build_transformer_config(small_run(parallel={"tensor": 2, "sequence_parallel": True}), substrate).sequence_parallel
