"""An estimate of the device time of a call, from counts. It is a model, never a measurement, and is called so.

Of each launch the largest of
- bytes that must cross the memory bus, over the bandwidth that a copy reaches, less the time for which a lone program
  loads nothing, and that the loads in flight sustain (Little's law: bytes in flight over the latency of a load),
- bytes asked for, but for parameters that the L1 has, over the bandwidth of the L2,
- instructions, over the rate at which the multiprocessors that have work issue them,
and, for each launch, the time that passes between two of them. Not in it: the order of programs, conflicts in shared
memory, the dependence of one instruction on another, clocks that fall with the power drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

from .binary import CompiledLaunch
from .targets import TARGETS, Device


@dataclass(frozen=True)
class Work:
    """What one launch has to do: as compiled, and the bytes it moves, asks for, and asks of the L2."""

    launch: CompiledLaunch
    moved_bytes: float
    asked_bytes: float
    l2_bytes: float

    @property
    def thread_bytes(self) -> float:
        """Bytes that each thread asks for."""
        return self.asked_bytes / (self.launch.programs * self.launch.threads)

    @property
    def instructions(self) -> float:
        """Those of all threads together."""
        return self.launch.code.issued(self.thread_bytes) * self.launch.threads * self.launch.programs


@dataclass(frozen=True)
class Estimate:
    """Seconds of one launch by each of the three limits, and between it and the next."""

    memory: float
    l2: float
    issue: float
    between: float

    @property
    def seconds(self) -> float:
        return max(self.memory, self.l2, self.issue) + self.between

    @property
    def limit(self) -> str:
        """The name of the largest part."""
        parts = {"memory": self.memory, "L2": self.l2, "issue": self.issue, "launch": self.between}
        return max(parts, key=lambda name: parts[name])


def estimate(work: Work, device: Device) -> Estimate:
    """Of one launch."""
    launch = work.launch
    busy = min(device.facts.multiprocessors, launch.programs)
    issue_rate = device.clock * TARGETS[device.target].multiprocessor.issue * busy
    issued = work.instructions * launch.warps / launch.threads
    in_flight = busy * _sustained_bytes(launch, work.thread_bytes, device)
    copy = device.copy_share * device.bandwidth
    bandwidth = min(copy * (1 - idle_share(launch, device)), in_flight / device.latency)
    return Estimate(
        memory=work.moved_bytes / bandwidth,
        l2=work.l2_bytes / (device.l2_bandwidth * busy / device.facts.multiprocessors),
        issue=issued / issue_rate,
        between=device.launch,
    )


def _sustained_bytes(launch: CompiledLaunch, thread_bytes: float, device: Device) -> float:
    """Bytes in flight on a multiprocessor, on average over a trip: all while it waits, their overlap while it works.

    Beside other programs a program works more slowly, but they load meanwhile; so each is counted as if alone, and so
    is each warp where they do not wait for each other.
    """
    trips = launch.code.trips(thread_bytes)
    unit = TARGETS[device.target].multiprocessor
    together = launch.warps if launch.in_step or not launch.code.loop_bytes else 1
    working = launch.code.issued(thread_bytes) / trips * together / unit.issue / device.clock
    waiting = device.latency
    share = (waiting + launch.overlap * working) / (waiting + working)
    return share * launch.bytes_in_flight(device.facts.multiprocessors)


def idle_share(launch: CompiledLaunch, device: Device) -> float:
    """The share of a trip for which nothing is loaded, because a program that has a multiprocessor for itself works on
    what it has loaded: 0 where there are other programs, or warps that do not wait for each other."""
    unit = TARGETS[device.target].multiprocessor
    multiprocessors = device.facts.multiprocessors
    alone = launch.side_by_side(multiprocessors) == 1
    if not (alone and launch.in_step):
        return 0.0
    working = (1 - launch.overlap) * launch.code.loop_instructions * launch.warps / unit.issue / device.clock
    moving = launch.code.loop_bytes * launch.threads * multiprocessors / (device.copy_share * device.bandwidth)
    return working / (working + moving)
