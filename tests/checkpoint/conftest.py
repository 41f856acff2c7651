"""One rank in this process, for what needs a process group but no other ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture
def single_rank() -> Iterator[None]:
    """torch.distributed with this process as the only rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
