"""The images of a run: where they lie, in what proportion, and how each becomes a square."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_hybrid.config.section import Section


class ImageSourceConfig(Section):
    """One collection of images."""

    path: str = Field(min_length=1)
    """A folder of images; or webdataset shards: one .tar, a folder of them, or a pattern ("data/{00000..00099}.tar", "data/*.tar")."""
    weight: float = Field(1.0, gt=0)
    """Share of the samples that come from here, relative to the other sources' weights."""


class ImagesConfig(Section):
    """What the student looks at."""

    sources: dict[str, ImageSourceConfig] = Field(min_length=1)
    """Source name -> collection. One source goes round independently of the others, each pass in a new order."""
    seed: int = Field(1234, ge=0, lt=2**63)
    """Seed of the order and of the crops."""
    aspect: Literal["random_resized_crop", "resize_crop", "pad"] = "random_resized_crop"
    """random_resized_crop: a random part. resize_crop: shorter side fitted, centre kept. pad: longer side fitted, grey right and below."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Smallest and largest share of the image's area that a random crop takes."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a random crop, drawn evenly in the logarithm."""
    flip_probability: float = Field(0.5, ge=0, le=1)
    """Share of the samples that are mirrored left to right."""
    num_workers: int = Field(2, ge=0)
    """Processes that decode ahead for each rank; 0 decodes in the training process. No image depends on it."""
    batches_ahead: int = Field(4, gt=0)
    """Micro-batches that each worker keeps ready."""

    @model_validator(mode="after")
    def _check(self) -> ImagesConfig:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale={list(self.crop_scale)}: expected two shares of the area, 0 < smallest <= largest <= 1")
        narrow, wide = self.crop_ratio
        if not 0 < narrow <= wide:
            raise ValueError(f"crop_ratio={list(self.crop_ratio)}: expected 0 < narrowest <= widest")
        if self.aspect != "random_resized_crop":
            for name in ("crop_scale", "crop_ratio"):
                if getattr(self, name) != ImagesConfig.model_fields[name].default:
                    raise ValueError(f"{name} is not read with aspect={self.aspect}; drop it or choose random_resized_crop")
        return self
