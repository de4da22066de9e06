"""`python -m benchmarks.publish [RUN]`: copies a run and its plots beside the committed ones, by device and date."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import environment
from .records import Run
from .report import page
from .report.__main__ import latest

RESULTS = environment.LOCAL_RESULTS.parent


def publish(path: Path, folder: Path = RESULTS, *, despite_changes: bool = False) -> list[Path]:
    """Copies, and returns what was written. ValueError for a run of changed sources, or one that is there already."""
    run = Run.read(path)
    if run.environment["dirty"] and not despite_changes:
        raise ValueError(
            f"{path} is of sources that differ from commit {run.environment['commit']}, so nobody could repeat it; "
            "commit first and run again, or say --despite-changes"
        )
    target = folder / f"{environment.slug(run.environment)}.jsonl"
    if target.exists():
        raise ValueError(f"{target} is there already; move it away, or rename it if both are worth keeping")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as drawn:  # of which the page can be made again from the run
        plots = [written for written in page.write(run, Path(drawn)) if written.suffix == ".png"]
        kept = [Path(shutil.move(plot, f"{target.with_suffix('')}-{plot.name}")) for plot in plots]
    shutil.copyfile(path, target)
    return [target, *kept]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what was written; 1 where nothing was."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.publish", description=__doc__)
    parser.add_argument("run", type=Path, nargs="?", help="a file that benchmarks.run wrote; the latest of local/")
    parser.add_argument("--despite-changes", action="store_true", help="also a run of sources that were not committed")
    options = parser.parse_args(arguments)
    path = options.run or latest()
    if path is None:
        print(f"no run lies in {environment.LOCAL_RESULTS}: make one with `make bench`, or name another")
        return 1
    try:
        written = publish(path, despite_changes=options.despite_changes)
    except ValueError as error:
        print(error)
        return 1
    print("\n".join(f"wrote {each}" for each in written))
    print(f"add a line on it to {RESULTS / 'README.md'}, and commit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
