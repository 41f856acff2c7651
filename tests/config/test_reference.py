"""docs/configuration.md says what the schema says."""

from __future__ import annotations

from pathlib import Path

from megatron_hybrid.config.options import iterate_options
from megatron_hybrid.config.reference import option_table
from megatron_hybrid.config.schema import RunConfig

REWRITE = "python -c 'from megatron_hybrid.config.reference import option_table; print(option_table(), end=str())' > docs/configuration.md"


def test_the_committed_reference_is_up_to_date() -> None:
    committed = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert committed.read_text(encoding="utf-8") == option_table(), f"the schema has changed; run: {REWRITE}"


def test_every_option_is_documented_and_listed() -> None:
    table = option_table()
    for option in iterate_options(RunConfig):
        assert option.summary
        row = f"\n## {'.'.join(option.path)}\n" if option.section else f"\n| `{option.path[-1]}` |"
        assert row in table


def test_every_row_has_four_cells() -> None:
    for line in option_table().splitlines():
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") == 5, line
