"""The block of a pre-norm Transformer for sequences (N, T, C)."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch.nn.functional as TF
from torch import Tensor, nn

from .. import validation
from ..modules import ResidualAdd
from .norms import sequence_norms


class Attention(nn.Module):
    """Multi-head self-attention over the positions of (N, T, dim), each position seeing all: no mask, no dropout.

    .. math:: \\mathrm{out}(\\mathrm{softmax}(q k^T / \\sqrt{d}) \\, v), \\quad q, k, v = \\mathrm{qkv}(x)

    in each of the heads, which have d = dim / num_heads channels. Queries, keys and values are in this order in `qkv`,
    as in torch.nn.MultiheadAttention's in_proj_weight.

    Raises:
        ValueError: num_heads that are no integer which divides dim.

    Vaswani et al., "Attention Is All You Need", arXiv:1706.03762.

    Example:
        >>> y = Attention(64, num_heads=4)(torch.randn(2, 10, 64))
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = divisor_of(dim, num_heads, type(self).__name__)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(TF.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Block of a pre-norm Transformer: attention, then an MLP, each of the normalized stream and added to it.

    .. math:: x' = x + f(\\mathrm{attention}(\\mathrm{norm}_1(x))), \\quad
              y = x' + f(\\mathrm{mlp}(\\mathrm{norm}_2(x'))), \\quad
              f(z) = \\mathrm{drop\\_path}(\\mathrm{scale} \\cdot \\mathrm{dropout}(z))

    x and y have shape ``(N, T, dim)``. Each position sees all: there is no attention mask, padding or causal, and no
    dropout of attention weights.

    Without scale and drop-path the first sum and the norm behind it are one call; in a stack of such blocks
    `AddTransformerBlock` joins the second sum to the next block's norm as well. Which of the two it is goes by how the
    block is made: `add1` is None where `norm2` adds, whereas `add2` is always there.

    Args:
        mlp_ratio: the MLP's width over dim; its activation is gelu.
        norm: "batch", "layer", "rms", "group", "instance" or "switch", see `blocks.norms`. All but layer and rms look
            at several positions at once.
        dropout_p: rate of elements dropped from both branches in training.
        drop_path_p: rate of samples whose branch is dropped in training, see `ResidualAdd`. To change it in `add1` and
            `add2` as training goes, make the block with a rate above 0, or with a scale: else there is no `add1`.
        layer_scale: what the scale of both branches, a parameter a channel, begins with; None is no scale.

    Raises:
        ValueError: an unknown norm, a rate outside [0, 1], num_heads that are no integer which divides dim, an MLP
            without a channel, or x of another shape.

    Xiong et al., "On Layer Normalization in the Transformer Architecture", arXiv:2002.04745; Huang et al., "Deep
    Networks with Stochastic Depth", arXiv:1603.09382; Touvron et al., "Going Deeper with Image Transformers",
    arXiv:2103.17239.

    Example:
        >>> block = TransformerBlock(64, num_heads=4, norm="rms", drop_path_p=0.1, layer_scale=1e-5)
        >>> y = block(torch.randn(2, 10, 64))
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        norm: str = "layer",
        dropout_p: float = 0.0,
        drop_path_p: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        name, self.dim = type(self).__name__, dim
        num_heads, hidden = divisor_of(dim, num_heads, name), width_of_mlp(dim, mlp_ratio, name)
        norms = sequence_norms(norm)
        scale = None if layer_scale is None else (dim, layer_scale)

        self.norm1 = norms.norm(dim)
        self.attention = Attention(dim, num_heads)
        if scale is None and not drop_path_p:
            self.add1 = None
            self.norm2 = norms.add_norm(dim, dropout_p=dropout_p)
        else:
            self.add1 = ResidualAdd(scale=scale, dropout_p=dropout_p, drop_path_p=drop_path_p)
            self.norm2 = norms.norm(dim)
        self.mlp = mlp(dim, hidden)
        self.add2 = ResidualAdd(scale=scale, dropout_p=dropout_p, drop_path_p=drop_path_p)

    def forward(self, x: Tensor) -> Tensor:
        check_sequences(x, self.dim)
        branch = self.attention(self.norm1(x))
        if self.add1 is None:
            y, x = self.norm2(branch, x)
        else:
            x = self.add1(branch, x)
            y = self.norm2(x)
        return self.add2(self.mlp(y), x)


class AddTransformerBlock(nn.Module):
    """`TransformerBlock` for the inside of a stack, each of its sums in one call with the norm behind it.

    .. math:: \\mathrm{total} = \\mathrm{residual} + x, \\quad
              \\mathrm{total}' = \\mathrm{total} + \\mathrm{attention}(\\mathrm{norm}_1(\\mathrm{total})), \\quad
              \\mathrm{branch} = \\mathrm{mlp}(\\mathrm{norm}_2(\\mathrm{total}'))

    Returns (branch, total'), whose sum is the block's output: the next block makes it, and behind the last one the norm
    before the head. The first block is given two tensors whose sum is the embedding, such as those of tokens and of
    their places. x is dropped out as it is added, so `dropout_p` drops from the embedding too.

    All have shape ``(N, T, dim)``; arguments and errors as in `TransformerBlock`, whose state_dict this one takes where
    that has no scale.

    Example:
        >>> blocks = nn.ModuleList(AddTransformerBlock(64, num_heads=4) for _ in range(2))
        >>> norm = fused_ops.AddLayerNorm(64)
        >>> x, residual = torch.randn(2, 10, 64), torch.randn(10, 64).expand(2, 10, 64)
        >>> for block in blocks:
        ...     x, residual = block(x, residual)
        >>> y, _ = norm(x, residual)
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4.0, *, norm: str = "layer", dropout_p: float = 0.0
    ) -> None:
        super().__init__()
        name, self.dim = type(self).__name__, dim
        num_heads, hidden = divisor_of(dim, num_heads, name), width_of_mlp(dim, mlp_ratio, name)
        norms = sequence_norms(norm)
        self.norm1 = norms.add_norm(dim, dropout_p=dropout_p)
        self.attention = Attention(dim, num_heads)
        self.norm2 = norms.add_norm(dim, dropout_p=dropout_p)
        self.mlp = mlp(dim, hidden)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        check_sequences(x, self.dim)
        y, total = self.norm1(x, residual)
        y, total = self.norm2(self.attention(y), total)
        return self.mlp(y), total


def divisor_of(dim: int, num_heads: Any, module: str) -> int:
    """A number of heads as Python's own integer; it must divide dim."""
    try:
        heads = operator.index(num_heads)
    except TypeError:
        heads = 0
    if heads < 1 or dim % heads:
        raise ValueError(
            f"{module}: num_heads must be an integer that divides dim, but is {num_heads!r} and dim is {dim}"
        )
    return heads


def width_of_mlp(dim: int, mlp_ratio: Any, module: str) -> int:
    """`mlp_ratio` times dim, of which at least one channel must be left."""
    width = validation.number(module, "mlp_ratio", mlp_ratio) * dim
    if not 1 <= width < math.inf:
        raise ValueError(
            f"{module}: mlp_ratio * dim must be finite and at least 1, but mlp_ratio is {mlp_ratio} and dim is {dim}"
        )
    return int(width)


def mlp(dim: int, hidden: int) -> nn.Sequential:
    """The feed-forward half of a block: out to `hidden` channels, gelu, and back."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


def check_sequences(x: Tensor, dim: int) -> None:
    """Requires (N, T, dim): a norm over positions would take a sequence without a batch for something else."""
    if x.dim() != 3 or x.shape[-1] != dim:
        raise ValueError(f"x must have shape (N, T, {dim}), but has shape {tuple(x.shape)}")
