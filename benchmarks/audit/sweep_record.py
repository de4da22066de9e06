"""What was swept of the launch tables, kept in a file, so that a sweep of hours can be cut off and go on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import triton

from .sweep import Group, Spill


class SweepRecord:
    """Lines of JSON, one a group of entries: what spilled, by which version of Triton, and a hash of what decides it. A
    line that was cut off is no line. Without a path nothing is known, and nothing kept."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: dict[tuple[str, str, str], list[Spill]] = {}
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    entry = json.loads(line)
                    spills = [Spill(**spill) for spill in entry["spills"]]
                    self._known[entry["target"], entry["triton"], entry["contents"]] = spills

    def spills(self, group: Group) -> list[Spill] | None:
        """What was found in a group, None where its kernels have changed since, or were never compiled."""
        return self._known.get(_key(group))

    def add(self, group: Group, spills: Sequence[Spill]) -> None:
        """Keeps what was found at once."""
        self._known[_key(group)] = list(spills)
        if self.path is None:
            return
        entry = {
            "target": group.target,
            "triton": triton.__version__,
            "kernel": group.kernel,
            "first_call": str(group.calls[0]),
            "entries": len(group.entries),
            "contents": group.contents,
            "spills": [dataclasses.asdict(spill) for spill in spills],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write("\n" + json.dumps(entry))  # in front, for the sake of a line that was cut off


def _key(group: Group) -> tuple[str, str, str]:
    return group.target, triton.__version__, group.contents
