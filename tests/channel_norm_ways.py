"""The ways in which a channel norm can run: whole groups in registers, or pieces, in either layout."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

import fused_ops.kernels.channel_norm.backward as backward_module
import fused_ops.kernels.channel_norm.forward as forward_module
import fused_ops.kernels.column_sum as column_sum_module
from fused_ops.kernels.channel_norm.config import PieceTile
from tests.channel_norm_cases import ChannelCase, channels_last, with_layout

MODULES = (forward_module, backward_module, column_sum_module)
Layout = Callable[[ChannelCase], ChannelCase]

# Small pieces are so small that a test's few elements are many of them, some partly beyond the planes or the channels.
WAYS = ("whole", "small pieces", "channels_last", "channels_last in small pieces")


def forget_schedules() -> None:
    """Schedules are built once for each kind of call, from the configurations of that moment."""
    for module in MODULES:
        for member in vars(module).values():
            if hasattr(member, "cache_clear"):
                member.cache_clear()


@contextlib.contextmanager
def in_pieces(block_channels: int, block_plane: int, steps: int = 1) -> Iterator[None]:
    """Cuts every group into pieces of `steps` tiles of block_channels x block_plane until it ends."""

    def tile(of: Callable[..., PieceTile]) -> Callable[..., PieceTile]:
        def smaller(channels: int, plane: int, *sizes: Any) -> PieceTile:
            stages = 0 if plane <= block_plane else 1
            tile = of(channels, plane, *sizes)
            return replace(tile, block_channels=block_channels, block_plane=block_plane, stages=stages)

        return smaller

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward_module, "group_forward_tile", lambda *sizes: None)
        patch.setattr(backward_module, "group_backward_tile", lambda *sizes: None)
        for module in (forward_module, backward_module):
            patch.setattr(module, "piece_tile", tile(module.piece_tile))
        patch.setattr(forward_module, "forward_steps", lambda *sizes: steps)
        patch.setattr(backward_module, "backward_steps", lambda *sizes: steps)
        forget_schedules()
        try:
            yield
        finally:
            patch.undo()
            forget_schedules()


@contextlib.contextmanager
def running(way: str) -> Iterator[Layout]:
    """Runs channel norms in that way of WAYS until it ends; gives what lays out a case for it."""
    layout = channels_last if "channels_last" in way else lambda tensor: tensor.contiguous()
    with contextlib.ExitStack() as stack:
        if "pieces" in way:
            # Bits fill whole bytes along the neighbours in memory.
            stack.enter_context(in_pieces(*((8, 64, 2) if "channels_last" in way else (4, 128, 1))))
        yield lambda case: with_layout(case, layout)
