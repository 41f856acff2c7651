"""Whether a conversion lost or changed a bit: the target, read back through the inverse map, against the source."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_hybrid.checkpoint.digest import shard_digest
from megatron_hybrid.config import ModelConfig
from megatron_hybrid.convert.correspondence import Correspondence, correspondences
from megatron_hybrid.convert.source import Source, names_of, read_as
from megatron_hybrid.convert.target import Plan


@dataclass(frozen=True)
class RoundTrip:
    """What the comparison found."""

    num_tensors: int
    """Tensors of the source that were compared; none when already the configurations differ."""
    differing: tuple[str, ...]
    """Names, in the source, of those that do not come back bit for bit, each with what is wrong."""

    @property
    def passed(self) -> bool:
        """Whether every tensor came back."""
        return not self.differing


def compare_round_trip(source: Source, target: Source, plan: Plan) -> RoundTrip:
    """Read every tensor of the target, turn it into the source's form, and compare its digest with that of the source's own.

    Where the dtype changes, the source is rounded to the new one first. Padding rows of the vocabulary belong to no token and are not
    compared.

    Args:
        source: what was converted.
        target: what was made of it, opened anew.
        plan: how it was made.
    """
    differing = _config_differences(source.model, target.model)
    if differing:
        return RoundTrip(0, tuple(differing))
    num_tensors = 0
    pairs = zip(correspondences(source.model), correspondences(target.model), plan.dtypes, strict=True)
    for here, there, dtype in tqdm(pairs, total=len(plan.dtypes), unit="tensor", desc="comparing bits"):
        names = names_of(here, source.form)
        expected = _digests(here, read_as(source.form, source, here, dtype, source.model), source.model.vocab_size)
        num_tensors += len(names)
        try:
            found = _digests(here, read_as(source.form, target, there, dtype, target.model), source.model.vocab_size)
        except ValueError as error:
            differing += [f"{name}: {error}" for name in names]
            continue
        stored = {target.specs[name].dtype for name in names_of(there, target.form)}
        if stored != {dtype}:
            differing += [f"{name}: the target has it in {', '.join(sorted(map(str, stored)))} instead of {dtype}" for name in names]
            continue
        differing += [f"{name}: other values" for name, one, other in zip(names, expected, found, strict=True) if one != other]
    return RoundTrip(num_tensors, tuple(differing))


def _config_differences(source: ModelConfig, target: ModelConfig) -> list[str]:
    """What the two configurations make different of the same numbers; padding, initialisation and chunks are none of it."""
    here, there = (
        model.model_dump(exclude={"vocab_divisible_by", "init_std", "mamba_chunk_size"}) | {"pattern": model.layer_kinds}
        for model in (source, target)
    )
    return [f"configuration: {name} is {there[name]!r}, in the source {here[name]!r}" for name in here if here[name] != there[name]]


def _digests(correspondence: Correspondence, tensors: list[Tensor], vocab_size: int) -> list[tuple[torch.Size, int]]:
    """Shape and digest of each; what was read is given up one by one."""
    digests = []
    while tensors:
        tensor = tensors.pop(0)
        if correspondence.arrangement == "vocabulary":
            tensor = tensor[:vocab_size]
        digests.append((tensor.shape, shard_digest(tensor, tensor.shape, (0,) * tensor.ndim)))
    return digests
