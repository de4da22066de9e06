"""Whole models of torch.nn, one for each kind of norm, at a size for a GPU, one for a CPU and one for tests."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..workloads import Shape, Size
from .convolutional import UNetBlocks, bit50, cyclegan_generator, resnet50
from .transformers import VisionTransformer, llama

Build = Callable[[], nn.Module]
Sized = tuple[tuple[int, ...], Shape]


@dataclass(frozen=True)
class WholeModel:
    """sizes: of each, how the model is made and the shape of its input. in_default_run_on_cpu: the others only with
    --full, where a CPU has the time."""

    name: str
    sizes: Mapping[Size, tuple[Build, Shape]]
    in_default_run_on_cpu: bool = True

    def build(self, size: Size, dtype: torch.dtype, device: torch.device, seed: int = 0) -> nn.Module:
        """Its parameters drawn from a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.sizes[size][0]().to(device, dtype)

    def shape(self, size: Size) -> Shape:
        """The shape of its input."""
        return self.sizes[size][1]

    def example(self, size: Size, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
        """A standard normal input."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.shape(size), generator=generator).to(device, dtype)


def _sizes(
    make: Callable[..., nn.Module], full: Sized, reduced: Sized, tiny: Sized
) -> Mapping[Size, tuple[Build, Shape]]:
    """Of each size the arguments of `make` and the shape of an input."""
    of_size: Mapping[Size, Sized] = {"full": full, "reduced": reduced, "tiny": tiny}
    return {size: (functools.partial(make, *own), shape) for size, (own, shape) in of_size.items()}


# Full: the batch that a training step has on one GPU. Reduced: as many layers, narrower or of fewer positions, so that
# a step lasts some tens of ms on two cores.
_ALL = (
    WholeModel(
        "resnet50",
        _sizes(resnet50, full=((), (128, 3, 224, 224)), reduced=((32,), (4, 3, 64, 64)), tiny=((32,), (2, 3, 32, 32))),
    ),
    WholeModel(
        "bit_resnet50",
        _sizes(bit50, full=((), (64, 3, 224, 224)), reduced=((32,), (4, 3, 64, 64)), tiny=((32,), (2, 3, 32, 32))),
        in_default_run_on_cpu=False,
    ),
    WholeModel(
        "sd_unet_blocks",
        _sizes(UNetBlocks, full=((), (16, 320, 64, 64)), reduced=((64,), (2, 64, 32, 32)), tiny=((64,), (1, 64, 4, 4))),
    ),
    WholeModel(
        "vit_b",
        _sizes(
            VisionTransformer,
            full=((224,), (64, 3, 224, 224)),
            reduced=((64, 192, 6, 6), (8, 3, 64, 64)),
            tiny=((32, 32, 2, 2), (2, 3, 32, 32)),
        ),
    ),
    WholeModel(
        "llama_blocks",
        _sizes(
            llama,
            full=((4096, 32, 14336), (2, 4096, 4096)),
            reduced=((256, 4, 896), (2, 128, 256)),
            tiny=((32, 2, 64), (1, 3, 32)),
        ),
    ),
    WholeModel(
        "cyclegan_generator",
        _sizes(
            cyclegan_generator,
            full=((), (8, 3, 256, 256)),
            reduced=((16,), (1, 3, 64, 64)),
            tiny=((4, 1), (1, 3, 16, 16)),
        ),
        in_default_run_on_cpu=False,
    ),
)
WHOLE_MODELS: Mapping[str, WholeModel] = {model.name: model for model in _ALL}
