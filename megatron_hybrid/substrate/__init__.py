"""Where a run executes: device, process groups, RNG, launching ranks, and megatron-core with or without CUDA.

Importing this package installs the CPU host (see ``cpu_host``) where there is no CUDA, which has to come before the first import of
``megatron.core``. It does not import megatron-core itself; ``groups`` and ``transformer_config`` do.
"""

from megatron_hybrid.substrate.context import Substrate
from megatron_hybrid.substrate.cpu_host import HostError, install_cpu_host
from megatron_hybrid.substrate.exit_codes import ExitCode
from megatron_hybrid.substrate.signals import StopRequest

__all__ = ["ExitCode", "HostError", "StopRequest", "Substrate"]

install_cpu_host()
