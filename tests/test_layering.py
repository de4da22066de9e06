"""Layers run one way, benchmarks -> fused_ops -> kernels, and the reference stands alone."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STANDARD_LIBRARY = frozenset(sys.stdlib_module_names)
LINE_LIMIT = 400

# Beside the standard library, all that the modules of a layer may import.
ALLOWED = {
    "fused_ops.kernels": {"torch", "triton", "fused_ops.kernels"},
    "fused_ops.reference": {"numpy", "fused_ops.reference"},
}
# What the modules of a top level may never import. A top level `kernels` is another project's package.
FORBIDDEN = {
    "fused_ops": {"benchmarks", "tests", "tools", "kernels"},
    "benchmarks": {"tests", "tools", "kernels"},
    "tests": {"kernels"},
}


def module_names() -> dict[str, Path]:
    """Every module of the repository by the name it is imported under; kernels/ through its symlink alone."""
    modules = {}
    for top in FORBIDDEN:
        files = [*(ROOT / top).rglob("*.py")]
        if top == "fused_ops":  # whether rglob follows a symlink depends on the version of Python
            files = [path for path in files if "kernels" not in path.relative_to(ROOT).parts]
            modules.update({f"fused_ops.{name}": path for name, path in named(ROOT, ROOT / "kernels")})
        modules.update({dotted(path.relative_to(ROOT)): path for path in files})
    return modules


def named(root: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    for path in folder.rglob("*.py"):
        yield dotted(path.relative_to(root)), path


def dotted(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and absolute name of each import: inside functions, for type checkers and by name as well."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                # Level 1 is the module's own package, which for an __init__ is the module itself.
                package = module.split(".")[: len(module.split(".")) + is_package - node.level]
                base = ".".join([*package, base] if base else package)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    allowed = next((names for layer, names in ALLOWED.items() if within(module, layer)), None)
    forbidden = FORBIDDEN[module.split(".")[0]]
    found = []
    for line, name in imports(source, module, is_package):
        wrong = any(within(name, top) for top in forbidden)
        if allowed is not None and name.split(".")[0] not in STANDARD_LIBRARY:
            wrong = wrong or not any(within(name, top) for top in allowed)
        if wrong:
            found.append(f"{module}:{line} imports {name}")
    return found


MODULES = module_names()


LAYERS = ["fused_ops.kernels", "fused_ops.reference", "fused_ops", "benchmarks", "tests"]


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_run_one_way(layer: str) -> None:
    members = {name: path for name, path in MODULES.items() if within(name, layer)}
    assert members, f"no module of {layer} was found, so nothing would be checked"
    found = [
        violation
        for name, path in members.items()
        for violation in violations(path.read_text(), name, path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "is_package", "source"),
    [
        ("fused_ops.kernels.row_norm", False, "import numpy as np"),
        ("fused_ops.kernels.row_norm", False, "from .. import functional"),
        ("fused_ops.kernels.row_norm.forward", False, "from ...validation import check"),
        ("fused_ops.kernels.row_norm", True, "from ...backend import choose"),
        ("fused_ops.kernels.row_norm", False, "from fused_ops import backend"),
        ("fused_ops.reference.norms", False, "import torch"),
        ("fused_ops.reference", True, "from ..activation import Activation"),
        ("fused_ops.functional", False, "import kernels"),
        ("fused_ops.functional", False, "from kernels.row_norm import row_norm_forward"),
        ("fused_ops.functional", False, "importlib.import_module('kernels.views')"),
        ("fused_ops.functional", False, "from benchmarks import workloads"),
        ("fused_ops.functional", False, "def f():\n    from tests.tolerances import bound"),
        ("benchmarks.run", False, "from tests import tolerances"),
        ("tests.test_launch", False, "from kernels import launch"),
    ],
)
def test_a_wrong_import_is_found(module: str, is_package: bool, source: str) -> None:
    assert len(violations(source, module, is_package)) == 1


@pytest.mark.parametrize(
    ("module", "is_package", "source"),
    [
        (
            "fused_ops.kernels.row_norm",
            False,
            "import math, torch\nimport triton.language as tl\nfrom . import views",
        ),
        ("fused_ops.kernels.row_norm", True, "from ..epilogue import finish\nfrom .forward import launch"),
        (
            "fused_ops.kernels.row_norm.forward",
            False,
            "from ..views import RowView\nfrom fused_ops import kernels",
        ),
        ("fused_ops.reference.norms", False, "import numpy as np\nfrom .activations import value"),
        ("fused_ops.autograd", False, "from .kernels import row_norm\nfrom fused_ops.kernels import launch"),
        ("benchmarks.run", False, "import fused_ops\nfrom fused_ops.kernels import launch"),
    ],
)
def test_a_right_import_passes(module: str, is_package: bool, source: str) -> None:
    assert violations(source, module, is_package) == []


def test_every_file_can_be_read_in_one_sitting() -> None:
    files = [*MODULES.values(), *ROOT.glob("*.py"), *ROOT.glob("tools/*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > LINE_LIMIT} == {}


def test_kernels_are_reached_through_a_relative_symlink() -> None:
    link = ROOT / "fused_ops" / "kernels"
    assert link.is_symlink() and link.readlink() == Path("../kernels")
