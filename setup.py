"""moesaic: load-adaptive Mixture-of-Experts training. The repository root is the package `moesaic`."""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
# Tests, and whatever else lies beside these folders, stay out.
FOLDERS = ("jit", "runtime", "collectives", "placement", "kernels", "launch", "integrations", "benchmarks")
(VERSION,) = re.findall(r'^__version__ = "(.+)"$', (ROOT / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)


class BuildModules(build_py):
    """Leaves this file out, which lies in the package's folder."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """The modules of a package, as (package, module, file)."""
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if module[:2] != ("moesaic", "setup")]


setup(
    name="moesaic",
    version=VERSION,
    description="Load-adaptive Mixture-of-Experts training: fully sharded, sparsely materialized experts",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords=["mixture of experts", "expert parallelism", "load balancing", "distributed training", "pytorch"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    cmdclass={"build_py": BuildModules},
    package_dir={"moesaic": "."},
    packages=[
        "moesaic",
        *(
            f"moesaic.{package}"
            for package in find_packages(str(ROOT), include=[name for folder in FOLDERS for name in (folder, f"{folder}.*")])
        ),
    ],
    package_data={"moesaic": ["py.typed"], "moesaic.benchmarks": ["*.sh"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; sys_platform == 'linux'",
        "numpy>=2.0",
        "numba>=0.61",
        "pulp>=3.3.1",
        "highspy>=1.9",
        "click>=8.1",
        "pydantic>=2.9",
        "tomli-w>=1.1",
        "tqdm>=4.66",
    ],
    extras_require={
        "mpi": ["mpi4py>=4.0", "openmpi>=5.0"],
        "cbc": ["pulp[cbc]; python_version >= '3.12'"],
        "cuda12": ["nvidia-nccl-cu12"],
        "hf": ["transformers>=5.20", "safetensors>=0.5"],
        "loops": ["transformers>=5.23", "safetensors>=0.5", "accelerate>=1.15"],
        "report": ["matplotlib>=3.9", "tensorboard>=2.18"],
        "docs": ["mkdocs>=1.6", "mkdocs-material>=9.6"],
        "test": [
            "matplotlib>=3.9",
            "mkdocs>=1.6",
            "mkdocs-material>=9.6",
            "mpi4py>=4.0",
            "openmpi>=5.0",
            "peft>=0.21",
            "pulp[cbc]; python_version >= '3.12'",
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.110",
            "accelerate>=1.15",
            "datasets>=4.0",
            "trl>=1.16",
            "ruff>=0.12",
            "mypy>=1.15",
        ],
    },
    entry_points={"console_scripts": ["moesaic = moesaic.launch.cli:main"]},
)
