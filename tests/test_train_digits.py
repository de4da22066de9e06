"""The training comparison: both twins are the same model, and learn the same."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import train_digits
from benchmarks.digits import batches, digits
from benchmarks.models import MODELS
from benchmarks.resnet import FusedResNet, PlainResNet


@pytest.mark.parametrize("model", MODELS)
def test_the_twins_learn_the_same(model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--model", model, "--steps", "4", "--device", "cpu", "--output", str(tmp_path)]
    assert train_digits.main(options) == 0
    (path,) = tmp_path.glob(f"digits-{model}-cpu-*.json")
    result = json.loads(path.read_text())
    plain, fused = (result["losses"][name] for name in (train_digits.PLAIN, train_digits.FUSED))
    assert len(plain) == len(fused) == 4
    assert plain[-1] < plain[0]
    # Four steps do not amplify: each loss is a mean over a batch of values of some units, rounded a few dozen times.
    assert result["largest_difference"] <= 100 * torch.finfo(torch.float32).eps * max(plain)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    out = capfd.readouterr().out
    assert "largest difference" in out and "accuracy" in out and "time of a step" in out


def test_differences_are_told_of_the_first_steps_and_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def drifts(student: train_digits.Student, images: torch.Tensor, labels: torch.Tensor) -> None:
        step = len(student.losses)
        is_fused = any(type(module).__module__.startswith("fused_ops") for module in student.model.modules())
        student.losses.append(1.0 + step * is_fused)
        student.seconds.append(1.0)

    monkeypatch.setattr(train_digits.Student, "step", drifts)
    result = train_digits.train("vit", 30, torch.device("cpu"))
    assert result["largest_difference"] == 29
    assert result["largest_first_difference"] == train_digits.FIRST_STEPS - 1
    assert "losses: 29, of the first 20: 19\n" in train_digits.describe(result)


@pytest.mark.parametrize(
    "model, fused_norms",
    [("vit", {"LayerNorm": 1, "AddLayerNorm": 5}), ("resnet18", {"BatchNorm2d": 1 + 8 * 2 + 3})],
)
def test_the_plain_twin_is_of_torch_nn_alone(model: str, fused_norms: dict[str, int]) -> None:
    plain, fused = MODELS[model].build(seed=0)
    assert not any(type(module).__module__.startswith("fused_ops") for module in plain.modules())
    norms = Counter(type(module).__name__ for module in fused.modules() if "Norm" in type(module).__name__)
    assert norms == fused_norms
    assert all(type(m).__module__.startswith("fused_ops") for m in fused.modules() if "Norm" in type(m).__name__)
    assert list(plain.state_dict()) == list(fused.state_dict())  # an optimizer's state goes by order
    for name, parameter in plain.state_dict().items():
        assert torch.equal(parameter, fused.state_dict()[name])
    plain.load_state_dict(fused.state_dict())


def test_a_resnet_learns_the_same_with_kernels(device: torch.device, launches: list[str], triton_backend: None) -> None:
    """In float64: of float32's roundings one may put a value on the other side of a ReLU's kink."""
    torch.manual_seed(0)
    plain, fused = (network(width=4).to(device, torch.float64) for network in (PlainResNet, FusedResNet))
    fused.load_state_dict(plain.state_dict())
    (images, labels), (unseen, _) = digits(device)
    students = []
    for network in (plain, fused):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
        students.append(train_digits.Student(network, optimizer, schedule))
        for batch in torch.arange(24).split(8):
            students[-1].step(images[batch].double(), labels[batch])
    assert launches
    torch.testing.assert_close(students[1].losses, students[0].losses, rtol=1e-10, atol=0)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], value, rtol=1e-8, atol=1e-10)
    with torch.no_grad():
        expected, actual = (network.eval()(unseen[:8].double()) for network in (plain, fused))
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


def test_batches_are_whole_and_the_same_for_a_seed() -> None:
    first, again = (list(batches(300, 5, seed=3, size=128)) for _ in range(2))
    assert [len(batch) for batch in first] == [128] * 5
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(set(torch.cat(first[:2]).tolist())) == 256  # an epoch repeats no image
