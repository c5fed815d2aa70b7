"""``python -m dgi_kernels.info``: versions, devices, and which backend runs which op here, and why not.

For every device type that torch can use here, and every dtype, the report names the backend that ``backend="auto"``
takes; below each table it says why an op's reference runs, where it does.
"""

from __future__ import annotations

import importlib.metadata
import platform

import torch

import dgi_kernels
from dgi_kernels.backend import KERNELS, PREFERENCE, why_not

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def report() -> str:
    """The report as text: versions, CPU and GPUs, the backends, and what runs each op on each device and dtype."""
    facts = {
        "dgi-kernels": dgi_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton(),
        "platform": platform.platform(),
        "CPU": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "GPU": _gpus(),
    }
    sections: list[list[tuple[str, ...]]] = [[*facts.items()], _backends()]
    for device in _devices():
        sections += [_ops(device), _reasons(device)]
    return "\n\n".join("\n".join(_aligned(rows)) for rows in sections if rows)


def _triton() -> str:
    try:
        return importlib.metadata.version("triton")  # without importing it, which may fail: see the backends
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    devices = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return "; ".join(f"{d.name}, sm_{d.major}{d.minor}, {d.total_memory / 2**30:.0f} GiB" for d in devices)


def _backends() -> list[tuple[str, ...]]:
    status = dgi_kernels.backends()
    return [
        ("backend", "available", "why not"),
        *((name, _yes(backend.available), backend.reason) for name, backend in status.items()),
    ]


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _ops(device: str) -> list[tuple[str, ...]]:
    """What ``backend="auto"`` takes, a row for each op and a column for each dtype."""
    return [
        (f"op on {device}", *(_short(dtype) for dtype in DTYPES)),
        *((op, *(_chosen(op, device, dtype) for dtype in DTYPES)) for op in KERNELS),
    ]


def _chosen(op: str, device: str, dtype: torch.dtype) -> str:
    candidates = (backend for backend in PREFERENCE[device] if why_not(op, backend, device, dtype) is None)
    return next(candidates, "reference")


def _reasons(device: str) -> list[tuple[str, ...]]:
    """Why the reference runs, a row for each op and reason with the dtypes that it is the reason for."""
    dtypes_of: dict[tuple[str, str], list[str]] = {}
    for op, kernels in KERNELS.items():
        candidates = [backend for backend in PREFERENCE[device] if backend in kernels]
        for dtype in DTYPES:
            if _chosen(op, device, dtype) == "reference":
                problems = [str(why_not(op, backend, device, dtype)) for backend in candidates]
                # Op and dtype have columns of their own.
                reason = "; ".join(problems).replace(f"{op} has", "it has").replace(f" {dtype} on", " this dtype on")
                dtypes_of.setdefault((op, reason or "it has no kernel"), []).append(_short(dtype))
    rows = [
        (op, "all" if len(dtypes) == len(DTYPES) else ", ".join(dtypes), reason)
        for (op, reason), dtypes in dtypes_of.items()
    ]
    return [(f"reference on {device}", "dtypes", "why no kernel"), *rows] if rows else []


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


if __name__ == "__main__":
    print(report())
