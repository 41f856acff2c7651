"""Run megatron-core 0.16.1 without CUDA: an import hook that loads ``megatron.core`` with its device words rewritten.

The hook exists only where ``torch.cuda.is_available()`` is false, so that GPU hosts run the wheel as it was published, and it touches
nothing but modules below ``megatron.core``. It refuses another version of megatron-core, and a module whose number of
rewritten places differs from ``rewrite_manifest.json``.

Two settings go with it. ``torch.compile`` would want a C++ compiler, so megatron-core's fuser is switched off as soon as
``megatron.core.jit`` has run, before other modules copy it. And megatron-core warns when the CPU's random state moves
inside its tracker, which is what has to happen here, so that one message is filtered.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import logging
import marshal
import os
import sys
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from types import CodeType, ModuleType

import torch

from megatron_hybrid.substrate import cuda_stand_in, rewrite

MEGATRON_CORE_VERSION = "0.16.1"
_PACKAGE = "megatron.core"
_RNG_MODULE = "megatron.core.tensor_parallel.random"


class HostError(RuntimeError):
    """megatron-core cannot be used on this host as it is installed or imported."""


def install_cpu_host() -> bool:
    """Install the hook where there is no CUDA; return whether it is active. Installing twice changes nothing.

    Raises:
        HostError: megatron-core is missing or not 0.16.1, or was imported before the hook.
    """
    _check_version()
    if torch.cuda.is_available():
        return False
    if any(isinstance(finder, CpuHostFinder) for finder in sys.meta_path):
        return True
    imported = sorted(name for name in sys.modules if _is_ours(name))
    if imported:
        raise HostError(
            f"{imported[0]} was imported before megatron_hybrid.substrate, so it holds CUDA code on a host without CUDA; "
            "import megatron_hybrid.substrate first"
        )
    manifest = json.loads(resources.files("megatron_hybrid.substrate").joinpath("rewrite_manifest.json").read_text(encoding="ascii"))
    if manifest["megatron_core"] != MEGATRON_CORE_VERSION:
        raise HostError(
            f"the rewrite manifest is of megatron-core {manifest['megatron_core']}, this code of {MEGATRON_CORE_VERSION}; "
            f"write it anew with: {rewrite.COMMAND}"
        )
    logging.getLogger(_RNG_MODULE).addFilter(_is_no_rng_warning)
    sys.meta_path.insert(0, CpuHostFinder(manifest["places"]))
    return True


class CpuHostFinder(importlib.abc.MetaPathFinder):
    """Finds the modules of megatron-core as Python does, and gives them the rewriting loader."""

    def __init__(self, places: dict[str, dict[str, int]]) -> None:
        self._places = places

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not _is_ours(fullname):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = RewritingLoader(fullname, spec.loader.path, self._places.get(fullname, {}))
            spec.cached = None
        return spec


class RewritingLoader(importlib.machinery.SourceFileLoader):
    """Compiles one module from its rewritten tree, after comparing the rewritten places with the expected ones."""

    def __init__(self, fullname: str, path: str, expected_places: dict[str, int]) -> None:
        super().__init__(fullname, path)
        self._expected_places = expected_places

    def get_code(self, fullname: str) -> CodeType:
        source = self.get_data(self.path)
        cached = _cache_path(source, self.path, self._expected_places)
        try:
            return marshal.loads(cached.read_bytes())
        except (OSError, ValueError, EOFError, TypeError):
            pass
        code = self._compile(source)
        _write_cache(cached, code)
        return code

    def _compile(self, source: bytes) -> CodeType:
        tree, places = rewrite.rewrite(source, self.path)
        if places != self._expected_places:
            raise HostError(
                f"{self.name} has {places or 'no'} places to rewrite for the CPU, expected {self._expected_places or 'none'} "
                f"(megatron-core {MEGATRON_CORE_VERSION}); {self.path} is not the published file, reinstall "
                f"megatron-core=={MEGATRON_CORE_VERSION}"
            )
        return compile(tree, self.path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        setattr(module, rewrite.STAND_IN_NAME, cuda_stand_in)
        super().exec_module(module)
        if self.name == "megatron.core.jit":
            module.disable_jit_fuser()


def _is_ours(module_name: str) -> bool:
    return module_name == _PACKAGE or module_name.startswith(_PACKAGE + ".")


def _is_no_rng_warning(record: logging.LogRecord) -> bool:
    return record.msg != "CPU RNG state changed within GPU RNG context"


def _check_version() -> None:
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    if version != MEGATRON_CORE_VERSION:
        raise HostError(
            f"megatron-core {version} is installed, this code needs {MEGATRON_CORE_VERSION}; "
            f"pip install megatron-core=={MEGATRON_CORE_VERSION}"
        )


def _cache_path(source: bytes, path: str, expected_places: dict[str, int]) -> Path:
    """Bytecode of exactly this source, rewritten by exactly these rules, checked against exactly this manifest entry."""
    digest = hashlib.sha256(importlib.util.MAGIC_NUMBER + Path(rewrite.__file__).read_bytes())
    digest.update(json.dumps([path, expected_places]).encode() + source)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "megatron_hybrid" / "megatron_core_on_cpu" / f"{digest.hexdigest()}.{sys.implementation.cache_tag}.bin"


def _write_cache(path: Path, code: CodeType) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(marshal.dumps(code))
        os.replace(file.name, path)
    except OSError:
        # A read-only or full home costs start-up time, nothing else.
        pass
