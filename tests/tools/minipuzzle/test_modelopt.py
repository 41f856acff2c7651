"""nvidia-modelopt as the peer: its Minitron mode is really registered in the pinned version, and its distillation loss is ours."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist

from megatron_hybrid.config import RunConfig
from megatron_hybrid.ops.distillation import linear_kl_divergence
from megatron_hybrid.ops.hidden_states import HIDDEN_STATE_LOSSES
from megatron_hybrid.substrate.groups import initialize, shutdown
from megatron_hybrid.substrate.transformer_config import build_transformer_config
from tests.runs import small_run

VOCAB_SIZE = 256


def registered_mode() -> tuple[str, str]:
    """modelopt's version, and the mode that prunes megatron-core models. Its plugin loader turns a failed import into a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import modelopt
        import modelopt.torch.prune  # noqa: F401
        from modelopt.torch.opt.mode import _ModeRegistryCls

    return modelopt.__version__, str(_ModeRegistryCls.get_from_any("mcore_minitron"))


def losses_of_both(run: RunConfig, temperature: float) -> dict[str, torch.Tensor]:
    """Per-token losses and student gradients of both, on this rank's shard of the vocabulary; runs on every rank."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from modelopt.torch.distill.plugins.megatron import LogitsKLLoss
    substrate = initialize(run)
    group = substrate.tensor_group
    generator = torch.Generator().manual_seed(0)
    hidden, teacher = (torch.randn(24, 3, 32, generator=generator) for _ in range(2))
    weight_VD, teacher_weight_VD = (torch.randn(VOCAB_SIZE, 32, generator=generator).chunk(group.size())[group.rank()] for _ in range(2))
    token_weights = torch.rand(24, 3, generator=generator)

    ours = hidden.clone().requires_grad_()
    total, of_tokens = linear_kl_divergence(
        ours, weight_VD, teacher, teacher_weight_VD, token_weights, vocab_size=VOCAB_SIZE, temperature=temperature, group=group
    )
    total.backward()

    theirs = hidden.clone().requires_grad_()
    criterion = LogitsKLLoss(build_transformer_config(run, substrate), temperature=temperature)
    of_tokens_BL, is_partial, _ = criterion(theirs @ weight_VD.t(), teacher @ teacher_weight_VD.t())
    (of_tokens_BL.t() * token_weights).sum().backward()
    their_tokens = of_tokens_BL.detach().t().contiguous()
    if is_partial and group.size() > 1:
        dist.all_reduce(their_tokens, group=group)
    result = {"ours": of_tokens, "theirs": their_tokens, "our gradient": ours.grad, "their gradient": theirs.grad}
    for name in ("our gradient", "their gradient"):
        dist.all_reduce(result[name], group=group)
    shutdown(substrate)
    return result


def hidden_losses_of_both(run: RunConfig, kind: str) -> tuple[torch.Tensor, ...]:
    """Per-token losses of hidden states and the student's gradients, ours and theirs; runs on one rank."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from modelopt.torch.distill.plugins.megatron import HiddenStateCosineLoss, MSELoss
    substrate = initialize(run)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(24, 3, 32, generator=generator) for _ in range(2))
    token_weights_LB = torch.rand(24, 3, generator=generator)
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    of_tokens = HIDDEN_STATE_LOSSES[kind](ours, teacher)
    criterion = {"mse": MSELoss, "cosine": HiddenStateCosineLoss}[kind](build_transformer_config(run, substrate))
    their_tokens = criterion(theirs, teacher)[0].t()
    for losses in (of_tokens, their_tokens):
        (losses * token_weights_LB).sum().backward()
    shutdown(substrate)
    return of_tokens.detach(), their_tokens.detach().contiguous(), ours.grad, theirs.grad


@pytest.mark.parametrize("kind", HIDDEN_STATE_LOSSES)
def test_losses_between_layers_are_modelopts(kind: str, tmp_path, run_ranks) -> None:
    ((ours, theirs, our_gradient, their_gradient),) = run_ranks(hidden_losses_of_both, 1, small_run(tmp_path), kind)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-5, atol=1e-6)


def test_minitron_is_registered_in_the_pinned_version(run_ranks) -> None:
    """0.44 to 0.46 import Transformer Engine unguarded, 0.47 needs a newer megatron-core: there the mode is silently absent."""
    assert run_ranks(registered_mode, 1) == [("0.43.0", "mcore_minitron")]


def test_the_distillation_loss_is_modelopts(tmp_path, run_ranks) -> None:
    for tensor, temperature in ((1, 1.0), (2, 1.0), (2, 2.0)):
        run = small_run(tmp_path, parallel={"tensor": tensor})
        for result in run_ranks(losses_of_both, tensor, run, temperature):
            torch.testing.assert_close(result["ours"], result["theirs"], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(result["our gradient"], result["their gradient"], rtol=1e-5, atol=1e-5)
