"""A ViT with adaptor heads, the whole of what a RADIO checkpoint holds: ``base_model``, ``input_conditioner``, ``_heads`` (summaries) and
``_feature_projections`` (spatial features), the heads by teacher name.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from vision_agglom.contract import TeacherFeatures
from vision_agglom.plain.vit import PlainViT, PlainViTShape


@dataclass(frozen=True)
class PlainHeadShape:
    """The heads of one teacher."""

    name: str
    token: int
    """Class token that its summary head reads."""
    summary_channels: int | None
    """None: no summary head."""
    spatial_channels: int
    hidden_size: int
    num_inner: int = 0


@dataclass(frozen=True)
class RadioFeatures:
    """What the student says of a batch of images."""

    summary_BC: Tensor
    spatial_BTC: Tensor
    grid: tuple[int, int]
    adaptors: dict[str, TeacherFeatures]
    """Teacher -> what the student expects it to say, in the teacher's own space."""


class PlainRadio(PlainViT):
    """See above. Images in [0, 1]; ``forward`` gives summary and patch tokens, ``features`` the adaptors' outputs too."""

    def __init__(self, shape: PlainViTShape, heads: tuple[PlainHeadShape, ...]) -> None:
        super().__init__(shape)
        self.head_shapes = heads
        width = shape.hidden_size
        self._heads = nn.ModuleDict(
            {
                head.name: PlainHead(width, head.hidden_size, head.summary_channels, head.num_inner)
                for head in heads
                if head.summary_channels is not None
            }
        )
        self._feature_projections = nn.ModuleDict(
            {head.name: PlainHead(width, head.hidden_size, head.spatial_channels, head.num_inner) for head in heads}
        )

    def features(self, images_BCHW: Tensor) -> RadioFeatures:
        """Describe images whose sides are multiples of the patch."""
        conditioner, patch = self.input_conditioner, self.shape.patch_size
        tokens = self.base_model((images_BCHW - conditioner.norm_mean) / conditioner.norm_std)
        grid = (images_BCHW.shape[2] // patch, images_BCHW.shape[3] // patch)
        patches = self.patches(tokens)
        adaptors = {
            head.name: TeacherFeatures(
                self._heads[head.name](tokens[:, head.token]) if head.summary_channels is not None else None,
                self._feature_projections[head.name](patches),
                grid,
            )
            for head in self.head_shapes
        }
        return RadioFeatures(self.summary(tokens), patches, grid, adaptors)


class PlainHead(nn.Module):
    """RADIO's "v2" MLP: fc1, residual blocks of (norm, GELU, linear), final (norm, GELU, linear)."""

    def __init__(self, width: int, hidden: int, channels: int, num_inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, hidden)) for _ in range(num_inner))
        self.final = nn.Sequential(nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, channels))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map [..., width] to [..., channels]."""
        tokens = self.fc1(tokens)
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return self.final(tokens)
