"""Rewrite megatron-core's source so that its device words mean the CPU; standard library only.

Four rules over the syntax tree (measured to be sufficient for megatron-core 0.16.1):

R1  ``torch.cuda``, and what is imported from it, becomes the stand-in module ``cuda_stand_in``
R2  the string ``"cuda"`` becomes ``"cpu"``
R3  the type names ``"torch.cuda.FloatTensor"`` (Half, BFloat16) become ``"torch.FloatTensor"``
R4  ``x.cuda(...)`` becomes ``x.cpu()``

Line numbers are kept, so tracebacks point into the installed files. Run as a script, this file writes the manifest of
rewritten places that ``cpu_host`` compares every module with.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import importlib.util
import json
from pathlib import Path

STAND_IN_MODULE = "megatron_hybrid.substrate.cuda_stand_in"
STAND_IN_NAME = "_torch_cuda_stand_in"
"""Global that the loader sets in every rewritten module."""
COMMAND = "python megatron_hybrid/substrate/rewrite.py --output megatron_hybrid/substrate/rewrite_manifest.json"
RULES = ("R1", "R2", "R3", "R4")

_TYPE_NAMES = {f"torch.cuda.{kind}Tensor": f"torch.{kind}Tensor" for kind in ("Float", "Half", "BFloat16")}


class DeviceRewriter(ast.NodeTransformer):
    """Apply the four rules to a tree; ``counts`` says how often each one applied."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(RULES, 0)

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        if isinstance(node.value, ast.Name) and node.value.id == "torch" and node.attr == "cuda":
            self.counts["R1"] += 1
            return ast.copy_location(ast.Name(id=STAND_IN_NAME, ctx=node.ctx), node)
        self.generic_visit(node)
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom:
        if node.level == 0 and node.module == "torch.cuda":
            self.counts["R1"] += 1
            node.module = STAND_IN_MODULE
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        if node.value == "cuda":
            self.counts["R2"] += 1
            return ast.copy_location(ast.Constant("cpu"), node)
        if isinstance(node.value, str) and node.value in _TYPE_NAMES:
            self.counts["R3"] += 1
            return ast.copy_location(ast.Constant(_TYPE_NAMES[node.value]), node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
            self.counts["R4"] += 1
            node.func.attr = "cpu"
            node.args, node.keywords = [], []
        self.generic_visit(node)
        return node


def rewrite(source: bytes | str, filename: str) -> tuple[ast.Module, dict[str, int]]:
    """Return the rewritten tree of a module's source and the number of places per rule (rules without a place left out)."""
    rewriter = DeviceRewriter()
    tree = rewriter.visit(ast.parse(source, filename))
    return ast.fix_missing_locations(tree), {rule: count for rule, count in rewriter.counts.items() if count}


def count_package(folder: Path, package: str) -> dict[str, dict[str, int]]:
    """Return the places per rule of every module below ``folder`` that has any, by module name."""
    counted = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        name = ".".join((package, *(parts[:-1] if parts[-1] == "__init__" else parts)))
        _, places = rewrite(path.read_bytes(), str(path))
        if places:
            counted[name] = places
    return counted


def main() -> None:
    """Write the manifest of the installed megatron-core."""
    parser = argparse.ArgumentParser(
        description="Count the places that the CPU host rewrites in the installed megatron-core.", epilog=f"example: {COMMAND}"
    )
    parser.add_argument("--output", type=Path, required=True, help="the manifest to write (JSON)")
    output = parser.parse_args().output
    spec = importlib.util.find_spec("megatron")
    if spec is None or spec.submodule_search_locations is None:
        parser.error("megatron-core is not installed")
    folder = Path(next(iter(spec.submodule_search_locations))) / "core"
    version = importlib.metadata.version("megatron-core")
    output.write_text(render_manifest(version, count_package(folder, "megatron.core")), encoding="ascii")


def render_manifest(version: str, places: dict[str, dict[str, int]]) -> str:
    """Return the manifest as JSON with one module per line."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(counts)}" for name, counts in places.items())
    return f'{{\n "command": {json.dumps(COMMAND)},\n "megatron_core": {json.dumps(version)},\n "places": {{\n{lines}\n }}\n}}\n'


if __name__ == "__main__":
    main()
