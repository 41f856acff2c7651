"""Learning rate as a pure function of tokens seen, so that it depends on no batch size and needs no state in a checkpoint."""

from __future__ import annotations

import math

from megatron_hybrid.config import OptimizerConfig, ScheduleConfig


def learning_rate(schedule: ScheduleConfig, optimizer: OptimizerConfig, tokens: int, total_tokens: int) -> float:
    """Learning rate of the step that begins after ``tokens`` tokens of a run of ``total_tokens``.

    Warm-up is linear from lr / steps rather than from 0: the first step begins at 0 tokens, and a step at rate 0 would be wasted, so
    callers pass the tokens at the step's end.

    Args:
        schedule: shape and lengths, in tokens.
        optimizer: gives ``lr`` and ``min_lr``.
        tokens: tokens seen at the end of the step the rate is for.
        total_tokens: tokens of the whole run.
    """
    if tokens < schedule.warmup_tokens:
        return optimizer.lr * tokens / schedule.warmup_tokens
    span = optimizer.lr - optimizer.min_lr
    if schedule.kind == "constant":
        return optimizer.lr
    if schedule.kind == "cosine":
        decay_end = schedule.decay_tokens or total_tokens
        return optimizer.min_lr + span * _cosine(_progress(tokens, schedule.warmup_tokens, decay_end))
    progress = _progress(tokens, total_tokens - schedule.decay_tokens, total_tokens)
    return optimizer.min_lr + span * _WSD_DECAYS[schedule.wsd_decay](progress)


def _progress(tokens: int, start: int, end: int) -> float:
    return min(max((tokens - start) / max(end - start, 1), 0.0), 1.0)


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


_WSD_DECAYS = {"linear": lambda progress: 1.0 - progress, "cosine": _cosine, "minus_sqrt": lambda progress: 1.0 - math.sqrt(progress)}
