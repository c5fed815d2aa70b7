"""CUDA graphs: work that is recorded once and then launched as a whole, for which launching took longer than running.

What is recorded may not wait for the host, nor have shapes that follow from values; of a run before it are the memory
and the choices of kernels that libraries make the first time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

WARMUPS = 3  # runs before a capture
Result = TypeVar("Result")


def aside(function: Callable[[], Result], device: torch.device) -> Result:
    """Run ``function`` on another stream, as runs before a capture should, between what comes before and after."""
    with torch.cuda.device(device):
        stream = _other_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = function()
        torch.cuda.current_stream().wait_stream(stream)
    return result


@functools.cache
def _other_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def capture(function: Callable[[], Result], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Record ``function`` without running it; what it returns has the values of the graph's last ``replay()``."""
    with torch.cuda.device(device):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function()
    return graph, result


def possible(device: torch.device) -> bool:
    """Whether there can be graphs on a device."""
    return device.type == "cuda"
