"""Sharded checkpoints: written together, verified, read into any layout.

``CheckpointStore`` keeps a run's checkpoints, ``load`` reads one, ``read_header`` and ``check_header`` tell whether it fits.
"""

import megatron_hybrid.substrate  # noqa: F401  (makes megatron-core importable where there is no CUDA)
from megatron_hybrid.checkpoint.agreement import CheckpointError
from megatron_hybrid.checkpoint.header import check_header, read_header
from megatron_hybrid.checkpoint.reading import load
from megatron_hybrid.checkpoint.store import CheckpointStore

__all__ = ["CheckpointError", "CheckpointStore", "check_header", "load", "read_header"]
