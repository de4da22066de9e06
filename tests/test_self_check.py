"""`python -m fused_ops` checks every function that there is, and tells a wrong result."""

from __future__ import annotations

import pytest
import torch

from fused_ops import __main__ as self_check
from fused_ops import functional


def test_every_function_is_checked() -> None:
    public = {name for name in vars(functional) if callable(getattr(functional, name)) and not name.startswith("_")}
    assert {case.function for case in self_check.CASES} == public


@pytest.mark.parametrize("case", self_check.CASES, ids=lambda case: case.label)
def test_results_agree_with_the_reference(case: self_check.Case) -> None:
    checks = list(self_check.run_case(case, torch.device("cpu"), torch.float32))
    assert [check.output for check in checks if not check.passed] == []
    running = {"running_mean", "running_var"} & set(case.operands)
    assert running | {"y", "dx"} <= {check.output for check in checks}


def test_running_statistics_that_stay_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    original = functional.batch_norm

    def stays(*arguments: torch.Tensor, running_mean: torch.Tensor, **named: object) -> torch.Tensor:
        return original(*arguments, running_mean=running_mean.clone(), **named)  # type: ignore[arg-type]

    monkeypatch.setattr(functional, "batch_norm", stays)
    case = next(case for case in self_check.CASES if case.label == "batch_norm")
    checks = self_check.run_case(case, torch.device("cpu"), torch.float32)
    assert [check.output for check in checks if not check.passed] == ["running_mean"]
