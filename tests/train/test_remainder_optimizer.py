"""The optimizer without fp32 masters: what stands for a master, what an update is, and what of it a checkpoint holds.

Its kernel runs in Triton's interpreter on a CPU host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_hybrid.checkpoint import CheckpointStore, load
from megatron_hybrid.config import RunConfig
from megatron_hybrid.train import optimizer as optimizer_module
from megatron_hybrid.train.adamw import RemainderAdamW
from megatron_hybrid.train.optimizer import ScalingOptimizer
from megatron_hybrid.train.remainder_optimizer import RemainderDistributedOptimizer, join_master, split_master
from tests.checkpoint.training_state import Kind, Layout, TrainingState
from tests.runs import small_run, write_corpus
from tests.train.layouts import train_in_layout
from tests.train.test_resume import assert_same_state
from tests.train.training import Outcome, train

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
KIND = Kind("bf16", distributed=True)


def every_upper_half() -> Tensor:
    """fp32 numbers, [65536 x 7] int32 bits: every upper half with lower halves at the edges of rounding, and at random."""
    upper = torch.arange(2**16, dtype=torch.int64)[:, None] << 16
    edges = torch.tensor([0, 1, 2**15 - 1, 2**15, 2**15 + 1, 2**16 - 1]).expand(2**16, -1)
    lower = torch.cat((edges, torch.randint(2**16, (2**16, 1), generator=torch.Generator().manual_seed(0))), dim=1)
    bits = upper | lower
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).flatten()


def test_weight_and_remainder_are_the_master_bit_for_bit() -> None:
    """Infinities and NaN too."""
    bits = every_upper_half()
    assert torch.equal(join_master(*split_master(bits.view(torch.float32))).view(torch.int32), bits)


def test_the_weight_is_the_nearest_bf16_number() -> None:
    master = torch.randn(100_000) * torch.exp2(torch.randint(-30, 30, (100_000,)).float())
    weight, remainder = split_master(master)
    # At a tie the weight is rounded away from zero, torch rounds to even; both are as near.
    assert torch.equal((weight.float() - master).abs(), (master.bfloat16().float() - master).abs())
    assert torch.equal(weight[remainder != -(2**15)], master.bfloat16()[remainder != -(2**15)])


def test_the_kernel_joins_and_splits_alike(device: str) -> None:
    """An update of zero leaves every number's bits, and what it was joined to shows in a moment: here one takes in the master itself."""
    masters = every_upper_half().view(torch.float32)
    masters = masters[masters.abs().clamp(torch.finfo(torch.float32).tiny, 1e30) == masters.abs()].to(device)
    weight, remainder = split_master(masters)
    optimizer = RemainderAdamW([{"params": [weight], "weight_decay": 0.0, **OPTIONS, "lr": 0.0}])
    optimizer.state[weight]["remainder"].copy_(remainder)
    weight.decoupled_grad = torch.ones_like(masters)
    optimizer.step()
    assert torch.equal(join_master(weight, optimizer.state[weight]["remainder"]), masters)
    assert torch.equal(weight.view(torch.int16), split_master(masters)[0].view(torch.int16))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_an_update_is_torchs_of_fp32_masters(weight_decay: float, device: str) -> None:
    """Against AdamW in fp64: off by roundings of the master (1.5 units in its last place) and of the step (2^-20 of it), no more."""
    generator = torch.Generator().manual_seed(0)
    masters, grad = (torch.randn(20_000, generator=generator).to(device) for _ in range(2))
    weight, remainder = split_master(masters)
    optimizer = RemainderAdamW([{"params": [weight], "weight_decay": weight_decay, **OPTIONS}])
    optimizer.state[weight]["remainder"].copy_(remainder)
    weight.decoupled_grad = grad
    exact = torch.nn.Parameter(masters.double())
    exact.grad = grad.double()
    optimizer.step()
    torch.optim.AdamW([exact], weight_decay=weight_decay, **OPTIONS).step()
    updated = join_master(weight, optimizer.state[weight]["remainder"])
    unit = torch.exp2(torch.floor(torch.log2(torch.maximum(masters.abs(), updated.abs()).double())) - 23)
    assert ((updated - exact.data).abs() <= 1.5 * unit + OPTIONS["lr"] * 2**-20).all()


@contextmanager
def optimizer_kind(ours: bool) -> Iterator[None]:
    """Our optimizer on a CPU too, where Triton's interpreter runs its kernel; or megatron-core's own on a GPU too."""
    with mock.patch.object(optimizer_module, "has_optimizer_kernel", lambda chunks: ours):
        yield


def held_by(optimizer: ScalingOptimizer) -> list[Tensor]:
    """Shards and their states."""
    states = [item for part in optimizer.chained_optimizers for item in part.optimizer.state.items()]
    return [tensor for shard, state in states for tensor in (shard, *state.values())]


def fill_gradients(state: TrainingState) -> list[Tensor]:
    """Random gradients in the wrapper's buffers, as after a step's reductions; returns this rank's, as one vector per parameter."""
    generator = torch.Generator().manual_seed(3)
    for chunk in state.chunks:
        for buffer in chunk.buffers:
            buffer.grad_data.copy_(torch.randn(buffer.grad_data.shape, generator=generator))
    return [parameter.main_grad.flatten() for chunk in state.chunks for parameter in chunk.parameters()]


def scale_within_the_update(num_tokens: int | None, clip_grad: float) -> dict[str, Any]:
    """One update by our optimizer beside clip_grad_norm_ of divided gradients; runs on a rank."""
    with optimizer_kind(ours=True):
        state = TrainingState(Layout(), KIND, seed=1)
    optimizer = state.optimizer
    assert isinstance(optimizer, ScalingOptimizer)
    assert all(isinstance(part, RemainderDistributedOptimizer) for part in optimizer.chained_optimizers)
    optimizer.config.clip_grad = clip_grad
    grads = fill_gradients(state)
    optimizer.num_tokens = None if num_tokens is None else torch.tensor(num_tokens)
    divided = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for parameter, grad in zip(divided, grads, strict=True):
        parameter.grad = grad / (num_tokens or 1)
    expected_norm = float(torch.nn.utils.clip_grad_norm_(divided, clip_grad))
    updated, norm, _ = optimizer.step()
    of_weight = {id(parameter): clipped.grad for parameter, clipped in zip(_weights(state), divided, strict=True)}
    errors = []
    for part in optimizer.chained_optimizers:
        for weight in (weight for groups in (part.model_fp32_groups, part.model_float16_groups) for group in groups for weight in group):
            shard, of_shard = part._shard_of(weight)
            beta1, beta2 = OPTIONS["betas"]
            clipped = of_weight[id(weight)].double()
            errors.append(float((of_shard["exp_avg"] - (1 - beta1) * clipped).abs().max() / clipped.abs().max()))
            errors.append(float((of_shard["exp_avg_sq"] - (1 - beta2) * clipped**2).abs().max() / clipped.abs().max() ** 2))
    return {"updated": updated, "norm": norm, "expected_norm": expected_norm, "error": max(errors), "num_errors": len(errors)}


def _weights(state: TrainingState) -> list[torch.nn.Parameter]:
    return [parameter for chunk in state.chunks for parameter in chunk.parameters()]


@pytest.mark.parametrize("num_tokens, clip_grad", [(37, 0.5), (37, float("inf")), (None, 0.5), (0, 0.5)])
def test_an_update_clips_and_divides_as_two_passes_would(num_tokens: int | None, clip_grad: float, run_ranks: Any) -> None:
    (found,) = run_ranks(scale_within_the_update, 1, num_tokens, clip_grad)
    assert found["updated"] and found["norm"] == pytest.approx(found["expected_norm"], rel=1e-5)
    assert found["num_errors"] > 20 and found["error"] < 1e-5


def update_with_infinity() -> tuple[bool, float, bool]:
    with optimizer_kind(ours=True):
        state = TrainingState(Layout(), KIND, seed=1)
    fill_gradients(state)[3][1] = float("inf")
    before = [tensor.clone() for tensor in held_by(state.optimizer)]
    updated, norm, _ = state.optimizer.step()
    return updated, norm, all(torch.equal(old, new) for old, new in zip(before, held_by(state.optimizer), strict=True))


def test_a_gradient_that_is_not_finite_changes_nothing(run_ranks: Any) -> None:
    assert run_ranks(update_with_infinity, 1) == [(False, float("inf"), True)]


def update_and_save(directory: Path, layout: Layout) -> dict[str, Tensor]:
    """Two updates of our optimizer, saved; returns masters and moments by kind, shard and name."""
    with optimizer_kind(ours=True):
        state = TrainingState(layout, KIND, seed=1)
    for _ in range(2):
        fill_gradients(state)
        state.optimizer.step()
    return save(directory, 0, state)


def save(directory: Path, step: int, state: TrainingState) -> dict[str, Tensor]:
    CheckpointStore(directory, keep_last=3, asynchronous=False).save(step, state.sharded(is_loading=False), {"kind": "bf16"})
    return contents(state)


def contents(state: TrainingState) -> dict[str, Tensor]:
    """Weights, masters, moments and steps of a rank, in either optimizer."""
    found = {f"{name} weight": weight.detach().clone() for model in state.models for name, weight in model.named_global_parameters()}
    for part in state.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for shard in group["params"]:
                number, of_shard = len(found), part.optimizer.state[shard]
                master = join_master(shard, of_shard["remainder"]) if "remainder" in of_shard else shard.data
                found[f"{number} master"] = master.clone()
                found |= {f"{number} {name}": of_shard[name].clone() for name in ("exp_avg", "exp_avg_sq")}
                found[f"{number} step"] = torch.as_tensor(of_shard.get("step", group.get("step"))).float()
    return found


def load_and_save(directory: Path, step: int, layout: Layout, ours: bool) -> dict[str, Tensor]:
    """The newest checkpoint read into our optimizer or megatron-core's own, and saved again."""
    with optimizer_kind(ours):
        state = TrainingState(layout, KIND, seed=2)
    assert isinstance(state.optimizer, ScalingOptimizer) == ours
    newest = CheckpointStore(directory, keep_last=3, asynchronous=False).newest()
    state.take(load(newest, state.sharded(is_loading=True)))
    return save(directory, step, state)


@pytest.mark.parametrize("layout", [Layout(), Layout(data=2)], ids=str)
def test_a_checkpoint_goes_to_the_optimizer_with_masters_and_back(layout: Layout, tmp_path: Path, run_ranks: Any) -> None:
    saved = run_ranks(update_and_save, layout.num_ranks, tmp_path, layout)
    for step, ours in enumerate((False, True, True), start=1):
        for before, after in zip(saved, run_ranks(load_and_save, layout.num_ranks, tmp_path, step, layout, ours), strict=True):
            assert before.keys() == after.keys()
            different = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
            # At a tie ours rounds a weight away from zero; the weights are saved as they are, and the masters decide.
            assert not different, (ours, different)


def train_ours(run: RunConfig) -> Outcome:
    with optimizer_kind(ours=True):
        return train(run)


def test_resume_is_bitwise(tmp_path: Path, run_ranks: Any) -> None:
    write_corpus(tmp_path / "text")

    def run(name: str, stop: int | None = None) -> RunConfig:
        options = {"precision": "bf16", "steps": 4, "exit_after_steps": stop}
        return small_run(tmp_path, run_dir=tmp_path / name, optimizer={"lr": 1e-3}, train=options)

    whole, part, rest = (run_ranks(train_ours, 1, each)[0] for each in (run("whole"), run("parts", stop=2), run("parts")))
    assert part.losses + rest.losses == whole.losses
    assert any(tensor.dtype == torch.int16 and tensor.any() for tensor in whole.optimizer)
    assert_same_state(rest, whole)


def losses_of(run: RunConfig, ours: bool) -> list[float]:
    with optimizer_kind(ours):
        return train_in_layout(run, 5).losses


def test_training_is_that_with_masters(tmp_path: Path, run_ranks: Any) -> None:
    """The same losses as far as bf16 weights show differences in the last bits of their masters."""
    write_corpus(tmp_path / "text")
    run = small_run(tmp_path, train={"precision": "bf16"}, optimizer={"lr": 1e-3})
    ours, theirs = (run_ranks(losses_of, 1, run, kind)[0] for kind in (True, False))
    assert ours[0] == theirs[0] and ours == pytest.approx(theirs, rel=2e-3) and ours[-1] < ours[0]
