"""The launchers that merge the partial results of pieces, and their tiles, by how many a group has of them."""

from __future__ import annotations

from collections.abc import Callable

import triton

from ..launcher import Launcher

# Partial results of all channels that are several columns each: of 2048 programs with 128 columns.
SPREAD_PARTIALS = 2048 * 128


FEW_PARTIALS = 128  # of a channel that all samples share, up to which they are merged as few


def combine_tile(channels: int, groups: int, spread: bool, partials: int | None) -> tuple[int, int]:
    """(partial results, groups) that a program merges at a time. partials: about how many a group has, None for many.

    Those of a large group are neighbours, of small ones only beside those of the next: eight fill a sector of memory.
    But many are merged by more programs, few together. Of channels that are several columns each there are the fewer
    the more groups there are: so many programs share them.
    """
    if spread:
        return min(1024, max(128, triton.next_power_of_2(SPREAD_PARTIALS // groups))), 1
    if partials is None or partials > 256:
        return 1024, 1 if channels // groups >= 8 else 2
    block = max(8, triton.next_power_of_2(partials))
    return block, min(8, 1024 // block)


class Combiner:
    """Where samples share a group, a launcher for few partial results and one for many, of which no sample's bits
    depend on itself alone; else one for as many as a group of one sample has, whatever the batch.

    make: a launcher of a tile (see `combine_tile`); pieces: of a plane, None for many.
    """

    def __init__(
        self, make: Callable[[int, int], Launcher], channels: int, groups: int, pooled: bool, pieces: int | None
    ) -> None:
        spread = pooled and channels != groups

        def of(partials: int | None) -> tuple[Launcher, int]:
            tile = combine_tile(channels, groups, spread, partials)
            return make(*tile), tile[1]

        if pooled:
            self.many = of(None)
            self.few = self.many if spread else of(FEW_PARTIALS)
        else:
            self.few = self.many = of(None if pieces is None else pieces * (channels // groups))

    def of(self, partials: int) -> tuple[Launcher, int]:
        """What merges groups of so many partial results, and how many groups a program of it does."""
        return self.few if partials <= FEW_PARTIALS else self.many
