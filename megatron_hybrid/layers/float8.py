"""Which layers' linears stand in float8: the planned ones get a ``Float8Linear`` for a product."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from megatron_hybrid.config import Fp8Config
from megatron_hybrid.fp8.backends import choose_implementation, make_backend
from megatron_hybrid.fp8.linear import Float8Linear


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
    backend = make_backend(choose_implementation(recipe.implementation, device))
    for (name, layer), planned in zip(layers, plan, strict=True):
        linears = [(path, module) for path, module in layer.named_modules() if path.rpartition(".")[2] in planned]
        assert len(linears) == len(planned), (name, planned)
        for path, linear in linears:
            linear.product = Float8Linear(f"{name}.{path}", recipe, backend, linear.product)


def runs_in_float8(product: Callable[..., Tensor]) -> bool:
    """Whether a linear's product is in float8 at present."""
    return isinstance(product, Float8Linear) and product.enabled
