"""Launch parameters: those that were measured stay, and what fits no GPU is refused."""

from __future__ import annotations

import pytest
import torch

from megatron_hybrid.ops.triton.launch import OutputLaunch, ProductLaunch, ScanLaunch, SourceLaunch, WalkLaunch, scan_launch
from megatron_hybrid.ops.triton.ssd import choose_launch

WALK, NARROW = WalkLaunch(64, 64, 4, 3), WalkLaunch(16, 128, 2, 3)
MEASURED = {
    (64, 128): ScanLaunch(128, 128, WALK, WALK, OutputLaunch(64, 16, 4, 2), SourceLaunch(64, 8, 2), ProductLaunch(8, 3)),
    (80, 128): ScanLaunch(
        128,
        64,
        WalkLaunch(64, 64, 2, 3),
        WalkLaunch(16, 128, 2, 3),
        OutputLaunch(128, 16, 8, 2),
        SourceLaunch(64, 4, 2),
        ProductLaunch(4, 2),
    ),
    (64, 256): ScanLaunch(128, 64, WALK, WALK, OutputLaunch(64, 8, 4, 2), SourceLaunch(64, 4, 2), ProductLaunch(8, 2)),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="follows the GPU's shared memory; here Hopper's is taken")
@pytest.mark.parametrize("sizes", MEASURED, ids=["8b", "nano-4b", "56b"])
def test_the_measured_models_keep_their_launches(sizes: tuple[int, int]) -> None:
    """Head dim and state; a change of these numbers needs new figures on the cards."""
    assert scan_launch(torch.bfloat16, *sizes) == MEASURED[sizes]


@pytest.mark.parametrize("sizes", [(256, 64), (32, 512), (256, 128), (128, 256)], ids=str)
def test_a_state_that_is_large_along_one_axis_is_not_loaded_ahead(sizes: tuple[int, int]) -> None:
    """What is loaded ahead is a number of stages times a head's values and state, whose product alone says nothing."""
    launch = scan_launch(torch.bfloat16, *sizes)
    assert launch.output.num_stages == launch.source_gradient.num_stages == launch.key_gradient.num_stages == 1
    assert launch.forward_chunk == 64 and launch.backward_chunk == 32


@pytest.mark.parametrize(
    "dtype, sizes", [(torch.bfloat16, (257, 256)), (torch.bfloat16, (16, 1024)), (torch.float32, (65, 256))], ids=["area", "state", "fp32"]
)
def test_what_fits_no_gpu_is_refused_with_the_way_out(dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"head of {sizes[0]} channels with a state of {sizes[1]} .*set kernels.mamba_core=cpu"):
        choose_launch(dtype, *sizes, None)
