"""Who may import whom, as docs/architecture.md states it; and the sizes that keep the way from README to optimizer step short."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_hybrid"


def allowed_imports() -> dict[str, set[str]]:
    """The table of rooms in docs/architecture.md: room -> rooms it may import."""
    rows = re.findall(r"^\| `(\w+)/` \|[^|]*\| ([^|]*) \|$", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    return {room: set(re.findall(r"\w+", imports)) - {"nothing"} for room, imports in rows}


def imported_modules(file: Path) -> set[str]:
    """Every module a file imports, wherever in the file."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


@pytest.mark.parametrize("room", sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()))
def test_room_imports_what_the_table_says(room: str) -> None:
    allowed = allowed_imports()
    assert room in allowed, f"docs/architecture.md has no row for {room}/"
    for file in (PACKAGE / room).rglob("*.py"):
        rooms = {module.split(".")[1] for module in imported_modules(file) if module.startswith("megatron_hybrid.")}
        foreign = {name for name in rooms if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()} - allowed[room] - {room}
        assert not foreign, f"{file.relative_to(ROOT)} imports {sorted(foreign)}; the table allows {sorted(allowed[room])}"


VISION_SUBSTRATE = {"checkpoint", "config", "data", "fp8", "layers", "layout", "model", "ops", "run_directory", "substrate", "train"}
"""What vision_agglom builds on; of the language model's room its initialisation alone."""


def test_vision_builds_on_the_substrate_and_not_on_the_language_model() -> None:
    for file in (ROOT / "vision_agglom").rglob("*.py"):
        modules = {module for module in imported_modules(file) if module.startswith("megatron_hybrid.")}
        assert {module.split(".")[1] for module in modules} <= VISION_SUBSTRATE, file
        from_model = {module for module in modules if module.startswith("megatron_hybrid.model")}
        assert all(module.startswith("megatron_hybrid.model.initialize") for module in from_model), file


def test_nothing_imports_vision() -> None:
    for file in PACKAGE.rglob("*.py"):
        assert not any(module.split(".")[0] == "vision_agglom" for module in imported_modules(file)), file


@pytest.mark.parametrize("package", ["megatron_hybrid", "vision_agglom"])
def test_nothing_imports_tools_or_tests(package: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        assert not {module.split(".")[0] for module in imported_modules(file)} & {"tools", "tests", "examples", "benchmarks"}, file


@pytest.mark.parametrize("room", ["config", "layout"])
def test_arithmetic_needs_no_torch(room: str) -> None:
    for file in (PACKAGE / room).rglob("*.py"):
        assert not {module.split(".")[0] for module in imported_modules(file)} & {"torch", "numpy", "megatron"}, file


def test_describing_a_distillation_needs_no_torch() -> None:
    files = [
        *(ROOT / "vision_agglom" / "config").rglob("*.py"),
        ROOT / "vision_agglom/commands/describe.py",
        ROOT / "vision_agglom/flops.py",
    ]
    for file in files:
        assert not {module.split(".")[0] for module in imported_modules(file)} & {"torch", "numpy", "megatron"}, file


def test_the_way_to_the_optimizer_step_is_short() -> None:
    assert len((PACKAGE / "__main__.py").read_text().splitlines()) < 100
    assert function_length(PACKAGE / "train/trainer.py", "train") < 50
    assert function_length(PACKAGE / "train/step.py", "train_step") < 50


def function_length(file: Path, name: str) -> int:
    """Lines of the function or method of this name."""
    (node,) = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef) and node.name == name)
    return node.end_lineno - node.lineno + 1
