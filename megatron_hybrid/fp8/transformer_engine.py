"""The product of two float8 matrices through Transformer Engine's GEMM, which is cuBLASLt and can add to its result.

Only the product is Transformer Engine's. Its modules keep histories per module call; here they follow optimizer steps (docs/fp8.md).
"""

from __future__ import annotations

import torch
import transformer_engine.pytorch  # noqa: F401  # loads the library that the extension below needs
import transformer_engine_torch
from torch import Tensor
from transformer_engine.pytorch.cpp_extensions.gemm import general_gemm
from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

_FORMATS = {
    torch.float8_e4m3fn: transformer_engine_torch.DType.kFloat8E4M3,
    torch.float8_e5m2: transformer_engine_torch.DType.kFloat8E5M2,
}


def transformer_engine_product(
    a_MK: Tensor,
    b_NK: Tensor,
    inverse_a: Tensor,
    inverse_b: Tensor,
    *,
    out_dtype: torch.dtype,
    fast: bool,
    add_to: Tensor | None = None,
) -> Tensor:
    """`backends.emulated_product` on float8 tensor cores; with ``add_to`` the product itself adds, in fp32."""
    product, *_ = general_gemm(
        _storage(b_NK, inverse_b),
        _storage(a_MK, inverse_a),
        out_dtype=out_dtype if add_to is None else add_to.dtype,
        out=add_to,
        accumulate=add_to is not None,
        use_split_accumulator=not fast,
    )
    return product


def _storage(x_MK: Tensor, inverse: Tensor) -> Float8TensorStorage:
    return Float8TensorStorage(data=x_MK.view(torch.uint8), fp8_scale_inv=inverse.view(1), fp8_dtype=_FORMATS[x_MK.dtype])
