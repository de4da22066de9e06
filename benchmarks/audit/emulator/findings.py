"""What the emulator finds a kernel to do wrong."""

from __future__ import annotations

from dataclasses import dataclass

OUT_OF_BOUNDS = "out of bounds"
MISALIGNED = "misaligned"
TWO_VALUES = "one store writes two values to one address"
# One sum, say, that threads have rounded differently: all are right, and PTX does not say which of them is kept.
TWO_VALUES_SHARED = "one store writes two values to one address of shared memory"
TWO_PROGRAMS = "two programs write one address"
READ_BEFORE_BARRIER = "reads what another warp wrote since the last barrier"
READ_BEFORE_DELIVERY = "reads what cp.async has not delivered"
OVERWRITES_READ = "overwrites what another warp read since the last barrier"
OVERWRITES_WRITTEN = "overwrites with another value what another warp wrote since the last barrier"


@dataclass(frozen=True)
class Finding:
    """One kind of fault of one instruction of a kernel, where it occurred first."""

    kernel: str
    what: str
    where: str

    def __str__(self) -> str:
        return f"{self.kernel}: {self.what}: {self.where}"


class Report:
    """Collects the findings of a launch, of an instruction the first of each kind."""

    def __init__(self, kernel: str, findings: list[Finding]) -> None:
        self.kernel = kernel
        self._findings = findings
        self._known: set[tuple[str, str]] = set()

    def add(self, what: str, instruction: str, where: str) -> None:
        if (what, instruction) not in self._known:
            self._known.add((what, instruction))
            self._findings.append(Finding(self.kernel, what, f"{where}: {instruction}"))
