"""A loaded model and its engine on these ranks: what a command opens, uses on the first rank, and closes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from megatron_hybrid.generate.engine import DEFAULT_PREFILL_TOKENS, Engine
from megatron_hybrid.generate.load import LanguageModel
from megatron_hybrid.generate.ranks import Leader, follow
from megatron_hybrid.generate.scheduler import STEPS_AHEAD, Scheduler
from megatron_hybrid.generate.stages import Stages
from megatron_hybrid.generate.text import encode_prompt
from megatron_hybrid.substrate.context import Substrate

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Session:
    """What the first rank has."""

    language_model: LanguageModel
    engine: Engine | Leader
    steps_ahead: int

    def new_scheduler(self) -> Scheduler:
        """A scheduler over the engine; one at a time."""
        return Scheduler(self.engine, self.language_model.tokenizer, steps_ahead=self.steps_ahead)

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt that begins a document.

        Raises:
            ValueError: it is empty or no Unicode text.
        """
        return encode_prompt(text, self.language_model.tokenizer, self.language_model.companions.prompt_prefix)

    def keep_alive(self) -> None:
        """To be called every few seconds while there is nothing to do: no rank waits for another for ever."""
        if isinstance(self.engine, Leader):
            self.engine.keep_alive()


def lead(
    language_model: LanguageModel,
    substrate: Substrate,
    use: Callable[[Session], ResultT],
    *,
    max_batch_size: int,
    max_length: int,
    prefill_tokens: int = DEFAULT_PREFILL_TOKENS,
) -> ResultT | None:
    """Make the engines and call ``use`` on the first rank, while the others follow; returns its result there, and None on the others.

    Args:
        language_model: as loaded on this rank.
        substrate: the ranks.
        use: what to do.
        max_batch_size: sequences at a time.
        max_length: tokens of a sequence, prompt included.
        prefill_tokens: tokens of prompts that go through the model at a time.
    """
    engine = Engine(
        language_model.model,
        max_batch_size=max_batch_size,
        max_length=max_length,
        vocab_size=language_model.tokenizer.vocab_size,
        stages=Stages.of(substrate),
        prefill_tokens=prefill_tokens,
    )
    steps_ahead = STEPS_AHEAD if substrate.device.type == "cuda" else 0
    if substrate.world_size == 1:
        return use(Session(language_model, engine, steps_ahead))
    if substrate.rank > 0:
        follow(engine, substrate.control_group)
        return None
    leader = Leader(engine, substrate.control_group)
    result = use(Session(language_model, leader, steps_ahead))
    # Not after a failure: the others end with this rank then.
    leader.dismiss()
    return result
