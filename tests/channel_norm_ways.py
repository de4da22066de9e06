"""The ways in which a channel norm can run: whole groups in registers, or pieces, in either layout."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import fused_ops.kernels.channel_norm.backward as backward_module
import fused_ops.kernels.channel_norm.backward_pieces as backward_pieces
import fused_ops.kernels.channel_norm.forward as forward_module
import fused_ops.kernels.channel_norm.forward_pieces as forward_pieces
from fused_ops.kernels.channel_norm.config import PieceTile
from tests.channel_norm_cases import ChannelCase, make_case, with_layout
from tests.layouts import Layout, channels_last
from tests.schedules import forget_schedules

# Channels of a group, positions, groups. Hardly a size is a power of two.
SHAPES = {
    "whole": (3, (7, 9), 3),
    # Planes that begin between 16-byte boundaries.
    "ragged": (3, (7, 6), 4),
    # Pieces so small that a test's few elements are many of them, some partly beyond the planes or the channels.
    "small pieces": (3, (15, 14), 4),
    "channels_last": (3, (15, 14), 4),
    "channels_last in small pieces": (3, (15, 14), 4),
}
WAYS = tuple(SHAPES)
# Of few elements and few statistics the largest error would be chance, and torch's no measure of ours, but where the
# type's own rounding is far larger than any other error. More samples take more programs, and an interpreter long.
SAMPLES = {torch.float32: 10, torch.float64: 4, torch.float16: 2, torch.bfloat16: 2}
SAMPLES_IN_PIECES = {**SAMPLES, torch.float32: 5}


@dataclass(frozen=True)
class Way:
    """One of WAYS, and cases for it. Instance norm's channels are as many as group norm's groups."""

    name: str

    @property
    def layout(self) -> Layout:
        return channels_last if "channels_last" in self.name else torch.Tensor.contiguous

    def shape(self, function: str, dtype: torch.dtype = torch.float32, samples: int | None = None) -> tuple[int, ...]:
        channels, positions, groups = SHAPES[self.name]
        enough = SAMPLES if self.name in ("whole", "ragged") else SAMPLES_IN_PIECES
        return (samples or enough[dtype], groups * (channels if "group" in function else 1), *positions)

    def case(
        self, function: str, *, dtype: torch.dtype = torch.float32, samples: int | None = None, **fields: Any
    ) -> ChannelCase:
        """A case of normal numbers that runs in this way."""
        shape, groups = self.shape(function, dtype, samples), SHAPES[self.name][-1]
        return self.lay_out(make_case(function, *shape, groups=groups, dtype=dtype, **fields))

    def lay_out(self, case: ChannelCase) -> ChannelCase:
        return with_layout(case, self.layout)


@contextlib.contextmanager
def in_pieces(
    block_channels: int, block_plane: int, steps: int = 1, backward_steps: int | None = None
) -> Iterator[None]:
    """Cuts every group into pieces of `steps` tiles of block_channels x block_plane until it ends."""

    def tile(of: Callable[..., PieceTile]) -> Callable[..., PieceTile]:
        def smaller(channels: int, plane: int, *sizes: Any, **flags: Any) -> PieceTile:
            stages = 0 if plane <= block_plane else 1
            tile = of(channels, plane, *sizes, **flags)
            return replace(tile, block_channels=block_channels, block_plane=block_plane, stages=stages)

        return smaller

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward_module, "group_forward_tile", lambda *sizes: None)
        patch.setattr(backward_module, "group_backward_tile", lambda *sizes: None)
        for module, name in ((forward_pieces, "forward_piece_tile"), (backward_pieces, "backward_piece_tile")):
            patch.setattr(module, name, tile(getattr(module, name)))
            patch.setattr(module, "backward_steps", lambda *sizes: backward_steps or steps)
        patch.setattr(forward_pieces, "forward_steps", lambda *sizes: steps)
        forget_schedules()
        try:
            yield
        finally:
            patch.undo()
            forget_schedules()


@contextlib.contextmanager
def running(name: str) -> Iterator[Way]:
    """Runs channel norms in that way of WAYS until it ends."""
    way = Way(name)
    with contextlib.ExitStack() as stack:
        if "pieces" in name:
            # Bits fill whole bytes along the neighbours in memory.
            stack.enter_context(in_pieces(*((8, 64, 2) if "channels_last" in name else (8, 128, 1))))
        yield way
