"""What a checkpoint says about itself: ``header.json``, plain JSON that costs nothing to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FORMAT = 1
HEADER = "header.json"


def header_text(header: dict[str, Any]) -> str:
    """Return the file's text: the caller's header and the format's version."""
    assert "format" not in header, "the format's version is the checkpoint's own"
    return json.dumps({"format": FORMAT, **header}, indent=1) + "\n"


def read_header(path: Path) -> dict[str, Any]:
    """Return the header of the checkpoint in directory ``path``, as it was given to ``CheckpointStore.save``, and ``format``.

    Raises:
        ValueError: ``path`` is no checkpoint, or one of another format version.
    """
    try:
        header = json.loads((path / HEADER).read_text())
        version = header["format"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no checkpoint: expected a directory with {HEADER} in it ({type(error).__name__}: {error})") from None
    if version != FORMAT:
        raise ValueError(f"{path} has checkpoint format {version}, this program reads {FORMAT}; use the version that wrote it")
    return header


def check_header(header: dict[str, Any], *, model: dict[str, Any], training: dict[str, Any] | None = None) -> None:
    """Compare a checkpoint's header with what is about to be loaded.

    Args:
        header: what ``read_header`` returned.
        model: the architecture here, as the header's ``model`` has it.
        training: what decides the kind of optimizer state here, as the header's ``training`` has it; None when only weights are loaded.

    Raises:
        ValueError: something differs; the message names every field with both values.
    """
    advice = "use the model's options of that run, or another checkpoint"
    _compare(header["model"], model, "the checkpoint is of another architecture", advice)
    if training is not None:
        advice = "optimizer state is not converted: keep these options, or start a new run from the weights (checkpoint.initialize_from)"
        _compare(header["training"], training, "the checkpoint's optimizer state is of another kind", advice)


def _compare(saved: dict[str, Any], here: dict[str, Any], finding: str, advice: str) -> None:
    # What was saved went through JSON: tuples are lists by now.
    here = json.loads(json.dumps(here))
    missing = "(not set)"
    differences = [
        f"{name} is {saved.get(name, missing)!r} there and {here.get(name, missing)!r} here"
        for name in sorted(saved.keys() | here.keys())
        if saved.get(name, missing) != here.get(name, missing)
    ]
    if differences:
        raise ValueError(f"{finding}: {'; '.join(differences)}; {advice}")
