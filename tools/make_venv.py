"""Make .venv or update it: ``python tools/make_venv.py test,bench`` installs the checkout with these extras.

An interpreter that already holds a supported torch is inherited: what it has is used as it is, and the
package index is asked only for the rest. Any other gets the versions in constraints.txt. This runs first, and
so on the standard library alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import site
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = str(VENV / "bin" / "python")
MADE_FROM = VENV / "made-from"  # the interpreter, then whatever else would make it another .venv
READY = VENV / "ready"  # what it was last brought up to date with, then the extras that it has
SETUP = (ROOT / "setup.py").read_text()
# The first that builds a wheel, and so an editable install, without the package `wheel`.
SETUPTOOLS = "setuptools>=70.1"


def release(version: str) -> tuple[int, ...]:
    numbers = re.findall(r"\d+", re.split(r"[^\d.]", version)[0])
    return tuple(int(number) for number in [*numbers, "0", "0"][:3])


def accepted(name: str, version: str) -> bool:
    """Whether pip would leave this version in place: it is in the range that setup.py states, if any."""
    stated = re.search(rf"[\"']{re.escape(name)}>=([\d.]+)(?:,<([\d.]+))?", SETUP)
    if stated is None:
        return True
    low, high = stated.groups()
    is_pre_release = re.match(r"[\d.]+(a|b|rc|\.?dev)", version) is not None
    above_low = release(version) > release(low) or (release(version) == release(low) and not is_pre_release)
    return above_low and (high is None or release(version) < release(high))


def present(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_interpreter(inherit: bool) -> None:
    low, high = re.findall(r'python_requires=">=([\d.]+),<([\d.]+)"', SETUP)[0]
    version = ".".join(map(str, sys.version_info[:3]))
    if not release(low) <= release(version) < release(high):
        sys.exit(f"{sys.executable} is Python {version}, not >={low},<{high}: name another, make PYTHON=...")
    needed = ["venv"] if inherit and present("pip") else ["venv", "ensurepip"]
    missing = [module for module in needed if importlib.util.find_spec(module) is None]
    if missing:
        sys.exit(
            f"{sys.executable} lacks {' and '.join(missing)}, and makes no virtual environment: install "
            "it (Debian and Ubuntu: the package python3-venv) or name another interpreter, make PYTHON=..."
        )


def create(inherit: bool) -> None:
    import venv  # check_interpreter has found it

    # A virtual environment made by another one's Python would inherit from the Python below both.
    from_venv = sys.prefix != sys.base_prefix
    venv.EnvBuilder(system_site_packages=inherit and not from_venv, clear=True, symlinks=True).create(VENV)
    if inherit and from_venv:
        folders = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
        (site_packages,) = VENV.glob("lib/python3*/site-packages")
        lines = [f"import site; site.addsitedir({folder!r})\n" for folder in folders]
        (site_packages / "inherited.pth").write_text("".join(lines))
    # Not left to EnvBuilder, which would put a bundled, older pip and setuptools before the inherited ones.
    if not runs("-m", "pip", "--version", quiet=True) and not runs("-m", "ensurepip", "--default-pip", quiet=True):
        sys.exit(f"{VENV_PYTHON} -m ensurepip failed: run it to see why")


def constraints(inherit: bool) -> str:
    """constraints.txt, less the pins of what is inherited and accepted, so that none is replaced."""
    kept = []
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, is_pin, _ = line.partition("==")
        version = present(name) if inherit and is_pin else None
        if version is None or not accepted(name, version):
            kept.append(line)
    if inherit:
        kept.append(f"torch=={present('torch')}")
    path = VENV / "constraints.txt"
    path.write_text("\n".join(kept) + "\n")
    return str(path)


def runs(*arguments: str, quiet: bool = False) -> bool:
    return subprocess.run([VENV_PYTHON, *arguments], cwd=ROOT, capture_output=quiet).returncode == 0


def pip(*arguments: str, quiet: bool = False) -> bool:
    return runs("-m", "pip", "install", "--disable-pip-version-check", *arguments, quiet=quiet)


def install_offline(extras: str) -> bool:
    """Install from what is there; False where something is missing."""
    if pip("--no-index", "--no-build-isolation", "-e", f".[{extras}]", quiet=True):
        return True
    # Setuptools before 70.1 (Python 3.10 and 3.11 bring one, torch 2.11 and 2.12 accept it) needs the package
    # `wheel` for that; it has another way to install a checkout.
    return (
        not runs("-c", "import setuptools.command.bdist_wheel", quiet=True)
        and runs("setup.py", "develop", "--no-deps", quiet=True)
        and pip("--no-index", f"fused-ops[{extras}]", quiet=True)
    )


def install(extras: str, inherit: bool) -> str:
    if inherit and install_offline(extras):
        return "nothing was downloaded"
    pins = ["-c", constraints(inherit)]
    # Named beside torch, as one that torch accepts: torch 2.11 and 2.12 accept none from 82 on.
    builder = [SETUPTOOLS, "torch"] if inherit else [SETUPTOOLS]
    if not (pip(*pins, *builder) and pip(*pins, "--no-build-isolation", "-e", f".[{extras}]")):
        sys.exit(
            f"pip could not install fused-ops[{extras}] into {VENV}, and says why above. Without a network "
            "it takes an interpreter that has torch and all the rest: make PYTHON=..."
        )
    return "what was missing came from the package index" if inherit else "the versions of constraints.txt"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: make_venv.py EXTRA[,EXTRA...], of the extras in setup.py")
    extras = sys.argv[1]
    if Path(sys.prefix).resolve() == VENV and MADE_FROM.is_file():
        # .venv is activated, and cannot be made from itself: hand over to the interpreter that made it.
        parent = MADE_FROM.read_text().splitlines()[0]
        os.execv(parent, [parent, *sys.argv])

    torch = present("torch")
    inherit = torch is not None and accepted("torch", torch)
    check_interpreter(inherit)
    made_from = f"{sys.executable}\n{sys.version}\n{ROOT}\ninherited torch: {torch if inherit else None}\n"
    inputs = [Path(__file__), *(ROOT / name for name in ("setup.py", "pyproject.toml", "constraints.txt"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in inputs)).hexdigest()

    as_before = MADE_FROM.is_file() and MADE_FROM.read_text() == made_from
    known_digest, *known_extras = READY.read_text().split() if as_before and READY.is_file() else [""]
    if known_digest != digest:
        known_extras = []
    if set(extras.split(",")) <= set(known_extras):
        return
    if not as_before:
        create(inherit)
        MADE_FROM.write_text(made_from)
    how = install(extras, inherit)
    READY.write_text("\n".join([digest, *sorted({*known_extras, *extras.split(",")})]))
    origin = f"inherits torch {torch}" if inherit else f"its own torch (inheritable: {torch or 'none'})"
    print(f".venv: Python {sys.version.split()[0]} of {sys.prefix}, {origin}; [{extras}]: {how}")


if __name__ == "__main__":
    main()
