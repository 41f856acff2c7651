"""Frozen models that the student learns to match, from any library, behind one call."""

from vision_agglom.teachers.load import load_teacher

__all__ = ["load_teacher"]
