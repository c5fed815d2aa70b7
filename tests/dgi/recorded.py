"""A CUDA graph without a GPU: every operation of a function, recorded once and then run again on the same memory.

As a graph does, a recording reads tensors where they are and Python numbers as they were; and it refuses what would
wait for the device, and what has a shape that follows from values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REFUSED = {"_local_scalar_dense", "_unique2", "bincount", "equal", "masked_select", "nonzero"}
REFUSED_METHODS = (Tensor.tolist, Tensor.numpy, Tensor.cpu)  # which on the CPU are no operations
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Recording(TorchDispatchMode):
    """Stands for a ``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []
        self.random_state = torch.get_rng_state()
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        assert name not in REFUSED, f"{name} waits for the device"
        masks = [x for x in tree_leaves(args) if isinstance(x, Tensor) and x.dtype == torch.bool]
        assert not (name in ("index", "index_put_", "index_put") and len(masks)), "a mask as index waits for the device"
        for given, argument in zip(args, func._schema.arguments, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._keep([x for x in tree_leaves(given) if isinstance(x, Tensor)])
        self._keep([x for x in tree_leaves(kwargs.get("out")) if isinstance(x, Tensor)])
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result

    def _keep(self, written: list[Tensor]) -> None:
        for tensor in written:
            storage = tensor.untyped_storage()
            self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))

    def forget(self) -> None:
        """Undo what recording has done: a graph is not run while it is recorded."""
        for storage, values in self.before.values():
            storage.copy_(values)
        torch.set_rng_state(self.random_state)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            if func._schema.name.split("::")[1] in ALLOCATIONS:
                continue
            again = func(*args, **kwargs)
            for kept, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(kept, Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


class Methods(TorchFunctionMode):
    """Refuses methods that would wait for the device."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        assert func not in REFUSED_METHODS, f"{func.__name__} waits for the device"
        return func(*args, **(kwargs or {}))


def record(function: Callable[[], Any], device: torch.device) -> tuple[Recording, Any]:
    """As :func:`dgi_kernels.cuda_graphs.capture`."""
    recording = Recording()
    with recording, Methods():
        result = function()
    recording.forget()
    return recording, result
