"""What a launch must not do, whatever it computes: the allowances of the design that are read off a compiled kernel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .binary import WIDEST_ACCESS, CompiledLaunch
from .estimate import idle_share
from .targets import DEVICES, Device

# Statistics and masks are narrower by nature, a few values beside rows of x: at spans of 256 they are a quarter of the
# bytes, and there are as many of their accesses as of wide ones; beside planes of 256 that have a weight and a bias of
# their own a third, and two for each. An operand that is read narrow has many more.
LEAST_WIDE_SHARE = 0.65
LEAST_WIDE_SHARE_BETWEEN = 0.6  # beside runs that begin between 16-byte boundaries, whose own accesses are half as wide
MOST_NARROW = 2.5  # accesses, for each wide one
# Accesses are counted in the code, where those of once a program weigh as those of a loop.
LEAST_WIDE_SHARE_MIXING, MOST_NARROW_MIXING = 0.4, 7.0
# From here on a call has to fill the device: of an H200's multiprocessors, of more of them as much more.
LARGE_CALL = 4 * 2**20
OF_MULTIPROCESSORS = 132
# Of an H200's multiprocessor; one that has less of its device's bandwidth needs as much less, at the same latency.
LEAST_BYTES_IN_FLIGHT = 32 * 2**10
# Of a kernel that was timed with more in flight on an H200 and took longer: bit_weight_standardize 57 us where it takes
# 44, layer_norm_16384 97 where it takes 79 (benchmarks/results/h200-variants.txt).
LEAST_AS_TIMED: Mapping[str, int] = {"row_walk_forward_kernel": 16 * 2**10}
MOST_IDLE = 0.3  # of a trip of the loop; above it smaller programs, of which several overlap, are worth trying
MOST_COMPILATIONS = 2
# Have all rows of a matrix in registers, as a power of two of them; more than this many powers do not fit.
HOLD_ALL_ROWS = frozenset({"batch_norm_forward_kernel", "batch_norm_backward_kernel"})
MOST_ROW_TILES = 10
# Merge partial results; next to nothing beside the launch before them.
SMALL_KERNELS = frozenset(
    {
        "column_sum_kernel",
        "column_sum_of_any_span_kernel",
        "combine_moments_kernel",
        "combine_gradients_kernel",
        "combine_switch_moments_kernel",
        "combine_switch_gradients_kernel",
    }
)


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


def of_launch(
    launch: CompiledLaunch,
    where: str,
    elements: int,
    device: Device,
    mixes: bool = False,
    widest: int = WIDEST_ACCESS,
) -> list[Finding]:
    """Of one launch of a call on x with so many elements. mixes: programs begin by reading statistics of all kinds.
    widest: bytes of an access at most, where runs of neighbours begin between 16-byte boundaries."""
    multiprocessors = device.facts.multiprocessors

    def finding(what: str, found: object, allowed: object) -> Finding:
        return Finding(where, launch.kernel, what, str(found), str(allowed))

    found = []
    if launch.spilled_bytes:
        found.append(finding("spills", f"{launch.spilled_bytes} bytes a thread", "none"))
    if launch.kernel in SMALL_KERNELS:
        return found
    least_wide, most_narrow = (
        (LEAST_WIDE_SHARE_MIXING, MOST_NARROW_MIXING) if mixes else (LEAST_WIDE_SHARE, MOST_NARROW)
    )
    if widest < WIDEST_ACCESS:
        least_wide = min(least_wide, LEAST_WIDE_SHARE_BETWEEN)
    if (wide_share := launch.share_at(widest)) < least_wide:
        share, least = f"{wide_share:.0%} of the bytes {widest} at a time", f"{least_wide:.0%}"
        found.append(finding("narrow accesses", share, least))
    wide = sum(count for width, count in launch.widths.items() if width >= widest)
    narrow = sum(launch.widths.values()) - wide
    if narrow > most_narrow * wide:
        beside = f"{narrow} beside {wide} of {widest} bytes"
        found.append(finding("narrow accesses", beside, f"{most_narrow:.0f} for each"))
    if elements >= LARGE_CALL * max(1.0, multiprocessors / OF_MULTIPROCESSORS):
        if launch.programs < multiprocessors:
            found.append(finding("under-filled", f"{launch.programs} programs", f"{multiprocessors} and more"))
        in_flight = launch.bytes_in_flight(multiprocessors)
        least_in_flight = least_bytes_in_flight(launch.kernel, device)
        if in_flight < least_in_flight:
            least = f"{least_in_flight} and more"
            found.append(finding("few bytes in flight", f"{in_flight} a multiprocessor", least))
        idle = idle_share(launch, device)
        if idle > MOST_IDLE:
            share = f"a lone program loads nothing for {idle:.0%} of the time"
            found.append(finding("works without loading", share, f"{MOST_IDLE:.0%}"))
    return found


def least_bytes_in_flight(kernel: str, device: Device) -> int:
    """What a multiprocessor must have on its way of a call that fills the device."""
    shares = [each.bandwidth / each.facts.multiprocessors for each in (device, DEVICES["H200"])]
    least = LEAST_AS_TIMED.get(kernel, LEAST_BYTES_IN_FLIGHT)
    return int(min(least, LEAST_BYTES_IN_FLIGHT * shares[0] / shares[1]))


def of_compilations(compilations: Mapping[str, int], where: str) -> list[Finding]:
    """Of how many times each kernel was compiled over row counts."""
    return [
        Finding(where, kernel, "recompiles with the number of rows", f"{count} compilations", f"{MOST_COMPILATIONS}")
        for kernel, count in compilations.items()
        if count > (MOST_ROW_TILES if kernel in HOLD_ALL_ROWS else MOST_COMPILATIONS)
    ]


def of_layouts(few: set[tuple[str, str]], many: set[tuple[str, str]], where: str) -> list[Finding]:
    """Of what the kernels for few rows reduce and those for many: a row has the same bits only if they add alike."""
    if few == many:
        return []
    found, expected = (
        ", ".join(f"{shape} {layout}" for shape, layout in sorted(one - other)) or "nothing else"
        for one, other in ((many, few), (few, many))
    )
    return [Finding(where, "the forward", "sums many rows in another order than few", found, expected)]


def of_call(
    launches: Iterable[CompiledLaunch],
    where: str,
    elements: int,
    device: Device,
    mixes: bool = False,
    widest: int = WIDEST_ACCESS,
) -> list[Finding]:
    """Of all launches of a call."""
    return [found for launch in launches for found in of_launch(launch, where, elements, device, mixes, widest)]
