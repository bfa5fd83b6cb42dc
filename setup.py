"""Package definition; tools (ruff, mypy, pytest) are configured in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """The version as it stands in the package, without importing it."""
    text = (ROOT / "deadpool_megatron" / "__init__.py").read_text()
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise SystemExit('setup.py: no line __version__ = "..." in deadpool_megatron/__init__.py')
    return found.group(1)


def long_description() -> str:
    """README.md, where there is one."""
    readme = ROOT / "README.md"
    return readme.read_text() if readme.exists() else ""


setup(
    name="deadpool-megatron",
    version=version(),
    description="Megatron-LM pre-training that survives the permanent loss of nodes without ending the job",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["deadpool_megatron", "deadpool_megatron.*"]),
    package_data={"deadpool_megatron": ["py.typed", "judged.txt", "patches/*.patch", "examples/*"]},
    python_requires=">=3.12",
    install_requires=[
        "torch>=2.11",
        "megatron-core>=0.18,<0.21",
        "pyzmq",
        "msgspec",
        "xxhash",
        "fsspec",
        "psutil",
        "rich",
        "numpy",
        "prometheus-client",
        "PyYAML",
    ],
    extras_require={
        "te": ["transformer-engine[pytorch]"],
        "emulation": ["pydantic", "onnxscript"],  # of Transformer Engine's Python, which has a folder of its own
        "parity": ["pyeclib"],
        "rdma": ["nixl>=1.3"],
        "etcd": ["urllib3>=2"],
        "plots": ["matplotlib"],
        "baselines": ["torchft>=0.2"],
        "muon": ["emerging-optimizers>=0.2"],
        "dev": [
            *["pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "types-PyYAML", "types-psutil", "jsonschema"],
            *["pyeclib", "matplotlib", "nixl", "safetensors", "tensorboard", "einops", "emerging-optimizers"],
            *["urllib3", "pydantic", "onnxscript"],
        ],
    },
    entry_points={"console_scripts": ["deadpool = deadpool_megatron.cli:main"]},
)
