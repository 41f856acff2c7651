"""How well a student reproduces a teacher, in the teacher's own space, streamed in float64.

- MSE: mean over images, positions and channels of the squared difference (PHI-S, table of teacher MSE).
- Fidelity: the teacher's mean variance per channel / MSE (FeatSharp); 1 is what always predicting the teacher's mean reaches.
- Cosine error: 1 - cosine, mean over rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cosine_similarity


@dataclass(frozen=True)
class Match:
    """The figures above."""

    mse: float
    fidelity: float
    cosine_error: float
    teacher_variance: float
    """Mean over channels of the variance over images and positions."""
    student_variance: float
    num_rows: int


class MatchStatistics:
    """Accumulates rows of student and teacher features, which have the same channels."""

    def __init__(self) -> None:
        self._squares = self._cosine = 0.0
        self._student: _Variance = _Variance()
        self._teacher: _Variance = _Variance()

    def add(self, student: Tensor, teacher: Tensor) -> None:
        """Count rows [..., C].

        Raises:
            ValueError: the shapes differ.
        """
        if student.shape != teacher.shape:
            raise ValueError(f"student features {tuple(student.shape)} and teacher features {tuple(teacher.shape)} must have one shape")
        student_NC, teacher_NC = (features.detach().flatten(0, -2).double() for features in (student, teacher))
        self._squares += float((student_NC - teacher_NC).square().mean(1).sum())
        self._cosine += float((1 - cosine_similarity(student_NC, teacher_NC, dim=1)).sum())
        self._student.add(student_NC)
        self._teacher.add(teacher_NC)

    def result(self) -> Match:
        """Return the figures of all rows so far.

        Raises:
            ValueError: there are none.
        """
        count = self._teacher.count
        if not count:
            raise ValueError("no features were compared: the evaluation has no images")
        mse, variance = self._squares / count, self._teacher.mean_variance()
        fidelity = variance / mse if mse > 0 else float("inf")
        return Match(mse, fidelity, self._cosine / count, variance, self._student.mean_variance(), count)


class _Variance:
    """Variance per channel of rows that stream by (Chan, Golub and LeVeque 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self._mean_C: Tensor | None = None
        self._scatter_C: Tensor | None = None

    def add(self, rows_NC: Tensor) -> None:
        count, mean_C = len(rows_NC), rows_NC.mean(0)
        scatter_C = (rows_NC - mean_C).square().sum(0)
        if self._mean_C is None or self._scatter_C is None:
            self.count, self._mean_C, self._scatter_C = count, mean_C, scatter_C
            return
        total, difference_C = self.count + count, mean_C - self._mean_C
        self._scatter_C = self._scatter_C + scatter_C + difference_C.square() * (self.count * count / total)
        self._mean_C = self._mean_C + difference_C * (count / total)
        self.count = total

    def mean_variance(self) -> float:
        assert self._scatter_C is not None
        return float((self._scatter_C / self.count).mean())
