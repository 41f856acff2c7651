"""megatron-core's own MambaModel reads what is written, in the names and cuts of its sharded_state_dict.

Its mixer wants mamba_ssm and triton, which need a GPU; what they compute does not matter here, so the gated norm is stood in for by a
module that holds the weight. The layers are those of its ModelOpt specification, which has norms and linears apart and saves them under the
names of Transformer Engine's fused ones.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from megatron_hybrid.checkpoint.sharding import shard_parameters
from megatron_hybrid.config import RunConfig
from megatron_hybrid.convert.native import NativeSource, run_of
from megatron_hybrid.model.build import build_chunks
from megatron_hybrid.substrate.groups import initialize
from megatron_hybrid.substrate.transformer_config import build_transformer_config
from tools.convert_checkpoint import main

GATED_NORM = "mamba_ssm.ops.triton.layernorm_gated"
GPU_MODULES = (
    "mamba_ssm",
    "mamba_ssm.ops",
    "mamba_ssm.ops.triton",
    "mamba_ssm.ops.triton.selective_state_update",
    "mamba_ssm.ops.triton.ssd_combined",
    "megatron.core.inference.contexts.attention_context.triton.tensor_ops",
)
FUSED = {
    "norm.weight": "mixer.in_proj.layer_norm_weight",
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


class StandInNorm(torch.nn.Module):
    """The weight of mamba_ssm's gated norm."""

    def __init__(self, size: int, *, eps: float, group_size: int, norm_before_gate: bool, device: object, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(size, dtype=dtype))


def differing(directory: Path, run: RunConfig) -> list[str]:
    """Parameters that megatron-core's model and ours load differently, by our names; runs on every rank."""
    with patch.dict(sys.modules, {name: MagicMock() for name in GPU_MODULES} | {GATED_NORM: SimpleNamespace(RMSNorm=StandInNorm)}):
        from megatron.core.models.mamba import MambaModel
        from megatron.core.post_training.modelopt.mamba import model_specs
        from megatron.core.ssm import mamba_block

    substrate = initialize(run)
    config = build_transformer_config(run, substrate)
    with (
        patch.object(model_specs, "Norm", WrappedTorchNorm),
        patch.object(mamba_block, "TENorm", WrappedTorchNorm),
    ):
        theirs = MambaModel(
            config,
            model_specs.get_mamba_stack_modelopt_spec(local_core_attention=True, remap_te_layernorm=True),
            vocab_size=run.model.padded_vocab_size,
            max_sequence_length=64,
            hybrid_override_pattern=run.model.pattern,
        )
    # Its names: "missing" is what nobody asked for, "unexpected" what is not there.
    loaded, superfluous, absent = dist_checkpointing.load(theirs.sharded_state_dict(), str(directory), strict=StrictHandling.RETURN_ALL)
    assert not superfluous and all(key.endswith("._extra_state") for key in absent), (superfluous, absent)
    theirs.load_state_dict(loaded, strict=False)
    (ours,) = build_chunks(run, config, substrate)
    sharded = shard_parameters(ours.named_global_parameters(), substrate.tensor_group, substrate.data_group)
    expected = dist_checkpointing.load({"model": sharded}, str(directory))["model"]
    found = {our_name(name): parameter for name, parameter in theirs.named_parameters()}
    assert found.keys() == expected.keys()
    return [name for name, tensor in expected.items() if not torch.equal(found[name].detach(), tensor)]


def our_name(name: str) -> str:
    """A name of megatron-core's with its separate norms, as it saves it."""
    prefix, layers, rest = name.partition("decoder.layers.")
    number, _, inside = rest.partition(".")
    return f"{prefix}{layers}{number}.{FUSED[inside]}" if inside in FUSED else name


def test_megatron_cores_own_model_loads_it(native: Path, tmp_path: Path, run_ranks) -> None:
    assert main(["--from", "native", "--to", "megatron", str(native), str(tmp_path / "out"), "--verdict", "bits"]) == 0
    run = run_of(NativeSource(native).model, tmp_path, precision="fp32")
    for tensor in (1, 2):
        layout = run.model_copy(update={"parallel": run.parallel.model_copy(update={"tensor": tensor})})
        assert run_ranks(differing, tensor, tmp_path / "out/iter_0000001", layout) == [[]] * tensor
