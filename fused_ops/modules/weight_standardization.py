"""WSConv1d, WSConv2d and WSConv3d."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .. import functional as F
from .base import Extending

DEFAULT_EPS = 1e-5


class _Standardized(Extending, _ConvNd):
    """Mixin before a torch.nn convolution: its weight is standardized in every call, and kept as it is."""

    eps: float

    def __init__(self, *args: Any, eps: float = DEFAULT_EPS, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eps = eps

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, F.weight_standardize(self.weight, self.eps), self.bias)

    def extra_repr(self) -> str:
        shown = super().extra_repr()
        return shown if self.eps == DEFAULT_EPS else f"{shown}, eps={self.eps}"


class WSConv1d(_Standardized, nn.Conv1d):
    """torch.nn.Conv1d whose filters have mean 0 and variance 1, see `functional.weight_standardize`.

    Same constructor and state_dict as torch's, and the keyword `eps`.

    Example:
        >>> y = WSConv1d(16, 32, 3, padding=1)(torch.randn(2, 16, 8))
    """


class WSConv2d(_Standardized, nn.Conv2d):
    """torch.nn.Conv2d whose filters have mean 0 and variance 1, see `functional.weight_standardize`.

    Same constructor and state_dict as torch's, and the keyword `eps`.

    Example:
        >>> y = WSConv2d(16, 32, 3, padding=1)(torch.randn(2, 16, 8, 8))
    """


class WSConv3d(_Standardized, nn.Conv3d):
    """torch.nn.Conv3d whose filters have mean 0 and variance 1, see `functional.weight_standardize`.

    Same constructor and state_dict as torch's, and the keyword `eps`.

    Example:
        >>> y = WSConv3d(16, 32, 3, padding=1)(torch.randn(2, 16, 8, 8, 8))
    """
