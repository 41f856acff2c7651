"""Run two implementations of one operation on the same inputs and compare results and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def results_and_gradients(
    operation: Callable, inputs: Mapping[str, Tensor], options: Mapping[str, Any], *, cotangent_dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Every differentiable result, and every input's gradient under fixed random cotangents, by name.

    The cotangents are rounded to `cotangent_dtype` first if it is given.
    """
    leaves = {name: tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_() for name, tensor in inputs.items()}
    results = operation(**leaves, **options)
    results = results if isinstance(results, Sequence) else (results,)
    results = [result for result in results if result.requires_grad]
    generator = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(result.shape, dtype=torch.float64, generator=generator) for result in results]
    cotangents = [cotangent.to(cotangent_dtype or result.dtype).to(result) for cotangent, result in zip(cotangents, results, strict=True)]
    gradients = torch.autograd.grad(results, list(leaves.values()), cotangents)
    named = {f"result {index}": result.detach() for index, result in enumerate(results)}
    return named | {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def assert_equivalent(fast: Callable, specification: Callable, inputs: Mapping[str, Tensor], bound: float, **options: Any) -> None:
    """Largest difference over largest magnitude stays below `bound` for results and gradients; dtypes and shapes agree."""
    actual, expected = results_and_gradients(fast, inputs, options), results_and_gradients(specification, inputs, options)
    for name, reference in expected.items():
        assert actual[name].dtype == reference.dtype and actual[name].shape == reference.shape, name
        difference = relative_difference(actual[name], reference)
        assert difference <= bound, f"{name}: {difference:.2e} > {bound:.0e}"


def relative_difference(actual: Tensor, reference: Tensor) -> float:
    """Largest absolute difference over the largest magnitude of the reference; NaN stays NaN and so fails any bound."""
    if not reference.numel():
        return 0.0
    scale = reference.double().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((actual.double() - reference.double()).abs().max() / scale)


def l2_distance(actual: Tensor, reference: Tensor) -> float:
    """l2 norm of the difference over that of the reference."""
    scale = reference.double().norm().clamp_min(torch.finfo(torch.float32).tiny)
    return float((actual.double() - reference.double()).norm() / scale)


def assert_near_fp64(
    fast: Callable, specification: Callable, inputs: Mapping[str, Tensor], bounds: tuple[float, float], **options: Any
) -> None:
    """Relative l2 distances of results and gradients from the specification in fp64, on the same inputs, stay below the two bounds."""
    dtype = min((tensor.dtype for tensor in inputs.values()), key=lambda dtype: dtype.itemsize)
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    actual = results_and_gradients(fast, inputs, options, cotangent_dtype=dtype)
    exact = results_and_gradients(specification, wide, options, cotangent_dtype=dtype)
    for name, reference in exact.items():
        assert actual[name].shape == reference.shape, name
        distance, bound = l2_distance(actual[name], reference), bounds[name.startswith("gradient")]
        assert distance <= bound, f"{name}: {distance:.2e} > {bound:.0e}"
