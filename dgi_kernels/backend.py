"""Which backend runs an op here, and why others cannot: the only place that decides.

Every public op asks :func:`choose` which implementation to call.  ``native`` is the compiled extension (C++ on
CPU tensors, CUDA on CUDA tensors), ``triton`` the Triton kernels, ``reference`` plain PyTorch, which every kernel
falls back to and is tested against.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import get_args

import torch

from dgi_kernels import _extension
from dgi_kernels.types import Backend

BACKENDS: tuple[str, ...] = get_args(Backend)

logger = logging.getLogger("dgi_kernels")


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run here; the message says why."""


# Where one implementation of one op runs: device types, each with the dtypes of the op's main floating-point input
# there, or None where the op takes no floating-point tensor.
Kernel = Mapping[str, frozenset[torch.dtype] | None]

_FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
_GPU_FLOATS = _FLOATS - {torch.float64}
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter runs its kernels on CPU tensors
_TRITON: Kernel = {"cuda": _GPU_FLOATS}
if _INTERPRETED:  # whose products take the raw bits of bfloat16 for numbers
    _TRITON = {"cuda": _GPU_FLOATS, "cpu": _GPU_FLOATS - {torch.bfloat16}}
_TRITON_HALF: Kernel = {device: dtypes - {torch.float32} for device, dtypes in _TRITON.items() if dtypes}
_CPP: Kernel = {"cpu": _FLOATS}
_CPP_FLOAT32: Kernel = {"cpu": frozenset({torch.float32})}
_CPP_AND_CUDA: Kernel = {"cpu": _FLOATS, "cuda": _GPU_FLOATS}

# op -> backend -> where it runs.  The reference runs everywhere and is not listed.
KERNELS: dict[str, dict[str, Kernel]] = {
    "cosine_logits": {"native": _CPP, "triton": _TRITON_HALF},
    "cosine_cross_entropy": {"native": _CPP, "triton": _TRITON},
    "gumbel_softmax": {"native": _CPP_AND_CUDA, "triton": _TRITON},
    "residual_quantize": {"native": _CPP, "triton": _TRITON},
    "assign_codes": {"native": _CPP, "triton": _TRITON},
    "kmeans": {"native": _CPP, "triton": _TRITON},
    "balanced_codes": {"native": _CPP, "triton": _TRITON},
    "unique_codes": {"native": _CPP},
    "gumbel_noise": {"native": dict.fromkeys(_CPP_AND_CUDA), "triton": dict.fromkeys(_TRITON)},
    "trie_build": {"native": {"cpu": None}},
    "trie_find": {"native": {"cpu": None}},
    "trie_filter": {"native": {"cpu": None}},
    "beam_step": {"native": _CPP_AND_CUDA},
    "cosine_beam_step": {"native": _CPP_AND_CUDA},
    "beam_codes": {"native": {"cpu": None}},
    "log_normalizer": {"native": _CPP, "triton": _TRITON},
    "rank_candidates": {"native": _CPP_AND_CUDA},
    "decoder_step": {"native": _CPP_FLOAT32},
    "encoder_layers": {"native": _CPP_FLOAT32},
    "dropout": {"native": _CPP_FLOAT32},
    "attention": {"native": _CPP_FLOAT32},
}

# Ops whose reference forms a tensor of rows x codes that is neither an input nor an output.
FORMS_LOGITS = frozenset(
    {
        "assign_codes",
        "balanced_codes",
        "cosine_beam_step",
        "cosine_cross_entropy",
        "log_normalizer",
        "residual_quantize",
    }
)

# Options of an op that one of its kernels lacks, "name=value" -> why: what the other backends have, it may get later.
LACKS: dict[tuple[str, str], dict[str, str]] = {}

# Which of an op's kernels ``auto`` tries first.  On GPUs Triton's noise takes fewer instructions per element: hardware
# logarithms, and a row that fits into registers is made once, where CUDA C++ makes it again in every pass.
PREFERENCE = {"cpu": ("native", "triton"), "cuda": ("triton", "native")}


def _why_no_triton() -> str | None:
    """What is known without importing Triton, which takes half a second."""
    try:
        spec = importlib.util.find_spec("triton")
    except (ImportError, ValueError) as error:  # such as a placeholder in its place
        return f"the package triton cannot be found ({error})"
    if spec is None:
        return "the package triton is not installed"
    if not torch.cuda.is_available() and not _INTERPRETED:
        return "no CUDA device is available"
    return None


_BACKEND_PROBLEM: dict[str, str | None] = {
    "reference": None,
    "triton": _why_no_triton(),
    "native": None,  # the extension says itself, once all calls into it are known
}
_to_import = set() if _BACKEND_PROBLEM["triton"] else {"triton"}


def _backend_problem(backend: str) -> str | None:
    """Why a backend cannot run here; Triton, where it seems to be able to, is imported when first asked for."""
    if backend in _to_import:
        _to_import.discard(backend)
        try:
            for module in (
                "clustering.triton",
                "cosine.triton",
                "gumbel.triton_softmax",
                "normalizer.triton",
                "quantize.triton",
            ):
                importlib.import_module(f"dgi_kernels.{module}")
        except Exception as error:  # whatever a broken Triton raises: the other backends run without it
            _BACKEND_PROBLEM[backend] = f"the package triton cannot be imported ({type(error).__name__}: {error})"
    return _known_problem(backend)


def _known_problem(backend: str) -> str | None:
    return _BACKEND_PROBLEM[backend] or (_extension.load_error if backend == "native" else None)


# torch.compile calls it and does not trace it. torch.compiler.assume_constant_result says so by this attribute too, but
# imports all of the compiler.
_backend_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class BackendStatus:
    """One backend on this machine: can it run at all, why not, and for which ops it has kernels."""

    available: bool
    reason: str
    ops: tuple[str, ...]


def backends() -> dict[str, BackendStatus]:
    """Return which backends work on this machine, and why others do not.

    Returns:
        ``{"reference": BackendStatus, "triton": ..., "native": ...}``; ``reason`` is empty where available.

    Examples:
        >>> dgi_kernels.backends()["reference"].available
        True
    """
    status = {"reference": BackendStatus(True, "", tuple(KERNELS))}
    for backend in ("triton", "native"):
        problem = _backend_problem(backend)
        ops = tuple(op for op, kernels in KERNELS.items() if backend in kernels)
        status[backend] = BackendStatus(problem is None, problem or "", ops)
    return status


def why_not(
    op: str,
    backend: str,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    options: Mapping[str, object] | None = None,
) -> str | None:
    """Return why ``backend`` cannot run ``op`` on ``device`` with ``dtype`` and ``options``, or None where it can.

    Args:
        op: name of a public op, such as ``"cosine_cross_entropy"``; ``python -m dgi_kernels.info`` lists them.
        backend: ``"reference"``, ``"triton"`` or ``"native"``.
        device: device of the op's inputs, such as ``"cpu"`` or ``"cuda:0"``.
        dtype: dtype of the op's main floating-point input; not looked at for ops that have none.
        options: values of the op's options that a kernel may lack, such as ``{"metric": "dot"}``.

    Raises:
        ValueError: ``op`` or ``backend`` has no such name.

    Examples:
        >>> dgi_kernels.why_not("cosine_cross_entropy", "reference", "cpu", torch.float32)  # None: it runs
        >>> dgi_kernels.why_not("beam_step", "triton", "cuda")
        'beam_step has no triton kernel in this version'
    """
    if op not in KERNELS:
        raise ValueError(f"op must be one of {', '.join(map(repr, KERNELS))}; got {op!r}")
    if backend not in BACKENDS[1:]:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS[1:]))}; got {backend!r}")
    return _problem(op, backend, torch.device(device), dtype, options)


def _problem(
    op: str, backend: str, device: torch.device, dtype: torch.dtype | None, options: Mapping[str, object] | None
) -> str | None:
    """:func:`why_not` for names that are known to be right."""
    if backend == "reference":
        return None
    kernel = KERNELS[op].get(backend)
    if kernel is None:
        return f"{op} has no {backend} kernel in this version"
    problem = _backend_problem(backend) if device.type in kernel else _known_problem(backend)
    if problem is not None:
        return f"the {backend} backend is not available: {problem}"
    if device.type not in kernel:
        return f"{op} has no {backend} kernel for {device.type} tensors (it runs on {_names(kernel)})"
    if backend == "native" and device.type == "cuda" and not _extension.has_cuda:
        return (
            "the extension was built without CUDA kernels; install dgi-kernels again where torch is a CUDA build "
            "and nvcc is there, with DGI_BUILD_CUDA=1"
        )
    dtypes = kernel[device.type]
    if dtypes is not None and dtype not in dtypes:
        return f"{op} has no {backend} kernel for {dtype} on {device.type} (it takes {_names(dtypes)})"
    lacks = LACKS.get((op, backend), {})
    for option in (f"{name}={value}" for name, value in (options or {}).items()):
        if option in lacks:
            return f"{op} has no {backend} kernel for {option}: {lacks[option]}"
    if dtypes is not None and _is_transformed():
        return "inside torch.func's transforms (vmap, grad, jvp, ...) only the reference can run"
    if dtypes is not None and torch.autograd.forward_ad._current_level >= 0:
        return "inside forward-mode differentiation (torch.autograd.forward_ad) only the reference can run"
    return None


def tracing() -> bool:
    """Whether operations are traced, and tensors have no values: by torch.compile or export, or by a FakeTensorMode."""
    return torch.compiler.is_compiling() or torch._C._get_dispatch_mode(_FAKE) is not None


_FAKE = torch._C._TorchDispatchModeKey.FAKE


def _is_transformed() -> bool:
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def choose(
    op: str,
    backend: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    options: Mapping[str, object] | None = None,
) -> str:
    """Resolve ``backend`` to ``"reference"``, ``"triton"`` or ``"native"`` for one call.

    ``options`` are those of the op, by name, that a kernel may lack: see :data:`LACKS`.

    Raises:
        ValueError: ``backend`` is not one of :data:`BACKENDS`.
        BackendUnavailable: a backend asked for by name cannot run this op here.
    """
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}; got {backend!r}")
    if backend != "auto":
        problem = _problem(op, backend, device, dtype, options)
        if problem is not None:
            raise BackendUnavailable(f'backend="{backend}" cannot run {op} here: {problem}')
        return backend
    problems = []
    for candidate in PREFERENCE.get(device.type, PREFERENCE["cpu"]):
        if candidate not in KERNELS[op]:
            continue
        problem = _problem(op, candidate, device, dtype, options)
        if problem is None:
            return candidate
        problems.append(problem)
    if problems:
        _log_fallback(op, device, "; ".join(problems))
    return "reference"


def choose_without_gradient(op: str, backend: str, main: torch.Tensor, *others: object) -> str:
    """As :func:`choose`, for ops whose reference alone passes gradients on: it is taken where an input requires one."""
    chosen = choose(op, backend, main.device, main.dtype)
    wants_gradient = any(isinstance(value, torch.Tensor) and value.requires_grad for value in (main, *others))
    if chosen == "reference" or not wants_gradient or not torch.is_grad_enabled():
        return chosen
    if backend != "auto":
        raise BackendUnavailable(
            f'backend="{backend}" cannot run {op} here: it gives no gradients, and an input '
            "requires one (call it under torch.no_grad(), or take the reference)"
        )
    _log_fallback(op, main.device, "an input requires a gradient, and only the reference gives one")
    return "reference"


_logged: set[tuple[str, str, str]] = set()


def _log_fallback(op: str, device: torch.device, reason: str) -> None:
    """Say once per op, device type and reason that the reference runs in place of a kernel.

    At level WARNING, which Python shows by default, where that costs the memory that an accelerator is short of.
    """
    key = (op, device.type, reason)
    if torch.compiler.is_compiling() or key in _logged:
        return
    _logged.add(key)
    if device.type != "cpu" and op in FORMS_LOGITS:
        logger.warning(
            "%s: falling back to the PyTorch reference, which forms all rows x codes logits on %s (%s)",
            op,
            device,
            reason,
        )
    else:
        logger.info("%s: falling back to the PyTorch reference (%s)", op, reason)


def _names(values: Iterable[object]) -> str:
    return ", ".join(sorted(str(value) for value in values))


_debug = os.environ.get("DGI_DEBUG") == "1"


@contextlib.contextmanager
def debug() -> Iterator[None]:
    """Check the *values* of CUDA inputs too (indices, scales), at the price of a host sync per op.

    On CPU tensors values are always checked.  ``DGI_DEBUG=1`` in the environment turns this on for a whole run.

    Examples:
        >>> with dgi_kernels.debug():
        ...     loss = dgi_kernels.cosine_cross_entropy(torch.ones(2, 8), torch.ones(4, 8), torch.tensor([0, 3]), 30.0)
    """
    global _debug
    before, _debug = _debug, True
    try:
        yield
    finally:
        _debug = before


def checks_values(device: torch.device) -> bool:
    """Whether a check that reads tensor values is made on ``device``: always on the CPU, in :func:`debug` elsewhere."""
    return device.type == "cpu" or _debug
