"""The one place that states every version this project is built and tested with."""

from setuptools import find_packages, setup

setup(
    name="megatron-hybrid",
    version="0.1.0",
    description="Pretrain hybrid Mamba-2 / attention / MLP language models with 3D parallelism, on megatron-core",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["megatron_hybrid*", "vision_agglom*", "tools*"]),
    package_data={
        "megatron_hybrid.config": ["presets/*.yaml"],
        "megatron_hybrid.ops": ["*.json"],
        "megatron_hybrid.substrate": ["*.json"],
        "vision_agglom.config": ["presets/*.yaml"],
    },
    install_requires=[
        # CPU hosts pin torch below (extra "cpu"); a GPU host brings the build that fits its driver.
        "torch>=2.11,<2.14",
        "megatron-core==0.16.1",
        "numpy==2.2.6; python_version < '3.11'",
        "numpy==2.4.6; python_version >= '3.11'",
        "einops==0.8.2",
        "psutil==7.2.2",
        "pydantic==2.14.3",
        "PyYAML==6.0.3",
        "sentencepiece==0.2.3",
        "protobuf==7.36.2",
        "tokenizers==0.23.3",
        "tqdm==4.70.1",
        "matplotlib==3.10.8; python_version < '3.11'",
        "matplotlib==3.11.2; python_version >= '3.11'",
    ],
    extras_require={
        "cpu": ["torch==2.13.0"],
        # With a network and CUDA. megatron-core 0.16.1 asks for Transformer Engine below 2.12; NVIDIA's apex is not needed.
        # All three build against the torch that is there: install torch first, then this with --no-build-isolation (docs/kernels.md).
        "gpu": ["transformer-engine[pytorch]==2.11.0", "mamba-ssm==2.3.2.post1", "causal-conv1d==1.7.0"],
        "logging": ["tensorboard==2.21.0"],
        "serve": ["starlette==1.10.0", "uvicorn==0.54.0", "jinja2==3.1.6"],
        "evaluate": ["lm_eval==0.4.13"],
        "huggingface": [
            "transformers==5.20.2; python_version < '3.11'",
            "transformers==5.23.0; python_version >= '3.11'",
        ],
        "minipuzzle": ["PuLP==3.3.2", "safetensors==0.8.0"],
        "vision": [
            "pillow==12.3.0; python_version < '3.11'",
            "pillow==13.0.0; python_version >= '3.11'",
            "scikit-image==0.25.2; python_version < '3.11'",
            "scikit-image==0.26.0; python_version >= '3.11'",
            "scikit-learn==1.7.2; python_version < '3.11'",
            "scikit-learn==1.9.1; python_version >= '3.11'",
            "onnx==1.23.2",
            "onnxruntime==1.23.2; python_version < '3.11'",
            "onnxruntime==1.32.0; python_version >= '3.11'",
            "onnxscript==0.7.2",
        ],
        # Both import torchvision, which must fit the host's torch; CPU hosts need neither.
        "teachers": ["timm==1.0.31", "open_clip_torch==3.3.0"],
        # Triton's interpreter runs the kernels' tests on CPU hosts; a GPU host has the one its torch was built with.
        # nvidia-modelopt is what MiniPuzzle is compared with. Later versions prune megatron-core models only beside Transformer Engine
        # (0.44) or a newer megatron-core (0.47).
        "test": [
            "pytest==9.2.0",
            "pytest-xdist==3.8.0",
            "ruff==0.17.6",
            "safetensors==0.8.0",
            "openai==3.57.0",
            "triton==3.7.1; platform_system == 'Linux'",
            "nvidia-modelopt==0.43.0",
        ],
    },
)
