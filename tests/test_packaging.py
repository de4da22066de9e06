"""What is built: one top level, the kernels as real files, and a package that works without Triton."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "results")

# The build backend called as pip calls it, without pip: no isolation, no network.
BUILD = """
import sys
from setuptools import build_meta

_, kind, folder = sys.argv
print(getattr(build_meta, f"build_{kind}")(folder))
"""


def why_nothing_can_be_built() -> str | None:
    if importlib.util.find_spec("setuptools") is None:
        return "setuptools is absent"
    version = metadata.version("setuptools")
    builds_wheels = tuple(map(int, version.split(".")[:2])) >= (70, 1)
    if not builds_wheels and importlib.util.find_spec("wheel.bdist_wheel") is None:
        return f"setuptools {version} needs a `wheel` package of its time to build one"
    return None


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build in: a build leaves build/ and an egg-info beside its sources."""
    reason = why_nothing_can_be_built()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("build") / "tree"
    shutil.copytree(ROOT, folder, symlinks=True, ignore=LEFT_OUT)
    return folder


def run_python(*arguments: str, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "FUSED_OPS_BACKEND"}
    command = [sys.executable, "-c", *arguments]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def build(tree: Path, kind: str) -> Path:
    return tree.parent / run_python(BUILD, kind, str(tree.parent), cwd=tree).splitlines()[-1]


def kernel_files() -> set[str]:
    files = {f"fused_ops/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
    assert files, f"{ROOT / 'kernels'} holds no module"
    return files


def package_files() -> set[str]:
    """What belongs to the package: its modules, the kernels', and py.typed."""
    own = {str(path.relative_to(ROOT)) for path in (ROOT / "fused_ops").rglob("*.py")}
    return own | kernel_files() | {"fused_ops/py.typed"}


def test_wheel_holds_fused_ops_alone(tree: Path) -> None:
    with zipfile.ZipFile(build(tree, "wheel")) as wheel:
        entries = wheel.infolist()
        sources = {entry.filename: wheel.read(entry) for entry in entries if entry.filename in kernel_files()}
    names = {entry.filename for entry in entries}
    top_levels = {re.sub(r"-[\d.]+\.dist-info$", ".dist-info", name.split("/")[0]) for name in names}
    assert top_levels == {"fused_ops", "fused_ops.dist-info"}
    assert {name for name in names if name.startswith("fused_ops/")} == package_files()
    # A symlink in a zip is an entry whose bytes are the path it points to.
    for name, source in sources.items():
        assert source == (ROOT / name).read_bytes(), f"{name} in the wheel is not the file in the checkout"


def test_sdist_builds_the_same_wheel(tree: Path, tmp_path: Path) -> None:
    with tarfile.open(build(tree, "sdist")) as sdist:
        members = {member.name.split("/", 1)[-1]: member for member in sdist.getmembers()}
        assert all(members[name].isfile() for name in package_files())
        sdist.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    with zipfile.ZipFile(build(unpacked, "wheel")) as wheel:
        assert {name for name in wheel.namelist() if name.startswith("fused_ops/")} == package_files()
