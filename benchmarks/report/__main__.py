"""`python -m benchmarks.report [RUN]`: the table of an earlier run, the latest if none is named, and its page.

Writes plots, report.md and index.html, which holds all of them, into a folder beside the run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import counted, environment, tables
from ..records import Run
from . import page, text


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints and writes; 1 where there is no run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("run", type=Path, nargs="?", help="a file that benchmarks.run wrote; the latest of local/")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown, and write nothing")
    parser.add_argument("--output", type=Path, help="the folder of the page; the run's own name without .jsonl")
    options = parser.parse_args(arguments)
    path = options.run or latest()
    if path is None:
        print(f"no run lies in {environment.LOCAL_RESULTS}: make one with `make bench`, or name another")
        return 1
    run = Run.read(path)
    if options.markdown:
        shown = [text.markdown_table(run, rows) for rows in text.parts(run).values()]
        print("\n\n".join([*shown, *counted.paragraphs(run, tables.markdown)]))
        return 0
    print("\n".join([text.summary(run), *text.ending(run), ""]))
    for written in page.write(run, options.output or path.with_suffix("")):
        print(f"wrote {written}")
    return 0


def latest() -> Path | None:
    """The run of local/ that was written last."""
    runs = sorted(environment.LOCAL_RESULTS.glob("rows-*.jsonl"), key=lambda path: path.stat().st_mtime)
    return runs[-1] if runs else None


if __name__ == "__main__":
    sys.exit(main())
