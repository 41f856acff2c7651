# GPU image on NVIDIA's PyTorch image, which brings torch and Transformer Engine built for its CUDA. Not built here: this host has no container engine.
# The image's torch has to be 2.11 to 2.13 (setup.py); pass another release with --build-arg BASE_IMAGE=...
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${BASE_IMAGE}

WORKDIR /workspace/megatron_hybrid
COPY setup.py README.md ./
COPY megatron_hybrid megatron_hybrid
COPY tools tools
COPY examples examples

# The image constrains every package it ships; of those only torch and what is built against it must stay, the rest follows setup.py.
RUN grep -iE '^(torch|transformer[-_]engine|triton)' /etc/pip/constraint.txt > /tmp/constraint.txt || true \
    && PIP_CONSTRAINT=/tmp/constraint.txt pip install --no-cache-dir --editable ".[logging,huggingface]"

ENTRYPOINT ["python", "-m", "megatron_hybrid"]
