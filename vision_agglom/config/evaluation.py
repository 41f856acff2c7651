"""What a trained student is measured on."""

from __future__ import annotations

from pydantic import Field, model_validator

from megatron_hybrid.config.section import Section

TEXT_LIBRARIES = ("transformers", "open_clip")
"""Libraries whose teachers may have a text tower."""


class ZeroShotConfig(Section):
    """Classification by the names of the classes, through a teacher's text tower and the student's head for it."""

    teacher: str
    """The teacher whose summaries live in one space with texts."""
    class_names: tuple[str, ...] = Field(min_length=2)
    """What each class is called, by index."""
    text_model: str | None = None
    """Hub name or folder of the text tower, or open_clip's name. Unset: the teacher's own model."""


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
    zero_shot: ZeroShotConfig | None = None
    """Unset: no zero-shot classification. It looks at labelled_test."""
    batch_size: int = Field(8, gt=0)
    """Images per forward pass."""

    @model_validator(mode="after")
    def _check(self) -> EvaluationConfig:
        if (self.labelled_train is None) != (self.labelled_test is None):
            raise ValueError("give labelled_train and labelled_test together, or neither")
        if self.zero_shot is not None and self.labelled_test is None:
            raise ValueError("zero_shot needs labelled_train and labelled_test: the images that it classifies")
        if self.zero_shot is not None and len(self.zero_shot.class_names) != self.num_classes:
            raise ValueError(f"zero_shot.class_names has {len(self.zero_shot.class_names)} names for num_classes={self.num_classes}")
        return self
