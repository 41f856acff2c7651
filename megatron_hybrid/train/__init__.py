"""The trainer: the loop, the step, the optimizer, the schedule, and what may watch them."""

# Before any module here imports megatron.core, which a host without CUDA has to rewrite first.
import megatron_hybrid.substrate  # noqa: F401
