"""What a launch must not do, whatever it computes: the allowances of the design that are read off a compiled kernel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .binary import WIDEST_ACCESS, CompiledLaunch

# Statistics and masks are narrower by nature: a few values beside rows of x.
LEAST_WIDE_SHARE = 0.6
# From here on a call has to fill the device.
LARGE_CALL = 4 * 2**20
LEAST_BYTES_IN_FLIGHT = 32 * 2**10
LEAST_OVERLAP = 0.25
MOST_COMPILATIONS = 2
# Sums some rows of partial sums; next to nothing beside the launch before it.
SMALL_KERNELS = frozenset({"column_sum_kernel"})


@dataclass(frozen=True)
class Finding:
    """An allowance that is exceeded: where, which, and the two numbers."""

    where: str
    kernel: str
    what: str
    found: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.where}: {self.kernel}: {self.what}: {self.found}, allowed {self.allowed}"


def of_launch(launch: CompiledLaunch, where: str, elements: int, multiprocessors: int) -> list[Finding]:
    """Of one launch of a call on x with so many elements."""

    def finding(what: str, found: object, allowed: object) -> Finding:
        return Finding(where, launch.kernel, what, str(found), str(allowed))

    found = []
    if launch.spilled_bytes:
        found.append(finding("spills", f"{launch.spilled_bytes} bytes a thread", "none"))
    if launch.kernel in SMALL_KERNELS:
        return found
    if launch.wide_share < LEAST_WIDE_SHARE:
        share, least = f"{launch.wide_share:.0%} of the bytes {WIDEST_ACCESS} at a time", f"{LEAST_WIDE_SHARE:.0%}"
        found.append(finding("narrow accesses", share, least))
    if elements >= LARGE_CALL:
        if launch.programs < multiprocessors:
            found.append(finding("under-filled", f"{launch.programs} programs", f"{multiprocessors} and more"))
        in_flight = launch.bytes_in_flight(multiprocessors)
        if in_flight < LEAST_BYTES_IN_FLIGHT:
            least = f"{LEAST_BYTES_IN_FLIGHT} and more"
            found.append(finding("few bytes in flight", f"{in_flight} a multiprocessor", least))
        alone = min(launch.resident_programs, -(-launch.programs // multiprocessors)) == 1
        if alone and launch.in_step and launch.overlap < LEAST_OVERLAP:
            overlap = f"{launch.overlap:.0%} of the loads under way while a lone program works"
            found.append(finding("waits for its own loads", overlap, f"{LEAST_OVERLAP:.0%} and more"))
    return found


def of_compilations(compilations: Mapping[str, int], where: str) -> list[Finding]:
    """Of how many times each kernel was compiled over row counts."""
    return [
        Finding(where, kernel, "recompiles with the number of rows", f"{count} compilations", f"{MOST_COMPILATIONS}")
        for kernel, count in compilations.items()
        if count > MOST_COMPILATIONS
    ]


def of_call(launches: Iterable[CompiledLaunch], where: str, elements: int, multiprocessors: int) -> list[Finding]:
    """Of all launches of a call."""
    return [found for launch in launches for found in of_launch(launch, where, elements, multiprocessors)]
