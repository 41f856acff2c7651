"""Without CUDA, megatron.core is loaded with its device words rewritten, and nothing else in the process changes."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import torch

from megatron_hybrid.substrate import HostError, cuda_stand_in, install_cpu_host, rewrite
from megatron_hybrid.substrate.cpu_host import MEGATRON_CORE_VERSION, CpuHostFinder, RewritingLoader

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="the hook is not there beside CUDA")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120, check=False)


def manifest() -> dict[str, dict[str, int]]:
    return json.loads(resources.files("megatron_hybrid.substrate").joinpath("rewrite_manifest.json").read_text())["places"]


@pytest.mark.parametrize(
    ("source", "rewritten", "places"),
    [
        ("torch.cuda.current_device()", f"{rewrite.STAND_IN_NAME}.current_device()", {"R1": 1}),
        ("from torch.cuda import _lazy_call", f"from {rewrite.STAND_IN_MODULE} import _lazy_call", {"R1": 1}),
        ("torch.zeros(1, device='cuda')", "torch.zeros(1, device='cpu')", {"R2": 1}),
        ("x.type() == 'torch.cuda.HalfTensor'", "x.type() == 'torch.HalfTensor'", {"R3": 1}),
        ("y = x.cuda(torch.cuda.current_device())", "y = x.cpu()", {"R4": 1}),
        ("cuda = 'cuda:0' + x.cuda + mytorch.cuda", "cuda = 'cuda:0' + x.cuda + mytorch.cuda", {}),
    ],
)
def test_rewrite_rules(source: str, rewritten: str, places: dict[str, int]) -> None:
    tree, counted = rewrite.rewrite(source, "example.py")
    assert ast.unparse(tree) == rewritten
    assert counted == places


def test_the_manifest_covers_the_installed_megatron_core() -> None:
    folder = Path(next(iter(importlib.util.find_spec("megatron").submodule_search_locations))) / "core"
    assert manifest() == rewrite.count_package(folder, "megatron.core")


def test_a_module_with_other_places_than_the_manifest_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "clip_grads.py"
    path.write_text("import torch\ntorch.cuda.synchronize()\n")
    with pytest.raises(HostError, match=r"megatron.core.clip_grads has \{'R1': 1\} places .* expected none .*reinstall megatron-core=="):
        RewritingLoader("megatron.core.clip_grads", str(path), {}).get_code("megatron.core.clip_grads")
    with pytest.raises(HostError, match=r"expected \{'R1': 2\}"):
        RewritingLoader("megatron.core.clip_grads", str(path), {"R1": 2}).get_code("megatron.core.clip_grads")


def test_rewritten_code_is_cached_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "module.py"
    loader = RewritingLoader("megatron.core.module", str(path), {"R2": 1})

    def value() -> str:
        namespace: dict[str, str] = {}
        exec(loader.get_code("megatron.core.module"), namespace)
        return namespace["device"]

    path.write_text("device = 'cuda'\n")
    assert value() == value() == "cpu"
    (cached,) = (tmp_path / "cache").rglob("*.bin")
    cached.write_bytes(cached.read_bytes()[:7])
    assert value() == "cpu"
    path.write_text("device = 'cuda' + '!'\n")
    assert value() == "cpu!"


def test_a_read_only_home_costs_only_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = tmp_path / "module.py"
    path.write_text("x = 1\n")
    assert RewritingLoader("megatron.core.module", str(path), {}).get_code("megatron.core.module") is not None


@pytest.mark.parametrize("version", ["0.16.0", "0.17.0", None])
def test_another_megatron_core_is_refused(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(package: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return version

    monkeypatch.setattr(importlib.metadata, "version", find)
    with pytest.raises(HostError, match=rf"{version or 'none'} is installed.*pip install megatron-core=={MEGATRON_CORE_VERSION}"):
        install_cpu_host()


@without_cuda
def test_installing_twice_changes_nothing() -> None:
    before = list(sys.meta_path)
    assert install_cpu_host()
    assert sys.meta_path == before
    assert sum(isinstance(finder, CpuHostFinder) for finder in before) == 1


@without_cuda
def test_megatron_core_imported_too_early_is_refused() -> None:
    done = run_python("import megatron.core.enums, megatron_hybrid.substrate")
    assert done.returncode == 1
    assert "megatron.core was imported before megatron_hybrid.substrate" in done.stderr


def test_beside_cuda_nothing_is_installed() -> None:
    done = run_python(
        "import sys, torch; before = list(sys.meta_path); torch.cuda.is_available = lambda: True\n"
        "import megatron_hybrid.substrate; assert sys.meta_path == before\n"
        "import megatron.core.enums; print(type(megatron.core.enums.__loader__).__name__)"
    )
    assert done.stdout.strip() == "SourceFileLoader", done.stderr


@without_cuda
def test_torch_is_untouched() -> None:
    done = run_python(
        "import torch, sys\n"
        "modules = [module for name, module in sys.modules.items() if name.split('.')[0] == 'torch']\n"
        "contents = lambda: {module.__name__: {k: id(v) for k, v in vars(module).items() if callable(v)} for module in modules}\n"
        "tensor = lambda: {k: id(v) for k, v in vars(torch.Tensor).items()}\n"
        "before, tensor_before = contents(), tensor()\n"
        "import megatron_hybrid.substrate, megatron.core, megatron.core.pipeline_parallel, megatron.core.optimizer\n"
        "after = contents()\n"
        "changed = [(m, k) for m in before for k in before[m] if before[m][k] != after[m].get(k)]\n"
        "assert not changed and tensor() == tensor_before, changed\n"
        "assert not torch.cuda.is_available()\n"
        "import megatron.core.jit; assert megatron.core.jit.jit_fuser is megatron.core.jit.noop_decorator\n"
        "import json; assert json.__loader__.__class__.__name__ == 'SourceFileLoader'"
    )
    assert done.returncode == 0, done.stderr


@without_cuda
def test_tracebacks_point_into_the_installed_file() -> None:
    from megatron.core import parallel_state

    code = parallel_state.initialize_model_parallel.__code__
    source = Path(parallel_state.__file__).read_text().splitlines()
    assert source[code.co_firstlineno - 1].startswith("def initialize_model_parallel(")


def test_what_a_cpu_cannot_do_is_refused() -> None:
    with pytest.raises(AttributeError, match="torch.cuda.get_device_properties"):
        cuda_stand_in.get_device_properties(0)
    with pytest.raises(RuntimeError, match="torch.cuda.CUDAGraph"):
        cuda_stand_in.CUDAGraph()


def test_events_measure_time() -> None:
    start, end = cuda_stand_in.Event(enable_timing=True), cuda_stand_in.Event(enable_timing=True)
    start.record()
    end.record()
    assert 0 <= start.elapsed_time(end) < 1000


@without_cuda
def test_random_tracker_forks_and_restores_the_cpu_generator(caplog: pytest.LogCaptureFixture) -> None:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    states = tracker.get_states()
    try:
        tracker.reset()
        torch.manual_seed(1)
        expected = torch.rand(2)
        torch.manual_seed(2)
        inside = torch.rand(2)
        torch.manual_seed(1)
        tracker.add("test", 2)
        with tracker.fork("test"):
            first = torch.rand(1)
        with tracker.fork("test"):
            second = torch.rand(1)
        assert torch.equal(torch.rand(2), expected)
        assert torch.equal(torch.cat([first, second]), inside)
        assert not caplog.records
    finally:
        tracker.reset()
        tracker.set_states(states)


@without_cuda
def test_recomputed_dropout_is_the_same_dropout() -> None:
    from megatron.core.tensor_parallel.random import checkpoint

    def layer(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(x, 0.5) ** 2

    gradients = []
    for run in (layer, lambda x: checkpoint(layer, False, x)):
        torch.manual_seed(3)
        x = torch.linspace(0.0, 1.0, 64, requires_grad=True)
        run(x).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
