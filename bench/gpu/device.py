"""The one place where the benchmarks touch the GPU's run time, so that the rehearsal can put another in its place."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[], object]


class Gpu:
    """The CUDA device that is there."""

    device = torch.device("cuda")
    here = True

    def seconds(self, run: Step, calls: int = 1) -> float:
        """The seconds of one of ``calls`` calls without a pause between them, until the GPU is done."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls

    def graphed(self, run: Step) -> Step:
        """The replay of a CUDA graph of ``run``, which leaves the host's share out."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            run()
            run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = run()
        return lambda: (graph.replay(), kept)

    def on_another_stream(self, run: Step) -> object:
        """``run`` on a stream that is not the default one, with what it returned safe to read."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            result = run()
        torch.cuda.current_stream().wait_stream(aside)
        return result

    def peak_bytes(self, run: Step) -> int:
        """The peak of one call beyond what was allocated before."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def launches(self, run: Step) -> int:
        """Kernels that one call starts."""
        run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())

    def compile(self, function: Callable) -> Callable:
        return torch.compile(function, dynamic=False)

    def to(self, value: object) -> object:
        """Something made on the CPU (a tensor, a trie), on the GPU."""
        return value.to(self.device)  # type: ignore[attr-defined]

    def number(self, x: Tensor) -> float:
        """The one place that reads a value: it waits for the GPU."""
        return float(x)

    def poison(self) -> None:
        """Fill what ``torch.empty`` will hand out with NaN, so that a kernel which leaves elements out is seen."""
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(True, warn_only=True)

    def release(self) -> None:
        """Give back the memory of the last measurement."""
        gc.collect()
        torch.cuda.empty_cache()


class Cpu(Gpu):
    """The CPU in the GPU's place: runs Triton's kernels interpreted, for tests of the checks themselves."""

    device = torch.device("cpu")

    def seconds(self, run: Step, calls: int = 1) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls

    def graphed(self, run: Step) -> Step:
        return run

    def on_another_stream(self, run: Step) -> object:
        return run()

    def peak_bytes(self, run: Step) -> int:
        return 0

    def launches(self, run: Step) -> int:
        return 0

    def release(self) -> None:
        gc.collect()
