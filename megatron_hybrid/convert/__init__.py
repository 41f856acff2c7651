"""Checkpoints in and out of Hugging Face NemotronH and Megatron-LM, tensor by tensor, with a verdict at the end."""

# Before any module here imports megatron.core, which a host without CUDA has to rewrite first.
import megatron_hybrid.substrate  # noqa: F401
