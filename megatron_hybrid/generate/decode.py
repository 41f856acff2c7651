"""The decode loop: the prompt in one pass, then token by token, through the layers' caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_hybrid.generate.sampling import Sampling, sample
from megatron_hybrid.layers.attention import AttentionLayer
from megatron_hybrid.layers.mamba import MambaLayer
from megatron_hybrid.layers.sequence import AttentionCache, MambaCache
from megatron_hybrid.model.hybrid import HybridModel


class Decoder:
    """A model in the middle of B sequences of equal length.

    Args:
        model: the whole model, on one stage.
        batch_size: B.
        max_length: tokens, prompt included, that there is room for.
    """

    def __init__(self, model: HybridModel, *, batch_size: int, max_length: int) -> None:
        self.model = model
        self.num_tokens = 0
        self.caches = [new_cache(layer, batch_size, max_length) for layer in model.decoder.layers]

    @torch.inference_mode()
    def advance(self, tokens_BL: Tensor) -> Tensor:
        """Take the next L tokens of every sequence, in one pass, and return the logits of the token after them, fp32 [B, V]."""
        length = tokens_BL.shape[1]
        sequence = self.model.describe_sequence(length, offset=self.num_tokens)
        hidden_LBD = self.model.run_layers(tokens_BL, sequence, self.caches)
        self.num_tokens += length
        return self.model.output_layer.logits(hidden_LBD[-1:]).squeeze(1).float()


def new_cache(layer: torch.nn.Module, batch_size: int, max_length: int) -> MambaCache | AttentionCache | None:
    """What a layer carries from one token to the next, before the first; None for a layer whose tokens do not meet."""
    if isinstance(layer, MambaLayer):
        return layer.mixer.new_cache(batch_size)
    if isinstance(layer, AttentionLayer):
        return layer.self_attention.new_cache(batch_size, max_length)
    return None


def generate_tokens(
    model: HybridModel, prompt: Sequence[int], *, max_new_tokens: int, sampling: Sampling, seed: int, vocab_size: int, eod_id: int
) -> Iterator[int]:
    """Yield the tokens that continue a prompt, each as soon as it is chosen.

    Tokens are drawn on the host, so that a seed means the same on every device.

    Args:
        model: the whole model, on one stage.
        prompt: token ids, at least one.
        max_new_tokens: tokens after which to stop.
        sampling: how tokens are chosen.
        seed: of this sequence alone.
        vocab_size: tokens to choose from, the first of the model's vocabulary (which may be larger than the tokenizer's).
        eod_id: the token that ends a document; it is yielded, and nothing after it.

    Raises:
        ValueError: the model gives logits that are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    decoder = Decoder(model, batch_size=1, max_length=len(prompt) + max_new_tokens)
    device = next(model.parameters()).device
    tokens_BL = torch.tensor([prompt], device=device)
    for _ in range(max_new_tokens):
        logits_BV = decoder.advance(tokens_BL)[:, :vocab_size].to(generator.device)
        if not logits_BV.isfinite().all():
            raise ValueError(f"the logits are not finite after {decoder.num_tokens} tokens: training diverged; use an earlier checkpoint")
        tokens_B = sample(logits_BV, sampling, generator)
        token = int(tokens_B)
        yield token
        if token == eod_id:
            return
        tokens_BL = tokens_B[:, None].to(device)
