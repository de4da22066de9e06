"""The contenders, declared as data: how each makes its call of a workload, and why it may be unable to.

A peer that is missing is a stated gap in the table, never a zero.
"""

from __future__ import annotations

import torch

from ..workloads import Call, Workload
from . import apex, flag_gems, flash_attention, liger, quack, transformer_engine
from .peer import Peer as Peer

OURS = "ours"
EAGER = "torch eager"
COMPILED = "torch.compile"
OURS_COMPILED = "ours compiled"
AUTOTUNED = "torch.compile max-autotune"
LIBRARIES = (liger, quack, flag_gems, flash_attention, apex, transformer_engine)


def forget_compiled() -> None:
    """Makes torch.compile start over, so that each shape is compiled as if it were the only one.

    Otherwise the second shape of a call is compiled with dynamic sizes, or dropped at the limit of recompilations. It
    forgets every compiled call: to be called between workloads, not between contenders of one.
    """
    torch._dynamo.reset()


def _compiled(call: Call) -> Call:
    return torch.compile(call, dynamic=False)


def _autotuned(call: Call) -> Call:
    # Without CUDA graphs of its own, since every contender's calls are captured in one.
    return torch.compile(call, dynamic=False, mode="max-autotune-no-cudagraphs")


def _gap_of_ours_compiled(workload: Workload, device: str) -> str:
    return "" if device == "cpu" else "compared on a CPU, where the compiler sees through our call"


PEERS: tuple[Peer, ...] = (
    Peer(OURS, Workload.ours),
    Peer(EAGER, Workload.torch_composition),
    Peer(COMPILED, lambda workload: _compiled(workload.torch_composition()), compiles=True),
    Peer(OURS_COMPILED, lambda workload: _compiled(workload.ours()), _gap_of_ours_compiled, compiles=True),
    Peer(AUTOTUNED, lambda workload: _autotuned(workload.torch_composition()), compiles=True, only_full=True),
    *(library.PEER for library in LIBRARIES),
)

# Which is compared with which: ours with each peer, and compiled with compiled.
COMPARED: tuple[tuple[str, str], ...] = (
    (OURS, EAGER),
    (OURS, COMPILED),
    (OURS_COMPILED, COMPILED),
    (OURS, AUTOTUNED),
    *((OURS, library.NAME) for library in LIBRARIES),
)
