"""The machine, the versions and the commit that a run is from."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import fused_ops

ROOT = Path(__file__).resolve().parent.parent
LOCAL_RESULTS = ROOT / "benchmarks" / "results" / "local"


def describe(device: torch.device) -> dict[str, Any]:
    """All that a figure needs beside it to mean something."""
    return {
        "device": device.type,
        "device_name": device_name(device),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "fused_ops": fused_ops.__version__,
        "backend": fused_ops.get_backend(),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **commit(),
    }


def pick_device(name: str | None) -> torch.device:
    """The device of that name, or the GPU if there is one; ValueError for what the benchmark cannot time."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"the device must be cpu or cuda, but is {device}")
    if device.type == "cuda":
        if ":" not in str(device):
            device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(device)  # events and graphs belong to the current one
    return device


def device_name(device: torch.device) -> str:
    """The model of the GPU, or of the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """The model of the CPU, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()


def commit() -> dict[str, Any]:
    """The commit of the sources and whether they differ from it; None where they are no git checkout."""
    revision = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain")
    return {"commit": revision or None, "dirty": None if status is None else bool(status)}


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def stamp(environment: dict[str, Any]) -> str:
    """A name for files of this run: the kind of device and the time."""
    return f"{environment['device']}-{environment['time'][:19].replace(':', '').replace('-', '').replace('T', '-')}"


def sentence(environment: dict[str, Any]) -> str:
    """Which machine the figures are from."""
    versions = ", ".join(f"{name} {environment[name]}" for name in ("torch", "triton", "python") if environment[name])
    revision = (environment["commit"] or "unknown")[:10] + (" (changed since)" if environment["dirty"] else "")
    if environment["device"] == "cpu":
        where = f"CPU {environment['device_name']}, threads {environment['threads']} of {environment['cores']} cores"
        if environment["load_average"] is not None:
            where += f" (load average before the run {environment['load_average']})"
    else:
        where = f"GPU {environment['device_name']}, CUDA {environment['cuda']}"
    return f"{where}; {versions}; fused_ops {environment['fused_ops']}, commit {revision}"


def device_and_date(environment: dict[str, Any]) -> str:
    """What a run is called by people."""
    return f"{environment['device_name']}, {environment['time'][:10]}"


def slug(environment: dict[str, Any]) -> str:
    """The same for a file."""
    return re.sub(r"[^a-z0-9]+", "-", device_and_date(environment).lower()).strip("-")
