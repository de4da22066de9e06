"""Metadata of fused-ops; the build system and the tools' settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="fused-ops",
    version="0.1.0",
    description="Normalization fused with residual add and activation: Triton kernels, torch.nn interfaces",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The fused-ops authors",
    license="MIT",
    python_requires=">=3.10,<3.14",
    # The source folder kernels/ reaches the wheel through the symlink fused_ops/kernels: a top level of that
    # name would overwrite another project's package.
    packages=find_packages(include=["fused_ops", "fused_ops.*"]),
    package_data={"fused_ops": ["py.typed"]},
    install_requires=[
        "torch>=2.11,<2.16",
        "numpy",
        'triton>=3.6,<3.10; platform_system == "Linux"',
    ],
    extras_require={
        "test": ["pytest>=8", "pytest-benchmark>=4", "pytest-xdist>=3", "hypothesis>=6", "scikit-learn>=1.3"],
        "bench": ["jinja2>=3", "matplotlib>=3.7", "tqdm>=4.60", "scikit-learn>=1.3"],
        "lint": ["ruff>=0.15", "mypy>=1.15"],
        "models": ["timm>=1.0", "torchvision", "transformers>=4.56"],  # whose models the tests of fuse take
    },
    zip_safe=False,  # a type checker reads py.typed and Triton reads its kernels' source as files
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
