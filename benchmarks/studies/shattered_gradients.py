"""Shattered gradients: of a deep rectifier network they are white noise, unless small layers add to an identity path.

A network has 200 units a layer and weights of He's initialization; a layer is W relu(batch_norm(x)), added to x with
weight beta in a residual network. The first layer, of a grid of inputs, is W relu(w t + b) with w and b of one
deviation, so that its units switch at points all over the grid. Batch norm's statistics are held fixed as the gradient
is taken, so that it is one sample's own. The feed-forward network has batch norm as well, so that half of the units are
on. A pair's inputs have 200 independent normal values; its correlation is the normalized inner product of their
gradients of one random output, averaged over all pairs of 128 inputs and over networks.

Exponents are fitted from 8 layers on, as the law is one of many; a fit that begins at 1 layer is flatter. The quick
setting draws the figure and fits no exponents. No data are needed.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from fused_ops import BatchNorm1d
from fused_ops import functional as F

from .study import Claim, Found, Numbers, Study, draw_mean, over_seeds, values

Curve = Sequence[float]


@dataclass(frozen=True)
class Settings:
    """networks, pair_networks: how many a seed averages. beta: on the grid. tolerance: of fitted numbers.

    fitted_from: the least depth that counts for an exponent, as the law is one of many layers.
    """

    networks: int
    pair_networks: int = 0
    plain_depths: tuple[int, ...] = ()
    residual_depths: tuple[int, ...] = ()
    beta: float = 0.1
    pair_betas: tuple[float, ...] = (1.0, 0.1)
    fitted_from: int = 8
    tolerance: float = 0.1
    width: int = 200
    points: int = 256
    reach: float = 2.0
    lags: int = 15
    inputs: int = 128


FULL = Settings(
    networks=20, pair_networks=5, plain_depths=tuple(range(1, 9)), residual_depths=(1, 2, 4, 8, 16, 32, 64, 128)
)
QUICK = Settings(networks=4)


@dataclass(frozen=True)
class Noise:
    """Independent normal values, or for brown noise their running sum."""

    brown: bool


@dataclass(frozen=True)
class Grid:
    """Networks on the grid; without beta they are feed-forward."""

    layers: int
    beta: float | None = None


@dataclass(frozen=True)
class Pairs:
    """Networks on pairs of inputs, likewise."""

    depths: tuple[int, ...]
    beta: float | None = None


Condition = Noise | Grid | Pairs
WHITE, BROWN, SHALLOW, PLAIN, RESIDUAL = "white noise", "brown noise", "1 layer", "24 layers", "50 residual layers"
PLAIN_PAIRS, RESIDUAL_PAIRS = "feed-forward", "residual, beta {:g}"
MEAN_TAKEN_AWAY = 1 - 1 / math.pi
"""Of a rectified normal value's mean square the share that is variance."""


def conditions(settings: Settings) -> Mapping[str, Condition]:
    """The figure's five, and where there are depths the correlations over pairs."""
    noise = {WHITE: Noise(brown=False), BROWN: Noise(brown=True)}
    grid = {SHALLOW: Grid(1), PLAIN: Grid(24), RESIDUAL: Grid(50, settings.beta)}
    pairs = {PLAIN_PAIRS: Pairs(settings.plain_depths)}
    pairs |= {RESIDUAL_PAIRS.format(beta): Pairs(settings.residual_depths, beta) for beta in settings.pair_betas}
    return {**noise, **grid, **(pairs if settings.pair_networks else {})}


def he_linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
    """By He, Zhang, Ren, Sun, "Delving Deep into Rectifiers"; a bias has the weights' deviation."""
    made = nn.Linear(inputs, outputs, bias)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=math.sqrt(2 / inputs))
    return made.requires_grad_(False)


class Layers(nn.Module):
    """Layers W relu(batch_norm(x)), which yield x and then what comes out of each."""

    def __init__(self, count: int, width: int, beta: float | None) -> None:
        super().__init__()
        # With a momentum of 1 the running statistics are those of the last batch.
        self.norms = nn.ModuleList(BatchNorm1d(width, momentum=1.0, activation="relu") for _ in range(count))
        self.linears = nn.ModuleList(he_linear(width, width) for _ in range(count))
        self.scale = None if beta is None else nn.Parameter(torch.tensor(beta), requires_grad=False)

    def forward(self, x: Tensor) -> Iterator[Tensor]:
        yield x
        for norm, linear in zip(self.norms, self.linears, strict=True):
            branch = linear(norm(x))
            x = branch if self.scale is None else F.residual_add(branch, x, scale=self.scale)
            yield x

    @torch.no_grad()
    def freeze_statistics(self, x: Tensor) -> None:
        """Makes each norm's statistics constants: those of this batch."""
        list(self(x))
        self.eval()


def measure(settings: Settings, condition: Condition, seed: int, device: torch.device) -> Numbers:
    """An autocorrelation and one of the series it is the mean of, or a correlation for each depth."""
    torch.manual_seed(seed)
    if isinstance(condition, Pairs):
        found = [pair_correlations(settings, condition, device) for _ in range(settings.pair_networks)]
        return {"correlation": torch.stack(found).mean(0).tolist()}
    if isinstance(condition, Noise):
        steps = torch.randn(settings.networks, settings.points)
        series = steps.cumsum(1) if condition.brown else steps
    else:
        series = torch.stack([grid_gradient(settings, condition, device) for _ in range(settings.networks)]).cpu()
    one = [round(value, 3) for value in ((series[0] - series[0].mean()) / series[0].std()).tolist()]
    mean = torch.stack([autocorrelation(each, settings.lags) for each in series]).mean(0)
    return {"series": one, "autocorrelation": mean.tolist(), "mean_autocorrelation": mean[1:].mean().item()}


def grid_gradient(settings: Settings, network: Grid, device: torch.device) -> Tensor:
    """Of a random output of a new network, for each point of the grid."""
    width = settings.width
    first = nn.Sequential(he_linear(1, width, bias=True), nn.ReLU(), he_linear(width, width)).to(device)
    layers = Layers(network.layers - 1, width, network.beta).to(device)
    grid = torch.linspace(-settings.reach, settings.reach, settings.points).unsqueeze(1).to(device).requires_grad_()
    layers.freeze_statistics(first(grid))
    *_, x = layers(first(grid))
    return torch.autograd.grad((x @ torch.randn(width).to(device)).sum(), grid)[0].squeeze(1)


def autocorrelation(series: Tensor, lags: int) -> Tensor:
    """The sample autocorrelation at lags 0 up to the last."""
    series = series - series.mean()
    products = [(series[lag:] * series[: len(series) - lag]).sum() for lag in range(lags + 1)]
    return torch.stack(products) / products[0]


def pair_correlations(settings: Settings, networks: Pairs, device: torch.device) -> Tensor:
    """The mean normalized inner product of two inputs' gradients, at each depth of one new network."""
    layers = Layers(max(networks.depths), settings.width, networks.beta).to(device)
    inputs = torch.randn(settings.inputs, settings.width).to(device).requires_grad_()
    layers.freeze_statistics(inputs)
    found = []
    for depth, x in enumerate(layers(inputs)):
        if depth in networks.depths:
            output = (x @ torch.randn(settings.width).to(device)).sum()
            gradients = nn.functional.normalize(torch.autograd.grad(output, inputs, retain_graph=True)[0])
            count = settings.inputs
            found.append(((gradients.sum(0) ** 2).sum() - count) / (count * (count - 1)))
    return torch.stack(found).cpu()


def slope(x: Sequence[float], correlation: Curve) -> float:
    """Of the logarithm of the correlation at the last of its depths, by least squares; the least one is 1e-6."""
    return statistics.linear_regression(x, [math.log(max(value, 1e-6)) for value in correlation[-len(x) :]]).slope


def claims(settings: Settings, found: Found) -> Sequence[Claim]:
    """What figure 1 shows, then how correlations are said to fall."""
    judged = [
        nearer(f"the gradient's autocorrelation is near brown noise's with {SHALLOW}", found, SHALLOW, BROWN, WHITE),
        nearer(f"near white noise's with {PLAIN}, feed-forward", found, PLAIN, WHITE, BROWN),
        nearer(f"near brown noise's with {RESIDUAL} at a small beta", found, RESIDUAL, BROWN, WHITE),
    ]
    if not settings.pair_networks:
        return judged

    def near(fitted: Sequence[float], expected: float) -> bool:
        return abs(statistics.mean(fitted) - expected) <= settings.tolerance

    slopes = [slope(settings.plain_depths, curve) for curve in values(found, PLAIN_PAIRS, "correlation")]
    said = f"{over_seeds(slopes, '.2f')} a layer in its logarithm against {-math.log(2):.2f}"
    judged.append(Claim("feed-forward, correlation falls like 1/2^L", said, near(slopes, -math.log(2))))
    logarithms = [math.log(depth) for depth in settings.residual_depths if depth >= settings.fitted_from]
    for beta in settings.pair_betas:
        exponents = [slope(logarithms, curve) for curve in values(found, RESIDUAL_PAIRS.format(beta), "correlation")]
        fitted = f"an exponent of {over_seeds(exponents, '.2f')}"
        counted = slope(logarithms, derived(beta, settings.residual_depths, MEAN_TAKEN_AWAY))
        law = f"{fitted} against -0.50; {counted:.2f} with the mean taken away"
        judged += [
            Claim(f"residual, beta {beta:g}: more slowly than 1/L", f"{fitted} against -1", min(exponents) > -1),
            Claim(f"residual, beta {beta:g}: like 1/sqrt(L)", law, near(exponents, -0.5)),
        ]
    return judged


def nearer(expected: str, found: Found, condition: str, near: str, far: str) -> Claim:
    """Whether a condition's mean over the lags is nearer to that of one noise than to the other's, with every seed."""
    means = {name: values(found, name, "mean_autocorrelation") for name in (condition, near, far)}
    holds = all(abs(one - close) < abs(one - distant) for one, close, distant in zip(*means.values(), strict=True))
    return Claim(expected, "; ".join(f"{name} {over_seeds(mean, '.2f')}" for name, mean in means.items()), holds)


def derived(beta: float, depths: Sequence[int], share: float) -> Curve:
    """The correlation at each depth, if of each layer's beta^2 this share adds to the variance of the stream."""
    correlation, variance, after = 1.0, 1.0, [1.0]
    for _ in range(max(depths)):
        gain = beta**2 / variance
        correlation *= (1 + gain / 2) / (1 + gain)
        variance += share * beta**2
        after.append(correlation)
    return [after[depth] for depth in depths]


def draw(settings: Settings, found: Found, figure: Figure) -> None:
    """One gradient of each kind over the grid, the autocorrelations, and the correlations over depth."""
    panels = figure.subplots(1, 3 if settings.pair_networks else 2)
    grid = torch.linspace(-settings.reach, settings.reach, settings.points).tolist()
    for place, name in enumerate((SHALLOW, PLAIN, RESIDUAL, WHITE, BROWN)):
        shifted = [value - 6 * place for value in found[name][0]["series"]]
        panels[0].plot(grid, shifted, color=f"C{place}", linewidth=0.8)
        panels[0].text(-settings.reach, 2.3 - 6 * place, name, fontsize=7)
        line, curves = "--" if name in (WHITE, BROWN) else "-", values(found, name, "autocorrelation")
        draw_mean(panels[1], range(settings.lags + 1), curves, line, color=f"C{place}", label=name)
    panels[0].set(xlabel="input", ylabel="gradient, in deviations, one below the other", yticks=[], ylim=(None, 4))
    panels[1].set(xlabel="lag, in points of the grid", ylabel="autocorrelation")
    if settings.pair_networks:
        draw_pairs(settings, found, panels[2])


def draw_pairs(settings: Settings, found: Found, axes: Axes) -> None:
    """Correlations over depth: dashed as expected, dotted with the mean that batch norm takes away."""
    plain, depths = settings.plain_depths, settings.residual_depths
    draw_mean(axes, plain, values(found, PLAIN_PAIRS, "correlation"), color="C1", label=PLAIN_PAIRS)
    axes.plot(plain, [0.5**depth for depth in plain], "k--", linewidth=1, label="1/2^L; beta^2 a layer")
    for color, beta in zip(("C5", "C2"), settings.pair_betas, strict=True):
        name = RESIDUAL_PAIRS.format(beta)
        draw_mean(axes, depths, values(found, name, "correlation"), color=color, label=name)
        axes.plot(depths, derived(beta, depths, 1), "k--", linewidth=1)
        axes.plot(depths, derived(beta, depths, MEAN_TAKEN_AWAY), "k:", linewidth=1)
    axes.plot([], [], "k:", label="with the mean taken away")
    axes.set(xscale="log", yscale="log", xlabel="layers L", ylabel="correlation of two inputs' gradients")


STUDY = Study(
    name="shattered_gradients",
    title="Shattered gradients: when a deep network's are white noise",
    source="Balduzzi, Frean, Leary, Lewis, Ma, McWilliams, *The Shattered Gradients Problem*, arXiv:1702.08591, "
    "figure 1 and section 3",
    expected="Over its inputs, the gradient of a shallow rectifier network is like brown noise and that of a deep "
    "feed-forward one like white noise: two inputs' correlation halves with each layer. In residual networks with "
    "batch norm it falls like 1 / (beta sqrt(L)); at a beta of 0.1 the gradient of 50 layers looks like that of one.",
    full=FULL,
    quick=QUICK,
    cause="beta is raised from 0.1 to 1",
    without_cause=dataclasses.replace(QUICK, beta=1.0),
    conditions=conditions,
    measure=measure,
    claims=claims,
    draw=draw,
    meaning="The reasoning behind the law: a rectifier lets half of the gradient's variance through and a quarter of "
    "its covariance, so that without an identity path the correlation halves with each layer; with it and batch norm "
    "it falls like 1 / (beta sqrt(L)), as the variance that batch norm divides by grows by beta^2 a layer (dashed in "
    "the figure). But a rectifier's outputs have a mean, which batch norm takes away: of beta^2 only the share "
    "1 - 1 / pi counts. So the exponent of L tends to -pi / (2 pi - 2) = -0.73 instead of -0.5 where beta^2 L is large "
    "(dotted; thought of once the numbers were there, but with nothing in it to fit). At a beta of 0.1 beta^2 L is "
    "about 1 at most: no power of L is reached.",
)
