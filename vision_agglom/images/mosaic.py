"""k x k mosaics: several small images share one pass of a teacher that takes large squares only (RADIOv2.5, section on SAM).

The teacher's square has ``canvas_tokens x canvas_tokens`` patches. It is divided into k x k cells of ``cell_tokens = canvas_tokens // k``
patches a side; an image of ``image_tokens <= cell_tokens`` patches lies in its cell's top left corner, so that its patches are whole
patches of the teacher, and the features of exactly those patches are cut back. What is left of a cell, and of the canvas to the right
and below where k does not divide it, is padding. Of a 1024-pixel teacher with patches of 16: images of 256 make a 4 x 4 mosaic without
padding, images of 432 a 2 x 2 mosaic of cells of 512 of which 27 x 27 of 32 x 32 patches count.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vision_agglom.contract import Teacher, TeacherFacts, TeacherFeatures


@dataclass(frozen=True)
class MosaicPlan:
    """How images of one side share a teacher's square."""

    per_side: int
    """k: images along each side."""
    patch_size: int
    image_tokens: int
    """Patches along an image's side."""
    cell_tokens: int
    canvas_tokens: int

    @property
    def image_side(self) -> int:
        """Side of one image in pixels."""
        return self.image_tokens * self.patch_size

    @property
    def canvas_side(self) -> int:
        """Side of the teacher's square in pixels."""
        return self.canvas_tokens * self.patch_size

    @property
    def images_per_canvas(self) -> int:
        """k x k."""
        return self.per_side**2

    @property
    def used_share(self) -> float:
        """Share of the teacher's patches whose features are kept."""
        return self.images_per_canvas * self.image_tokens**2 / self.canvas_tokens**2

    def num_canvases(self, num_images: int) -> int:
        """Passes of the teacher for ``num_images`` images."""
        return -(-num_images // self.images_per_canvas)


def plan_mosaic(image_side: int, facts: TeacherFacts, per_side: int | None = None) -> MosaicPlan:
    """Return how images of ``image_side`` pixels share the teacher's square.

    Args:
        per_side: k; unset, the largest that fits.

    Raises:
        ValueError: the image's side is no multiple of the teacher's patch, or k x k of them do not fit.
    """
    if image_side % facts.patch_size:
        raise ValueError(
            f"a mosaic for teacher {facts.name!r} needs images of whole patches: {image_side} pixels is no multiple of {facts.patch_size}; "
            f"choose {image_side // facts.patch_size * facts.patch_size} or {-(-image_side // facts.patch_size) * facts.patch_size}"
        )
    image_tokens, canvas_tokens = image_side // facts.patch_size, facts.resolution // facts.patch_size
    largest = canvas_tokens // image_tokens
    chosen = max(largest, 1) if per_side is None else per_side
    if not 1 <= chosen <= largest:
        raise ValueError(
            f"a mosaic of {chosen} x {chosen} images of {image_side} pixels does not fit teacher {facts.name!r}, whose square has "
            f"{facts.resolution} pixels; " + (f"at most {largest} x {largest} do" if largest else "use smaller images")
        )
    return MosaicPlan(chosen, facts.patch_size, image_tokens, canvas_tokens // chosen, canvas_tokens)


def compose_mosaic(images_BCHW: Tensor, plan: MosaicPlan, fill_C: Tensor) -> Tensor:
    """Lay images out row by row on as many canvases as they need; the last one may have empty cells.

    Args:
        images_BCHW: side ``plan.image_side``.
        fill_C: colour of the padding; a teacher's mean becomes zero once it normalises.

    Returns:
        [canvases, C, canvas_side, canvas_side].
    """
    assert images_BCHW.shape[2:] == (plan.image_side, plan.image_side), images_BCHW.shape
    count, channels = images_BCHW.shape[:2]
    side, cell = plan.canvas_side, plan.cell_tokens * plan.patch_size
    shape = (plan.num_canvases(count), channels, side, side)
    canvases = fill_C.to(images_BCHW).view(1, -1, 1, 1).expand(shape).clone()
    for place in range(min(plan.images_per_canvas, count)):
        top, left = (cell * number for number in divmod(place, plan.per_side))
        images = images_BCHW[place :: plan.images_per_canvas]
        canvases[: len(images), :, top : top + plan.image_side, left : left + plan.image_side] = images
    return canvases


def cut_mosaic(spatial_MTC: Tensor, plan: MosaicPlan, num_images: int) -> Tensor:
    """Return each image's own features from those of the canvases.

    Args:
        spatial_MTC: [canvases, canvas_tokens^2, C], row-major.

    Returns:
        [num_images, image_tokens^2, C], row-major, in the order in which the images were laid out.
    """
    num_canvases, _, channels = spatial_MTC.shape
    grid = spatial_MTC.view(num_canvases, plan.canvas_tokens, plan.canvas_tokens, channels)
    cells = plan.per_side * plan.cell_tokens
    grid = grid[:, :cells, :cells].reshape(num_canvases, plan.per_side, plan.cell_tokens, plan.per_side, plan.cell_tokens, channels)
    grid = grid[:, :, : plan.image_tokens, :, : plan.image_tokens].permute(0, 1, 3, 2, 4, 5)
    return grid.reshape(num_canvases * plan.images_per_canvas, plan.image_tokens**2, channels)[:num_images]


class MosaicTeacher:
    """A teacher of fixed resolution that takes smaller images, k x k of them at a time. It has no summary: a canvas has many images.

    Args:
        teacher: takes squares of ``teacher.facts.resolution``.
        fill_C: colour of the padding, RGB in [0, 1].

    Raises:
        ValueError: see ``plan_mosaic``.
    """

    def __init__(self, teacher: Teacher, image_side: int, fill_C: Tensor, per_side: int | None = None) -> None:
        self.plan = plan_mosaic(image_side, teacher.facts, per_side)
        self.facts = TeacherFacts(
            name=teacher.facts.name,
            patch_size=teacher.facts.patch_size,
            resolution=image_side,
            fixed_resolution=True,
            summary_channels=None,
            spatial_channels=teacher.facts.spatial_channels,
        )
        self._teacher = teacher
        self._fill_C = fill_C

    def __call__(self, images_BCHW: Tensor) -> TeacherFeatures:
        """Describe images of ``facts.resolution`` pixels a side.

        Raises:
            ValueError: the images have another side.
        """
        if images_BCHW.shape[2:] != (self.plan.image_side, self.plan.image_side):
            raise ValueError(
                f"the mosaic of teacher {self.facts.name!r} is laid out for images of {self.plan.image_side} pixels a side, got "
                f"{tuple(images_BCHW.shape[2:])}"
            )
        canvases = compose_mosaic(images_BCHW, self.plan, self._fill_C)
        features = self._teacher(canvases)
        assert features.grid == (self.plan.canvas_tokens, self.plan.canvas_tokens), features.grid
        spatial_BTC = cut_mosaic(features.spatial_BTC, self.plan, len(images_BCHW))
        return TeacherFeatures(None, spatial_BTC, (self.plan.image_tokens, self.plan.image_tokens))
