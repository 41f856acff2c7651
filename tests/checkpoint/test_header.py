"""A checkpoint tells what it is, and a run that does not fit is told why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_hybrid.checkpoint import check_header, read_header
from megatron_hybrid.checkpoint.header import FORMAT, header_text

MODEL = {"pattern": "M-M*", "hidden_size": 256, "sizes": [1, 2]}
TRAINING = {"precision": "bf16", "distributed_optimizer": True}


def write(path: Path, text: str) -> Path:
    (path / "header.json").write_text(text)
    return path


def test_header_comes_back(tmp_path: Path) -> None:
    assert read_header(write(tmp_path, header_text({"state": {"step": 3}}))) == {"format": FORMAT, "state": {"step": 3}}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3"])
def test_what_is_no_header_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no checkpoint"):
        read_header(write(tmp_path, text))


def test_a_directory_without_header_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no checkpoint"):
        read_header(tmp_path / "nowhere")


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"format {FORMAT + 1}, this program reads {FORMAT}"):
        read_header(write(tmp_path, json.dumps({"format": FORMAT + 1})))


def test_the_same_architecture_fits(tmp_path: Path) -> None:
    header = read_header(write(tmp_path, header_text({"model": MODEL, "training": TRAINING})))
    check_header(header, model=MODEL | {"sizes": (1, 2)})
    check_header(header, model=MODEL, training=TRAINING)


def test_every_differing_field_of_the_architecture_is_named() -> None:
    with pytest.raises(ValueError, match="another architecture") as error:
        check_header({"model": MODEL | {"old": 1}}, model=MODEL | {"hidden_size": 512, "sizes": (1, 3)})
    message = str(error.value)
    assert "hidden_size is 256 there and 512 here" in message
    assert "sizes is" in message and "old is 1 there and '(not set)' here" in message
    assert "pattern" not in message


def test_optimizer_state_of_another_kind_is_refused_and_its_weights_are_not() -> None:
    header = {"model": MODEL, "training": TRAINING}
    with pytest.raises(ValueError, match="distributed_optimizer is True there and False here.*initialize_from"):
        check_header(header, model=MODEL, training=TRAINING | {"distributed_optimizer": False})
    check_header(header, model=MODEL)
