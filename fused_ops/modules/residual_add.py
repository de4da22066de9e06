"""ResidualAdd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import functional as F
from .. import validation
from ..activation import Activation, ActivationLike, resolve

Scale = tuple[int | Sequence[int], float]


class ResidualAdd(nn.Module):
    """``activation(residual + drop_path(scale * dropout(x)))``, how a block's branch x joins the residual stream.

    Args:
        activation: as in `functional.residual_add`.
        scale: None, or (shape, initial value) of the parameter `scale`, which broadcasts to x: ``(dim, 1e-5)`` is
            CaiT's layer scale, ``((channels, 1, 1), 1e-6)`` ConvNeXt's in an image.
        dropout_p, drop_path_p: rates in training; see `functional.residual_add`.

    Raises:
        ArgumentError (a ValueError and a RuntimeError): a rate outside [0, 1], a scale that is no shape with a value.
        ValueError: an unknown activation.

    Example:
        >>> add = ResidualAdd(scale=(1024, 1e-5), drop_path_p=0.1)
        >>> stream = add(torch.randn(8, 1024), torch.randn(8, 1024))
    """

    activation: Activation | None
    scale: nn.Parameter | None

    def __init__(
        self,
        activation: ActivationLike = None,
        *,
        scale: Scale | None = None,
        dropout_p: float = 0.0,
        drop_path_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.activation = resolve(activation)
        self.dropout_p = validation.rate(name, "dropout_p", dropout_p)
        self.drop_path_p = validation.rate(name, "drop_path_p", drop_path_p)
        self.initial_scale = None
        self.register_parameter("scale", None)
        if scale is not None:
            shape, self.initial_scale = validation.shape_and_value(name, "scale", scale)
            self.scale = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """The scale at its initial value."""
        if self.scale is not None and self.initial_scale is not None:
            nn.init.constant_(self.scale, self.initial_scale)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return F.residual_add(
            x,
            residual,
            activation=self.activation,
            scale=self.scale,
            dropout_p=self.dropout_p,
            drop_path_p=self.drop_path_p,
            training=self.training,
        )

    def extra_repr(self) -> str:
        shown = [] if self.activation is None else [f"activation={self.activation}"]
        if self.scale is not None:
            shown.append(f"scale=({tuple(self.scale.shape)}, {self.initial_scale})")
        rates = {"dropout_p": self.dropout_p, "drop_path_p": self.drop_path_p}
        shown += [f"{name}={rate}" for name, rate in rates.items() if rate]
        return ", ".join(shown)
