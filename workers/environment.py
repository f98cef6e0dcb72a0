"""What a start of a run ran on: machine, Python, torch, and every package with its version."""

from __future__ import annotations

import platform
from importlib import metadata

import psutil
import torch

ENVIRONMENT_FILE = "environment.txt"


def describe_environment() -> str:
    """A line for each fact, then one for each installed package as `pip freeze` writes it. No variables, no paths."""
    lines = [
        f"platform: {platform.platform()}",
        f"processor: {platform.processor() or platform.machine()}, {psutil.cpu_count()} cores",
        f"memory: {psutil.virtual_memory().total} bytes",
        f"python: {platform.python_version()}",
        f"torch: {torch.__version__}",
        f"cuda: {torch.version.cuda or 'none'}",  # that torch was built for
    ]
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        lines += [f"gpu {number}: {name}" for number, name in enumerate(names)]
        lines += [f"cudnn: {torch.backends.cudnn.version()}"]
    # A package that is being removed has a directory and no name.
    packages = {f"{found.name}=={found.version}" for found in metadata.distributions() if found.name}
    return "\n".join([*lines, "", *sorted(packages, key=str.lower)]) + "\n"
