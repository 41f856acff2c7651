"""Agglomerative vision students (RADIO): one ViT distilled from several frozen teachers, on megatron_hybrid's substrate and trainer."""
