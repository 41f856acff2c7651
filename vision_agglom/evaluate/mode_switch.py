"""Does a student say the same at every resolution? AM-RADIO's did not: above some side it switched from one teacher's manner to another's.

RADIOv2.5 reports a scale-equivariance error without its formula being public; this project's is

    E(r, r0) = sum ||D F(x_r) - D F(x_r0)||^2  /  sum ||D F(x_r0) - m||^2

where F(x_r) are the features of the same images shown with side r, D resizes both grids to the coarser of the two (bilinear where it
enlarges nothing: averaging by area), m is the mean over all images and positions of D F(x_r0), and sums run over images, positions and
channels. 0: the grid alone changes. 1: as far off as one constant vector. A student's error is the mean over the other sides r.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from vision_agglom.evaluate.matching import MatchStatistics


def pool_grid(spatial_BTC: Tensor, grid: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Average row-major features by area from ``grid`` to a coarser ``target``; cells that a border cuts count in both.

    Raises:
        ValueError: the target is finer.
    """
    if target[0] > grid[0] or target[1] > grid[1]:
        raise ValueError(f"cannot average a grid of {grid} to a finer one of {target}")
    if grid == target:
        return spatial_BTC
    return adaptive_avg_pool2d(spatial_BTC.mT.unflatten(2, grid).float(), target).flatten(2).mT


class ScaleEquivariance:
    """Accumulates E(r, r0) for every side r beside the reference r0."""

    def __init__(self, reference: int) -> None:
        self.reference = reference
        self._statistics: dict[int, MatchStatistics] = {}

    def add(self, features: Mapping[int, tuple[Tensor, tuple[int, int]]]) -> None:
        """Count a batch: side -> (features [B, T, C], grid) of the same images.

        Raises:
            ValueError: the reference side is not among them.
        """
        if self.reference not in features:
            raise ValueError(f"the features of the reference side {self.reference} are missing; got sides {sorted(features)}")
        base_BTC, base_grid = features[self.reference]
        for side, (spatial_BTC, grid) in features.items():
            if side == self.reference:
                continue
            target = (min(grid[0], base_grid[0]), min(grid[1], base_grid[1]))
            matched = (pool_grid(spatial_BTC, grid, target), pool_grid(base_BTC, base_grid, target))
            self._statistics.setdefault(side, MatchStatistics()).add(*matched)

    def errors(self) -> dict[int, float]:
        """Return E(r, r0) by side; 1 / fidelity of the reference's features as a teacher, which is the formula above."""
        results = {side: statistics.result() for side, statistics in sorted(self._statistics.items())}
        return {side: match.mse / match.teacher_variance if match.teacher_variance else float("inf") for side, match in results.items()}

    def error(self) -> float:
        """Return the mean over the sides.

        Raises:
            ValueError: there is no side beside the reference.
        """
        errors = self.errors()
        if not errors:
            raise ValueError("a scale-equivariance error needs at least two sides")
        return sum(errors.values()) / len(errors)
