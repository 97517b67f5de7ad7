"""moesaic: load-adaptive Mixture-of-Experts training. The repository root is the package `moesaic`."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# Tests, and whatever else lies beside these folders, stay out.
FOLDERS = ("runtime", "collectives", "placement", "kernels", "launch", "benchmarks")

setup(
    name="moesaic",
    version="0.1.0",
    description="Load-adaptive Mixture-of-Experts training: fully sharded, sparsely materialized experts",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"moesaic": "."},
    packages=[
        "moesaic",
        *(
            f"moesaic.{package}"
            for package in find_packages(str(ROOT), include=[name for folder in FOLDERS for name in (folder, f"{folder}.*")])
        ),
    ],
    package_data={"moesaic": ["py.typed"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; sys_platform == 'linux'",
        "numpy>=2.0",
        "numba>=0.61",
        "pulp>=3.3",
        "highspy>=1.9",
        "click>=8.1",
        "pydantic>=2.9",
        "tomli-w>=1.1",
        "tqdm>=4.66",
    ],
    extras_require={
        "mpi": ["mpi4py>=4.0", "openmpi>=5.0"],
        "cuda12": ["nvidia-nccl-cu12"],
        "hf": ["transformers>=5.20", "safetensors>=0.5"],
        "report": ["matplotlib>=3.9", "tensorboard>=2.18"],
        "test": [
            "matplotlib>=3.9",
            "mpi4py>=4.0",
            "openmpi>=5.0",
            "pytest>=8.3",
            "hypothesis>=6.110",
            "ruff>=0.12",
            "mypy>=1.15",
        ],
    },
    entry_points={"console_scripts": ["moesaic = moesaic.launch.cli:main"]},
)
