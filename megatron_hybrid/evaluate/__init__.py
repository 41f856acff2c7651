"""Benchmarks of language models, by EleutherAI's lm-evaluation-harness."""

# Before any module here imports megatron.core, which a host without CUDA has to rewrite first.
import megatron_hybrid.substrate  # noqa: F401
