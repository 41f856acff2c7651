"""MLP layers of different widths as if all had the widest's, for formats that know one width (Hugging Face's NemotronH, Megatron-LM).

What is missing is zeros. A neuron of zeros has no activation and no gradient, so that the model computes what it did, and training leaves
the zeros as they are; they cost memory and time all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from megatron_hybrid.config import ModelConfig
from megatron_hybrid.convert.correspondence import correspondences
from megatron_hybrid.convert.source import Companions, Form, Source
from megatron_hybrid.convert.specs import TensorSpec


class WidenedSource:
    """A native source whose MLP layers are filled up with zeros, as they are read, to the widest (a ``convert.source.Source``).

    Args:
        source: of native form; its MLP layers differ in width.
    """

    form: Form = "native"

    def __init__(self, source: Source) -> None:
        assert source.form == "native", source.form
        self._source = source
        self.model: ModelConfig = source.model.model_copy(update={"ffn_hidden_size": max(source.model.ffn_hidden_sizes)})
        shapes = {tensor.key: tensor.shape for each in correspondences(self.model) for tensor in each.native}
        self.specs: Mapping[str, TensorSpec] = {key: TensorSpec(shape, source.specs[key].dtype) for key, shape in shapes.items()}

    @property
    def path(self) -> Path:
        """The source's."""
        return self._source.path

    @property
    def companions(self) -> Companions:
        """The source's."""
        return self._source.companions

    def read(self, name: str) -> Tensor:
        """Return a tensor, filled up."""
        tensor, shape = self._source.read(name), self.specs[name].shape
        if tuple(tensor.shape) == shape:
            return tensor
        widened = tensor.new_zeros(shape)
        widened[tuple(map(slice, tensor.shape))] = tensor
        return widened


def require_one_width(model: ModelConfig, where: str) -> None:
    """Refuse a model whose MLP layers differ in width, for a format that knows one.

    Raises:
        ValueError: they do.
    """
    if not isinstance(model.ffn_hidden_size, int):
        raise ValueError(
            f"MLP layers are {min(model.ffn_hidden_size)} to {max(model.ffn_hidden_size)} wide, but {where} has one width for all; "
            "fill them up with zeros first (with_one_width, as tools.convert_checkpoint does)"
        )


def with_one_width(source: Source) -> Source:
    """Return the source itself where its MLP layers have one width, and otherwise one that fills them up."""
    return source if isinstance(source.model.ffn_hidden_size, int) else WidenedSource(source)
