"""Loads the compiled extension, or remembers why it could not be loaded.

The extension registers its ops under ``torch.ops.dgi_kernels``. Beside the calls of an op, in its folder's
``native.py``, is its fake kernel, which tells ``torch.compile`` the shapes and dtypes of what it returns. What a fake
kernel takes is what the calls beside it give, so that a library whose op takes something else is of another version.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import library

Function = TypeVar("Function", bound=Callable)

# What the Python files call.
OPS = (
    "assign_codes",
    "attention",
    "attention_backward",
    "balanced_codes",
    "beam_codes",
    "beam_step",
    "child_masks",
    "cluster_costs",
    "cluster_sums",
    "code_ranges",
    "cosine_beam_step",
    "cosine_cross_entropy",
    "cosine_logits",
    "cosine_logits_backward",
    "count_outside",
    "decoder_step",
    "dropout",
    "encoder_layers",
    "find_children",
    "gumbel_noise",
    "gumbel_softmax",
    "gumbel_softmax_backward",
    "item_set",
    "kmeans_seeds",
    "log_normalizer",
    "parent_set",
    "rank_candidates",
    "residual_quantize",
    "residual_quantize_backward",
    "run_marks",
    "run_starts",
    "trie_arrays",
    "unique_codes",
)

LIBRARY = Path(__file__).with_name("_C.abi3.so")


def _load() -> str | None:
    """Load the extension; return the reason where that cannot be."""
    if not LIBRARY.exists():
        return (
            "the extension is not built (there was no C++ compiler when dgi-kernels was installed, or compiling "
            "failed); install one, e.g. `apt install g++`, then install dgi-kernels again: `pip install -v` shows "
            "the build's messages"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        # torch says which library it was, and its cause why: a symbol that is missing, an old glibc.
        reason = f": {error.__cause__}" if error.__cause__ is not None else ""
        return f"{LIBRARY} was found but could not be loaded by torch {torch.__version__}: {error}{reason}"
    missing = [op for op in OPS if not hasattr(torch.ops.dgi_kernels, op)]
    return _of_another_version(f"it has no {', '.join(missing)}") if missing else None


def _of_another_version(difference: str) -> str:
    """The reason, which is told at once too: the reference would do the work, many times as slowly."""
    reason = (
        f"{LIBRARY} is of another version of dgi-kernels than the Python files around it ({difference}); build it "
        "again: `pip install .`, or in a source tree `pip install -e .` or `python setup.py build_ext --inplace`"
    )
    warnings.warn(f"no compiled kernel is used: {reason}", RuntimeWarning, stacklevel=2)
    return reason


load_error: str | None = _load()


def fake_kernel(op: str) -> Callable[[Function], Function]:
    """Decorator of the fake kernel of an op; without the extension there is no op to have one."""

    def register(function: Function) -> Function:
        global load_error
        if load_error is None and (difference := _difference(op, function)):
            load_error = _of_another_version(difference)
        if load_error is None:
            library.register_fake(f"dgi_kernels::{op}", function)
        return function

    return register


def _difference(op: str, function: Callable) -> str:
    """What the library's op takes, where it is not what its fake kernel takes; else empty."""
    taken = [argument.name for argument in getattr(torch.ops.dgi_kernels, op).default._schema.arguments]
    parameters = inspect.signature(function).parameters.values()
    given = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL]
    if len(given) == len(taken) or (len(given) < len(taken) and len(given) < len(parameters)):
        return ""
    return f"its {op} takes {len(taken)} arguments ({', '.join(taken)}), not {len(given)}"


# Whether CUDA kernels are in it; without a GPU too.
has_cuda = load_error is None and torch._C._dispatch_has_kernel_for_dispatch_key("dgi_kernels::gumbel_noise", "CUDA")
