"""A student whole on one rank, inside a rank's process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.substrate.groups import initialize, shutdown
from tests.vision_agglom.small import FACTS
from vision_agglom.config.schema import VisionConfig
from vision_agglom.heads import HeadShape
from vision_agglom.students.build import build_student_chunks, build_transformer_config
from vision_agglom.students.vit import StudentModel


@contextmanager
def student_on(run: VisionConfig) -> Iterator[tuple[StudentModel, Substrate]]:
    """This rank's one chunk."""
    substrate = initialize(run)
    heads = [HeadShape(name, facts.summary_channels, facts.spatial_channels, 24, 0) for name, facts in FACTS.items()]
    (chunk,) = build_student_chunks(run, heads, build_transformer_config(run, substrate), substrate)
    yield chunk, substrate
    shutdown(substrate)
