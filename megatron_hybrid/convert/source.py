"""What a conversion reads: a model, its tensors one by one, and what goes with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.convert.companions import Companions
from megatron_hybrid.convert.correspondence import Correspondence
from megatron_hybrid.convert.rearrange import to_hub, to_native
from megatron_hybrid.convert.specs import TensorSpec

Form = Literal["hub", "native"]
"""Whose names and arrangement the tensors have. Megatron-LM's checkpoints are of native form."""


class Source(Protocol):
    """A checkpoint that is complete: every tensor its configuration asks for, and no other."""

    @property
    def path(self) -> Path: ...
    @property
    def form(self) -> Form: ...
    @property
    def model(self) -> ModelConfig: ...
    @property
    def companions(self) -> Companions: ...
    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def read(self, name: str) -> Tensor:
        """Return a tensor by its name in ``specs``, in memory of its own."""


def names_of(correspondence: Correspondence, form: Form) -> tuple[str, ...]:
    """Return the names of the correspondence's tensors in a form."""
    return tuple(tensor.name for tensor in correspondence.hub) if form == "hub" else tuple(tensor.key for tensor in correspondence.native)


def target_dtype(correspondence: Correspondence, source: Source, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype that a correspondence is converted to; None keeps the source's. SSM parameters are fp32 in every case.

    Raises:
        ValueError: parts of one tensor have different dtypes in the source.
    """
    if correspondence.is_fp32:
        return torch.float32
    if dtype is not None:
        return dtype
    kinds = {source.specs[name].dtype for name in names_of(correspondence, source.form)}
    if len(kinds) > 1:
        names = ", ".join(names_of(correspondence, source.form))
        raise ValueError(
            f"{source.path}: {names} have different dtypes ({', '.join(sorted(map(str, kinds)))}), but become one tensor; give --dtype"
        )
    return kinds.pop()


def read_as(form: Form, source: Source, correspondence: Correspondence, dtype: torch.dtype, model: ModelConfig) -> list[Tensor]:
    """Read a correspondence and return its tensors in a form, whatever form the source has.

    Args:
        form: of the result.
        source: where from.
        correspondence: as ``model`` has it.
        dtype: of the result.
        model: the source's, or the same with another padding of the vocabulary; a native result has this one's, and its padding rows
            are zeros if it differs.
    """
    tensors = [source.read(name).to(dtype) for name in names_of(correspondence, source.form)]
    has_other_padding = source.form == "native" and tuple(tensors[0].shape) != correspondence.native[0].shape
    if source.form == "native" and (form == "hub" or has_other_padding):
        tensors = to_hub(correspondence, tensors, model)
        return tensors if form == "hub" else to_native(correspondence, tensors, model)
    return tensors if source.form == form else to_native(correspondence, tensors, model)
