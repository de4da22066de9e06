"""Studies: what normalization and identity paths do to gradients, reproduced with the package's own modules.

Every norm, its activation and its residual come from fused_ops; the rest is plain torch. Each study is one file, with
its settings at the head, and judges itself: see `study`. `python -m benchmarks.studies` runs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import axis, batch_size, degradation, gradient_flow, remedies, shattered_gradients, switch_weights
from .study import Study

STUDIES: Mapping[str, Study[Any, Any]] = {
    module.STUDY.name: module.STUDY
    for module in (degradation, gradient_flow, shattered_gradients, batch_size, remedies, axis, switch_weights)
}
