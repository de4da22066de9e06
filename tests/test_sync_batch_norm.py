"""SyncBatchNorm in 2 and 3 processes is one process over the whole batch; and what it is where there is but one."""

from __future__ import annotations

import copy
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fused_ops
from tests.norm_cases import DEVICE, normal
from tests.sync_batch_norm_cases import CASES, Case, one_process
from tests.sync_batch_norm_workers import work
from tests.tolerances import assert_within_budget

Tensor = torch.Tensor
SECONDS = 240  # until processes that hang are ended; a collective that hangs fails after 60
SUMMED = ("dweight", "dbias")
OF_EACH = ("running_mean", "running_var", "num_batches_tracked")


def in_processes(world: int, folder: Path) -> list[dict[tuple[str, str], dict[str, Any]]]:
    """What each process found. They fork from one that has imported everything; on a GPU nobody may fork."""
    context: Any = multiprocessing.get_context("spawn" if DEVICE.type == "cuda" else "forkserver")
    if DEVICE.type != "cuda":
        context.set_forkserver_preload(["tests.sync_batch_norm_workers"])
    backends = ("triton", "torch") if fused_ops.backend.HAS_TRITON else ("torch",)
    processes = [context.Process(target=work, args=(rank, world, str(folder), backends)) for rank in range(world)]
    deadline = time.monotonic() + SECONDS
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    failures = [path.read_text() for path in sorted(folder.glob("failure_*"))]
    assert not failures, "\n".join(failures)
    assert [process.exitcode for process in processes] == [0] * world
    return [torch.load(folder / f"results_{rank}") for rank in range(world)]


def check(case: Case, world: int, found: list[dict[str, Any]]) -> None:
    expected, eager = one_process(case, world, exact=True), one_process(case, world, exact=False)
    samples = sum(case.batches[:world])
    for rank, of_rank in enumerate(found):
        assert of_rank["collectives"] == ({"all_gather": 1}, {"all_reduce": 1}), "collectives, forward and backward"
        assert ("dx" in of_rank) == (rank not in case.frozen)
    for name, want in expected.items():
        if name == "num_batches_tracked":
            assert [int(of_rank[name]) for of_rank in found] == [case.steps] * world
            continue
        parts = [of_rank[name] for of_rank in found if name in of_rank]
        if name in OF_EACH:
            assert all(torch.equal(part, parts[0]) for part in parts), f"{name} differs between processes"
            got, terms = parts[0], 1
        elif name in SUMMED:
            got, terms = torch.stack(parts).sum(0), samples * want.numel()
        else:
            got, terms = torch.cat(parts), 1
        learns = torch.cat([torch.full((case.batches[i],), name != "dx" or i not in case.frozen) for i in range(world)])
        of_samples = name not in SUMMED and name not in OF_EACH
        compared, torchs = (tensor[learns] if of_samples else tensor for tensor in (want.cpu(), eager[name].cpu()))
        assert_within_budget(name, got, torchs, compared, terms=terms, stored=case.dtype)


@pytest.mark.parametrize("world", [2, 3])
def test_it_is_one_process_over_the_whole_batch(world: int, tmp_path: Path) -> None:
    found = in_processes(world, tmp_path)
    wrong = []
    for key in found[0]:
        case = next(case for case in CASES if case.name == key[0])
        try:
            check(case, world, [of_rank[key] for of_rank in found])
        except AssertionError as error:
            wrong.append(f"{case.name} ({key[1]}): {error}")
    assert len(found[0]) >= len(CASES)
    assert not wrong, "\n".join(wrong)
