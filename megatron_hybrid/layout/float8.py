"""Which linears run in float8, decided by arithmetic alone, before anything starts.

A layer takes part unless it is one of those kept in BF16 at either end of the whole pattern, counted by its place in the model, so that no
pipeline cut moves them. A linear takes part where it is asked for and both dimensions of the rank's weight are multiples of 16, which is
what float8 matrix products on NVIDIA GPUs take; one that does not fit stays in BF16. The rule is the same on every host, so that a
configuration means the same precision everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from megatron_hybrid.layout.pattern import ATTENTION, MAMBA, MLP
from megatron_hybrid.layout.shape import HybridShape, attention_inner_size, attention_projection_size, mamba_projection_size

DIMENSION_UNIT: Final = 16
"""Both dimensions of a rank's weight, and the tokens of its micro-batch, must be multiples of this."""

LINEARS: Final = {MAMBA: ("in_proj", "out_proj"), ATTENTION: ("linear_qkv", "linear_proj"), MLP: ("linear_fc1", "linear_fc2")}
"""The linears of each layer kind: into the block (output rows cut over the tensor ranks), then out of it (input columns cut)."""


class Float8Choice(Protocol):
    """What the user asks for, named as in ``Fp8Config``."""

    @property
    def linears(self) -> Sequence[str]: ...
    @property
    def bf16_layers_at_start(self) -> int: ...
    @property
    def bf16_layers_at_end(self) -> int: ...


def plan_float8(model: HybridShape, tensor: int, choice: Float8Choice) -> tuple[tuple[str, ...], ...]:
    """Return the names of the linears that run in float8, for each layer of the model.

    Args:
        model: the layers and their dimensions.
        tensor: tensor-parallel ranks.
        choice: linears asked for, and the layers kept in BF16 at the ends.

    Raises:
        ValueError: no linear at all would run in float8.
    """
    num_layers = len(model.layer_kinds)
    own_layers = range(choice.bf16_layers_at_start, num_layers - choice.bf16_layers_at_end)
    plan = tuple(
        tuple(name for name, shape in _rank_shapes(model.of_layer(layer), kind, tensor).items() if name in choice.linears and _fits(shape))
        if layer in own_layers
        else ()
        for layer, kind in enumerate(model.layer_kinds)
    )
    if not any(plan):
        unfit = unfit_linears(model, tensor)
        raise ValueError(
            f"no linear would run in float8: {num_layers} layers, of which {choice.bf16_layers_at_start} at the start and "
            f"{choice.bf16_layers_at_end} at the end stay in BF16; linears asked for: {', '.join(choice.linears)}; "
            f"not multiples of {DIMENSION_UNIT} at parallel.tensor={tensor}: {', '.join(unfit) or 'none'}; "
            "change one of them, or set 'fp8={recipe: off}'"
        )
    return plan


def unfit_linears(model: HybridShape, tensor: int) -> dict[str, tuple[int, int]]:
    """Return the linears that a tensor cut leaves without multiples of 16, with the [output, input] shape of a rank's weight.

    Where layers differ in width, the shape is of the first that does not fit.
    """
    unfit: dict[str, tuple[int, int]] = {}
    for layer, kind in enumerate(model.layer_kinds):
        for name, shape in _rank_shapes(model.of_layer(layer), kind, tensor).items():
            if not _fits(shape):
                unfit.setdefault(name, shape)
    return unfit


def _fits(shape: tuple[int, int]) -> bool:
    return not (shape[0] % DIMENSION_UNIT or shape[1] % DIMENSION_UNIT)


def _rank_shapes(model: HybridShape, kind: str, tensor: int) -> dict[str, tuple[int, int]]:
    projected, inner = {
        MAMBA: (mamba_projection_size(model), model.mamba_inner_size),
        ATTENTION: (attention_projection_size(model), attention_inner_size(model)),
        MLP: (model.ffn_hidden_size, model.ffn_hidden_size),
    }[kind]
    into, out_of = LINEARS[kind]
    return {into: (projected // tensor, model.hidden_size), out_of: (model.hidden_size, inner // tensor)}
