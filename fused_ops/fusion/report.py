"""What was fused and what was left, as a list whose str is a table."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from .recognize import is_norm

NOT_FUSED = "fuse was not called"


@dataclass(frozen=True)
class Entry:
    """A normalization of the model, or a site without one.

    name: of the norm, or of the module whose forward the site is in; pattern: what one call computes, in order of
    execution (`norm+add+relu`); reason: why it was left, empty where it was fused.
    """

    name: str
    fused: bool
    pattern: str
    reason: str = ""


class FusionReport(list[Entry]):
    """The entries of a model: its norms in the order of `named_modules()`, then sites that hold no norm."""

    def __str__(self) -> str:
        if not self:
            return "no normalization in this model"
        fused = sum(entry.fused for entry in self)
        rows = [("name", "pattern", "left because")]
        rows += [(entry.name or "(the model)", entry.pattern, entry.reason) for entry in self]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines = [f"{name:{widths[0]}}  {pattern:{widths[1]}}  {reason}".rstrip() for name, pattern, reason in rows]
        return "\n".join([f"fused {fused} of {len(self)}", *lines])


def fusion_report(model: nn.Module) -> FusionReport:
    """What `fuse` did to a model, and to models in it that were fused by themselves.

    Returns a list with one entry a normalization, in the order of `named_modules()`, then one a site without any; its
    str is a table. Each has `name`, `fused`, `pattern` (`norm`, `norm+relu`, `norm+add`, `norm+add+relu`, `add+norm`,
    `add+norm+silu`, `add+relu`, `weight_standardize`) and `reason`. Nothing is printed.

    Example:
        >>> model = fused_ops.fuse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
        >>> [(entry.name, entry.pattern) for entry in fusion_report(model)]
        [('1', 'norm+relu')]
    """
    known: dict[str, Entry] = {}
    without_norm = []
    for prefix, module in model.named_modules():
        for entry in vars(module).get("_fusion_report", ()):
            named = replace(entry, name=".".join(part for part in (prefix, entry.name) if part))
            if "norm" in entry.pattern or entry.pattern == "weight_standardize":
                known.setdefault(named.name, named)
            else:
                without_norm.append(named)
    report = FusionReport()
    for name, module in model.named_modules():
        if name in known or is_norm(module):
            report.append(known.get(name, Entry(name, False, "norm", NOT_FUSED)))
    report.extend(without_norm)
    return report
