"""Token embedding with the vocabulary split over tensor-parallel ranks: rows of a table, and their gradients added up by token.

Rank r holds the rows from ``first_row`` on; a token of another rank gives zeros, so that outputs add up to the lookup.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def embedding_reference(weight_VD: Tensor, tokens_BL: Tensor, first_row: int) -> Tensor:
    """Rows ``weight[token - first_row]``, [B, L, D], and zeros for tokens outside this rank's rows."""
    rows_BL = tokens_BL - first_row
    owned_BL = (rows_BL >= 0) & (rows_BL < weight_VD.shape[0])
    return F.embedding(rows_BL.clamp(0, weight_VD.shape[0] - 1), weight_VD) * owned_BL[..., None]
