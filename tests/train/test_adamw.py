"""AdamW over weights and remainders is AdamW over fp32 masters; in Triton's interpreter on a CPU."""

from __future__ import annotations

import torch

from megatron_hybrid.train.adamw import RemainderAdamW
from megatron_hybrid.train.remainder_optimizer import join_master

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}


def test_updates_are_torchs_on_the_masters() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight, vector = torch.randn(5000, device=device).bfloat16(), torch.randn(300, device=device)
    # As megatron-core hands them over: shards of the model's weights, and no leaves.
    own = [torch.nn.Parameter(weight.clone()).view(-1), torch.nn.Parameter(vector.clone()).view(-1)]
    masters = [torch.nn.Parameter(weight.float()), torch.nn.Parameter(vector.clone())]
    groups = [{"params": [parameter], "weight_decay": decay, **OPTIONS} for parameter, decay in zip(own, (0.1, 0.0), strict=True)]
    optimizer = RemainderAdamW(groups)
    expected = torch.optim.AdamW([{"params": [master], "weight_decay": decay} for master, decay in zip(masters, (0.1, 0.0))], **OPTIONS)
    for _ in range(20):
        for parameter, master in zip(own, masters, strict=True):
            master.grad = torch.randn_like(master)
            parameter.decoupled_grad = 4 * master.grad
        optimizer.gradient_factor = 0.25
        optimizer.step()
        expected.step()
    torch.testing.assert_close(join_master(own[0].data, optimizer.state[own[0]]["remainder"]), masters[0].data, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(own[1].data, masters[1].data, rtol=1e-6, atol=1e-6)
    assert [group["step"] for group in optimizer.param_groups] == [20, 20]


def test_small_updates_are_not_lost_to_bf16() -> None:
    weight = torch.ones(64).bfloat16()
    optimizer = RemainderAdamW([{"params": [weight], "weight_decay": 0.0, **OPTIONS, "lr": 1e-5}])
    for _ in range(300):
        weight.decoupled_grad = torch.ones(64)
        optimizer.step()
    # 300 steps of 1e-5, each a hundredth of what bf16 resolves at 1
    torch.testing.assert_close(weight.float(), torch.full((64,), 0.997), rtol=0, atol=2**-9)
