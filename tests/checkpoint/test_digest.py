"""A tensor's digest depends on every element and its place, and on no cut."""

from __future__ import annotations

import pytest
import torch

from megatron_hybrid.checkpoint.digest import MODULUS, shard_digest

SHAPES = [(), (1,), (17,), (6, 10), (12, 1, 4), (2, 3, 4, 5), (3, 40_000)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8]


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (100 * torch.rand(shape, generator=torch.Generator().manual_seed(0))).to(dtype)


def digest(tensor: torch.Tensor) -> int:
    return shard_digest(tensor, tensor.shape, (0,) * tensor.ndim)


def by_definition(tensor: torch.Tensor) -> int:
    """The formula of the module's docstring, element by element, in Python's integers."""
    bits = int.from_bytes
    total = 0
    for position, element in enumerate(tensor.reshape(-1).split(1)):
        value = bits(element.view(torch.uint8).numpy().tobytes(), "little") + 0x9E3779B97F4A7C15 * position
        value %= 1 << 64
        total += (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    return total % (1 << 64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
def test_digest_is_the_documented_one(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = random_tensor(shape, dtype)
    assert digest(tensor) == by_definition(tensor)


@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
def test_parts_of_any_cut_add_up(shape: tuple[int, ...]) -> None:
    tensor = random_tensor(shape)
    for axis, size in enumerate(shape):
        for cut in {1, size // 2, size - 1} - {0}:
            first, second = tensor.split([cut, size - cut], axis)
            offset = [0] * len(shape)
            parts = shard_digest(first, shape, offset)
            offset[axis] = cut
            parts += shard_digest(second, shape, offset)
            assert parts % MODULUS == digest(tensor), (axis, cut)


def test_a_view_that_is_not_contiguous_counts_as_its_values() -> None:
    tensor = random_tensor((6, 10))
    assert digest(tensor.t()) == digest(tensor.t().contiguous()) != digest(tensor)


def test_any_flipped_bit_changes_it() -> None:
    tensor = random_tensor((3, 5))
    known = digest(tensor)
    bits = tensor.view(torch.int32)
    for element in range(bits.numel()):
        for bit in range(31):
            bits.view(-1)[element] ^= 1 << bit
            assert digest(tensor) != known, (element, bit)
            bits.view(-1)[element] ^= 1 << bit
    assert digest(tensor) == known


def test_right_values_in_wrong_places_change_it() -> None:
    tensor = random_tensor((8, 6))
    assert len({digest(tensor), digest(tensor.roll(1, 0)), digest(tensor.roll(1, 1)), digest(tensor.flip(0)), digest(tensor.flip(1))}) == 5


def test_minus_zero_is_not_zero() -> None:
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))


def test_an_empty_shard_adds_nothing() -> None:
    assert shard_digest(torch.empty(0, 4), (8, 4), (8, 0)) == 0
