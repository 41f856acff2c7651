"""Hadamard matrices, exact in integers: entries +1 and -1, H H^T = n I.

Constructions: Sylvester's (powers of 2), Paley's two over finite fields (order q + 1 for q = 3 mod 4, order 2 (q + 1) for q = 1 mod 4, q a
power of an odd prime), and Kronecker products of any of these.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from vision_agglom.targets.galois import prime_power, quadratic_character

_SYLVESTER_2 = np.array([[1, 1], [1, -1]], np.int64)


def hadamard(order: int) -> np.ndarray:
    """A Hadamard matrix, int64 [order, order], rows whose diagonal is negative flipped; the same on every host.

    Raises:
        ValueError: no construction here reaches the order.
    """
    matrix = _build(order)
    if matrix is None:
        reason = "Hadamard matrices have 1, 2 or a multiple of 4 rows" if order > 2 and order % 4 else "neither Sylvester's nor Paley's"
        reachable = [candidate for candidate in range(max(order - 64, 1), order + 65) if _plan(candidate) is not None]
        nearest = min(reachable, key=lambda candidate: abs(candidate - order))
        raise ValueError(
            f"no Hadamard matrix of order {order} is known here ({reason}"
            f"{' constructions, nor products of them, reach it' if order % 4 == 0 else ''}; the nearest order is {nearest}); "
            "choose standardizer=standardize, zca or pca_w for this teacher"
        )
    return matrix * np.where(np.diagonal(matrix) < 0, -1, 1)[:, None]


def _build(order: int) -> np.ndarray | None:
    plan = _plan(order)
    if plan is None:
        return None
    matrix = np.ones((1, 1), np.int64)
    for construction, size in plan:
        matrix = np.kron(matrix, _CONSTRUCTIONS[construction](size))
    return matrix


@lru_cache(maxsize=4096)
def _plan(order: int) -> tuple[tuple[str, int], ...] | None:
    """Factors whose Kronecker product has the order: as many of Sylvester's as leave a rest that Paley reaches."""
    if order < 1:
        return None
    twos = (order & -order).bit_length() - 1
    for sylvester in range(twos, -1, -1):
        rest = order >> sylvester
        factors = _paley_factors(rest)
        if factors is not None:
            return (("sylvester", 1 << sylvester), *factors)
    return None


def _paley_factors(order: int) -> tuple[tuple[str, int], ...] | None:
    """Paley matrices whose product has the order; an empty tuple for 1."""
    if order == 1:
        return ()
    single = _single_paley(order)
    if single is not None:
        return (single,)
    for first in range(12, int(order**0.5) + 1, 4):
        if order % first == 0:
            left, right = _single_paley(first), _paley_factors(order // first)
            if left is not None and right is not None:
                return (left, *right)
    return None


def _single_paley(order: int) -> tuple[str, int] | None:
    if order % 4:
        return None
    if (order - 1) % 4 == 3 and _odd_prime_power(order - 1):
        return "paley_1", order
    q = order // 2 - 1
    if q % 4 == 1 and _odd_prime_power(q):
        return "paley_2", order
    return None


def _odd_prime_power(q: int) -> bool:
    factors = prime_power(q)
    return factors is not None and factors[0] != 2


def _sylvester(order: int) -> np.ndarray:
    matrix = np.ones((1, 1), np.int64)
    while len(matrix) < order:
        matrix = np.kron(_SYLVESTER_2, matrix)
    return matrix


def _paley_1(order: int) -> np.ndarray:
    """I + S with S = [[0, 1], [-1, Q]], skew because -1 is no square."""
    skew = np.zeros((order, order), np.int64)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = quadratic_character(order - 1)
    return np.eye(order, dtype=np.int64) + skew


def _paley_2(order: int) -> np.ndarray:
    """The symmetric conference matrix [[0, 1], [1, Q]] with every entry replaced by a 2 x 2 block."""
    half = order // 2
    conference = np.zeros((half, half), np.int64)
    conference[0, 1:] = conference[1:, 0] = 1
    conference[1:, 1:] = quadratic_character(half - 1)
    diagonal = np.array([[1, -1], [-1, -1]], np.int64)
    return np.kron(conference, _SYLVESTER_2) + np.kron(np.eye(half, dtype=np.int64), diagonal)


_CONSTRUCTIONS: dict[str, Callable[[int], np.ndarray]] = {"sylvester": _sylvester, "paley_1": _paley_1, "paley_2": _paley_2}
