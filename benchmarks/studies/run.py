"""Runs studies: every condition with every seed, a core each."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from typing import Any, Literal

import torch
from tqdm import tqdm

from .. import environment
from ..processes import workers
from . import STUDIES
from .study import Numbers

Setting = Literal["full", "quick", "without_cause"]
Result = dict[str, Any]


def measure(study: str, setting: Setting, condition: str, seed: int, device: torch.device) -> Numbers:
    """One condition with one seed; on a CPU on one thread, as in a pool, so that it is the same everywhere."""
    chosen = STUDIES[study]
    settings = getattr(chosen, setting)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return chosen.measure(settings, chosen.conditions(settings)[condition], seed, device)
    finally:
        torch.set_num_threads(threads)


def run(names: Sequence[str], setting: Setting, seeds: int, device: torch.device, jobs: int = 1) -> Iterator[Result]:
    """A result for each study, as soon as all of it is measured. More than one job is a process for each."""
    described = environment.describe(device)
    if device.type == "cpu":
        described["threads"] = 1  # of each process
    cases = [
        (name, setting, condition, seed, device)
        for name in names
        for condition in STUDIES[name].conditions(getattr(STUDIES[name], setting))
        for seed in range(seeds)
    ]
    missing = collections.Counter(case[0] for case in cases)
    measured: dict[tuple[str, str, int], Numbers] = {}
    with tqdm(total=len(cases), unit="run", disable=None) as progress:
        for (name, _, condition, seed, _), numbers in _each(cases, jobs):
            measured[name, condition, seed] = numbers
            progress.update()
            progress.set_postfix_str(f"{name} {condition}")
            missing[name] -= 1
            if not missing[name]:
                yield _result(name, setting, seeds, measured, described)


def _each(cases: Sequence[Any], jobs: int) -> Iterator[tuple[Any, Numbers]]:
    if jobs == 1:
        yield from ((case, measure(*case)) for case in cases)
        return
    with workers(interpret=False, count=jobs) as pool:
        futures: dict[Future[Numbers], Any] = {pool.submit(measure, *case): case for case in cases}
        yield from ((futures[future], future.result()) for future in as_completed(futures))


def _result(
    name: str, setting: Setting, seeds: int, measured: Mapping[tuple[str, str, int], Numbers], described: dict[str, Any]
) -> Result:
    study = STUDIES[name]
    settings = getattr(study, setting)
    found = {
        condition: [measured[name, condition, seed] for seed in range(seeds)]
        for condition in study.conditions(settings)
    }
    return {
        "study": name,
        "setting": setting,
        "settings": dataclasses.asdict(settings),
        "seeds": seeds,
        "claims": [dataclasses.asdict(claim) for claim in study.claims(settings, found)],
        "found": found,
        "environment": described,
    }
