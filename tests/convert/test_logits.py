"""The products of the comparison of logits, which widen a matrix a few rows at a time."""

from __future__ import annotations

import pytest
import torch

from megatron_hybrid.convert import logits
from megatron_hybrid.convert.logits import linear_in_blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("elements", [1, 3 * 24, 17 * 24])
def test_blocks_of_rows_make_up_the_whole_product(dtype: torch.dtype, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "_ELEMENTS_PER_BLOCK", elements)
    generator = torch.Generator().manual_seed(0)
    x_LBI, weight_OI = torch.randn(5, 2, 24, generator=generator), torch.randn(17, 24, generator=generator).to(dtype)
    result_LBO = linear_in_blocks(x_LBI, weight_OI)
    assert result_LBO.dtype == torch.float32
    torch.testing.assert_close(result_LBO, torch.nn.functional.linear(x_LBI, weight_OI.float()))
