"""What Megatron-LM's checkpoints and ours have in common as targets: both are torch_dist directories in a folder with other things."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from megatron_hybrid.convert.correspondence import NativeTensor
from megatron_hybrid.convert.target import Plan, stage_numbers
from megatron_hybrid.convert.torch_dist import TorchDistWriter


class TorchDistTarget(ABC):
    """Weights in a torch_dist directory; see ``Target``. What stands beside them, and where, is the subclass's.

    Args:
        plan: what will be written.
        final: the directory's name when it is complete.

    Raises:
        ValueError: the model cannot be cut as the plan says.
    """

    def __init__(self, plan: Plan, final: Path) -> None:
        self._plan, self._final = plan, final
        self._stages = stage_numbers(plan)
        self._num_written = 0

    @abstractmethod
    def weights_folder(self, directory: Path) -> Path:
        """Return where in the target's directory the weights are."""

    def open(self, directory: Path, written: Sequence[list[dict[str, Any]]]) -> None:
        """See ``Target``."""
        folder = self.weights_folder(directory)
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = TorchDistWriter(folder, tensor_ranks=self._plan.layout.tensor, num_stages=self._plan.layout.pipeline)
        self._writer.open(file_sizes(written))
        self._num_written = len(written)

    def write(self, native: Sequence[Tensor]) -> list[dict[str, Any]]:
        """See ``Target``."""
        number, self._num_written = self._num_written, self._num_written + 1
        pairs = zip(self._plan.correspondences[number].native, native, strict=True)
        return [record for description, tensor in pairs for record in self._write_tensor(description, tensor, self._stages[number])]

    def flush(self) -> list[BinaryIO]:
        """See ``Target``."""
        return self._writer.flush()

    def close(self) -> None:
        """See ``Target``."""
        self._writer.close()

    def _write_tensor(self, description: NativeTensor, tensor: Tensor, stage: int) -> list[dict[str, Any]]:
        return self._writer.write(description, tensor, stage)


def file_sizes(written: Sequence[list[dict[str, Any]]]) -> dict[str, int]:
    """Return how much of each file is written, from the records of its shards."""
    ends = ((record["file"], record["start"] + record["length"]) for records in written for record in records)
    sizes: dict[str, int] = {}
    for name, end in ends:
        sizes[name] = max(end, sizes.get(name, 0))
    return sizes
