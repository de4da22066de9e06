"""What the CUDA tools that come with Triton say of a compiled kernel."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton


def resources(cubin: bytes, kernel: str) -> tuple[int, int]:
    """(registers, spilled bytes) of a thread."""
    usage = _printed(triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin, kernel)
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    if found.keys() != {"REG", "STACK", "LOCAL"}:
        raise RuntimeError(f"cuobjdump must print REG, STACK and LOCAL of {kernel}, but printed {usage!r}")
    return found["REG"], found["STACK"] + found["LOCAL"]


def machine_code(cubin: bytes, kernel: str) -> str:
    """Its SASS."""
    return _printed(triton.knobs.nvidia.nvdisasm.path, "-c", cubin, kernel)


def _printed(program: Any, option: str, cubin: bytes, kernel: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        Path(binary.name).write_bytes(cubin)
        done = subprocess.run([program, option, binary.name], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{program} {option} of {kernel} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout
