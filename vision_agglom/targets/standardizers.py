"""PHI-S's table of normalisations (arXiv 2410.01680, section 3) behind one interface: y' = T (y - mu) and its inverse y = Theta y' + mu.

    none          T = I, mu = 0
    global        T = I / s, one mean and one scale for all channels
    standardize   T = diag(1 / s_c)
    pca_w         T = L^(-1/2) U^T            whitened, along the principal axes
    zca           T = U L^(-1/2) U^T          whitened, turned back
    hca           T = H L^(-1/2) U^T          whitened, turned by a Hadamard matrix
    phi_s         T = H U^T / phi             an isometry and one scale, phi^2 the mean of L

for a covariance U L U^T and an orthonormal Hadamard matrix H. Every T here has a closed inverse, so a head that was trained on y' speaks
the teacher's own space once Theta and mu are folded into its last linear.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vision_agglom.config.distill import Standardizer
from vision_agglom.targets.hadamard import hadamard
from vision_agglom.targets.statistics import Moments


@dataclass(frozen=True)
class Transformation:
    """A normalisation of row vectors and its inverse; fp64 or whatever ``to`` made of it."""

    forward_CC: Tensor
    """T."""
    inverse_CC: Tensor
    """Theta."""
    mean_C: Tensor

    @classmethod
    def identity(cls, channels: int, device: torch.device | str = "cpu") -> Transformation:
        """Leaves features as they are."""
        eye = torch.eye(channels, dtype=torch.float64, device=device)
        return cls(eye, eye.clone(), torch.zeros(channels, dtype=torch.float64, device=device))

    def normalize(self, features: Tensor) -> Tensor:
        """y' of [..., C] features, in fp32."""
        if features.is_cuda and features.dtype == torch.bfloat16:
            return self._normalize_in_parts(features)
        forward_CC, mean_C = self.forward_CC.float(), self.mean_C.float()
        return (features.float() - mean_C) @ forward_CC.T

    def _normalize_in_parts(self, features: Tensor) -> Tensor:
        """T y - T mu on tensor cores: bf16 features times the bf16 parts of T, summed in fp32."""
        rows_NC = features.flatten(0, -2)
        offset_C = -(self.forward_CC.double() @ self.mean_C.double()).float()
        sum_NC = offset_C.expand(len(rows_NC), -1).contiguous()
        for part_CC in split_bf16(self.forward_CC.float()):
            torch.addmm(sum_NC, rows_NC, part_CC.t(), out_dtype=torch.float32, out=sum_NC)
        return sum_NC.view(features.shape)

    def denormalize(self, targets: Tensor) -> Tensor:
        """y of [..., C] normalised features, in fp32."""
        return targets.float() @ self.inverse_CC.float().T + self.mean_C.float()

    def fold(self, weight_CI: Tensor, bias_C: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias, fp64, of the linear that gives y where the given one gives y'.

        A linear that gives u^2 times C channels, for upsampling, is folded block by block.
        """
        channels = len(self.mean_C)
        blocks_KCI = weight_CI.double().unflatten(0, (-1, channels))
        bias_KC = bias_C.double().unflatten(0, (-1, channels))
        return (self.inverse_CC.double() @ blocks_KCI).flatten(0, 1), (
            bias_KC @ self.inverse_CC.double().T + self.mean_C.double()
        ).flatten()


def split_bf16(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three bf16 tensors whose sum is the fp32 one: 3 x 8 bits of mantissa."""
    parts, rest = [], matrix
    for _ in range(3):
        parts.append(rest.bfloat16())
        rest = rest - parts[-1].float()
    return tuple(parts)


@dataclass(frozen=True)
class Turn:
    """From one normalised space of a teacher to another: y'_new = A y'_old + c.

    Both stand for the same y, so A = T_new Theta_old and c = T_new (mu_old - mu_new). A head that learned the old targets gives the new
    ones once A and c are folded into its last linear, and what it says in the teacher's own space stays what it was.
    """

    matrix_CC: Tensor
    """A, fp32."""
    offset_C: Tensor
    """c, fp32."""

    @classmethod
    def between(cls, old: Transformation, new: Transformation) -> Turn | None:
        """None where both are the same."""
        pairs = ((old.forward_CC, new.forward_CC), (old.inverse_CC, new.inverse_CC), (old.mean_C, new.mean_C))
        if all(torch.equal(before, after) for before, after in pairs):
            return None
        matrix_CC = new.forward_CC.double() @ old.inverse_CC.double()
        offset_C = new.forward_CC.double() @ (old.mean_C.double() - new.mean_C.double())
        return cls(matrix_CC.float(), offset_C.float())

    def fold(self, weight_CI: Tensor, bias_C: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias, in their own dtype and differentiable, of the linear that gives y'_new where the given one gives y'_old."""
        weight, bias = self.matrix_CC @ weight_CI.float(), self.matrix_CC @ bias_C.float() + self.offset_C
        return weight.to(weight_CI.dtype), bias.to(bias_C.dtype)


def check_standardizer(kind: Standardizer, channels: int) -> None:
    """Refuse a normalisation that the number of channels does not allow, before anything is computed.

    Raises:
        ValueError: it needs a Hadamard matrix and none is known here.
    """
    if kind in ("hca", "phi_s"):
        hadamard(channels)


def make_transformation(kind: Standardizer, moments: Moments, *, eps: float) -> Transformation:
    """The normalisation that the statistics give.

    Args:
        kind: which one.
        moments: of the teacher's features.
        eps: smallest variance, as a share of the largest, that anything is divided by.

    Raises:
        ValueError: see ``check_standardizer``; or the features do not vary at all.
    """
    channels = len(moments.mean_C)
    if kind == "none":
        return Transformation.identity(channels, moments.mean_C.device)
    covariance_CC = moments.covariance_CC
    variance_C = covariance_CC.diagonal().clamp(min=0)
    if float(variance_C.max()) == 0:
        raise ValueError(f"cannot normalise features of {channels} channels that never vary over {int(moments.count)} positions")
    if kind == "global":
        mean = moments.mean_C.mean()
        # Variance over positions and channels together.
        scale = (variance_C.mean() + (moments.mean_C - mean).square().mean()).sqrt()
        return _scaled(scale.expand(channels), mean.expand(channels))
    if kind == "standardize":
        return _scaled(variance_C.clamp(min=eps * variance_C.max()).sqrt(), moments.mean_C)
    values_C, vectors_CC = principal_axes(covariance_CC)
    turn_CC = _orthonormal_hadamard(channels, covariance_CC) if kind in ("hca", "phi_s") else None
    if kind == "phi_s":
        phi = values_C.mean().sqrt()
        rotation_CC = turn_CC @ vectors_CC.T
        return Transformation(rotation_CC / phi, phi * rotation_CC.T, moments.mean_C.clone())
    scale_C = values_C.clamp(min=eps * values_C.max()).sqrt()
    whiten_CC, colour_CC = vectors_CC.T / scale_C[:, None], vectors_CC * scale_C
    if kind == "zca":
        turn_CC = vectors_CC
    if turn_CC is None:
        return Transformation(whiten_CC, colour_CC, moments.mean_C.clone())
    return Transformation(turn_CC @ whiten_CC, colour_CC @ turn_CC.T, moments.mean_C.clone())


def principal_axes(covariance_CC: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (descending, not below 0) and eigenvectors as columns, fp64, the same wherever the covariance is the same.

    A column's sign makes its largest entry positive. Where the covariance is singular the axes of its null space are arbitrary: they are
    taken from the unit vectors, projected into it, so that rounding does not choose them.
    """
    values_C, vectors_CC = torch.linalg.eigh(covariance_CC)
    values_C, vectors_CC = values_C.flip(0).clamp(min=0), vectors_CC.flip(1)
    rank = int((values_C > 1e-12 * values_C[0]).sum())
    if rank < len(values_C):
        values_C[rank:] = 0
        vectors_CC = torch.cat([vectors_CC[:, :rank], _complement(vectors_CC[:, :rank])], 1)
    largest_C = vectors_CC.abs().argmax(0)
    signs_C = vectors_CC.gather(0, largest_C[None])[0].sign()
    return values_C, vectors_CC * signs_C


def _complement(basis_CR: Tensor) -> Tensor:
    """An orthonormal basis of the rest, as columns: unit vectors orthogonalised in order of what is left of them (pivoted Cholesky)."""
    channels, rank = basis_CR.shape
    left_CC = torch.eye(channels, dtype=basis_CR.dtype, device=basis_CR.device) - basis_CR @ basis_CR.T
    columns = []
    for _ in range(channels - rank):
        # Rounded, so that ties fall to the first.
        pivot = int(left_CC.diagonal().round(decimals=6).argmax())
        column_C = left_CC[:, pivot] / left_CC[pivot, pivot].sqrt()
        columns.append(column_C)
        left_CC = left_CC - torch.outer(column_C, column_C)
    return torch.stack(columns, 1)


def _scaled(scale_C: Tensor, mean_C: Tensor) -> Transformation:
    return Transformation(torch.diag(1 / scale_C), torch.diag(scale_C), mean_C.clone())


def _orthonormal_hadamard(channels: int, like: Tensor) -> Tensor:
    return torch.from_numpy(hadamard(channels)).to(like) / channels**0.5
