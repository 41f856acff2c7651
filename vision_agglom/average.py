"""A running average of the student's weights, in fp32, that can be run itself (MESA's teacher)."""

from __future__ import annotations

import torch

from vision_agglom.students.vit import StudentModel


class AveragedStudent:
    """Follows a student that is whole on this rank's pipeline stage.

    Args:
        model: a second student, built like the first; the average is run with it.
        momentum: share of the average that stays at each step.
    """

    def __init__(self, model: StudentModel, momentum: float) -> None:
        self.model, self.momentum = model, momentum
        model.requires_grad_(False)
        model.eval()
        self.weights = {name: _like(parameter) for name, parameter in model.named_global_parameters()}
        self.is_started = False

    def start(self, student: StudentModel) -> None:
        """Begin at the student's present weights."""
        self._move(student, 0.0)
        self.is_started = True

    def follow(self, student: StudentModel) -> None:
        """Move towards the student's weights by one step."""
        self._move(student, self.momentum)

    def load_model(self) -> None:
        """Put the average into the model that is run."""
        with torch.no_grad():
            for name, parameter in self.model.named_global_parameters():
                parameter.copy_(self.weights[name])

    @torch.no_grad()
    def _move(self, student: StudentModel, momentum: float) -> None:
        for name, parameter in student.named_global_parameters():
            self.weights[name].lerp_(parameter.float(), 1 - momentum)
        for own, other in zip(self.model.buffers(), student.buffers(), strict=True):
            own.copy_(other)
        self.load_model()


def _like(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """An fp32 tensor that is cut and saved like the parameter."""
    weight = torch.nn.Parameter(torch.zeros_like(parameter, dtype=torch.float32), requires_grad=False)
    weight.declaration = parameter.declaration
    return weight
