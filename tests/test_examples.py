"""Every example is a run that loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_hybrid.config import load_config
from megatron_hybrid.config.quantities import resolve_position
from tools.minipuzzle.config import load_minipuzzle

EXAMPLES = Path(__file__).parents[1] / "examples"
COMPRESSIONS = [file for file in sorted((EXAMPLES / "minipuzzle").glob("*.yaml")) if "parent" not in file.stem]
RUNS = [file for file in sorted(EXAMPLES.rglob("*.yaml")) if file not in COMPRESSIONS]


@pytest.mark.parametrize("file", RUNS, ids=lambda file: str(file.relative_to(EXAMPLES)))
def test_example_loads(file: Path) -> None:
    assert load_config(file, []).train.steps > 0


@pytest.mark.parametrize("file", COMPRESSIONS, ids=lambda file: file.stem)
def test_compression_loads(file: Path) -> None:
    assert load_minipuzzle(file).search.top_k > 0


def test_nemotron_h_8b_is_the_papers_run() -> None:
    run = load_config(EXAMPLES / "nemotron_h" / "8b.yaml", [])
    assert run.tokens_per_step == 6_291_456
    assert run.total_tokens == pytest.approx(15e12, rel=1e-6)
    starts = [resolve_position(phase.start, run.total_tokens) for phase in run.data.phases]
    assert starts[1:3] == pytest.approx([9e12, 12e12], rel=1e-6)
    assert run.total_tokens - starts[3] == 380 * 10**9
