"""Schedules of kernels, for tests that put other configurations in the place of their own."""

from __future__ import annotations

import sys

from fused_ops import known


def forget_schedules() -> None:
    """They are built once for each kind of call, from the configurations of that moment, and calls are planned by
    them."""
    known.forget()
    for name, module in list(sys.modules.items()):
        if name.startswith("fused_ops.kernels."):
            for member in list(vars(module).values()):
                if hasattr(member, "cache_clear"):
                    member.cache_clear()
