"""Batch norm by halves, forward and backward, between which statistics may go round processes; always over pieces."""

from __future__ import annotations

import torch

from ..problem import BatchNorm, Forward, Gradients, Tensor, Wanted, compute_dtype
from .backward import allocate_gradients
from .backward_pieces import Pair
from .batch_backward import backward_pieces_of, prepare_backward
from .batch_forward import allocate, batch_drop_numbers, numbers_of, pieces_of, prepare


class SyncForward:
    """`batch_norm_forward` of x with elements, by statistics of which its own are a part."""

    def __init__(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        norm: BatchNorm,
        save_bits: bool,
    ) -> None:
        self.norm = norm
        self.out = allocate(x, residual, norm, save_statistics=False, save_bits=save_bits)
        tensors = (x, residual, weight, bias)
        self.kind, self.view, read, self.strides = prepare(*tensors, norm, (), True, save_bits)
        self.given = read((*tensors, norm.seed))
        self.floats = numbers_of(norm, x)

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """A rough mean of x, the difference of the mean from it, and the sum of squared deviations, [channels] each."""
        kind, view, given, strides = self.kind, self.view, self.given, self.strides
        pieces = pieces_of(kind)
        origin = torch.empty(kind.groups, dtype=compute_dtype(kind.x), device=self.out.y.device)
        mean, m2 = torch.empty_like(origin), torch.empty_like(origin)
        moments, *lengths = pieces.reduce(view.samples, view.plane, given, self.out.total, strides, self.floats)
        pieces.merge(view.samples, moments, lengths, (origin, mean, m2, None))
        return origin, mean, m2

    def finish(self, mean: Tensor, rstd: Tensor) -> Forward:
        """y and what else was asked for, after `moments`."""
        kind, view, given, strides = self.kind, self.view, self.given, self.strides
        out = self.out._replace(mean=mean, rstd=rstd)
        pieces_of(kind).finish(view.samples, view.plane, given, out, strides, self.floats)
        return out


class SyncBackward:
    """`batch_norm_backward` of dy with elements, where mean and rstd depend on more than x."""

    def __init__(
        self,
        dy: Tensor,
        dtotal: Tensor | None,
        x: Tensor,
        residual: Tensor | None,
        bits: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        norm: BatchNorm,
        wanted: Wanted,
    ) -> None:
        self.norm, self.wanted = norm, wanted
        # Others need the means, whether dx is wanted here or not; and who has it stored must always have it stored.
        with_dx = wanted._replace(dx=True)
        self.dx, self.dresidual = allocate_gradients(dy, x, norm, with_dx)
        tensors = (dy, dtotal, x, residual, bits, weight, bias, mean, rstd, norm.seed)
        self.kind, self.view, read, self.strides = prepare_backward(tensors, norm, with_dx)
        self.given = read(tensors)
        self.floats = (*batch_drop_numbers(norm, dy), norm.alpha, norm.beta)

    def means(self) -> tuple[Tensor, Tensor]:
        """The means of g = dz * weight and of g * x_hat over dy, [channels] each."""
        kind, view, given, strides = self.kind, self.view, self.given, self.strides
        means, self.parameters, self.lengths = backward_pieces_of(kind).sum_up(
            view.samples, view.plane, given, self._written(), strides, self.floats
        )
        mean_g, mean_g_x_hat = means
        assert mean_g is not None and mean_g_x_hat is not None
        return mean_g, mean_g_x_hat

    def finish(self, mean_g: Tensor, mean_g_x_hat: Tensor) -> Gradients:
        """The wanted gradients, after `means`, from the means over all that mean and rstd depend on."""
        kind, view, given, strides = self.kind, self.view, self.given, self.strides
        pieces = backward_pieces_of(kind)
        if self.wanted.dx or (self.wanted.dresidual and not pieces.leaves_dz):
            means = (None, None, None, None, mean_g, mean_g_x_hat)
            pieces.finish(view.samples, view.plane, given, self._written(), means, strides, self.lengths, self.floats)
        return Gradients(self.dx if self.wanted.dx else None, self.dresidual, *self.parameters)

    def _written(self) -> Pair:
        return self.dx, self.dresidual
