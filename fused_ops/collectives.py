"""What batch norm's statistics and their gradients need of other processes: one all-gather, and one all-reduce."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .validation import ArgumentError

Tensor = torch.Tensor


class Moments(NamedTuple):
    """Of each channel, in this process: a rough mean, the difference of the mean from it, and the sum of squared
    deviations."""

    origin: Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def of_nothing(cls, x: Tensor) -> Moments:
        """Those of an input without elements."""
        return cls(*x.new_zeros((3, x.shape[1]), dtype=computed_in(x)).unbind())


class Statistics(NamedTuple):
    """Of each channel, in all processes together."""

    mean: Tensor
    rstd: Tensor
    unbiased_var: Tensor | None  # None where no process has a value

    @torch.no_grad()
    def attract(self, running_mean: Tensor | None, running_var: Tensor | None, momentum: float) -> None:
        """Moves running statistics, if there are any, towards these; both, or where it fails neither."""
        moved = []
        for running, found in ((running_mean, self.mean), (running_var, self.unbiased_var)):
            if running is not None and found is not None:
                wide = torch.promote_types(running.dtype, found.dtype)
                moved.append((running, running.to(wide).lerp(found.to(wide), momentum)))
        for running, value in moved:
            running.copy_(value)


def computed_in(x: Tensor) -> torch.dtype:
    """The type of statistics and of what goes round: the same in all processes, whatever a process runs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def values_of_channel(x: Tensor) -> int:
    """How many there are in this process."""
    return x.numel() // x.shape[1]


def gather_statistics(moments: Moments, count: int, eps: float, group: Any) -> Statistics:
    """The statistics of all processes of the group from the moments of `count` values a channel in each.

    Raises:
        ArgumentError: all processes together have one value a channel; in each of them.
    """
    packed = torch.cat((*moments, moments.mean.new_full((1,), count)))
    gathered = packed.new_empty((dist.get_world_size(group), packed.numel()))
    if dist.get_backend(group) == "gloo":  # as torch.nn.SyncBatchNorm: this backend is not sure to have the others
        dist.all_gather([*gathered.unbind()], packed, group=group)
    elif hasattr(dist, "all_gather_single"):  # since torch 2.13, which deprecates the other
        dist.all_gather_single(gathered.view(-1), packed, group=group)
    else:
        dist.all_gather_into_tensor(gathered.view(-1), packed, group=group)
    origins, means, m2s = gathered[:, :-1].unflatten(1, (3, -1)).unbind(1)
    counts = gathered[:, -1:]
    in_all = counts.sum()
    if count <= 1:  # a device is waited for only by who cannot tell alone
        values = int(in_all)
        if values == 0:
            return Statistics(moments.mean, torch.ones_like(moments.mean), None)
        if values == 1:
            raise ArgumentError(
                "sync_batch_norm: expected more than 1 value per channel when training, but all processes together "
                "have one; pass a larger batch, or eval()"
            )
    # As a kernel merges pieces: a rough mean first, and everything else as differences from it.
    shares = counts / in_all
    origin = ((origins + means) * shares).sum(0)
    means = origins - origin + means
    shift = (means * shares).sum(0)
    deviation = torch.where(counts > 0, means - shift, 0.0)  # where there is nothing a square may still overflow
    m2 = (m2s + deviation * (deviation * counts)).sum(0)
    return Statistics(origin + shift, torch.rsqrt(m2 / in_all + eps), m2 / (in_all - 1))


def reduce_means(means: tuple[Tensor, Tensor] | None, count: int, like: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Two means [channels] over `count` values a channel here as means over those of all processes; None of nothing.

    `like` has the statistics' shape and type. How many there are comes with the sums, so that nobody keeps it.
    """
    if means is None:
        packed = like.new_zeros(2 * like.numel() + 1)
    else:
        packed = torch.cat((*means, like.new_ones(1))).mul_(count)
    dist.all_reduce(packed, group=group)
    first, second = (packed[:-1] / packed[-1]).view(2, -1).unbind()
    return first, second
