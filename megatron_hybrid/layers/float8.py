"""Which layers' linears stand in float8: the planned ones get a ``Float8Linear`` for a product."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from megatron_hybrid.config import Fp8Config
from megatron_hybrid.fp8.linear import Float8Linear
from megatron_hybrid.fp8.products import IMPLEMENTATIONS, choose_implementation


def use_float8(
    layers: Iterable[tuple[str, torch.nn.Module]], plan: Sequence[Sequence[str]], recipe: Fp8Config, device: torch.device
) -> None:
    """Put float8 products into linears, before the model is moved to its device.

    Args:
        layers: each layer with its name in the whole model.
        plan: names of the linears that run in float8, for each of ``layers``.
        recipe: formats and scaling.
        device: where the products will run.

    Raises:
        ValueError: nothing implements float8 on the device.
    """
    product = IMPLEMENTATIONS[choose_implementation(recipe.implementation, device)]
    for (name, layer), planned in zip(layers, plan, strict=True):
        linears = [(path, module) for path, module in layer.named_modules() if path.rpartition(".")[2] in planned]
        assert len(linears) == len(planned), (name, planned)
        for path, linear in linears:
            linear.product = Float8Linear(f"{name}.{path}", recipe, product, linear.product)
