"""fuse(model): finds what these kernels compute in somebody's model, and has them compute it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .check import Example, Results, disagreeing
from .inlining import Inlined, inline
from .patterns import Site, fuse_graph
from .plans import Plan, can_be_kept
from .recognize import Recognized, is_norm, is_standardizing, may_be_norm, may_standardize, recognize
from .report import Entry, FusionReport
from .sites import FusedForward, NormSite, Replaced, fused_forward, replace, restore
from .tracing import Given, Traced, Untraceable, given_by, given_by_default, trace, trace_whatever_grad, training_set_to

_MOST_PLANS = 8  # of a module, which looks through them in every call

Calls = Mapping[nn.Module, list[dict[str, Given]]]


def fuse(model: nn.Module, example_inputs: Any = None) -> nn.Module:
    """Has a model's norms, and the adds and activations beside them, computed by these kernels.

    Norms of torch.nn, and norms of other libraries that are seen to compute the same, become ours in place; where
    torch.fx can trace the forward around one, norm -> activation, norm -> add, norm -> add -> activation, add -> norm
    and add -> activation become one call each. A value that is used elsewhere, or that a hook listens to, is left. The
    model keeps its modules, parameters, buffers, hooks, modes and state_dict, and can be copied, pickled and trained on
    as before; a call of another kind than those that were seen runs the forward that it had.

    Args:
        model: any module; it is changed, and returned.
        example_inputs: a tuple of positional or a dict of keyword arguments. With it, forwards are traced for the calls
            that they get, and the result is compared with the original's, in evaluation and in training: what
            disagrees is undone. The model, the generators and every `.grad` are left as they were.

    Raises:
        ValueError: `model` is no module, or `example_inputs` neither a tuple nor a dict.
        Whatever the model raises for `example_inputs` in evaluation.

    Example:
        >>> model = fused_ops.fuse(torchvision.models.resnet50())
        >>> print(fused_ops.fusion_report(model))
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"fuse: model must be a torch.nn.Module, but is a {type(model).__name__}")
    example = None if example_inputs is None else Example(example_inputs)
    unfuse(model)
    expected: dict[bool, Results] = {}
    calls: Calls | None = None
    if example is not None:
        calls, expected = _seen(model, example)
    reasons: dict[nn.Module, str] = {}
    try:
        _replace_norms(model, reasons)
        _replace_forwards(model, calls)
        if example is not None:
            units = [module for module in model.modules() if isinstance(module, Replaced)]
            for unit, reason in disagreeing(model, example, expected, units).items():
                reasons[unit] = reason
                restore(unit)
    except BaseException:
        unfuse(model)
        raise
    model.__dict__["_fusion_report"] = _report(model, reasons)
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Takes back what `fuse` did: every module's class, and with it every bit of what it computes.

    Returns the model. Raises ValueError where a module was given yet another class since (a parametrization).

    Example:
        >>> y = fused_ops.unfuse(fused_ops.fuse(model))(x)
    """
    for module in model.modules():
        if isinstance(module, Replaced):
            restore(module)
        module.__dict__.pop("_fusion_report", None)
    return model


# --- norms ---------------------------------------------------------------------------------------------------------


def _replace_norms(model: nn.Module, reasons: dict[nn.Module, str]) -> None:
    for module in list(model.modules()):
        try:
            named = is_norm(module) or may_be_norm(module)
            if not (named or may_standardize(module)):
                continue
            found = recognize(module)
            named = named or is_standardizing(module)
        except Exception as error:  # of somebody's module, of any kind, that is asked for what it does not expect
            found, named = Recognized(reason=f"to look at it raises {type(error).__name__}: {error}"), True
        if found.cls is not None:
            replace(module, found.cls, found.attributes)
        elif named:
            reasons[module] = found.reason


# --- forwards ------------------------------------------------------------------------------------------------------


def _traceable(model: nn.Module) -> Iterator[nn.Module]:
    """Modules whose own forward may have something to fuse in it."""
    for module in list(model.modules()):
        cls = type(module)
        of_torch = cls.__module__.startswith(("torch.", "fused_ops.")) and cls is not nn.Sequential
        replaced = isinstance(module, Replaced | torch.jit.ScriptModule | torch.fx.GraphModule)
        runs_its_own = cls.forward is not nn.Module.forward and "forward" not in vars(module)
        if runs_its_own and module._modules and not of_torch and not replaced:
            yield module


def _seen(model: nn.Module, example: Example) -> tuple[Calls, dict[bool, Results]]:
    """How each module is called by the model on the example, and what the model returns in both modes."""
    calls: dict[nn.Module, list[dict[str, Given]]] = {module: [] for module in _traceable(model)}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        try:
            given = given_by(module, args, kwargs)
        except (Untraceable, TypeError):
            return
        if given not in calls[module]:
            calls[module].append(given)

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in calls]
    try:
        expected = {False: example.results(model, False)}  # raises what the example does
        with contextlib.suppress(Exception):  # in training alone, as a batch norm of one value
            expected[True] = example.results(model, True)
    finally:
        for handle in handles:
            handle.remove()
    return calls, expected


def _replace_forwards(model: nn.Module, calls: Calls | None) -> None:
    for module in _traceable(model):
        plans = list(_plans(module, None if calls is None else calls.get(module, [])))[:_MOST_PLANS]
        if plans:
            replace(module, fused_forward(type(module)), {"_plans": tuple(plans)})


def _plans(module: nn.Module, seen: list[dict[str, Given]] | None) -> Iterator[Plan]:
    try:
        ways = [given_by_default(module)] if seen is None else seen
    except (Untraceable, TypeError, ValueError):
        return
    for given in ways:
        for training in (True, False):
            try:
                with training_set_to(module, training):
                    plan = _plan(module, given)
            except Untraceable:
                continue
            if plan is not None:
                yield plan
                if "training" not in plan.attributes:
                    break


def _plan(module: nn.Module, given: Mapping[str, Given]) -> Plan | None:
    traced = trace_whatever_grad(module, given)
    inlined = inline(traced.graph, module)
    sites = fuse_graph(traced.graph, module)
    joined = {site.norm for site in sites if site.pattern.startswith("norm+")}
    of_use = [child for child in inlined if child.norm in joined]
    if len(of_use) < len(inlined):
        traced = trace(module, given)
        inlined = inline(traced.graph, module, frozenset(child.name for child in of_use))
        sites = fuse_graph(traced.graph, module)
    plan = _kept(module, traced, given, sites, inlined)
    if plan is None and inlined:  # a class of a part cannot be pickled
        traced = trace(module, given)
        plan = _kept(module, traced, given, fuse_graph(traced.graph, module), [])
    return plan


def _kept(
    module: nn.Module, traced: Traced, given: Mapping[str, Given], sites: list[Site], inlined: list[Inlined]
) -> Plan | None:
    plan = Plan(module, traced, given, sites, inlined) if sites else None
    return plan if plan is not None and can_be_kept(plan) else None


# --- the report ----------------------------------------------------------------------------------------------------


def _report(model: nn.Module, reasons: Mapping[nn.Module, str]) -> FusionReport:
    patterns: dict[nn.Module, str] = {}
    without_norm: list[Entry] = []
    for name, module in model.named_modules():
        if not isinstance(module, FusedForward):
            continue
        for site in _sites(module):
            if site.of_a_part:
                continue
            if not site.norm:
                without_norm.append(Entry(name, True, site.pattern))
                continue
            norm = module.get_submodule(site.norm)
            patterns[norm] = max(patterns.get(norm, ""), site.pattern, key=len)
    report = FusionReport()
    for name, module in model.named_modules():
        standardizes = is_standardizing(module) and (isinstance(module, Replaced) or module in reasons)
        if not is_norm(module) and not standardizes:
            continue
        if isinstance(module, Replaced):
            own = "weight_standardize" if standardizes else _alone(module)
            report.append(Entry(name, True, patterns.get(module, own)))
        else:
            pattern = "weight_standardize" if standardizes else "norm"
            report.append(Entry(name, False, pattern, reasons.get(module, "it was not looked at")))
    report.extend(without_norm)
    return report


def _sites(module: FusedForward) -> list[Site]:
    """Of all plans, each once: how often one has it that has it most often."""
    most: dict[Site, int] = {}
    for plan in module._plans:
        for site in plan.sites:
            most[site] = max(most.get(site, 0), plan.sites.count(site))
    return [site for site, count in most.items() for _ in range(count)]


def _alone(module: nn.Module) -> str:
    own = module._own_activation if isinstance(module, NormSite) else None
    return "norm" if own is None else f"norm+{own.name}"
