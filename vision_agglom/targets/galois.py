"""Finite fields of q = p^k elements, for Paley's constructions. Integers throughout.

Elements are numbered 0 to q - 1: the digits of a number to base p are the coefficients of a polynomial over GF(p), lowest first.
"""

from __future__ import annotations

from itertools import product

import numpy as np


def prime_power(q: int) -> tuple[int, int] | None:
    """Return (p, k) with q = p^k and p prime, or None.

    >>> prime_power(25), prime_power(43), prime_power(12)
    ((5, 2), (43, 1), None)
    """
    if q < 2:
        return None
    p = next((divisor for divisor in range(2, int(q**0.5) + 1) if q % divisor == 0), q)
    k, rest = 0, q
    while rest % p == 0:
        rest //= p
        k += 1
    return (p, k) if rest == 1 else None


def quadratic_character(q: int) -> np.ndarray:
    """The matrix chi(a - b), int64 [q, q]: 0 on the diagonal, 1 where a - b is a square of the field, -1 elsewhere.

    Raises:
        ValueError: q is no power of an odd prime.
    """
    factors = prime_power(q)
    if factors is None or factors[0] == 2:
        raise ValueError(f"expected a power of an odd prime, got {q}")
    p, k = factors
    digits = _digits(p, k)
    character = np.full(q, -1, np.int64)
    character[_squares(digits, p, k)] = 1
    character[0] = 0
    difference = (digits[:, None, :] - digits[None, :, :]) % p
    return character[difference @ (p ** np.arange(k))]


def _squares(digits: np.ndarray, p: int, k: int) -> np.ndarray:
    """Numbers of the squares of all elements."""
    modulus = irreducible_polynomial(p, k)
    squares = np.zeros((len(digits), 2 * k - 1), np.int64)
    for i in range(k):
        for j in range(k):
            squares[:, i + j] += digits[:, i] * digits[:, j]
    squares %= p
    # x^k = -(lower coefficients of the monic modulus).
    for degree in range(2 * k - 2, k - 1, -1):
        squares[:, degree - k : degree] -= squares[:, degree : degree + 1] * modulus[:k]
        squares %= p
    return squares[:, :k] @ (p ** np.arange(k))


def irreducible_polynomial(p: int, k: int) -> np.ndarray:
    """The first monic polynomial of degree k that is irreducible over GF(p), coefficients lowest first, int64 [k + 1]."""
    for tail in product(range(p), repeat=k):
        candidate = np.array([*reversed(tail), 1], np.int64)
        if not any(
            _divides(np.array([*rest, 1], np.int64), candidate, p) for n in range(1, k // 2 + 1) for rest in product(range(p), repeat=n)
        ):
            return candidate
    raise AssertionError(f"GF({p}^{k}) exists")


def _divides(divisor: np.ndarray, dividend: np.ndarray, p: int) -> bool:
    """Whether a monic polynomial divides another over GF(p)."""
    rest = dividend.copy()
    for top in range(len(rest) - 1, len(divisor) - 2, -1):
        rest[top - len(divisor) + 1 : top + 1] -= rest[top] * divisor
        rest %= p
    return not rest.any()


def _digits(p: int, k: int) -> np.ndarray:
    """[p^k, k] digits of all numbers to base p, lowest first."""
    return np.arange(p**k)[:, None] // p ** np.arange(k) % p
