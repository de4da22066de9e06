"""The launchers that merge the partial results of pieces, by how many a group has of them."""

from __future__ import annotations

from collections.abc import Callable

from ..launcher import Launcher
from .config import FEW_PARTIALS, combine_tile


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
