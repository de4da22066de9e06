"""`python -m benchmarks.run`: the fused calls beside torch and its peers on the device that is here.

Prints a table and writes lines of JSON and a plot to benchmarks/results/local/. Without a GPU it ends with a second
table, of what one would have to launch and move. The default takes some minutes on two cores.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from . import ceilings, compilations, counted, environment, timing
from .measure import Settings, first_line, measure
from .measure_models import measure_model
from .peers import EAGER, OURS
from .records import CountedRow, Row, Run
from .report import text
from .report.plots import draw_calls
from .selection import chosen, chosen_models, dtypes
from .traffic import DIRECTIONS
from .whole_models import WHOLE_MODELS, WholeModel
from .workloads import WORKLOADS, Workload

# For how long a run goes on giving disturbed rows more time; the rest of a default run then fits five minutes.
DEFAULT_PATIENCE_S, FULL_PATIENCE_S = 30, 1800


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--full", action="store_true", help="every workload, more types, torch.compile on every row")
    parser.add_argument("--device", help="cpu or cuda; the GPU if there is one")
    parser.add_argument(
        "--filter", nargs="*", default=[], metavar="TEXT", help="only workloads and models whose name holds a text"
    )
    parser.add_argument("--size", choices=("full", "reduced", "tiny"), help="full on a GPU, reduced on a CPU")
    parser.add_argument("--seconds", type=float, default=0.5, help="how long the contenders of a row are timed")
    parser.add_argument(
        "--output", type=Path, default=environment.LOCAL_RESULTS, help="folder of the JSON and the plot"
    )
    return parser.parse_args(arguments)


def progress(row: Row) -> str:
    """One line as soon as a row is done."""
    ours, ratio = row.measurement(OURS), row.ratio(OURS, EAGER)
    name = f"{row.workload} {row.dtype} {row.direction}"
    if ours is None or ours.seconds is None:
        return f"{name}: {'not run' if ours is None else f'{ours.status}: {ours.reason}'}"
    against = "" if ratio is None else f", {ratio.of_medians:.2f} of torch eager"
    return f"{name}: {text.milliseconds(ours.seconds.median)} ms{against}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs; 1 where a contender of ours was wrong or failed, or where nothing was chosen."""
    options = parse(arguments)
    device = environment.pick_device(options.device)
    workloads = chosen(device, options.full, options.filter)
    models = chosen_models(device, options.full, options.filter)
    if not workloads and not models:
        known = ", ".join([*WORKLOADS, *WHOLE_MODELS])
        print(f"no name of a workload or model holds any of {options.filter}; known are {known}")
        return 1
    described = environment.describe(device)
    if device.type == "cpu":
        described["allocator"] = timing.keep_freed_memory()
    compilations.listen()
    described |= ceilings.measure(device)
    settings = Settings(
        device,
        options.size or ("full" if device.type == "cuda" else "reduced"),
        options.seconds,
        compile_all=options.full,
        patient_until=time.perf_counter() + (FULL_PATIENCE_S if options.full else DEFAULT_PATIENCE_S),
    )
    measured: list[Workload | WholeModel] = [*models, *workloads]
    cases = [(each, dtype) for each in measured for dtype in dtypes(device, options.full)]
    started = time.perf_counter()
    rows: list[Row] = []
    data_path = options.output / f"rows-{environment.stamp(described)}.jsonl"
    with tqdm(total=len(cases) * len(DIRECTIONS), unit="row") as bar:
        for each, dtype in cases:
            bar.set_description(each.name)
            timing.set_aside_what_lives()
            for row in rows_of(each, dtype, settings):
                rows.append(row)
                Run(described, rows).write(data_path)  # what is done stays, if the run is cut off
                bar.write(progress(row))
                bar.update()
    described["copy_bytes_per_second_after"] = ceilings.copy_rate(device)
    described["seconds"] = round(time.perf_counter() - started, 1)
    run = Run(described, rows, *count_without_gpu(device, workloads, options.full))
    run.write(data_path)
    plot_path = data_path.with_suffix(".png")
    draw_calls(run, plot_path)
    ending = text.ending(run)
    print("\n".join(["", text.summary(run), f"Full data: {data_path}", f"Plot:      {plot_path}", *ending]))
    return 1 if ours_is_broken(run) else 0


def rows_of(each: Workload | WholeModel, dtype: torch.dtype, settings: Settings) -> Iterator[Row]:
    """Both directions of a call or of a model."""
    return measure_model(each, dtype, settings) if isinstance(each, WholeModel) else measure(each, dtype, settings)


def count_without_gpu(device: torch.device, workloads: Sequence[Workload], full: bool) -> tuple[list[CountedRow], str]:
    """On a CPU: what these workloads would take of a GPU, and why some or all of it is missing."""
    calls = [workload for workload in workloads if not workload.series]
    if device.type != "cpu" or not calls:
        return [], ""
    if gap := counted.gap():
        return [], gap
    cases = [(workload, dtype) for workload in calls for dtype in dtypes(torch.device("cuda"), full)]
    rows: list[CountedRow] = []
    try:
        with tqdm(total=len(cases), desc="counting", unit="workload") as bar:
            for of_case in counted.count(cases):
                rows += of_case
                bar.update()
    except Exception as error:  # what was timed must not be lost for it
        return rows, first_line(error)
    return rows, ""


def ours_is_broken(run: Run) -> bool:
    """Whether our own call was wrong or raised anywhere."""
    found = (row.measurement(OURS) for row in run.rows)
    return any(measurement is not None and measurement.status in ("wrong", "failed") for measurement in found)


if __name__ == "__main__":
    sys.exit(main())
