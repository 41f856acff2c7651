"""A model for EleutherAI's lm-evaluation-harness (lm_eval): its tasks, our engine.

The harness calls on the first rank alone; other ranks of a divided model follow through the session's engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from megatron_hybrid.generate.chat import ChatWriter
from megatron_hybrid.generate.sampling import Sampling
from megatron_hybrid.generate.scheduler import Request
from megatron_hybrid.generate.session import Session

DEFAULT_NEW_TOKENS = 256
"""Where a task does not say."""
_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_OTHERS = {"do_sample", "until", "max_gen_toks", "max_new_tokens", "seed"}


class HarnessModel(TemplateLM):
    """The three questions that the harness asks.

    Args:
        session: a loaded model, and its engine, which nobody else uses meanwhile.
        seed: of the first generated text of each call; each further one has one more.
    """

    def __init__(self, session: Session, *, seed: int = 0) -> None:
        super().__init__()
        self._session, self._seed = session, seed
        self._language_model = session.language_model
        self._chat: ChatWriter | None = None

    @property
    def max_length(self) -> int:
        """Tokens that a sequence may have."""
        return self._session.engine.max_length

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self._language_model.tokenizer.eod_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context becomes: the token that comes before a document's first, as the model was trained."""
        prefix = self._language_model.companions.prompt_prefix
        return prefix[-1] if prefix else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """Tells the harness's request caches of different models apart."""
        return self._language_model.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokens of a text, after those that come before a document's first unless they are not wanted. Once chats are written by the
        model's template, every text is one, with its control tokens written out."""
        if self._chat is not None:
            return self._chat.encode_text(string)
        prefix = () if add_special_tokens is False else self._language_model.companions.prompt_prefix
        return [*prefix, *self._language_model.tokenizer.encode(string)]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as one text.

        Raises:
            ValueError: the model has no chat template, or it refuses the chat.
        """
        self._chat = self._chat or ChatWriter(self._language_model)
        return self._chat.write(chat_history, add_generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template, for the harness's reports."""
        return self._language_model.companions.chat_template if chat_template else None

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, in windows of ``max_length`` tokens where they are longer."""
        windows: list[tuple[int, list[int], list[int]]] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            tokens = self.tok_encode(text, add_special_tokens=False)
            pieces = get_rolling_token_windows(tokens, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1)
            windows += [(number, *make_disjoint_window(piece)) for piece in pieces]
        scores = self._score([(context, continuation) for _, context, continuation in windows], disable_tqdm)
        totals = [0.0] * len(requests)
        for (number, _, _), (log_probability, _) in zip(windows, scores, strict=True):
            totals[number] += log_probability
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether it is what the model would write. A context that is too long loses its
        beginning."""
        scores = self._score([(context, continuation) for _, context, continuation in requests], disable_tqdm)
        for (texts, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, score)
        return scores

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]], disable_tqdm: bool) -> list[tuple[float, bool]]:
        """Score continuations in batches of similar length, the longest first; equal answers in the order of ``pairs``."""
        engine = self._session.engine
        sequences = []
        for context, continuation in pairs:
            if not context or not continuation:
                raise ValueError(f"the harness asks for {len(continuation)} tokens after {len(context)}; both must be at least one")
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"a continuation has {len(continuation):,} tokens, but there is room for {self.max_length:,}; raise --max-length"
                )
            sequences.append(([*context, *continuation][-(self.max_length + 1) :], len(continuation)))
        order = sorted(range(len(pairs)), key=lambda number: -len(sequences[number][0]))
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        with tqdm(total=len(pairs), desc="scoring", disable=disable_tqdm or None) as progress:
            for first in range(0, len(order), engine.max_batch_size):
                batch = order[first : first + engine.max_batch_size]
                tokens, counts = zip(*(sequences[number] for number in batch))
                for number, score in zip(batch, engine.score(tokens, counts), strict=True):
                    scores[number] = (score.log_probability, score.is_greedy)
                progress.update(len(batch))
        return scores

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each context until one of its stop strings or the end of the document. A context that is too long loses its beginning.

        Raises:
            ValueError: a task asks for settings that there are not.
        """
        scheduler, texts = self._session.new_scheduler(), [""] * len(requests)
        for number, request in enumerate(requests):
            context, settings = request.args
            scheduler.submit(self._request(number, context, dict(settings)))
        with tqdm(total=len(requests), desc="generating", disable=disable_tqdm or None) as progress:
            while scheduler.has_work:
                for event in scheduler.advance():
                    if event.error is not None:
                        raise ValueError(event.error)
                    texts[event.key] += event.text
                    progress.update(event.ending is not None)
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _request(self, number: int, context: str, settings: dict[str, Any]) -> Request:
        check_settings(settings)
        chosen = {name: settings[name] for name in _SETTINGS if settings.get(name) is not None}
        # As for transformers: a task that does not sample is greedy, whatever temperature it names.
        do_sample = settings.get("do_sample")
        sampled = chosen.get("temperature", 0.0) > 0 if do_sample is None else do_sample
        chosen["temperature"] = float(chosen.get("temperature", 1.0)) if sampled else 0.0
        num_new = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or min(DEFAULT_NEW_TOKENS, self.max_length // 2))
        room = self.max_length - num_new
        if room < 1:
            raise ValueError(f"the task asks for {num_new:,} new tokens, but there is room for {self.max_length:,}; raise --max-length")
        tokens = (self.tok_encode(context) or [self.prefix_token_id])[-room:]
        return Request(
            key=number,
            prompt=tokens,
            max_new_tokens=num_new,
            sampling=Sampling(**chosen),
            seed=int(settings.get("seed", self._seed)) + number,
            stop=_texts(settings.get("until")),
            stop_tokens=self._language_model.companions.end_tokens,
        )


def check_settings(settings: Mapping[str, Any]) -> None:
    """Tell whether a task's ``generation_kwargs`` can be followed.

    Raises:
        ValueError: one has no meaning here.
    """
    unknown = sorted(settings.keys() - _OTHERS - set(_SETTINGS))
    if unknown:
        raise ValueError(
            f"the task's generation_kwargs have {', '.join(unknown)}, which there is not here; there are {', '.join(_SETTINGS)}, "
            "do_sample, seed, until and max_gen_toks"
        )


def _texts(until: str | Iterable[str] | None) -> tuple[str, ...]:
    texts = (until,) if isinstance(until, str) else tuple(until or ())
    return tuple(text for text in texts if text)
