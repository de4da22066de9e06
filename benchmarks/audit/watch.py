"""Watches interpreted kernels: every launch, and every access of a program to memory, is told to observers.

For a process with TRITON_INTERPRET=1, Triton 3.6 to 3.9, tensors on the CPU. Programs run one after the other, each to
its end, in the order of the grid or in a shuffled one.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from triton.runtime import interpreter

from fused_ops.kernels.launcher import INTERPRETED

from .quick_interpreter import quick_interpreter

Kind = Literal["load", "store", "atomic"]


@dataclass(frozen=True)
class Argument:
    """A tensor of a launch, named as its parameter without `_ptr`; elements [first, end) of its block."""

    name: str
    first: int
    end: int


class Block:
    """Memory that one storage holds, in elements of the smallest type with which the launch looks at it."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        storage = next(iter(tensors.values())).untyped_storage()
        self.address = storage.data_ptr()
        self.itemsize = min(tensor.element_size() for tensor in tensors.values())
        self.end = self.address + storage.nbytes()
        # Whether an element is one of a tensor's, not of a gap between its rows. By NumPy, whose zeros take no memory.
        self.belongs = np.zeros(storage.nbytes() // self.itemsize, bool)
        belongs = torch.from_numpy(self.belongs)
        arguments = []
        for name, tensor in tensors.items():
            first = (tensor.data_ptr() - self.address) // self.itemsize
            parts = tensor.element_size() // self.itemsize
            reach = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
            arguments.append(Argument(name, first, first + reach * parts if tensor.numel() else first))
            if tensor.numel():
                steps = [step * parts for step in tensor.stride()]
                belongs.as_strided((*tensor.shape, parts), (*steps, 1), first).fill_(True)
        self.arguments = tuple(arguments)

    def argument(self, element: int) -> Argument:
        """The first of its arguments that reaches over an element of one."""
        return next(found for found in self.arguments if found.first <= element < found.end)


@dataclass(frozen=True)
class Access:
    """Elements of one block that one instruction of one program reaches, one entry a lane that is not masked off."""

    kind: Kind
    program: int
    block: Block
    argument: Argument
    elements: np.ndarray
    bytes: int


@dataclass
class Launch:
    """One launch: the kernel, its blocks of memory, and its number of programs."""

    kernel: str
    blocks: list[Block]
    programs: int = 0
    grid: tuple[int, int, int] = (1, 1, 1)
    order: np.ndarray | None = field(default=None, repr=False)

    def element_array(self, dtype: type, most: int | None = None) -> dict[int, np.ndarray]:
        """Zeros, one an element, by the id of a block of at most so many: memory is taken only of what is touched."""
        blocks = (block for block in self.blocks if most is None or block.belongs.size <= most)
        return {id(block): np.zeros(block.belongs.size, dtype) for block in blocks}


class Observer(Protocol):
    """What is told of launches. A lane outside every tensor is told, too, and then not carried out."""

    def begin(self, launch: Launch) -> None: ...

    def access(self, launch: Launch, access: Access) -> None: ...

    def outside(self, launch: Launch, kind: Kind, program: int, address: int) -> None: ...

    def end(self, launch: Launch) -> None: ...


@contextlib.contextmanager
def watch(*observers: Observer, shuffle: int | None = None) -> Iterator[None]:
    """Tells the observers of every launch inside; with `shuffle` a seed, programs run in an order drawn from it.

    Raises RuntimeError in a process whose kernels are compiled.
    """
    if not INTERPRETED:
        raise RuntimeError("kernels are compiled in this process and cannot be watched; set TRITON_INTERPRET=1")
    watcher = _Watcher(observers, shuffle)
    with contextlib.ExitStack() as hooks:
        for owner, name in (
            (interpreter.GridExecutor, "_init_args_hst"),
            (interpreter.GridExecutor, "_restore_args_dev"),
            (interpreter.InterpreterBuilder, "set_grid_dim"),
            (interpreter.InterpreterBuilder, "set_grid_idx"),
            (interpreter.InterpreterBuilder, "create_masked_load"),
            (interpreter.InterpreterBuilder, "create_masked_store"),
            (interpreter.InterpreterBuilder, "create_atomic_rmw"),
            (interpreter.InterpreterBuilder, "create_atomic_cas"),
        ):
            _hook(hooks, owner, name, getattr(watcher, name.removeprefix("_")))
        hooks.enter_context(quick_interpreter())
        yield


def _hook(hooks: contextlib.ExitStack, owner: type, name: str, replacement: Any) -> None:
    """Puts `replacement(original, self, ...)` in the place of a method until the stack unwinds."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def hooked(self: Any, *args: Any, **kwargs: Any) -> Any:
        return replacement(functools.partial(original, self), self, *args, **kwargs)

    setattr(owner, name, hooked)
    hooks.callback(setattr, owner, name, original)


class _Watcher:
    """Follows the interpreter through a launch; each method stands for the interpreter's of its name."""

    def __init__(self, observers: tuple[Observer, ...], shuffle: int | None) -> None:
        self.observers = observers
        self.shuffle = shuffle
        self.launch: Launch | None = None
        self.program = 0

    def init_args_hst(self, original: Any, executor: Any, args: Any, kwargs: Any) -> Any:
        args_hst, kwargs_hst = original(args, kwargs)
        named = {**dict(zip(executor.arg_names, args_hst, strict=False)), **kwargs_hst}
        storages: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in named.items():
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes():
                of_storage = storages.setdefault(tensor.untyped_storage().data_ptr(), {})
                of_storage[name.removesuffix("_ptr")] = tensor
        self.launch = Launch(executor.fn.__name__, [Block(tensors) for tensors in storages.values()])
        return args_hst, kwargs_hst

    def set_grid_dim(self, original: Any, builder: Any, x: int, y: int, z: int) -> None:
        original(x, y, z)
        assert self.launch is not None
        self.launch.grid, self.launch.programs = (x, y, z), x * y * z
        if self.shuffle is not None:
            self.launch.order = np.random.default_rng(self.shuffle).permutation(x * y * z)
        for observer in self.observers:
            observer.begin(self.launch)

    def set_grid_idx(self, original: Any, builder: Any, x: int, y: int, z: int) -> None:
        assert self.launch is not None
        columns, rows, _ = self.launch.grid
        self.program = x + columns * (y + rows * z)
        if self.launch.order is not None:
            self.program = int(self.launch.order[self.program])
            x, y, z = (
                self.program % columns,
                self.program // columns % rows,
                self.program // (columns * rows),
            )
        original(x, y, z)

    def restore_args_dev(self, original: Any, executor: Any, *args: Any) -> Any:
        assert self.launch is not None
        for observer in self.observers:
            observer.end(self.launch)
        self.launch = None
        return original(*args)

    def create_masked_load(self, original: Any, builder: Any, ptrs: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        return original(ptrs, self._tell("load", ptrs, mask), *rest, **named)

    def create_masked_store(
        self, original: Any, builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **named: Any
    ) -> Any:
        return original(ptrs, value, self._tell("store", ptrs, mask), *rest, **named)

    def create_atomic_rmw(
        self, original: Any, builder: Any, op: Any, ptr: Any, value: Any, mask: Any, *rest: Any, **named: Any
    ) -> Any:
        return original(op, ptr, value, self._tell("atomic", ptr, mask), *rest, **named)

    def create_atomic_cas(self, original: Any, builder: Any, ptr: Any, *rest: Any, **named: Any) -> Any:
        self._tell("atomic", ptr, None)
        return original(ptr, *rest, **named)

    def _tell(self, kind: Kind, pointers: Any, mask: Any) -> Any:
        """Tells the observers of an access; the mask without lanes that no tensor of the launch holds."""
        assert self.launch is not None
        addresses = pointers.data.reshape(-1)
        # A mask may hold integers: what the interpreter makes of a scalar and a vector.
        lanes = None if mask is None else np.broadcast_to(np.asarray(mask.data, bool), pointers.data.shape).reshape(-1)
        if lanes is not None and lanes.all():
            lanes = None
        wanted = addresses if lanes is None else addresses[lanes]
        if not wanted.size:
            return mask
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        outside = self._tell_blocks(kind, wanted, width)
        if outside is None or mask is None:
            return mask
        kept = np.ones(addresses.size, bool) if lanes is None else lanes.copy()
        kept[np.flatnonzero(kept)[outside]] = False
        return interpreter.TensorHandle(kept.reshape(pointers.data.shape), interpreter.tl.int1)

    def _tell_blocks(self, kind: Kind, wanted: np.ndarray, width: int) -> np.ndarray | None:
        """Which of the lanes lie outside, None where none does."""
        assert self.launch is not None
        lowest, highest = int(wanted.min()), int(wanted.max())
        inside = np.zeros(wanted.size, bool)
        for block in self.launch.blocks:
            if highest < block.address or lowest >= block.end:
                continue
            whole = block.address <= lowest and highest < block.end
            here = slice(None) if whole else (wanted >= block.address) & (wanted < block.end)
            elements = (wanted[here] - block.address).astype(np.int64) // block.itemsize
            belongs = block.belongs[elements]
            if not belongs.all():
                elements = elements[belongs]
            inside[here] = belongs
            if elements.size:
                argument = block.argument(int(elements[0]))
                access = Access(kind, self.program, block, argument, elements, elements.size * width)
                for observer in self.observers:
                    observer.access(self.launch, access)
            if whole:
                break
        if inside.all():
            return None
        address = int(wanted[~inside][0])
        for observer in self.observers:
            observer.outside(self.launch, kind, self.program, address)
        return ~inside
