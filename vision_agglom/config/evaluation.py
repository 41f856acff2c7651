"""What a trained student is measured on."""

from __future__ import annotations

from pydantic import Field, model_validator

from megatron_hybrid.config.schema import Section


class EvaluationConfig(Section):
    """Matching with the teachers, behaviour over resolutions, probes on labelled images. Read by ``evaluate``, not while training."""

    images: str | None = None
    """Images (folder or shards) on which student and teachers are compared, each as its largest centred square. Unset: no comparison."""
    max_images: int = Field(64, gt=0)
    """Images of it that are looked at."""
    resolutions: tuple[int, ...] = ()
    """Sides in pixels of the curves over resolution. Empty: those of the stages."""
    resolution: int | None = Field(None, gt=0)
    """Side in pixels of everything else, and the reference of scale equivariance. Unset: the last stage's first."""
    labelled_train: str | None = None
    """Images with classes and masks (webdataset .cls and .mask.png) that probes learn from. Unset: no probes."""
    labelled_test: str | None = None
    """Images with classes and masks that probes are tested on."""
    num_classes: int = Field(2, ge=2)
    """Classes, the background of masks among them."""
    batch_size: int = Field(8, gt=0)
    """Images per forward pass."""

    @model_validator(mode="after")
    def _check(self) -> EvaluationConfig:
        if (self.labelled_train is None) != (self.labelled_test is None):
            raise ValueError("give labelled_train and labelled_test together, or neither")
        return self
