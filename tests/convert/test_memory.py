"""Peak memory stays below twice the largest tensor and one gigabyte, whatever the model's size, verdict included."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_hybrid.convert.correspondence import correspondences
from megatron_hybrid.convert.hub import HubWriter
from megatron_hybrid.convert.hub_config import hub_from_model, model_from_hub
from megatron_hybrid.convert.specs import TensorSpec
from tests.convert.checkpoints import CONFIG

MODEL = {
    "hidden_size": 4096,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "mamba_num_heads": 128, "mamba_head_dim": 64, "n_groups": 8,
    "ssm_state_size": 128,
}  # fmt: skip
SHAPES = {
    "vocabulary": {"vocab_size": 32000, "intermediate_size": 16384, "hybrid_override_pattern": "M-M*-M-"},
    "MLP": {"vocab_size": 512, "intermediate_size": 32768, "hybrid_override_pattern": "M*-"},
}
"""Models by what their largest tensor belongs to: the whole model has two of the first kind, every MLP layer two of the second."""
MEASURE = """
import sys
from pathlib import Path
from tools.convert_checkpoint import main
code = main(sys.argv[1:])
(peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
print(peak)
sys.exit(code)
"""
"""The peak of the command's own memory. getrusage's ru_maxrss would not do: over fork and exec it keeps the peak of this process, in which
the model is made. Pages of libraries count."""


def write_large(path: Path, shape: str) -> tuple[int, int]:
    """A bf16 NemotronH, written tensor by tensor; returns its bytes and those of its largest tensor."""
    model = model_from_hub({**CONFIG, **MODEL, **SHAPES[shape]})
    specs = {
        tensor.name: TensorSpec(tensor.shape, torch.float32 if each.is_fp32 else torch.bfloat16)
        for each in correspondences(model)
        for tensor in each.hub
    }
    path.mkdir()
    writer = HubWriter(path, specs, style="hub", shard_bytes=10**9)
    generator = torch.Generator().manual_seed(0)
    for name, spec in specs.items():
        writer.write(name, (torch.randn(spec.shape, generator=generator, dtype=torch.float32) / spec.shape[-1] ** 0.5).to(spec.dtype))
    writer.finish(hub_from_model(model, style="hub", dtype="bfloat16", max_position_embeddings=8192, token_ids={}))
    sizes = [spec.size_bytes for spec in specs.values()]
    return sum(sizes), max(sizes)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.slow
def test_peak_memory_is_bounded_by_the_largest_tensor(shape: str, tmp_path: Path) -> None:
    total, largest = write_large(tmp_path / "hf", shape)
    assert total > 3 * largest
    # Cut for tensor ranks, so that the way back puts tensors together from parts.
    there, back = ["--from", "hf", "--to", "native", "--tensor", "8"], ["--from", "native", "--to", "hf"]
    for options, source, target in ((there, "hf", "native"), (back, "native", "back")):
        command = [sys.executable, "-c", MEASURE, *options, str(tmp_path / source), str(tmp_path / target)]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        peak = int(result.stdout.split()[-2]) * 1024
        print(f"{' '.join(options)}: {total:,} bytes, largest tensor {largest:,}, peak {peak:,}\n{result.stdout}")
        assert peak < 2 * largest + 10**9
