"""Commands hide the warnings that every run would print, and no others."""

from __future__ import annotations

import logging
import warnings

import pytest

from megatron_hybrid.substrate.quiet import silence_known_warnings


def test_only_the_known_warnings_are_hidden() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        silence_known_warnings()
        warnings.warn("Transformer Engine and Apex are not installed. Falling back to Torch optimizers.", UserWarning, stacklevel=1)
        warnings.warn("`torch.distributed.reduce_scatter_tensor` is deprecated. Please use another.", FutureWarning, stacklevel=1)
        warnings.warn("Transformer Engine is broken", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["Transformer Engine is broken"]


def test_only_the_known_log_message_is_hidden(caplog: pytest.LogCaptureFixture) -> None:
    silence_known_warnings()
    logger = logging.getLogger("torch.utils.cpp_extension")
    logger.addHandler(caplog.handler)
    logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/cuda")
    logger.warning("Something else")
    logger.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {"Something else"}
