"""What a writer raises where its format has no such student: nothing failed, and other formats may have one."""

from __future__ import annotations


class UnsupportedStudentError(ValueError):
    """The format cannot be this student; the message says what of it there is no place for."""
