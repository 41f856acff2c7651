from __future__ import annotations

import inspect

import pytest

from megatron_hybrid.ops.registry import IMPLEMENTATIONS, select
from tests.ops.library_stand_ins import stand_ins


@pytest.mark.parametrize("operation", IMPLEMENTATIONS)
def test_every_operation_has_a_specification_and_a_cpu_version_with_its_arguments(operation: str) -> None:
    """Implementations may take tuning arguments more, all with defaults."""
    expected = inspect.signature(select(operation, "reference")).parameters
    for name in IMPLEMENTATIONS[operation]:
        with stand_ins():
            actual = inspect.signature(select(operation, name)).parameters
        assert list(actual)[: len(expected)] == list(expected)
        assert all(parameter.default is not inspect.Parameter.empty for parameter in list(actual.values())[len(expected) :])
    assert "cpu" in IMPLEMENTATIONS[operation]


def test_unknown_names_are_refused_with_what_there_is() -> None:
    with pytest.raises(ValueError, match="unknown operation 'sdd'; there are: attention, causal_conv1d"):
        select("sdd", "cpu")
    with pytest.raises(ValueError, match="'ssd' has no implementation 'cuda'; it has: cpu, mamba_ssm, reference, triton"):
        select("ssd", "cuda")


@pytest.mark.parametrize(
    "operation, implementation, package",
    [
        ("rms_norm", "transformer_engine", "transformer_engine"),
        ("linear", "transformer_engine", "transformer_engine"),
        ("attention", "transformer_engine", "transformer_engine"),
        ("causal_conv1d", "causal_conv1d", "causal_conv1d"),
        ("ssd", "mamba_ssm", "mamba_ssm"),
        ("gated_rms_norm", "mamba_ssm", "mamba_ssm"),
        ("mamba_core", "mamba_ssm", "mamba_ssm"),
        ("mamba_core", "mamba_ssm", "causal_conv1d"),
    ],
)
def test_a_missing_library_is_named(operation: str, implementation: str, package: str) -> None:
    with stand_ins(without=package), pytest.raises(ValueError, match=f"{implementation!r} for {operation!r} needs the package '{package}'"):
        select(operation, implementation)
