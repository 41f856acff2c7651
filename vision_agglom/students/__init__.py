"""The student: a Vision Transformer on megatron_hybrid's seams, cut over tensor, sequence and pipeline ranks, any resolution per batch."""

# Before any module here imports megatron.core, which a host without CUDA has to rewrite first.
import megatron_hybrid.substrate  # noqa: F401
