"""AdamW over bf16 weights and the 16 bits that each lacks to its fp32 master, one pass over everything an update touches.

Gradients are scaled within the update, so that dividing by the step's tokens and clipping cost no passes of their own. Per weight the
update moves 28 bytes: gradient 4, weight 2 + 2, remainder 2 + 2, moments 8 + 8.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _NUM_WARPS = 2048, 8


@triton.jit
def _update_kernel(
    weight_ptr,
    remainder_ptr,
    grad_ptr,
    first_moment_ptr,
    second_moment_ptr,
    size,
    factor,
    rate,
    decay,
    beta1,
    beta2,
    eps,
    correction1,
    correction2,
    HAS_REMAINDER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    grad = tl.load(grad_ptr + index, mask=inside, other=0.0) * factor
    first = tl.load(first_moment_ptr + index, mask=inside, other=0.0)
    second = tl.load(second_moment_ptr + index, mask=inside, other=0.0)
    if HAS_REMAINDER:
        remainder = tl.load(remainder_ptr + index, mask=inside, other=0).to(tl.int32)
        upper = tl.load(weight_ptr + index, mask=inside, other=0).to(tl.int32) - (remainder < 0).to(tl.int32)
        master = ((upper << 16) | (remainder & 0xFFFF)).to(tl.float32, bitcast=True)
    else:
        master = tl.load(weight_ptr + index, mask=inside, other=0.0)
    first = beta1 * first + (1.0 - beta1) * grad
    second = beta2 * second + (1.0 - beta2) * grad * grad
    step = (first / correction1) / (tl.sqrt_rn(second / correction2) + eps)
    master = master - rate * (step + decay * master)
    tl.store(first_moment_ptr + index, first, mask=inside)
    tl.store(second_moment_ptr + index, second, mask=inside)
    if HAS_REMAINDER:
        bits = master.to(tl.int32, bitcast=True)
        remainder = bits.to(tl.int16)
        tl.store(remainder_ptr + index, remainder, mask=inside)
        tl.store(weight_ptr + index, ((bits >> 16) + (remainder < 0).to(tl.int32)).to(tl.int16), mask=inside)
    else:
        tl.store(weight_ptr + index, master, mask=inside)


class RemainderAdamW(torch.optim.Optimizer):
    """AdamW for bf16 weights with fp32 masters, and for fp32 weights, under megatron-core's distributed optimizer.

    Reads each weight's fp32 gradient from its ``decoupled_grad`` and multiplies it by ``gradient_factor`` first. State: ``exp_avg`` and
    ``exp_avg_sq`` in fp32, and for a bf16 weight ``remainder``, the lower half of its master (``remainder_optimizer.join_master``). Masters
    start as what the bf16 weights are. ``step`` counts in the parameter groups, as in Transformer Engine's and Apex's AdamW.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        # torch takes leaves alone, and what megatron-core hands over are shards: views of the model's weights.
        super().__init__([torch.empty(0)], {})
        self.param_groups = list(groups)
        self.gradient_factor = 1.0
        for group in self.param_groups:
            group.setdefault("step", 0)
            for weight in group["params"]:
                state = {name: torch.zeros_like(weight, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
                if weight.dtype == torch.bfloat16:
                    state["remainder"] = torch.zeros_like(weight, dtype=torch.int16)
                self.state[weight] = state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            group["step"] += 1
            for weight in group["params"]:
                if weight.decoupled_grad is not None and weight.numel():
                    _update(weight, weight.decoupled_grad, self.state[weight], group, self.gradient_factor)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the options of the groups. The state's tensors are written in place by whoever loads them."""
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            own.update({name: value for name, value in saved.items() if name != "params"})


def _update(weight: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any], factor: float) -> None:
    beta1, beta2 = group["betas"]
    has_remainder = "remainder" in state
    assert grad.dtype == torch.float32 and grad.is_contiguous() and weight.is_contiguous(), (grad.dtype, weight.shape)
    _update_kernel[(triton.cdiv(weight.numel(), _BLOCK),)](
        weight.data.view(torch.int16) if has_remainder else weight.data,
        state.get("remainder", grad),
        grad,
        state["exp_avg"],
        state["exp_avg_sq"],
        weight.numel(),
        factor,
        group["lr"],
        group["weight_decay"],
        beta1,
        beta2,
        group["eps"],
        1.0 - beta1 ** group["step"],
        1.0 - beta2 ** group["step"],
        HAS_REMAINDER=has_remainder,
        BLOCK=_BLOCK,
        num_warps=_NUM_WARPS,
    )
