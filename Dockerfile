# GPU image on NVIDIA's PyTorch image, which brings torch and Transformer Engine built for its CUDA. Not built here: this host has no container engine.
# The image's torch has to be 2.11 to 2.13 (setup.py); pass another release with --build-arg BASE_IMAGE=...
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${BASE_IMAGE}

# What all below relies on, in one line of words before anything is installed.
RUN python -c "import torch; release = tuple(int(part) for part in torch.__version__.split('.')[:2]); \
assert (2, 11) <= release <= (2, 13) and torch.version.cuda, f'this image has torch {torch.__version__} for CUDA {torch.version.cuda}; \
megatron-hybrid takes 2.11 to 2.13 with CUDA: pass another --build-arg BASE_IMAGE'"

WORKDIR /workspace/megatron_hybrid
COPY setup.py README.md ./
COPY megatron_hybrid megatron_hybrid
COPY tools tools
COPY examples examples

# The image's Transformer Engine is used only where a run asks for it by name, and then has to be 2.11 (docs/kernels.md); the extra gpu,
# whose packages would be built against the image's torch, is left out: nothing that a run chooses by itself needs it.
# The image constrains every package it ships; of those only torch and what is built against it must stay, the rest follows setup.py.
RUN grep -iE '^(torch|transformer[-_]engine|triton)' /etc/pip/constraint.txt > /tmp/constraint.txt || true \
    && PIP_CONSTRAINT=/tmp/constraint.txt pip install --no-cache-dir --editable ".[logging,huggingface]"

ENTRYPOINT ["python", "-m", "megatron_hybrid"]
