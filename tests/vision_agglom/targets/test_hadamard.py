"""Hadamard matrices are exact, and what cannot be built is refused by its dimension."""

from __future__ import annotations

import numpy as np
import pytest

from vision_agglom.targets.galois import irreducible_polynomial, prime_power, quadratic_character
from vision_agglom.targets.hadamard import hadamard

WIDTHS = [1, 2, 4, 8, 12, 16, 20, 24, 28, 36, 44, 52, 60, 76, 100, 144, 176 - 8, 384, 768]
"""Every construction alone, products, and widths of models; 28 = 27 + 1, 52 and 100 come from fields of 3^3, 5^2 and 7^2 elements."""


@pytest.mark.parametrize("order", WIDTHS)
def test_rows_are_orthogonal_signs(order: int) -> None:
    matrix = hadamard(order)
    assert matrix.dtype == np.int64
    assert set(np.unique(matrix)) <= {-1, 1}
    # Products of signs are far below 2^53: exact in float64, and fast.
    np.testing.assert_array_equal((matrix.astype(float) @ matrix.T.astype(float)), order * np.eye(order))
    assert (np.diagonal(matrix) > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("order", [896, 1024, 1152, 1280, 1408, 1536, 1664, 2752])
def test_widths_of_large_teachers(order: int) -> None:
    matrix = hadamard(order).astype(float)
    np.testing.assert_array_equal(matrix @ matrix.T, order * np.eye(order))


@pytest.mark.parametrize("order", [3, 6, 30, 92, 116, 156, 172, 184, 188, 4304 + 1])
def test_unknown_orders_are_named(order: int) -> None:
    with pytest.raises(ValueError, match=rf"order {order} is known here .*nearest order is \d+.*standardizer="):
        hadamard(order)


@pytest.mark.parametrize(("q", "expected"), [(2, (2, 1)), (9, (3, 2)), (27, (3, 3)), (49, (7, 2)), (97, (97, 1)), (12, None), (1, None)])
def test_prime_powers(q: int, expected: tuple[int, int] | None) -> None:
    assert prime_power(q) == expected


@pytest.mark.parametrize("q", [3, 5, 7, 9, 13, 25, 27, 49])
def test_half_of_the_field_are_squares(q: int) -> None:
    character = quadratic_character(q)
    assert (np.diagonal(character) == 0).all()
    np.testing.assert_array_equal(character.sum(1), np.zeros(q))
    # chi(-1) = 1 exactly where q = 1 mod 4.
    np.testing.assert_array_equal(character.T, character if q % 4 == 1 else -character)


def test_irreducible_polynomials_have_no_roots() -> None:
    for p, k in ((3, 2), (5, 2), (3, 3), (7, 2)):
        polynomial = irreducible_polynomial(p, k)
        values = [sum(int(c) * x**i for i, c in enumerate(polynomial)) % p for x in range(p)]
        assert 0 not in values


@pytest.mark.parametrize("q", [4, 12, 15])
def test_fields_of_other_sizes_are_refused(q: int) -> None:
    with pytest.raises(ValueError, match=f"got {q}"):
        quadratic_character(q)
