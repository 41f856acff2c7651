"""The decode engine: up to B sequences in slots, each at its own length, started and stopped independently of one another.

``begin`` and ``prefill_piece`` take prompts into slots, ``step`` gives every sequence its next token, ``release`` frees a slot. Everything
a step needs lies in buffers on the device that are updated in place, so that on a GPU a step is one CUDA graph, and nothing in it waits for
the host. The command, the server, the evaluation harness and the benchmarks all generate through this.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megatron_hybrid.generate.graphs import Graphs
from megatron_hybrid.generate.prefill import Piece, run_prompts
from megatron_hybrid.generate.sampling import NOT_FINITE, Needs, Sampling, SamplingRows, choose
from megatron_hybrid.generate.score import Score, score_piece
from megatron_hybrid.generate.stages import Stages
from megatron_hybrid.generate.step import describe_position, embed, logits_of, run_layers
from megatron_hybrid.layers.attention import AttentionLayer
from megatron_hybrid.layers.mamba import MambaLayer
from megatron_hybrid.layers.sequence import Cache
from megatron_hybrid.model.hybrid import HybridModel
from megatron_hybrid.ops.decode import DecodeOps, decode_ops_for

DEFAULT_PREFILL_TOKENS = 8192


@dataclass(frozen=True)
class Start:
    """What a sequence starts from."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    sampling: Sampling
    seed: int
    """Of this sequence alone, 0 to 2^63 - 1; what it draws depends on nothing else."""


@dataclass(frozen=True)
class Slots:
    """Where the sequences stand, on the device; updated in place."""

    token_B: Tensor
    """int64, the last token of each, which the caches do not have yet."""
    num_tokens_B: Tensor
    """int64, tokens in the caches."""
    is_active_B: Tensor
    """bool."""
    sampling: SamplingRows

    def rows(self, first: int, end: int) -> Slots:
        """The same memory, of slots ``first`` to ``end`` (exclusive)."""
        return Slots(self.token_B[first:end], self.num_tokens_B[first:end], self.is_active_B[first:end], self.sampling.rows(first, end))


class StepTokens:
    """The tokens of a step, on their way from the device."""

    def __init__(self, token_B: Tensor) -> None:
        self._event = None
        if token_B.device.type == "cuda":
            self._token_B = torch.empty(token_B.shape, dtype=token_B.dtype, pin_memory=True)
            self._token_B.copy_(token_B, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._token_B = token_B.clone()

    def fetch(self) -> list[int]:
        """Wait for them and return one for each slot; ``NOT_FINITE`` where the logits were not. Free slots' mean nothing."""
        if self._event is not None:
            self._event.synchronize()
        return self._token_B.tolist()


@dataclass
class _Prefill:
    """Prompts under way into slots ``first`` and following."""

    first: int
    starts: Sequence[Start]
    pieces: Iterator[Piece]
    last_hidden_BD: Tensor | None = None


class Engine:
    """A model and the state of B sequences. On several ranks every method is called on all of them, with the same arguments.

    Args:
        model: this rank's stage.
        max_batch_size: B.
        max_length: tokens of a sequence, prompt included, that there is room for.
        vocab_size: tokens to choose from, the first of the model's (which may have more than the tokenizer).
        stages: the pipeline; unset, all of the model is here.
        prefill_tokens: tokens, padding included, that go through the model at a time while prompts are read.
        use_graphs: decode in CUDA graphs; unset, on a GPU that has all of the model.
    """

    def __init__(
        self,
        model: HybridModel,
        *,
        max_batch_size: int,
        max_length: int,
        vocab_size: int,
        stages: Stages | None = None,
        prefill_tokens: int = DEFAULT_PREFILL_TOKENS,
        use_graphs: bool | None = None,
    ) -> None:
        self.model, self.max_batch_size, self.max_length, self.vocab_size = model, max_batch_size, max_length, vocab_size
        self.stages = stages or Stages()
        self.prefill_tokens = prefill_tokens
        self._device = next(model.parameters()).device
        self._ops: DecodeOps = decode_ops_for(self._device)
        with torch.inference_mode():
            self.caches = [new_cache(layer, max_batch_size, max_length) for layer in model.decoder.layers]
            self._slots = Slots(
                token_B=torch.zeros(max_batch_size, dtype=torch.int64, device=self._device),
                num_tokens_B=torch.zeros(max_batch_size, dtype=torch.int64, device=self._device),
                is_active_B=torch.zeros(max_batch_size, dtype=torch.bool, device=self._device),
                sampling=SamplingRows.greedy(max_batch_size, vocab_size, self._device),
            )
        self._active: dict[int, Sampling] = {}
        self._lengths: dict[int, int] = {}
        self._prefill: _Prefill | None = None
        has_all = self.stages.num_stages == 1 and model.config.tensor_model_parallel_size == 1
        use_graphs = self._device.type == "cuda" and has_all if use_graphs is None else use_graphs
        self._graphs = Graphs(self._run_step, max_batch_size) if use_graphs else None

    @property
    def cache_bytes(self) -> int:
        """Memory of the caches on this rank."""
        return sum(getattr(cache, field.name).nbytes for cache in self.caches if cache is not None for field in fields(cache))

    def prefill(self, first: int, starts: Sequence[Start]) -> list[int]:
        """``begin``, and all pieces at once: the first new token of each sequence."""
        self.begin(first, starts)
        while (tokens := self.prefill_piece()) is None:
            pass
        return tokens

    def begin(self, first: int, starts: Sequence[Start]) -> None:
        """Prepare to take prompts into slots ``first`` and following, which must be free; the longest first wastes least.

        Raises:
            ValueError: a prompt is empty, or leaves no room for a new token.
        """
        assert self._prefill is None, "one prefill at a time"
        end = first + len(starts)
        assert starts and end <= self.max_batch_size and not any(slot in self._active for slot in range(first, end)), (first, end)
        for start in starts:
            if not 0 < len(start.prompt) < self.max_length:
                raise ValueError(f"a prompt has {len(start.prompt):,} tokens; expected 1 to {self.max_length - 1:,} of them")
        caches = [cache and cache.rows(first, end) for cache in self.caches]
        prompts = [start.prompt for start in starts]
        pieces = run_prompts(self.model, prompts, caches, stages=self.stages, max_tokens=self.prefill_tokens)
        self._prefill = _Prefill(first, starts, pieces)

    @torch.inference_mode()
    def prefill_piece(self) -> list[int] | None:
        """Run the next piece of the prompts; after the last return the first new token of each sequence, which is then under way."""
        prefill = self._prefill
        assert prefill is not None
        piece = next(prefill.pieces)
        if prefill.last_hidden_BD is None:
            prefill.last_hidden_BD = piece.hidden_LBD.new_zeros(len(prefill.starts), piece.hidden_LBD.shape[-1])
        ends = [
            (row, len(start.prompt) - piece.offset - 1)
            for row, (start, valid) in enumerate(zip(prefill.starts, piece.num_valid))
            if valid and piece.offset + valid == len(start.prompt)
        ]
        if ends:
            rows, places = (torch.tensor(each, device=self._device) for each in zip(*ends))
            prefill.last_hidden_BD[rows] = piece.hidden_LBD[places, rows]
        if piece.offset + max(piece.num_valid) < max(len(start.prompt) for start in prefill.starts):
            return None
        self._prefill = None
        return self._start(prefill)

    def _start(self, prefill: _Prefill) -> list[int]:
        first, end = prefill.first, prefill.first + len(prefill.starts)
        for slot, start in enumerate(prefill.starts, first):
            self._slots.sampling.set(slot, start.sampling, start.seed, start.prompt)
            self._active[slot], self._lengths[slot] = start.sampling, len(start.prompt)
        slots = self._slots.rows(first, end)
        slots.num_tokens_B.copy_(torch.tensor([len(start.prompt) for start in prefill.starts]))
        if self.stages.is_last:
            logits_BV = self.model.output_layer.logits(prefill.last_hidden_BD[None]).squeeze(1)[:, : self.vocab_size]
            needs = Needs.of(start.sampling for start in prefill.starts)
            slots.token_B.copy_(choose(logits_BV, slots.sampling, slots.num_tokens_B, needs))
        self.stages.share(slots.token_B)
        slots.is_active_B.fill_(True)
        return slots.token_B.tolist()

    @torch.inference_mode()
    def step(self) -> StepTokens:
        """Give every sequence its next token, without waiting for it.

        Raises:
            ValueError: a sequence is as long as there is room for.
        """
        assert self._active
        for slot in self._active:
            self._lengths[slot] += 1
            if self._lengths[slot] > self.max_length:
                raise ValueError(f"a sequence is at its limit of {self.max_length:,} tokens; release it")
        size, needs = max(self._active) + 1, Needs.of(self._active.values())
        if self._graphs is None:
            self._run_step(size, needs)
        else:
            self._graphs.run(size, needs, self._slots)
        return StepTokens(self._slots.token_B[:size])

    @torch.inference_mode()
    def release(self, slot: int) -> None:
        """Stop a sequence; its slot is free again."""
        del self._active[slot], self._lengths[slot]
        self._slots.is_active_B[slot] = False

    @torch.inference_mode()
    def fork(self, source: int, starts: Mapping[int, Start]) -> None:
        """Let free slots go on from where a sequence is, each with settings of its own: one prompt is read once for many continuations."""
        assert source in self._active and not any(slot in self._active for slot in starts)
        for slot, start in starts.items():
            for cache in self.caches:
                for name in () if cache is None else (field.name for field in fields(cache)):
                    getattr(cache, name)[slot].copy_(getattr(cache, name)[source])
            self._slots.sampling.set(slot, start.sampling, start.seed, start.prompt)
            for name in ("token_B", "num_tokens_B", "is_active_B"):
                getattr(self._slots, name)[slot] = getattr(self._slots, name)[source]
            self._active[slot], self._lengths[slot] = start.sampling, self._lengths[source]

    @torch.inference_mode()
    def score(self, sequences: Sequence[Sequence[int]], num_scored: Sequence[int]) -> list[Score]:
        """Log-probabilities of the last ``num_scored`` tokens of each sequence, given all before them. Slots must be free.

        Raises:
            ValueError: a sequence is longer than there is room for, or has no token before the scored ones.
        """
        assert not self._active and self._prefill is None
        assert len(sequences) == len(num_scored) <= self.max_batch_size
        for tokens, scored in zip(sequences, num_scored):
            if not 0 < scored < len(tokens) <= self.max_length + 1:
                raise ValueError(f"cannot score {scored} of {len(tokens)} tokens; there is room for {self.max_length + 1:,} tokens")
        # The last token is predicted, not read.
        read = [tokens[:-1] for tokens in sequences]
        caches = [cache and cache.rows(0, len(read)) for cache in self.caches]
        total = torch.zeros(len(read), 2, dtype=torch.float64, device=self._device)
        total[:, 1] = 1
        for piece in run_prompts(self.model, read, caches, stages=self.stages, max_tokens=self.prefill_tokens):
            if self.stages.is_last:
                score_piece(self.model, piece, sequences, num_scored, self.vocab_size, total)
        self.stages.share(total)
        return [Score(log_probability, is_greedy == 1) for log_probability, is_greedy in total.tolist()]

    def _run_step(self, size: int, needs: Needs) -> None:
        """One token of the first ``size`` slots."""
        slots, caches = self._slots.rows(0, size), [cache and cache.rows(0, size) for cache in self.caches]
        model, config = self.model, self.model.config
        here = describe_position(model, slots.num_tokens_B, slots.is_active_B)
        if self.stages.is_first:
            hidden_BD = embed(model, slots.token_B.clamp_min(0))
        else:
            hidden_BD = self.stages.receive((size, config.hidden_size), config.params_dtype, self._device)
        hidden_BD = run_layers(model, hidden_BD, caches, here, self._ops)
        self.stages.send(hidden_BD)
        slots.num_tokens_B.add_(slots.is_active_B)
        if self.stages.is_last:
            logits_BV = logits_of(model, hidden_BD, self._ops)[:, : self.vocab_size]
            slots.token_B.copy_(choose(logits_BV, slots.sampling, slots.num_tokens_B, needs))
        self.stages.share(slots.token_B)


def new_cache(layer: torch.nn.Module, batch_size: int, max_length: int) -> Cache:
    """What a layer carries from one token to the next; None for a layer whose tokens do not meet."""
    if isinstance(layer, MambaLayer):
        return layer.mixer.new_cache(batch_size)
    if isinstance(layer, AttentionLayer):
        return layer.self_attention.new_cache(batch_size, max_length)
    return None


def check_finite(token: int, num_tokens: int) -> int:
    """Return a token of ``StepTokens.fetch``.

    Raises:
        ValueError: it stands for logits that are not finite.
    """
    if token == NOT_FINITE:
        raise ValueError(f"the logits are not finite after {num_tokens} tokens: training diverged; use an earlier checkpoint")
    return token
