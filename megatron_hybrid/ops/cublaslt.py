"""Matrix products through cuBLASLt, called directly so that the algorithm is ours to choose.

For one product cuBLASLt's heuristic names several algorithms, its best guess first. Choices measured by ``benchmarks/products.py`` can be
pinned by shape in ``cublaslt_choices.json``; every other shape takes the first guess. Nothing is timed at run time: every rank and every
restart computes the same bits. So far nothing is pinned: what was fastest in short bursts was not in a training step (docs/log.md).

cuBLASLt counts in columns: what it is given is ``out^T = b a^T``, of the same memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from ctypes import CDLL, Structure, byref, c_float, c_int, c_int8, c_int64, c_size_t, c_uint32, c_uint64, c_void_p, sizeof
from functools import cache
from importlib.resources import files
from typing import NamedTuple

import torch
from torch import Tensor

WORKSPACE_BYTES = 64 * 2**20
"""What an algorithm may use beside its operands; torch's own default is half of it or less."""
_MAX_ALIGNMENT = 256
_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14, torch.float8_e4m3fn: 28, torch.float8_e5m2: 29}
"""cudaDataType_t"""
_COMPUTE_32F, _SCALE_32F = 68, 0
_TRANSPOSE_FIRST, _TRANSPOSE_SECOND, _SCALE_FIRST, _SCALE_SECOND, _FAST_ACCUMULATION = 3, 4, 17, 18, 25
"""cublasLtMatmulDescAttributes_t"""
_WORKSPACE, _ALIGNMENTS = 1, (5, 6, 7, 8)
"""cublasLtMatmulPreferenceAttributes_t"""
_STATUSES = {1: "not initialized", 3: "allocation failed", 7: "invalid value", 13: "execution failed", 15: "not supported"}
"""cublasStatus_t"""
_WAY_OUT = "kernels.linear=cublas and fp8.implementation=scaled_mm go through torch instead"


class Problem(NamedTuple):
    """Everything about ``out = a b^T`` that an algorithm is chosen by.

    ``a_by_rows`` says that a is contiguous along K, ``b_by_rows`` the same of b; the strides are those of the other axis. ``alignment``
    is the largest power of two that divides all addresses, in bytes, up to 256.
    """

    m: int
    n: int
    k: int
    a_type: torch.dtype
    b_type: torch.dtype
    out_type: torch.dtype
    a_by_rows: bool
    b_by_rows: bool
    a_stride: int
    b_stride: int
    out_stride: int
    accumulate: bool
    fast: bool
    alignment: int

    def __str__(self) -> str:
        """What choices are pinned by: types, orientations, sizes and alignment, but for strides, which change no list of candidates."""
        names = [str(each).removeprefix("torch.") for each in (self.a_type, self.b_type, self.out_type)]
        orientation = "".join("n" if by_rows else "t" for by_rows in (self.a_by_rows, self.b_by_rows))
        flags = (" accumulate" if self.accumulate else "") + (" fast" if self.fast else "")
        return f"{names[0]} {names[1]} {names[2]} {orientation} {self.m}x{self.n}x{self.k} {self.alignment}{flags}"


def multiply(
    a_MK: Tensor,
    b_NK: Tensor,
    *,
    out: Tensor | None = None,
    accumulate: bool = False,
    out_dtype: torch.dtype | None = None,
    inverse_a: Tensor | None = None,
    inverse_b: Tensor | None = None,
    fast: bool = False,
) -> Tensor:
    """``a @ b.T`` with fp32 sums, [M, N].

    Args:
        a_MK: on a CUDA device, contiguous along one of its axes; float8 along K.
        b_NK: the same.
        out: written to, or added to with ``accumulate``; contiguous along N.
        accumulate: add to ``out``.
        out_dtype: of the result where ``out`` is not given; default a's.
        inverse_a: float8 alone: fp32 scalar that a's values are multiplied by.
        inverse_b: b's.
        fast: float8 alone: let the tensor cores keep partial sums in less than fp32.

    Raises:
        RuntimeError: cuBLASLt has no algorithm for this product; the message names it.
    """
    a_MK, b_NK = _dense(a_MK), _dense(b_NK)
    if out is None:
        out = a_MK.new_empty(a_MK.shape[0], b_NK.shape[0], dtype=out_dtype or a_MK.dtype)
    products = products_on(a_MK.device.index)
    plan = products.plan(problem_of(a_MK, b_NK, out, accumulate=accumulate, fast=fast))
    plan.run(plan.candidates[-1], a_MK, b_NK, out, inverse_a, inverse_b)
    return out


def problem_of(a_MK: Tensor, b_NK: Tensor, out_MN: Tensor, *, accumulate: bool, fast: bool) -> Problem:
    """The problem that these tensors pose."""
    assert a_MK.shape[1] == b_NK.shape[1] and out_MN.shape == (a_MK.shape[0], b_NK.shape[0]), (a_MK.shape, b_NK.shape, out_MN.shape)
    assert out_MN.stride(1) == 1, out_MN.stride()
    (a_by_rows, a_stride), (b_by_rows, b_stride) = _orientation(a_MK), _orientation(b_NK)
    addresses = a_MK.data_ptr() | b_NK.data_ptr() | out_MN.data_ptr() | _MAX_ALIGNMENT
    return Problem(
        *out_MN.shape,
        a_MK.shape[1],
        a_MK.dtype,
        b_NK.dtype,
        out_MN.dtype,
        a_by_rows,
        b_by_rows,
        a_stride,
        b_stride,
        out_MN.stride(0),
        accumulate,
        fast,
        addresses & -addresses,
    )


def _dense(x_MK: Tensor) -> Tensor:
    """The matrix, or a copy of one with holes or repetitions in both directions."""
    return x_MK if _is_by_rows(x_MK) or _is_by_rows(x_MK.t()) else x_MK.contiguous()


def _is_by_rows(x_MK: Tensor) -> bool:
    """Whether rows are contiguous and lie apart."""
    return x_MK.stride(1) == 1 and (x_MK.shape[0] == 1 or x_MK.stride(0) >= x_MK.shape[1])


def _orientation(x_MK: Tensor) -> tuple[bool, int]:
    """Whether a matrix is contiguous along its rows, and the stride between them, or else between its columns."""
    if _is_by_rows(x_MK):
        return True, max(x_MK.stride(0), x_MK.shape[1])
    assert x_MK.stride(0) == 1, x_MK.stride()
    return False, max(x_MK.stride(1), x_MK.shape[0])


class Heuristic(Structure):
    """cublasLtMatmulHeuristicResult_t: an algorithm, and what cuBLASLt thinks of it."""

    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace_bytes", c_size_t),
        ("status", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


class Products:
    """cuBLASLt on one GPU.

    Args:
        device: index of the GPU.
    """

    def __init__(self, device: int) -> None:
        self.device, self.library, self.handle = device, _library(), c_void_p()
        with torch.cuda.device(device):
            status = self.library.cublasLtCreate(byref(self.handle))
        if status != 0:
            raise RuntimeError(f"cuBLASLt could not be started on GPU {device}: status {status}")
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        self.host = f"{self.library.cublasLtGetVersion()} on {capability}"
        """What choices are valid for: another version of the library, or another kind of GPU, makes other lists."""
        self._choices = pinned_choices().get(self.host, {})
        self._plans: dict[Problem, Plan] = {}

    def plan(self, problem: Problem) -> Plan:
        """The plan for a problem, whose last candidate is the pinned choice."""
        if problem not in self._plans:
            choice = self._choices.get(str(problem), 0)
            plan = Plan(self, problem, 1 + choice)
            if len(plan.candidates) <= choice:
                raise RuntimeError(
                    f"cublaslt_choices.json pins algorithm {choice} for {problem} under {self.host}, where there are "
                    f"{len(plan.candidates)}; make it anew with benchmarks/products.py"
                )
            self._plans[problem] = plan
        return self._plans[problem]


class Plan:
    """A problem's descriptors, and the first algorithms of the heuristic's list.

    Args:
        products: the library on this GPU.
        problem: the product.
        num_candidates: how many algorithms to ask for; there may be fewer. The list is the same at every start.

    Raises:
        RuntimeError: there is no algorithm.
    """

    def __init__(self, products: Products, problem: Problem, num_candidates: int) -> None:
        self.products, self.problem, self._library = products, problem, products.library
        self._one, self._keep = c_float(1.0), c_float(float(problem.accumulate))
        self._descriptor = c_void_p()
        self._describe()
        self._layouts = self._lay_out()
        self.candidates = self._ask(num_candidates)
        if not self.candidates:
            raise RuntimeError(f"cuBLASLt has no algorithm for the product {problem}; {_WAY_OUT}")

    def run(
        self, candidate: Heuristic, a_MK: Tensor, b_NK: Tensor, out_MN: Tensor, inverse_a: Tensor | None, inverse_b: Tensor | None
    ) -> None:
        """Compute the product on the current stream."""
        if inverse_a is not None:
            self._set_scales(inverse_b.data_ptr(), inverse_a.data_ptr())
        stream = torch.cuda.current_stream(self.products.device).cuda_stream
        first, second, result = self._layouts
        out = c_void_p(out_MN.data_ptr())
        # Back with torch when this returns, for what comes after it on the stream.
        workspace = out_MN.new_empty(candidate.workspace_bytes, dtype=torch.uint8)
        self._check(
            self._library.cublasLtMatmul(
                self.products.handle,
                self._descriptor,
                byref(self._one),
                c_void_p(b_NK.data_ptr()),
                first,
                c_void_p(a_MK.data_ptr()),
                second,
                byref(self._keep),
                out,
                result,
                out,
                result,
                byref(candidate),
                c_void_p(workspace.data_ptr()),
                c_size_t(candidate.workspace_bytes),
                c_void_p(stream),
            )
        )

    def _describe(self) -> None:
        problem = self.problem
        self._check(self._library.cublasLtMatmulDescCreate(byref(self._descriptor), _COMPUTE_32F, _SCALE_32F))
        self._set(_TRANSPOSE_FIRST, c_int(problem.b_by_rows))
        self._set(_TRANSPOSE_SECOND, c_int(not problem.a_by_rows))
        if problem.a_type.itemsize == 1:
            self._set(_FAST_ACCUMULATION, c_int8(problem.fast))
            # The heuristic wants to know that there are scales; each run brings its own.
            self._set_scales(16, 16)

    def _lay_out(self) -> tuple[c_void_p, c_void_p, c_void_p]:
        m, n, k = self.problem[:3]
        first, second = (k, n) if self.problem.b_by_rows else (n, k), (k, m) if self.problem.a_by_rows else (m, k)
        return (
            self._layout(self.problem.b_type, *first, self.problem.b_stride),
            self._layout(self.problem.a_type, *second, self.problem.a_stride),
            self._layout(self.problem.out_type, n, m, self.problem.out_stride),
        )

    def _layout(self, dtype: torch.dtype, rows: int, columns: int, stride: int) -> c_void_p:
        layout = c_void_p()
        self._check(self._library.cublasLtMatrixLayoutCreate(byref(layout), _TYPES[dtype], rows, columns, stride))
        return layout

    def _ask(self, num_candidates: int) -> list[Heuristic]:
        preference, found, results = c_void_p(), c_int(), (Heuristic * num_candidates)()
        self._check(self._library.cublasLtMatmulPreferenceCreate(byref(preference)))
        limits = [(_WORKSPACE, c_uint64(WORKSPACE_BYTES)), *((each, c_uint32(self.problem.alignment)) for each in _ALIGNMENTS)]
        for attribute, value in limits:
            self._check(self._library.cublasLtMatmulPreferenceSetAttribute(preference, attribute, byref(value), sizeof(value)))
        question = (self.products.handle, self._descriptor, *self._layouts, self._layouts[2], preference)
        status = self._library.cublasLtMatmulAlgoGetHeuristic(*question, num_candidates, results, byref(found))
        self._check(self._library.cublasLtMatmulPreferenceDestroy(preference))
        return [result for result in results[: found.value] if result.status == 0] if status == 0 else []

    def _set(self, attribute: int, value: c_int | c_int8 | c_void_p) -> None:
        self._check(self._library.cublasLtMatmulDescSetAttribute(self._descriptor, attribute, byref(value), sizeof(value)))

    def _set_scales(self, first: int, second: int) -> None:
        self._set(_SCALE_FIRST, c_void_p(first))
        self._set(_SCALE_SECOND, c_void_p(second))

    def _check(self, status: int) -> None:
        if status != 0:
            meaning = _STATUSES.get(status, "unknown")
            raise RuntimeError(f"cuBLASLt answered status {status} ({meaning}) to the product {self.problem}; {_WAY_OUT}")


@cache
def products_on(device: int) -> Products:
    """cuBLASLt on a GPU, started once."""
    return Products(device)


@cache
def _library() -> CDLL:
    """The cuBLASLt that torch has loaded."""
    library = CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")
    library.cublasLtGetVersion.restype = c_size_t
    library.cublasLtMatrixLayoutCreate.argtypes = (c_void_p, c_int, c_uint64, c_uint64, c_int64)
    for function in (library.cublasLtMatmulDescSetAttribute, library.cublasLtMatmulPreferenceSetAttribute):
        function.argtypes = (c_void_p, c_int, c_void_p, c_size_t)
    return library


def pinned_choices() -> Mapping[str, Mapping[str, int]]:
    """`Products.host` -> problem, as text -> its algorithm's place in the heuristic's list."""
    return json.loads(files("megatron_hybrid.ops").joinpath("cublaslt_choices.json").read_text(encoding="utf-8"))
