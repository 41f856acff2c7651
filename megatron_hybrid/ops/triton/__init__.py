"""The operations as Triton kernels for NVIDIA GPUs, fp32 and bf16; importing a module of this package needs triton.

Registered under the name "triton". On a host without a GPU they run in Triton's interpreter when TRITON_INTERPRET=1 is set before triton
is imported, which is how they are tested there. Nothing here tunes itself at run time: launch parameters stand in `launch.py`, so that
starts are quick and every rank runs the same kernels. No kernel uses atomics, so results repeat bit for bit, and no function waits for
the device or allocates by what it holds, so calls can be captured in CUDA graphs.
"""
