"""The hybrid language model: layers by pattern, stages by layout, initial weights by name."""

# Before any module here imports megatron.core, which a host without CUDA has to rewrite first.
import megatron_hybrid.substrate  # noqa: F401
