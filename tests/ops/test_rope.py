from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_hybrid.ops.rope import apply_rope, rope_tables


def random_heads(head_dim: int = 16) -> Tensor:
    return torch.randn(2, 10, 3, head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_rotates_pairs_half_a_head_apart() -> None:
    """Channel pairs (i, i + R) as complex numbers turn by position * base ** (-i / R)."""
    x = random_heads()
    rotated = apply_rope(x, *rope_tables(torch.arange(5, 15), 16, base=100.0))
    turns = torch.polar(torch.ones(10, 8, dtype=torch.float64), torch.arange(5, 15)[:, None] * 100.0 ** (-torch.arange(8) / 8.0).double())
    expected = torch.complex(x[..., :8], x[..., 8:]) * turns[:, None]
    torch.testing.assert_close(rotated, torch.cat((expected.real, expected.imag), dim=-1), atol=1e-5, rtol=1e-5)


def test_scores_depend_on_distance_only() -> None:
    q, k = random_heads(), random_heads().flip(1)
    scores = []
    for offset in (0, 77):
        tables = rope_tables(torch.arange(offset, offset + 10), 16)
        scores.append(torch.einsum("blhp,bshp->bhls", apply_rope(q, *tables), apply_rope(k, *tables)))
    torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)


def test_channels_behind_the_rotary_ones_pass_unchanged() -> None:
    x = random_heads()
    rotated = apply_rope(x, *rope_tables(torch.arange(10), 8))
    assert torch.equal(rotated[..., 8:], x[..., 8:]) and not torch.equal(rotated[..., :8], x[..., :8])


def test_keeps_the_dtype_and_is_differentiable() -> None:
    tables = rope_tables(torch.arange(10), 16)
    assert apply_rope(random_heads().bfloat16(), *tables).dtype == torch.bfloat16
    cos, sin = (table.double() for table in tables)
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, cos, sin), random_heads().requires_grad_())


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="positive even number of channels, got 7"):
        rope_tables(torch.arange(4), 7)
    with pytest.raises(ValueError, match="rotate 32 channels but the heads have 16"):
        apply_rope(random_heads(), *rope_tables(torch.arange(10), 32))
