"""Triton kernels; each stands beside a specification in plain torch and is tested against it."""
