# GPU image: NVIDIA's PyTorch image already holds torch, Transformer Engine and apex built for its CUDA.
FROM nvcr.io/nvidia/pytorch:25.09-py3

WORKDIR /workspace/megatron_hybrid
COPY setup.py README.md ./
COPY megatron_hybrid megatron_hybrid
COPY tools tools
COPY examples examples

# The image's constraint file pins its own torch; our pins of everything else are in setup.py.
RUN pip install --no-cache-dir --editable ".[logging,huggingface]"

ENTRYPOINT ["python", "-m", "megatron_hybrid"]
