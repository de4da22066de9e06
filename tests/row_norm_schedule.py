"""Other schedules than the row family's own, for its tests: how rows are divided among tiles, chunks and programs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

import fused_ops.kernels.row_norm.backward as backward_module
import fused_ops.kernels.row_norm.forward as forward_module
from fused_ops.kernels import launch
from tests.row_norm_cases import FUNCTIONS
from tests.schedules import forget_schedules

Call = tuple[str, bool, "str | None"]

# Both norms, every place of the residual, and an activation of each kind: no slope, one of two values (so a bit mask
# where the residual is added last), one that is computed again.
CALLS: list[Call] = [
    *itertools.product(("layer_norm", "rms_norm"), (False, True), (None, "relu", "silu")),
    *itertools.product(FUNCTIONS[2:], (True,), (None, "relu", "silu")),
]
FEW_CALLS: list[Call] = [
    ("layer_norm", False, "silu"),
    ("layer_norm", True, "relu"),
    ("rms_norm", True, None),
    ("rms_norm", True, "silu"),
    ("add_layer_norm", True, "relu"),
    ("add_rms_norm", True, None),
]

# (span, block_span, steps): one chunk, a little beyond it, three chunks (no power of two), chunks of several tiles of
# which the last ones lie beyond the row.
DIVISIONS = [(256, 256, 1), (264, 256, 1), (712, 256, 1), (712, 64, 4), (392, 64, 3)]


def calls(quick: list[Call]) -> pytest.MarkDecorator:
    """Parametrizes over every call, all but the quick ones in the long sweep: a program takes an interpreter 10 ms."""
    return pytest.mark.parametrize(
        ("function", "residual", "activation"),
        [
            pytest.param(*call, marks=[] if call in quick else pytest.mark.full, id="-".join(map(str, call)))
            for call in CALLS
        ],
    )


class Schedule:
    """Puts other configurations in the place of the launchers' own until the test ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def replace(self, module: ModuleType, name: str, function: Callable[..., Any]) -> None:
        self._monkeypatch.setattr(module, name, function)
        forget_schedules()

    def forward(self, kind: str, block_span: int = 256, steps: int = 1, parts: int = 1) -> None:
        """Whole rows as configured, or chunks of steps * block_span elements, walked or shared, finished in parts.

        Rows are walked only where they can be read at full width: in these tests a span is a multiple of 8.
        """
        if kind == "whole":
            return
        self.replace(forward_module, "row_forward_config", lambda *sizes: None)
        self.replace(forward_module, "chunk_config", chunks_of(block_span, steps, parts))
        self.replace(forward_module, "walks_rows", lambda *sizes: kind == "walk")

    def backward(self, block_span: int = 256, steps: int = 1, stripes: int | None = None, columns: int = 256) -> None:
        """Chunks of steps * block_span elements; blocks of so many columns, each shared by `stripes` programs."""
        self.replace(backward_module, "row_backward_config", lambda *sizes: None)
        self.replace(backward_module, "backward_chunk_config", chunks_of(block_span, steps))
        block = launch.RowConfig(1, columns, num_warps=4, stages=2, most_registers=128)
        self.replace(backward_module, "column_block_config", lambda *sizes: block)
        if stripes is not None:
            self.replace(backward_module, "column_stripes", lambda rows, *sizes: min(rows, stripes))
        self.replace(backward_module, "walks_gradients", lambda *sizes: False)

    def backward_walk(self, block_span: int = 256, stages: int = 1) -> None:
        """A row a program, in tiles of block_span elements; of the calls that want no parameter gradient."""
        self.replace(backward_module, "row_backward_config", lambda *sizes: None)
        self.replace(backward_module, "walks_gradients", lambda *sizes: True)
        tile = launch.RowConfig(1, block_span, num_warps=4, stages=stages, most_registers=128)
        self.replace(backward_module, "backward_walk_config", lambda *sizes: tile)


def chunks_of(block_span: int, steps: int, parts: int = 1) -> Callable[..., launch.ChunkConfig]:
    def config(span: int, *sizes: int) -> launch.ChunkConfig:
        chunks = launch.cdiv(span, block_span * steps)
        return launch.ChunkConfig(block_span, steps, chunks, num_warps=4, most_registers=128, parts=parts)

    return config
