"""How each teacher is matched: what it is shown, how its features are normalised, what the loss is and how losses are weighed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_hybrid.config.section import Section
from vision_agglom.config.teachers import TeacherConfig

Standardizer = Literal["none", "global", "standardize", "pca_w", "zca", "hca", "phi_s"]


class DistilledTeacherConfig(TeacherConfig):
    """A teacher of this run."""

    view: Literal["match", "own", "mosaic"] = "match"
    """What it is shown. match: a square with as many patches a side as the student's. own: its own resolution. mosaic: k x k images of
    matching patches on one square of its own resolution (no summary)."""
    standardizer: Standardizer = "phi_s"
    """Normalisation of its spatial features (PHI-S, table 2): none, one mean and scale, per channel, whitenings, or PHI-S."""
    spatial_loss: Literal["mse", "cosine_smooth_l1"] = "mse"
    """mse: squared error, mean over channels. cosine_smooth_l1: 0.9 (1 - cosine) + 0.1 smooth L1 (AM-RADIO)."""
    summary_loss: Literal["cosine", "angle", "none"] = "cosine"
    """cosine: 1 - cos. angle: squared angle over the teacher's own dispersion (C-RADIOv4). none: the summary is not learned."""
    spatial_weight: float = Field(1.0, ge=0)
    """Factor of the spatial loss."""
    summary_weight: float = Field(1.0, ge=0)
    """Factor of the summary loss."""

    @model_validator(mode="after")
    def _check_summary(self) -> DistilledTeacherConfig:
        if self.view == "mosaic" and self.summary_loss != "none":
            raise ValueError(f"{self.name}: view=mosaic gives no summary, since a mosaic has many images; set summary_loss=none")
        if self.summary == "none" and self.summary_loss != "none":
            raise ValueError(f"{self.name}: summary=none leaves nothing to learn; set summary_loss=none")
        return self


class HeadConfig(Section):
    """The adaptor heads between the student and each teacher's space."""

    hidden_size: int | None = Field(None, gt=0)
    """Inner width. Unset: the largest width among student and teachers."""
    num_inner: int = Field(0, ge=0)
    """Residual blocks (LayerNorm, GELU, linear) inside a head."""


class StatisticsConfig(Section):
    """When the teachers' feature statistics are gathered."""

    steps: int = Field(3000, gt=0)
    """Steps at the start of each stage that add to the statistics; frozen afterwards."""
    refresh_steps: int = Field(100, gt=0)
    """Steps between new transformations from the statistics so far."""
    eps: float = Field(1e-6, gt=0)
    """Smallest variance, relative to the largest, that a whitening divides by."""


class MesaConfig(Section):
    """MESA: the student also matches an average of its own past weights, on another crop (C-RADIOv4). Off while weight is 0."""

    weight: float = Field(0.0, ge=0)
    """Factor of the loss."""
    momentum: float = Field(0.999, gt=0, lt=1)
    """Share of the average that stays at each step."""
    start_step: int = Field(0, ge=0)
    """First step with the loss; the average is kept from the start."""

    @model_validator(mode="after")
    def _check(self) -> MesaConfig:
        if not self.weight and self != MesaConfig.model_construct():
            raise ValueError("momentum and start_step are not read with weight=0; drop them or give a weight")
        return self


class LossConfig(Section):
    """What the teachers' losses have in common."""

    balance: Literal["fixed", "adaloss", "uncertainty"] = "fixed"
    """fixed: the weights as given. adaloss: each term also divided by its running mean. uncertainty: learned (Kendall et al. 2018)."""
    adaloss_momentum: float = Field(0.99, gt=0, lt=1)
    """Share of adaloss's running mean that stays at each step."""
    smooth_l1_beta: float = Field(1.0, gt=0)
    """Where smooth L1 turns from squares to absolute values."""
    shift_patches: int = Field(0, ge=0)
    """Shift-equivariant matching: student and teachers see windows shifted by up to so many student patches each, independently, and are
    compared where they overlap. 0: all see the same image."""
    mesa: MesaConfig = MesaConfig()

    @model_validator(mode="after")
    def _check(self) -> LossConfig:
        if self.balance != "adaloss" and self.adaloss_momentum != LossConfig.model_fields["adaloss_momentum"].default:
            raise ValueError(f"adaloss_momentum is not read with balance={self.balance}; drop it or choose adaloss")
        return self
