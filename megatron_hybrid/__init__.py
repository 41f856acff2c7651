"""Pretrain hybrid Mamba-2 / attention / MLP language models with 3D parallelism, on megatron-core."""

__version__ = "0.1.0"
