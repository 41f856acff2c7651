"""Whether our layers and transformers' NemotronHForCausalLM compute the same from the same weights and tokens, layer by layer.

Both run in fp32 whatever the checkpoint's dtype, so that their difference is what two orders of summation make, and a wrong layout stands
far out of it.

One layer is in memory at a time, and its matrices in the conversion's dtype: a product turns rows of them into fp32 as it needs them. An
MLP layer's two matrices have one size, so that in fp32 they would take four times what the larger takes in a bf16 checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from tqdm import tqdm

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.convert.correspondence import Correspondence, correspondences
from megatron_hybrid.convert.hub_config import UNCLAMPED_TIME_STEP_MIN
from megatron_hybrid.convert.native import run_of
from megatron_hybrid.convert.source import Form, Source, read_as
from megatron_hybrid.layers.sequence import Sequence as LayerSequence
from megatron_hybrid.layers.specs import select_ops
from megatron_hybrid.layout.pattern import KIND_NAMES
from megatron_hybrid.model.hybrid import global_name
from megatron_hybrid.model.stack import HybridStack
from megatron_hybrid.ops.linear import linear_reference
from megatron_hybrid.substrate.groups import destroy_groups, initialize
from megatron_hybrid.substrate.place import Place
from megatron_hybrid.substrate.transformer_config import build_transformer_config

if TYPE_CHECKING:
    from transformers import NemotronHConfig, NemotronHModel

LENGTH, CHUNK_LENGTH = 160, 32
"""Several chunks, so that the state is carried from one to the next; short ones, because what a chunk needs in memory grows with its
length squared. The models' own length decides their speed alone."""
_ELEMENTS_PER_BLOCK = 1 << 21
"""Of a matrix, in fp32 at a time."""


@dataclass(frozen=True)
class Bounds:
    """What two fp32 implementations of the same model may differ by; errors are relative to the largest value of ours."""

    max_error: float = 1e-3
    mean_error: float = 1e-4
    cosine: float = 1 - 1e-6
    agreement: float = 0.99
    """Share of positions with the same most probable token; near-ties may fall either way."""


@dataclass(frozen=True)
class LogitsReport:
    """How far apart the logits of two models are."""

    max_error: float
    """Largest difference."""
    mean_error: float
    """Mean absolute difference."""
    scale: float
    """Largest logit of ours, by magnitude."""
    cosine: float
    """Of all logits as one vector."""
    agreement: float
    """Share of positions with the same most probable token."""
    first_wrong: str | None
    """The first layer after which the residual streams are further apart than the bound for the maximum."""

    def failures(self, bounds: Bounds) -> list[str]:
        """Return what is out of bounds, in words; nothing when the models agree."""
        found = [f"the residual streams part at {self.first_wrong}"] if self.first_wrong else []
        if not self.max_error <= bounds.max_error * self.scale:
            found.append(f"largest error {self.max_error:.3g} of {self.scale:.3g}, bound {bounds.max_error:g} of it")
        if not self.mean_error <= bounds.mean_error * self.scale:
            found.append(f"mean error {self.mean_error:.3g} of {self.scale:.3g}, bound {bounds.mean_error:g} of it")
        if not self.cosine >= bounds.cosine:
            found.append(f"cosine {self.cosine:.9f}, bound {bounds.cosine:.9f}")
        if not self.agreement >= bounds.agreement:
            found.append(f"greedy agreement {self.agreement:.4f}, bound {bounds.agreement:g}")
        return found


def compare_logits(ours: Source, hub: Source, dtypes: Sequence[torch.dtype], bounds: Bounds, *, seed: int = 0) -> LogitsReport:
    """Run our model from one checkpoint and transformers' from the other, and compare residual streams and logits.

    Args:
        ours: any form; its weights go into our layers.
        hub: a Hugging Face directory; its configuration and weights go into transformers' layers.
        dtypes: of the conversion, one for each correspondence; both sides' weights are rounded to them, so that the rounding itself
            is not counted as an error.
        bounds: says from which error on a layer is named.
        seed: of the tokens.

    Raises:
        ValueError: the two have different numbers of layers or tokens.
    """
    from transformers import NemotronHConfig

    model = ours.model
    if (model.layer_kinds, model.vocab_size) != (hub.model.layer_kinds, hub.model.vocab_size):
        raise ValueError(
            f"{hub.path} has layers {hub.model.layer_kinds} and {hub.model.vocab_size} tokens, "
            f"{ours.path} has {model.layer_kinds} and {model.vocab_size}"
        )
    tokens_BL = torch.randint(model.vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(seed))
    their_config = unclamped(NemotronHConfig.from_pretrained(hub.path, local_files_only=True))
    first_wrong = None
    our_table, their_table = (_Table(source, dtypes) for source in (ours, hub))
    with torch.no_grad(), one_rank(model) as config:
        # [L, B, D] and [B, L, D]
        here = our_table.embed(tokens_BL).transpose(0, 1).contiguous()
        there = their_table.embed(tokens_BL)
        sequence = LayerSequence(offset=0, segment_ids_BL=None, attention_mask_B1LS=None, rope_cos_sin=None)
        for layer, kind in enumerate(tqdm(model.layer_kinds, unit="layer", desc="comparing layers")):
            is_last = layer == model.num_layers - 1
            here, our_final = run_our_layer(our_table, model, config, layer, here, sequence, has_final_norm=is_last)
            there, their_final = run_their_layer(their_table, their_config, layer, there)
            if first_wrong is None and not _relative_error(here.transpose(0, 1), there) <= bounds.max_error:
                first_wrong = f"layer {layer} ({KIND_NAMES[kind]}: decoder.layers.{layer}, model.layers.{layer})"
        return _compare_heads(our_table, our_final.transpose(0, 1), their_table, their_final, first_wrong)


class _Table:
    """Parameters of one checkpoint, by name and one at a time: matrices in the conversion's dtype, all others in fp32."""

    def __init__(self, source: Source, dtypes: Sequence[torch.dtype]) -> None:
        self._source = source
        self._entries = list(zip(correspondences(source.model), dtypes, strict=True))

    def embed(self, tokens_BL: Tensor) -> Tensor:
        """Rows of the embedding, [B, L, D]."""
        return self._read("hub", self._entries[0])[0][tokens_BL].float()

    def head(self) -> Tensor:
        """The output layer [V, D] in the conversion's dtype."""
        return self._read("hub", self._entries[-1])[0]

    def our_parameter(self, name: str) -> Tensor:
        """A parameter of ours by its global name, whole: its components are joined."""
        (found,) = (entry for entry in self._entries if entry[0].parameter == name)
        parts = self._read("native", found)
        return _widened(parts[0] if len(parts) == 1 else torch.cat(parts))

    def their_layer(self, layer: int | None) -> Iterator[tuple[str, Tensor]]:
        """transformers' parameters of a layer, or the final norm, by their name in the whole model."""
        for entry in self._entries:
            if entry[0].layer == layer and entry[0].arrangement != "vocabulary":
                for description, tensor in zip(entry[0].hub, self._read("hub", entry), strict=True):
                    yield description.name, _widened(tensor)

    def _read(self, form: Form, entry: tuple[Correspondence, torch.dtype]) -> list[Tensor]:
        return read_as(form, self._source, *entry, self._source.model)


def run_our_layer(
    table: _Table,
    model: ModelConfig,
    config: TransformerConfig,
    layer: int,
    hidden_LBD: Tensor,
    sequence: LayerSequence,
    *,
    has_final_norm: bool,
) -> tuple[Tensor, Tensor]:
    """Run one layer of ours; returns the residual stream after it, and that after the final norm too (or again without one)."""
    ops = replace(select_ops("cpu", chunk_length=CHUNK_LENGTH), linear=linear_in_blocks)
    stack = HybridStack(model, config, ops, layer_range=(layer, layer + 1), recompute="none", has_final_norm=has_final_norm).eval()
    for name, parameter in stack.named_parameters():
        parameter.data = table.our_parameter(global_name(f"decoder.{name}", layer)).view(parameter.shape)
    hidden_LBD = stack.layers[0](hidden_LBD, sequence)
    return hidden_LBD, hidden_LBD if stack.final_norm is None else stack.final_norm(hidden_LBD)


def run_their_layer(table: _Table, config: NemotronHConfig, layer: int, hidden_BLD: Tensor) -> tuple[Tensor, Tensor]:
    """Run one layer of transformers', as a model of one layer; returns the residual stream after it, and that after the final norm."""
    one = copy.deepcopy(config)
    one.layers_block_type, one.vocab_size, one.chunk_size = [config.layers_block_type[layer]], 1, CHUNK_LENGTH
    model = _build_unfilled(one)
    weights = {name.replace(f"model.layers.{layer}.", "layers.0."): tensor for name, tensor in table.their_layer(layer)}
    weights |= {name.removeprefix("model."): tensor for name, tensor in table.their_layer(None)}
    weights["embeddings.weight"] = torch.zeros(1, config.hidden_size)
    model.load_state_dict(weights, strict=True, assign=True)
    outputs: list[Tensor] = []
    model.layers[0].register_forward_hook(lambda module, arguments, output: outputs.append(output))
    final_BLD = model(inputs_embeds=hidden_BLD, use_cache=False).last_hidden_state
    return outputs[0], final_BLD


def linear_in_blocks(x: Tensor, weight_OI: Tensor) -> Tensor:
    """`x @ weight.T` in fp32 with a weight of any dtype: x [..., I], weight [O, I], result [..., O]."""
    return torch.cat([linear_reference(x, block.float()) for block in weight_OI.split(_rows_per_block(weight_OI))], dim=-1)


def unclamped(config: NemotronHConfig) -> NemotronHConfig:
    """Return transformers' configuration without its lower clamp on time steps, which neither training nor the published code has."""
    config = copy.deepcopy(config)
    config.time_step_min = UNCLAMPED_TIME_STEP_MIN
    return config


@contextmanager
def one_rank(model: ModelConfig) -> Iterator[TransformerConfig]:
    """Make this process a rank of its own, on its CPU, for as long as our layers are in use; gives what they are built with."""
    run = run_of(model, Path("unused"), precision="fp32")
    run = run.model_copy(update={"runtime": run.runtime.model_copy(update={"threads_per_rank": torch.get_num_threads()})})
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    substrate = initialize(run, Place("plain"), dist.HashStore())
    try:
        yield build_transformer_config(run, substrate)
    finally:
        destroy_groups()
        torch.use_deterministic_algorithms(was_deterministic)


def _build_unfilled(config: NemotronHConfig) -> NemotronHModel:
    from transformers import NemotronHModel

    with torch.device("meta"):
        model = NemotronHModel(config).eval()
        linears = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        for name, module in linears:
            model.set_submodule(name, _LinearInBlocks(module.in_features, module.out_features, bias=False))
    return model


class _LinearInBlocks(torch.nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return linear_in_blocks(input, self.weight)


def _widened(tensor: Tensor) -> Tensor:
    """What a layer holds of a tensor: matrices, which only products read, as they are."""
    return tensor if tensor.ndim == 2 else tensor.float()


def _rows_per_block(matrix: Tensor) -> int:
    return max(1, _ELEMENTS_PER_BLOCK // matrix.shape[-1])


def _relative_error(here: Tensor, there: Tensor) -> float:
    return ((here - there).abs().max() / here.abs().max()).item()


def _compare_heads(our_table: _Table, here_BLD: Tensor, their_table: _Table, there_BLD: Tensor, first_wrong: str | None) -> LogitsReport:
    """Project onto the vocabulary in blocks of rows, and compare."""
    our_head_VD, their_head_VD = our_table.head(), their_table.head()
    here_ND, there_ND = here_BLD.flatten(0, 1), there_BLD.flatten(0, 1)
    rows = _rows_per_block(our_head_VD)
    largest = total = scale = 0.0
    dots = torch.zeros(3, dtype=torch.float64)
    best = [(torch.full((len(here_ND),), float("-inf")), torch.zeros(len(here_ND), dtype=torch.long)) for _ in range(2)]
    for first in range(0, len(our_head_VD), rows):
        block = slice(first, first + rows)
        logits = [hidden @ head[block].float().t() for hidden, head in ((here_ND, our_head_VD), (there_ND, their_head_VD))]
        error = (logits[0] - logits[1]).abs()
        # Not Python's max, which loses a NaN.
        largest = torch.tensor([largest, error.max()]).max().item()
        scale = max(scale, logits[0].abs().max().item())
        total += error.double().sum().item()
        one, other = (each.double().flatten() for each in logits)
        dots += torch.stack([one @ other, one @ one, other @ other])
        best = [_better(known, each, first) for known, each in zip(best, logits, strict=True)]
    return LogitsReport(
        max_error=largest,
        mean_error=total / (len(here_ND) * len(our_head_VD)),
        scale=scale,
        cosine=(dots[0] / (dots[1] * dots[2]).sqrt()).item(),
        agreement=(best[0][1] == best[1][1]).double().mean().item(),
        first_wrong=first_wrong,
    )


def _better(known: tuple[Tensor, Tensor], logits_NV: Tensor, first: int) -> tuple[Tensor, Tensor]:
    value_N, index_N = logits_NV.max(-1)
    is_better_N = value_N > known[0]
    return torch.where(is_better_N, value_N, known[0]), torch.where(is_better_N, index_N + first, known[1])
