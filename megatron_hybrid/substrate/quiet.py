"""What a run does not say, because it asks nothing of its user, and what it does."""

from __future__ import annotations

import logging
import warnings

_WARNINGS = (
    # megatron-core without Transformer Engine: its torch fallbacks are what a CPU host is meant to use.
    r"Transformer Engine and Apex are not installed\. Falling back to .*",
    r"Apex is not installed\. Falling back to Torch Norm",
    # The distributed optimizer's fp32 shards are views, and it asks each whether it has a gradient.
    r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed.*",
    # Reading a checkpoint through torch's own reader.
    r"`load_state_dict` is deprecated and will be removed in future versions.*",
    # Names that megatron-core 0.16.1 calls and torch 2.13 has newer ones for.
    r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated.*",
)
# A CUDA build of torch on a host without GPUs.
_CUDA_BUILD_LOGGER, _CUDA_BUILD_MESSAGE = "torch.utils.cpp_extension", "No CUDA runtime is found"


def silence_known_warnings() -> None:
    """Hide exactly the messages above. Commands call this first, before megatron-core is imported."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger(_CUDA_BUILD_LOGGER).addFilter(_is_worth_saying)


def show_own_messages() -> None:
    """Print our own log messages to stderr; called on the rank that speaks for all."""
    logger = logging.getLogger(__name__.partition(".")[0])
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


def _is_worth_saying(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_CUDA_BUILD_MESSAGE)
