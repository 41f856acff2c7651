"""Products through cuBLASLt: what a problem is everywhere, the numbers on a GPU."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from megatron_hybrid.ops import cublaslt
from megatron_hybrid.ops.cublaslt import Plan, multiply, problem_of, products_on

needs_nvidia = pytest.mark.skipif(torch.version.cuda is None or not torch.cuda.is_available(), reason="cuBLASLt runs on NVIDIA GPUs alone")


def matrix(rows: int, columns: int, by_rows: bool, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    x = torch.randn(*((rows, columns) if by_rows else (columns, rows)), device=device).to(dtype)
    return x if by_rows else x.t()


@pytest.mark.parametrize("a_by_rows", [True, False])
@pytest.mark.parametrize("b_by_rows", [True, False])
def test_a_problem_says_how_its_matrices_lie(a_by_rows: bool, b_by_rows: bool) -> None:
    a, b, out = matrix(6, 8, a_by_rows), matrix(10, 8, b_by_rows), torch.zeros(6, 12)[:, :10]
    problem = problem_of(a, b, out, accumulate=True, fast=False)
    assert problem[:3] == (6, 10, 8)
    assert (problem.a_by_rows, problem.a_stride) == (a_by_rows, 8 if a_by_rows else 6)
    assert (problem.b_by_rows, problem.b_stride, problem.out_stride) == (b_by_rows, 8 if b_by_rows else 10, 12)
    orientation = ("n" if a_by_rows else "t") + ("n" if b_by_rows else "t")
    assert str(problem) == f"bfloat16 bfloat16 float32 {orientation} 6x10x8 {problem.alignment} accumulate"


def test_the_alignment_is_what_divides_every_address() -> None:
    storage = torch.zeros(4096, dtype=torch.bfloat16)
    a, b, out = (storage[start : start + 64].view(8, 8) for start in (0, 1024, 2056))
    least = min(each.data_ptr() & -each.data_ptr() for each in (a, b, out))
    assert problem_of(a, b, out, accumulate=False, fast=False).alignment == min(least, 256)


def test_pinned_choices_name_library_gpu_and_problem() -> None:
    pinned = cublaslt.pinned_choices()
    names = {str(dtype).removeprefix("torch.") for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float32)}
    for host, of_host in pinned.items():
        version, capability = host.split(" on ")
        assert int(version) > 0 and float(capability) >= 9
        for problem, choice in of_host.items():
            assert set(problem.split()[:3]) <= names and len(problem.split()[4].split("x")) == 3
            assert 0 < choice < 8, "the first guess is not pinned"
    assert Path(cublaslt.__file__).with_name("cublaslt_choices.json").read_text(encoding="utf-8") == json.dumps(pinned, indent=1) + "\n"


@needs_nvidia
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("out_dtype", [None, torch.float32], ids=str)
def test_products_are_torchs(dtype: torch.dtype, out_dtype: torch.dtype | None) -> None:
    for a_by_rows, b_by_rows, (m, n, k) in itertools.product((True, False), (True, False), ((64, 48, 32), (129, 257, 65), (1, 16, 8))):
        a, b = matrix(m, k, a_by_rows, "cuda", dtype), matrix(n, k, b_by_rows, "cuda", dtype)
        exact = a.double() @ b.double().t()
        bound = 1e-5 if torch.float32 in (out_dtype, dtype) else 1e-2
        torch.testing.assert_close(multiply(a, b, out_dtype=out_dtype).double(), exact, rtol=bound, atol=bound * k**0.5)
        total = torch.ones(m, n, device="cuda")
        assert multiply(a, b, out=total, accumulate=True) is total
        torch.testing.assert_close(total.double(), 1 + exact, rtol=1e-5, atol=1e-5 * k)


@needs_nvidia
def test_repeated_and_scattered_operands_are_copied() -> None:
    a, b = torch.randn(1, 1, device="cuda").expand(16, 32), torch.randn(24, 64, device="cuda")[:, ::2]
    torch.testing.assert_close(multiply(a, b), a @ b.t())
    torch.testing.assert_close(multiply(a[:1].expand(16, 32), b), a @ b.t())


@needs_nvidia
def test_every_candidate_computes_the_same_product_and_repeats_it_bitwise() -> None:
    a, b = matrix(512, 4096, False, "cuda"), matrix(768, 4096, False, "cuda")
    out = torch.empty(512, 768, device="cuda")
    plan = Plan(products_on(0), problem_of(a, b, out, accumulate=False, fast=False), 8)
    assert len(plan.candidates) > 1
    for candidate in plan.candidates:
        results = []
        for _ in range(2):
            plan.run(candidate, a, b, out, None, None)
            results.append(out.clone())
        assert torch.equal(*results)
        torch.testing.assert_close(out, a.float() @ b.float().t(), rtol=1e-3, atol=1e-2)


@needs_nvidia
def test_what_cannot_be_multiplied_is_named() -> None:
    a = torch.zeros(16, 24, device="cuda").to(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")
    with pytest.raises(RuntimeError, match="float8_e4m3fn float8_e4m3fn bfloat16 nn 16x16x24.*scaled_mm"):
        multiply(a, a, out_dtype=torch.bfloat16, inverse_a=one, inverse_b=one)
