"""Where a result goes, looked at before the work that it is the result of."""

from __future__ import annotations

import os
from pathlib import Path


def check_output_file(file: Path) -> None:
    """Tell whether the file of --output can be written.

    Raises:
        ValueError: it is a directory, or its directory is missing or closed to us, or the file itself is.
    """
    if file.is_dir():
        raise ValueError(f"--output {file} is a directory; give a file")
    if not file.parent.is_dir():
        raise ValueError(f"--output {file}: there is no directory {file.parent}; make it first")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ValueError(f"--output {file} may not be written; choose another place")
