"""How the kernels are launched: block sizes, warps and pipeline stages, pinned per shape; `benchmarks/mamba_block.py --tune` measures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class WalkLaunch:
    """The state walk: each program holds a [block_p, block_n] part of one head's state."""

    block_p: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class OutputLaunch:
    """The outputs of a chunk: each program makes `block_l` positions of `num_heads` heads, one head after another."""

    block_l: int
    num_heads: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class SourceLaunch:
    """The gradients at a chunk's sources: each program walks over all heads of a group, `tile` targets at a time."""

    tile: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ProductLaunch:
    """The gradients of B or C of a chunk: each program walks over all heads of a group."""

    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ScanLaunch:
    """Everything about the scan that changes its speed and not its result."""

    forward_chunk: int
    backward_chunk: int
    forward_walk: WalkLaunch
    backward_walk: WalkLaunch
    output: OutputLaunch
    source_gradient: SourceLaunch
    key_gradient: ProductLaunch

    def with_chunks(self, forward_chunk: int, backward_chunk: int) -> ScanLaunch:
        return replace(self, forward_chunk=forward_chunk, backward_chunk=backward_chunk)


@dataclass(frozen=True)
class ConvLaunch:
    """The convolution: each program walks down `num_tiles` tiles of `tile` positions of `block_c` channels."""

    block_c: int
    num_tiles: int
    tile: int
    num_warps: int


@dataclass(frozen=True)
class NormLaunch:
    """The norms: each program takes `rows` rows of a group at once, in backward `num_tiles` times."""

    rows: int
    num_tiles: int
    num_warps: int


CONV_LAUNCH = ConvLaunch(block_c=512, num_tiles=16, tile=4, num_warps=4)


def norm_launch(size: int) -> NormLaunch:
    """For groups of `size` channels: some 1024 elements at once, 8 per thread; longer rows take more threads, then more per thread.

    Longer rows come without groups, so that their programs are fewer: each takes fewer tiles, to fill the GPU.
    """
    block = triton.next_power_of_2(size)
    rows = max(1, 1024 // block)
    num_tiles = max(1, 16 // rows) if block <= 1024 else 8
    return NormLaunch(rows=rows, num_tiles=num_tiles, num_warps=4 if block <= 1024 else 8 if block <= 4096 else 16)


LARGEST_HEAD_DIM, LARGEST_STATE_DIM, LARGEST_STATE = 256, 512, {2: 256 * 256, 4: 64 * 256}
"""Of the scan's kernels, after padding to powers of two: the last is the head dim times the state, by the bytes of a number."""


def check_state(dtype: torch.dtype, head_dim: int, state_dim: int) -> None:
    """Raise ValueError for a state that no launch of the scan's kernels fits into the shared memory of a Hopper GPU with."""
    block_p, block_n, largest = block_size(head_dim), block_size(state_dim), LARGEST_STATE[dtype.itemsize]
    if block_p > LARGEST_HEAD_DIM or block_n > LARGEST_STATE_DIM or block_p * block_n > largest:
        raise ValueError(
            f"a Mamba-2 head of {head_dim} channels with a state of {state_dim} takes more shared memory in {dtype} than a GPU has: the "
            f"Triton kernels hold {block_p} x {block_n} of it (powers of two), at most {LARGEST_HEAD_DIM} x {LARGEST_STATE_DIM} and "
            f"{largest} in all; set kernels.mamba_core=cpu and kernels.ssd=cpu, the versions in torch, which run on GPUs too"
        )


def scan_launch(dtype: torch.dtype, head_dim: int, state_dim: int) -> ScanLaunch:
    """The choice for Hopper; `head_dim` and `state_dim` are those of the model, before padding to powers of two.

    Measured on an H100 for states of 64 x 128 (8B) and 80 x 128 (Nano-4B); for others chosen by the registers and shared memory that the
    compiler reports (`tests/ops/compile_kernels.py`). fp32 keeps small chunks: its products run on the ordinary units, its tiles
    take twice the shared memory, and a thread holds whole rows and columns of what it multiplies: with 4 warps it would spill 13 KB.
    """
    block_p, block_n = block_size(head_dim), block_size(state_dim)
    if dtype == torch.float32:
        walk = WalkLaunch(block_p=min(block_p, 32), block_n=min(block_n, 32), num_warps=4, num_stages=1)
        num_warps = 8 if block_p * block_n <= 64 * 128 else 16
        output = OutputLaunch(16, 4, num_warps, 1)
        return ScanLaunch(32, 32, walk, walk, output, SourceLaunch(32, num_warps, 1), ProductLaunch(num_warps, 1))
    walk = WalkLaunch(min(block_p, 64), min(block_n, 64), num_warps=4, num_stages=3)
    if block_p <= 64 and block_n <= 128:
        return ScanLaunch(128, 128, walk, walk, OutputLaunch(64, 16, 4, 2), SourceLaunch(64, 8, 2), ProductLaunch(8, 3))
    if block_p <= 128 and block_n <= 128:
        # Each block of positions reads all the chunk's B; GPUs for desktops and inference have 100 KiB for it.
        output = OutputLaunch(128, 16, 8, 2) if shared_memory_bytes() >= 160 * 1024 else OutputLaunch(64, 8, 4, 2)
        narrow = WalkLaunch(block_p=16, block_n=block_n, num_warps=2, num_stages=3)
        return ScanLaunch(128, 64, replace(walk, num_warps=2), narrow, output, SourceLaunch(64, 4, 2), ProductLaunch(4, 2))
    if block_p <= 64 and block_n <= 256:
        return ScanLaunch(128, 64, walk, walk, OutputLaunch(64, 8, 4, 2), SourceLaunch(64, 4, 2), ProductLaunch(8, 2))
    # A wide state leaves no room to load ahead, nor for long chunks.
    return ScanLaunch(64, 32, walk, walk, OutputLaunch(64, 8, 8, 1), SourceLaunch(32, 8, 1), ProductLaunch(8, 1))


@cache
def shared_memory_bytes() -> int:
    """What a program may take on the GPU at hand; Hopper's without one, for those who compile for it elsewhere."""
    return torch.cuda.get_device_properties().shared_memory_per_block_optin if torch.cuda.is_available() else 227 * 1024


def block_size(size: int) -> int:
    """The smallest power of two that holds `size` and is wide enough for a matrix product."""
    return max(16, triton.next_power_of_2(size))


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 products are exact; for bf16 the word changes nothing."""
    return "ieee" if dtype == torch.float32 else "tf32"


def check_tensors(**tensors: Tensor) -> None:
    """Raise ValueError for a device or dtype that the kernels do not run on."""
    for name, tensor in tensors.items():
        if not (tensor.is_cuda or triton.knobs.runtime.interpret):
            raise ValueError(f"{name} is on {tensor.device}; Triton kernels need a CUDA device (or TRITON_INTERPRET=1 for tests)")
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} is {tensor.dtype}; the Triton kernels take float32, bfloat16 or float16")


def with_dense_rows(tensor: Tensor) -> Tensor:
    """The tensor with its last axis dense in memory: itself, or a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def dense_like(t_BLX: Tensor) -> Tensor:
    """Uninitialised and dense, with batch and sequence in the memory order of t."""
    if t_BLX.stride(0) < t_BLX.stride(1):
        return t_BLX.new_empty(t_BLX.shape[1], t_BLX.shape[0], *t_BLX.shape[2:]).transpose(0, 1)
    return t_BLX.new_empty(t_BLX.shape)
