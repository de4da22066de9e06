"""`python -m benchmarks.studies [NAME ...]`: runs studies, prints their verdicts, writes numbers, plots and pages."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import environment
from . import STUDIES, page
from .run import Setting, run

PUBLISHED = environment.ROOT / "docs" / "studies"
LOCAL = environment.LOCAL_RESULTS / "studies"


def main(arguments: Sequence[str] | None = None) -> int:
    """0 whatever the verdicts: that something is not reproduced is a result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(STUDIES)}; all")
    parser.add_argument("--quick", action="store_true", help="smaller settings, under a minute each")
    parser.add_argument("--without-cause", action="store_true", help="the quick settings, the cause taken away")
    parser.add_argument("--seeds", type=_positive, default=3, help="default %(default)s")
    parser.add_argument("--device", help="cpu or cuda; the GPU if there is one")
    parser.add_argument("--jobs", type=_positive, help="processes; as many as cores on a CPU, one on a GPU")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--output", type=Path, help="folder of the numbers, plots and pages; one for each setting")
    where.add_argument("--publish", action="store_true", help="write to docs/studies, where they are committed")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in STUDIES]
    if unknown:
        parser.error(f"no study is called {', '.join(unknown)}; there are {', '.join(STUDIES)}")
    if options.publish and (options.quick or options.without_cause or options.seeds < 3):
        parser.error("--publish is for the full settings and at least 3 seeds")
    if options.publish and environment.commit()["dirty"]:
        parser.error("--publish is for sources as they are committed, so that anybody can repeat it; commit first")
    device = environment.pick_device(options.device)
    jobs = options.jobs or (os.cpu_count() or 1 if device.type == "cpu" else 1)
    setting: Setting = "without_cause" if options.without_cause else "quick" if options.quick else "full"
    folder = PUBLISHED if options.publish else options.output or LOCAL / setting
    folder.mkdir(parents=True, exist_ok=True)
    for result in run(list(dict.fromkeys(options.names)) or list(STUDIES), setting, options.seeds, device, jobs):
        study = STUDIES[result["study"]]
        stem = folder / study.name
        stem.with_suffix(".json").write_text(page.as_json(result))
        stem.with_suffix(".md").write_text(page.markdown(study, result, folder))
        page.plot(study, result, getattr(study, setting), stem.with_suffix(".png"))
        print(page.text(study, result), flush=True)
    results = {name: json.loads(path.read_text()) for name in STUDIES if (path := folder / f"{name}.json").exists()}
    (folder / "README.md").write_text(page.index(STUDIES, results, folder))
    print(f"Numbers, plots and pages: {folder}")
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but is {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
