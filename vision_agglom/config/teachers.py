"""A teacher: which library builds it, from which weights, and how it is to be run."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_hybrid.config.section import Section


class TeacherConfig(Section):
    """A frozen model that the student learns to match."""

    name: str = Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")
    """What the run and the exported heads call it."""
    library: Literal["transformers", "timm", "open_clip", "torch_hub", "checkpoint"]
    """What builds it. checkpoint: a ViT in NVlabs' or timm's parameter names (such as RADIO itself), built by this project."""
    model: str = Field(min_length=1)
    """Hub name or folder (transformers), model name (timm, open_clip), REPO:ENTRY (torch_hub), file (checkpoint); of a twin, its kind."""
    pretrained: bool = True
    """Load weights. False builds an offline twin: random weights from seed, of the architecture that options describe."""
    weights: str | None = None
    """open_clip's tag of the weights, such as dfn5b, or a local file. The other libraries find them by model."""
    revision: str = "main"
    """transformers' branch, tag or commit in the hub's repository; a commit cannot move while a run is resumed."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Changes to the architecture: configuration fields (transformers, checkpoint), arguments (timm, torch_hub), vision_cfg (open_clip)."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of a twin's weights; not read with pretrained=true."""
    output_scale: float = Field(1.0, gt=0)
    """Multiplies both outputs, to give a twin the feature scale of the teacher it stands for; 1 with pretrained=true."""
    resolution: int | None = Field(None, gt=0)
    """Side in pixels of its input. Unset: what it was made for."""
    sides: Literal["own", "fixed", "any"] = "own"
    """Sides of images that it takes: resolution alone, or any multiple of its patch; own is what its library knows of it."""
    resize_input: bool = False
    """Resize images of other sides to resolution, bilinear with antialiasing, instead of refusing them."""
    mean: tuple[float, float, float] | None = None
    """Mean of the input normalisation, RGB in [0, 1]. Unset: its own."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of the input normalisation. Unset: its own."""
    summary: Literal["own", "none"] = "own"
    """own: the summary that its kind gives (class token, pooled or projected embedding). none: spatial features alone."""
    slice_size: int | None = Field(None, gt=0)
    """Images per forward pass of the teacher. Unset: the whole batch at once."""

    @model_validator(mode="after")
    def _check(self) -> TeacherConfig:
        if self.pretrained and self.seed:
            raise ValueError(f"{self.name}: seed={self.seed} is not read with pretrained=true; drop it or set pretrained=false")
        if self.pretrained and self.output_scale != 1.0:
            raise ValueError(f"{self.name}: output_scale={self.output_scale} is for twins; drop it or set pretrained=false")
        if not self.pretrained and self.weights is not None:
            raise ValueError(f"{self.name}: weights={self.weights!r} is not read with pretrained=false; drop one of them")
        if self.weights is not None and self.library != "open_clip":
            raise ValueError(f"{self.name}: weights is read with library=open_clip only; name the weights by model")
        if self.revision != "main" and (self.library != "transformers" or not self.pretrained):
            raise ValueError(
                f"{self.name}: revision={self.revision!r} is read with library=transformers and pretrained=true only; drop it"
                + (" and write REPO:BRANCH:ENTRY as model" if self.library == "torch_hub" else "")
            )
        if self.pretrained and self.library == "open_clip" and self.weights is None:
            raise ValueError(f"{self.name}: open_clip needs weights, the tag of the weights, such as dfn5b")
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"{self.name}: give mean and std together, or neither")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"{self.name}: std={list(self.std)} must be positive")
        if self.library == "torch_hub" and ":" not in self.model:
            raise ValueError(
                f"{self.name}: torch_hub needs model as REPO:ENTRY, such as facebookresearch/dinov2:dinov2_vitl14_reg, got {self.model!r}"
            )
        return self
