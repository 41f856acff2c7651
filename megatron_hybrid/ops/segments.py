"""Document boundaries inside a sequence, as every op here understands them: a new document starts wherever the id changes."""

from __future__ import annotations

import torch
from torch import Tensor


def number_documents(segment_ids_BL: Tensor) -> Tensor:
    """Running document number of each position, [B, L] int64 from 0: it grows by one wherever the id differs from the one before.

    Two positions belong to one document exactly when their numbers are equal, even if a later document reuses an earlier id.
    """
    changes_BL = torch.zeros_like(segment_ids_BL, dtype=torch.int64)
    changes_BL[:, 1:] = segment_ids_BL[:, 1:] != segment_ids_BL[:, :-1]
    return changes_BL.cumsum(1)
