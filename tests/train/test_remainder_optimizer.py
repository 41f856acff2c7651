from __future__ import annotations

import torch

from megatron_hybrid.train.remainder_optimizer import join_master, split_master


def test_weight_and_remainder_are_the_master_bit_for_bit() -> None:
    bits = torch.randint(-(2**31), 2**31, (100_000,), dtype=torch.int64).to(torch.int32)
    master = torch.cat((bits.view(torch.float32), torch.tensor([0.0, -0.0, 1.0, 1.00390625, 3.0e38, 1e-45])))
    master = master[master.isfinite()]
    weight, remainder = split_master(master)
    assert torch.equal(join_master(weight, remainder).view(torch.int32), master.view(torch.int32))


def test_the_weight_is_the_nearest_bf16_number() -> None:
    master = torch.randn(100_000) * torch.exp2(torch.randint(-30, 30, (100_000,)).float())
    weight, remainder = split_master(master)
    # At a tie the weight is rounded away from zero, torch rounds to even; both are as near.
    assert torch.equal((weight.float() - master).abs(), (master.bfloat16().float() - master).abs())
    assert torch.equal(weight[remainder != -(2**15)], master.bfloat16()[remainder != -(2**15)])
