"""Every kind of layer against its equations, written out from its own weights: outputs and all gradients; recomputed cores too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_hybrid.config import ModelConfig, RunConfig
from megatron_hybrid.layout.pattern import ATTENTION, MAMBA, MLP
from megatron_hybrid.ops.ssd import ssd_reference
from megatron_hybrid.substrate.groups import shutdown
from tests.runs import build_model, small_run

Weights = dict[str, Tensor]


def mamba(model: ModelConfig, weight: Weights, hidden_LBD: Tensor) -> Tensor:
    """in_proj, depthwise causal convolution, scan, norm of y * silu(z) within groups, out_proj."""
    groups, states, inner = model.mamba_num_groups, model.mamba_state_dim, model.mamba_inner_size
    normed_BLD = F.rms_norm(hidden_LBD, hidden_LBD.shape[-1:], weight["in_proj.layer_norm_weight"], model.norm_eps).transpose(0, 1)
    sizes = [inner, inner + 2 * groups * states, model.mamba_num_heads]
    z_BLI, xBC_BLC, dt_BLH = F.linear(normed_BLD, weight["in_proj.weight"]).split(sizes, dim=-1)
    kernel_C1W, length = weight["conv1d.weight"], hidden_LBD.shape[0]
    taps = kernel_C1W.shape[-1] - 1
    convolved_BCL = F.conv1d(xBC_BLC.transpose(1, 2), kernel_C1W, weight["conv1d.bias"], padding=taps, groups=len(kernel_C1W))[..., :length]
    x_BLI, B_BLS, C_BLS = F.silu(convolved_BCL).transpose(1, 2).split([inner, groups * states, groups * states], dim=-1)
    y_BLHP, _ = ssd_reference(
        x_BLI.unflatten(-1, (model.mamba_num_heads, model.mamba_head_dim)),
        dt_BLH,
        weight["A_log"],
        B_BLS.unflatten(-1, (groups, states)),
        C_BLS.unflatten(-1, (groups, states)),
        weight["D"],
        weight["dt_bias"],
    )
    gated_BLGI = (y_BLHP.flatten(2) * F.silu(z_BLI)).unflatten(-1, (groups, -1))
    gated_BLI = F.rms_norm(gated_BLGI, gated_BLGI.shape[-1:], eps=model.norm_eps).flatten(2) * weight["norm.weight"]
    return F.linear(gated_BLI, weight["out_proj.weight"]).transpose(0, 1)


def attention(model: ModelConfig, weight: Weights, hidden_LBD: Tensor) -> Tensor:
    """Causal softmax attention; head h of the queries reads key and value h // (heads / groups)."""
    normed_BLD = F.rms_norm(hidden_LBD, hidden_LBD.shape[-1:], weight["linear_qkv.layer_norm_weight"], model.norm_eps).transpose(0, 1)
    groups, dim = model.num_kv_heads, model.head_dim
    queries = model.num_attention_heads // groups
    by_group_BLGR = F.linear(normed_BLD, weight["linear_qkv.weight"]).unflatten(-1, (groups, (queries + 2) * dim))
    q_BLGE, k_BLGP, v_BLGP = by_group_BLGR.split([queries * dim, dim, dim], dim=-1)
    q_BGQLP = q_BLGE.unflatten(-1, (queries, dim)).permute(0, 2, 3, 1, 4)
    k_BG1LP, v_BG1LP = (tensor.transpose(1, 2).unsqueeze(2) for tensor in (k_BLGP, v_BLGP))
    scores_BGQLS = q_BGQLP @ k_BG1LP.transpose(-1, -2) / dim**0.5
    is_later_LS = torch.ones(scores_BGQLS.shape[-2:], dtype=torch.bool, device=hidden_LBD.device).triu(1)
    attended_BGQLP = scores_BGQLS.masked_fill(is_later_LS, -torch.inf).softmax(-1) @ v_BG1LP
    return F.linear(attended_BGQLP.permute(3, 0, 1, 2, 4).flatten(2), weight["linear_proj.weight"])


def mlp(model: ModelConfig, weight: Weights, hidden_LBD: Tensor) -> Tensor:
    """Squared ReLU between two linears."""
    normed_LBD = F.rms_norm(hidden_LBD, hidden_LBD.shape[-1:], weight["linear_fc1.layer_norm_weight"], model.norm_eps)
    return F.linear(F.linear(normed_LBD, weight["linear_fc1.weight"]).relu().square(), weight["linear_fc2.weight"])


EQUATIONS: dict[str, Callable[[ModelConfig, Weights, Tensor], Tensor]] = {MAMBA: mamba, ATTENTION: attention, MLP: mlp}
LENGTH, BATCH = 40, 2


def distances(run: RunConfig) -> dict[str, float]:
    """Relative distance of output and gradients from the equations', by name, for a model of one layer; runs on a rank."""
    model, substrate = build_model(run)
    layer, generator = model.decoder.layers[0], torch.Generator().manual_seed(0)
    (block,) = layer.children()
    weights = dict(block.named_parameters())
    for name, parameter in weights.items():
        if name.endswith(("norm_weight", "norm.weight", "bias", "D")):  # ones and zeros would hide where they stand
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
    shape_LBD = (LENGTH, BATCH, run.model.hidden_size)
    hidden_LBD, direction_LBD = (torch.randn(shape_LBD, generator=generator).to(substrate.device) for _ in range(2))
    hidden_LBD.requires_grad_()

    def with_gradients(output_LBD: Tensor) -> list[Tensor]:
        leaves = [hidden_LBD, *weights.values()]
        for leaf in leaves:
            leaf.grad = None
        output_LBD.backward(direction_LBD)
        return [output_LBD, *(leaf.grad for leaf in leaves)]

    found = with_gradients(layer(hidden_LBD, model.describe_sequence(LENGTH)))
    expected = with_gradients(hidden_LBD + EQUATIONS[run.model.pattern](run.model, weights, hidden_LBD))
    shutdown(substrate)
    names = ["output", "hidden", *weights]
    return {name: ((a - b).norm() / b.norm()).item() for name, a, b in zip(names, found, expected, strict=True)}


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("kind", EQUATIONS)
def test_a_layer_is_its_equations(kind: str, recompute: str, tmp_path: Path, run_ranks) -> None:
    run = small_run(tmp_path, model={"pattern": kind}, parallel={"recompute": recompute})
    (found,) = run_ranks(distances, 1, run)
    # Orders of summation differ, on some GPUs products of fp32 numbers too; a wrong equation is off by tenths.
    assert max(found.values()) < 1e-4, found
