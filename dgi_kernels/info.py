"""``python -m dgi_kernels.info``: versions, devices, and which backend runs which op here, and why not."""

from __future__ import annotations

import importlib
import importlib.util
import platform

import torch

import dgi_kernels


def report() -> str:
    """The report as text: versions, CPU and GPUs, the backends, and the ops that each has kernels for."""
    facts = {
        "dgi-kernels": dgi_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton(),
        "platform": platform.platform(),
        "CPU": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "GPU": _gpus(),
    }
    sections: tuple[list[tuple[str, ...]], ...] = ([*facts.items()], _backends(), _ops())
    return "\n\n".join("\n".join(_aligned(rows)) for rows in sections)


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    return importlib.import_module("triton").__version__


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    devices = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return "; ".join(f"{d.name}, sm_{d.major}{d.minor}, {d.total_memory / 2**30:.0f} GiB" for d in devices)


def _backends() -> list[tuple[str, ...]]:
    status = dgi_kernels.backends()
    return [("backend", "available", "why not"),
            *((name, _yes(backend.available), backend.reason) for name, backend in status.items())]


def _ops() -> list[tuple[str, ...]]:
    status = dgi_kernels.backends()
    return [("op", *status),
            *((op, *(_yes(backend.available and op in backend.ops) for backend in status.values()))
              for op in status["reference"].ops)]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


if __name__ == "__main__":
    print(report())
