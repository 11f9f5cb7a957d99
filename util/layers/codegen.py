"""Needs of generated code, torch.compile's and Triton's, on this machine."""

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

import torch

# Triton's code runs on GPUs from this compute capability on.
OLDEST_GPU = (7, 0)


def missing_for_compile(device: torch.device) -> str:
    """The first thing that torch.compile lacks here to generate code for a device; "" if none."""
    name, programs = (
        ("CC", ("gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++", "clang++"))
    )
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "Triton (pip install triton)"
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_GPU:
            return f"a GPU of compute capability {'.'.join(map(str, OLDEST_GPU))} or newer"
    given = os.environ.get(name)
    if not any(map(shutil.which, [given] if given else programs)):
        return f"a compiler ({given or ' or '.join(programs)}: apt-get install g++)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python's headers (Python.h: apt-get install python3-dev)"
    return ""
