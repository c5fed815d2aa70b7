"""A GPU that is not there, for a rehearsal of everything that a GPU is needed for.

Tensors that are "on" it are meta tensors that say ``cuda:0``: they have shapes, strides, dtypes and gradients, but no
numbers, so that sizes are the real ones and nothing takes time. The launchers of the Triton kernels run; a launch is
noted, not made. What a real GPU would refuse raises here too: an operator or a launch whose tensors lie on two devices,
and whatever reads a value. Time is a stub's.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
import triton_code
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .device import Gpu, Step

CUDA, META = torch.device("cuda:0"), torch.device("meta")
MULTIPROCESSORS = 132  # of an H100 or H200


class WrongDevice(RuntimeError):
    """Tensors of one operation lie on two devices."""


class FakeCuda(Tensor):
    """A meta tensor that says it is on ``cuda:0``."""

    within = False  # an operator of torch: there it is what it is

    @property
    def device(self) -> torch.device:
        return META if FakeCuda.within else CUDA

    @property
    def is_cuda(self) -> bool:
        return not FakeCuda.within

    @property
    def is_meta(self) -> bool:
        return FakeCuda.within

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        """As if every allocation began at 0, a multiple of any alignment."""
        return self.storage_offset() * self.element_size()

    def __repr__(self) -> str:
        return f"FakeCuda({tuple(self.shape)}, {self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl


def _wrapped(x: Tensor) -> Tensor:
    if isinstance(x, FakeCuda) or not Tensor.is_meta.__get__(x):  # type: ignore[attr-defined]
        return x
    return Tensor._make_subclass(FakeCuda, x)


def _check_devices(what: object, tensors: list[Tensor], *, scalars: bool) -> None:
    """``scalars``: tensors of the CPU without dimensions may take part, as they may in torch's own operators."""
    fake = [isinstance(x, FakeCuda) for x in tensors]
    if any(fake) and not all(own or (scalars and x.dim() == 0) for own, x in zip(fake, tensors, strict=True)):
        raise WrongDevice(f"{what}: expected all tensors to be on the same device, but found cuda:0 and cpu")


class Operators(TorchDispatchMode):
    """Runs torch's operators on meta tensors, and the launchers of Triton kernels as they are."""

    CUDA_ALONE = (torch.ops.aten.mm.dtype_out, torch.ops.aten.addmm.dtype_out)
    COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
    UPDATES = (torch.ops.aten._fused_adamw_.default, torch.ops.aten._fused_adamw_.tensor_lr)  # all lies on the device

    def __init__(self, launchers: dict[object, Callable], launches: Launches) -> None:
        super().__init__()
        self.launchers, self.launches = launchers, launches

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> object:
        kwargs = kwargs or {}
        if func not in self.COPIES:
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            _check_devices(func, tensors, scalars=func.namespace == "aten" and func not in self.UPDATES)
        if func in self.launchers:
            with Devices(), self:
                return self.launchers[func](*args, **kwargs)
        if func in self.CUDA_ALONE or func in self.UPDATES:
            result = kwargs.get("out")
        else:
            before, FakeCuda.within = FakeCuda.within, True
            try:
                result = tree_map_only(Tensor, _wrapped, func(*args, **kwargs))
            finally:
                FakeCuda.within = before
        if self.launches.memory is not None:
            self.launches.memory.see(result)
        if self.launches.calls is not None:
            self.launches.calls.append(Call(func, (), {"args": args, "kwargs": kwargs, "result": result}))
        return result


class Devices(TorchFunctionMode):
    """Makes on the meta device what is asked for on CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> object:
        kwargs = {name: _meta(value) if name == "device" else value for name, value in (kwargs or {}).items()}
        return func(*map(_meta, args), **kwargs)


def _meta(value: object) -> object:
    if isinstance(value, str) and value.split(":")[0] == "cuda":
        return META
    return META if isinstance(value, torch.device) and value.type == "cuda" else value


class FakeGpu(Gpu):
    """The GPU that is not there; its clock is a stub. What it has run once needs no second time."""

    device = CUDA
    here = False

    def __init__(self) -> None:
        self.done: set[Step] = set()

    def once(self, run: Step) -> None:
        if run not in self.done:
            run()
            self.done.add(run)

    def seconds(self, run: Step, calls: int = 1) -> float:
        self.once(run)
        return 1e-3

    def graphed(self, run: Step) -> Step:
        self.once(run)
        return run

    def on_another_stream(self, run: Step) -> object:
        return run()

    def peak_bytes(self, run: Step) -> int:
        return 0

    def launches(self, run: Step) -> int:
        self.once(run)
        return 2

    def compile(self, function: Callable) -> Callable:
        return function

    def number(self, x: Tensor) -> float:
        return 0.0

    def poison(self) -> None:
        pass

    def release(self) -> None:
        pass


@dataclass(frozen=True)
class Call:
    """One operator of torch, with its arguments and result, or one launch of Triton, with its grid and arguments."""

    what: Any
    grid: tuple[int, ...]
    values: dict[str, Any]


class Memory:
    """The bytes of storages that operators have returned, as long as these are there."""

    def __init__(self) -> None:
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def start(self) -> int:
        """Bytes now, from which on the peak is the largest."""
        self.peak = 0
        self.see(())
        return self.peak

    def see(self, result: object) -> None:
        self.live = {key: held for key, held in self.live.items() if not held[0].expired()}
        for x in tree_leaves(result):
            if isinstance(x, FakeCuda):
                storage = x.untyped_storage()
                reference = StorageWeakRef(storage)
                self.live.setdefault(reference.cdata, (reference, storage.nbytes()))
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))


class Launches:
    """Notes what Triton is asked to launch, and refuses what CUDA would. ``calls``, once it is a list, gets every
    launch and every operator of torch, in their order; ``memory``, once it is there, what these operators return."""

    LARGEST_GRID = (2**31 - 1, 65535, 65535)

    def __init__(self) -> None:
        self.noted: dict[triton_code.Launch, None] = {}
        self.calls: list[Call] | None = None
        self.memory: Memory | None = None

    def __call__(self, kernel: triton.JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        _check_devices(kernel.__name__, [*tensors, torch.empty(0, device=META).as_subclass(FakeCuda)], scalars=False)
        for size, largest in zip(grid, self.LARGEST_GRID, strict=False):
            if not 0 < size <= largest:
                raise RuntimeError(f"Triton Error [CUDA]: invalid argument: {kernel.__name__} has a grid of {grid}")
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        launch = triton_code.describe("", kernel, args, kwargs)
        self.noted[launch] = None
        if self.calls is not None:
            self.calls.append(Call(launch, tuple(grid), values))


@contextlib.contextmanager
def pretended_gpu() -> Iterator[Launches]:
    """A process in which a GPU seems to be there; yields what Triton is asked to launch."""
    from dgi_kernels import _extension, backend

    launches = Launches()
    properties = SimpleNamespace(multi_processor_count=MULTIPROCESSORS, name="rehearsed", total_memory=140 << 30)
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "device_of", lambda x: contextlib.nullcontext()),
            (torch.cuda, "device", lambda x: contextlib.nullcontext()),
            (torch.cuda, "get_device_capability", lambda *x: (9, 0)),
            (torch.cuda, "get_device_name", lambda *x: "rehearsed"),
            (torch.cuda, "get_device_properties", lambda *x: properties),
            (torch.cuda, "synchronize", lambda *x: None),
            (_extension, "has_cuda", _extension.load_error is None),
            (triton.JITFunction, "run", lambda kernel, *args, **kwargs: launches(kernel, *args, **kwargs)),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(mock.patch.dict(backend._BACKEND_PROBLEM, {"triton": None}))
        stack.enter_context(Devices())
        stack.enter_context(Operators(_launchers(), launches))
        yield launches


def _launchers() -> dict[object, Callable]:
    """Every operator that is written in Python, and what it does on CUDA."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("dgi_kernels."):
            for value in vars(module).values():
                if isinstance(value, CustomOpDef):
                    found[value._opoverload] = value._init_fn
    return found
