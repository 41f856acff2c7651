from __future__ import annotations

import pytest
import torch

from megatron_hybrid.ops.embedding import embedding_reference


def test_ranks_add_up_to_the_whole_lookup() -> None:
    table_VD, tokens_BL = torch.randn(12, 5), torch.randint(0, 12, (2, 7))
    parts = [embedding_reference(table_VD[first : first + 4], tokens_BL, first) for first in (0, 4, 8)]
    assert torch.equal(sum(parts), table_VD[tokens_BL])


@pytest.mark.parametrize("first_row", [0, 10])
def test_gradients_of_foreign_tokens_are_zero(first_row: int) -> None:
    table_VD, tokens_BL = torch.randn(20, 3, requires_grad=True), torch.randint(0, 40, (3, 11))
    embedding_reference(table_VD, tokens_BL, first_row).sum().backward()
    counts_V = torch.stack([(tokens_BL == first_row + row).sum() for row in range(20)])
    assert torch.equal(table_VD.grad, counts_V[:, None].expand(20, 3).float())
