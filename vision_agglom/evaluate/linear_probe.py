"""A linear classifier on frozen features: multinomial logistic regression, solved to the optimum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vision_agglom.evaluate.classes import require_classes


@dataclass(frozen=True)
class LinearProbe:
    """logits = ((x - mean) / std) W^T + b."""

    weight_KC: Tensor
    bias_K: Tensor
    mean_C: Tensor
    std_C: Tensor

    def logits(self, features_NC: Tensor) -> Tensor:
        """Return [N, classes], float64."""
        return ((features_NC.double() - self.mean_C) / self.std_C) @ self.weight_KC.T + self.bias_K

    def predict(self, features_NC: Tensor) -> Tensor:
        """Return the class of each row, int64 [N]."""
        return self.logits(features_NC).argmax(1)


def fit_linear_probe(
    features_NC: Tensor, classes_N: Tensor, *, num_classes: int, weight_decay: float = 1e-3, max_iterations: int = 200
) -> LinearProbe:
    """Fit by L-BFGS in float64: mean cross-entropy + weight_decay / 2 x squared norm of W, on standardised features.

    The objective is strictly convex, so the result depends on no seed, order or learning rate.

    Raises:
        ValueError: a class index is out of range, or there are no features.
    """
    if len(features_NC) == 0:
        raise ValueError("a linear probe needs features to learn from; there are none")
    require_classes(classes_N, num_classes)
    features_NC = features_NC.double()
    mean_C, std_C = features_NC.mean(0), features_NC.std(0, correction=0).clamp_min(1e-12)
    inputs_NC = (features_NC - mean_C) / std_C
    weight_KC = torch.zeros(num_classes, inputs_NC.shape[1], dtype=torch.float64, device=inputs_NC.device, requires_grad=True)
    bias_K = torch.zeros(num_classes, dtype=torch.float64, device=inputs_NC.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight_KC, bias_K], max_iter=max_iterations, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(inputs_NC @ weight_KC.T + bias_K, classes_N) + weight_decay / 2 * weight_KC.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    return LinearProbe(weight_KC.detach(), bias_K.detach(), mean_C, std_C)
