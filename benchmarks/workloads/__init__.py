"""The named workloads, one list for tests, audit and benchmarks.

A norm that is not here yet adds an entry to FUNCTIONS, and to Workload, with a default, what else it takes.
"""

from __future__ import annotations

from collections.abc import Mapping

from .batch_norms import BATCH_NORMS
from .channel_norms import CHANNEL_NORMS
from .functions import FUNCTIONS as FUNCTIONS
from .functions import finish as finish
from .residual_adds import RESIDUAL_ADDS
from .row_norms import ROW_NORMS
from .row_norms import swept as swept
from .workload import EPS as EPS
from .workload import Call as Call
from .workload import Case as Case
from .workload import Shape as Shape
from .workload import Shapes as Shapes
from .workload import Size as Size
from .workload import Tensor as Tensor
from .workload import Workload as Workload
from .workload import elements as elements


def _named(*workloads: Workload) -> dict[str, Workload]:
    names = [workload.name for workload in workloads]
    if len(set(names)) != len(names):
        raise ValueError(f"workload names must be unique, but are {names}")
    return dict(zip(names, workloads, strict=True))


WORKLOADS: Mapping[str, Workload] = _named(*ROW_NORMS, *CHANNEL_NORMS, *BATCH_NORMS, *RESIDUAL_ADDS)
