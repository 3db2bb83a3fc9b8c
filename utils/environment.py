"""What a result depends on beside its configuration: versions, commit, device."""

import os
import platform
import subprocess
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from utils.errors import InputError

PACKAGES = (
    "torch", "torchvision", "timm", "transformers", "tokenizers", "datasets", "hydra-core", "omegaconf",
    "safetensors", "fvcore", "scikit-learn", "numpy",
)  # fmt: skip


def resolve_device(name: str) -> torch.device:
    """Turn `auto`, `cpu` or `cuda` into a device.

    Raises:
        InputError: If `cuda` is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device=cuda: no CUDA device is available here; use device=cpu or device=auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def dtype_of(name: str, stored: torch.dtype) -> torch.dtype:
    """Turn `float32` or `bfloat16` into a dtype; `auto` is the one the weights came in."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "auto": stored}[name]


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that numbers depend on, and the git commit."""
    return {"python": platform.python_version(), "pare": _commit()} | package_versions(PACKAGES)


def package_versions(names: Iterable[str]) -> dict[str, str | None]:
    """Versions of packages by name; None for one that is not installed."""
    return {name: _version(name) for name in names}


def describe_device(device: torch.device) -> dict[str, str | int]:
    """Type and name of a device, and the number of CPU threads in use."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"type": device.type, "name": name, "cpu_threads": torch.get_num_threads(), "cpu_count": os.cpu_count() or 0}


@lru_cache(maxsize=256)
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@lru_cache(maxsize=1)
def _commit() -> str | None:
    """The commit that this process started from; the jobs of a sweep share it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
