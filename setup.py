"""Packaging of dpt."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1] for line in (HERE / "dpt" / "__init__.py").read_text().splitlines() if line.startswith("__version__")
)

setup(
    name="dpt",
    version=VERSION,
    description="Diffusion Transformers, dense and Mixture-of-Experts, trained on DeepSpeed for images and perception.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["dpt", "dpt.*", "data_tools", "data_tools.*"]),
    package_data={"dpt": ["assets/**/*"]},
    install_requires=[
        "torch>=2.10",  # the first with torch.nn.attention.activate_flash_attention_impl and torch.nn.functional.grouped_mm
        "deepspeed>=0.19,<0.20",  # dpt/training/deepspeed_internals.py lists what it relies on inside
        "diffusers>=0.36",
        "huggingface_hub>=0.34",  # what that diffusers asks for, too
        "webdataset>=1.0.2",
        "mlflow>=3.0",
        "numpy>=2.0",
        "braceexpand>=0.1.7",
        "safetensors>=0.5",
        "jsonargparse[signatures]>=4.40",
        "scipy>=1.13",
        "pyarrow>=18",
        "pillow>=11",
        "h5py>=3.12",
        "matplotlib>=3.9",
        "scikit-image>=0.24",
        "scikit-learn>=1.5",
        "tqdm>=4.66",
        "PyYAML>=6",
        "ninja>=1.11",
    ],
    extras_require={
        "flash": ["flash-attn>=2.8"],
        "clip": ["transformers>=5.0"],
        "video": ["av>=14"],
        "test": [
            "pytest>=9",
            "pytest-xdist>=3.6",
            "av>=14",
            "hypothesis>=6.100",
            "torchmetrics>=1.6",
            "transformers>=5.0",
            "ruff>=0.17",
            "mypy>=2.0",
        ],
        "docs": ["mkdocs>=1.6"],
    },
    entry_points={"console_scripts": ["dpt = dpt.cli:main"]},
)
