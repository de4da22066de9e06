"""Weight Standardization: every filter of a convolution has mean 0 and variance 1."""

from __future__ import annotations

import torch

from .. import known
from .row_dispatch import _plan_weight_standardize

Tensor = torch.Tensor


def weight_standardize(weight: Tensor, eps: float = 1e-5) -> Tensor:
    """A convolution's weight with every output filter at mean 0 and variance 1.

    .. math:: \\hat w_o = \\frac{w_o - \\mathrm{E}[w_o]}{\\sqrt{\\mathrm{Var}[w_o] + \\epsilon}}

    The mean and the biased variance are those of a filter, ``weight[o]``.

    Args:
        weight: shape ``(filters, *)``, float16, bfloat16, float32 or float64, any strides.

    Returns:
        The standardized weight, with weight's shape, type and order of dims in memory (channels_last stays so). All
        arithmetic is float32 (float64 for float64).

    Raises:
        ArgumentError (a ValueError and a RuntimeError): fewer than 2 dims, or a type that does not fit.

    Qiao, Wang, Liu, Shen, Yuille, "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization",
    arXiv:1903.10520.

    Example:
        >>> x, weight = torch.randn(2, 3, 8, 8), torch.randn(16, 3, 3, 3)
        >>> torch.nn.functional.conv2d(x, weight_standardize(weight)).shape
        torch.Size([2, 16, 6, 6])
    """
    return known.find("weight_standardize", _plan_weight_standardize, (float(eps),), (weight,))(weight)
