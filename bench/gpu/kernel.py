"""Calls the op that launches one kernel, a few times and nothing else: what bench/profile.sh looks at."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable

import bench_beam
import torch

from dgi_kernels import beam_step, cosine_cross_entropy, gumbel_softmax

from . import beam, cosine, quantize
from .device import Gpu, Step

CALLS = 4


def loss(gpu: Gpu, d: int) -> Step:
    return cosine.step(cosine_cross_entropy, cosine.inputs(gpu, cosine.N, cosine.K, d, "flat"))


def quantizer(gpu: Gpu, d: int) -> Step:
    return quantize.step(quantize.ours, *quantize.inputs(gpu, 65536, d, "flat"))


def softmax(gpu: Gpu) -> Step:
    logits = torch.randn(16384, 4096, device=gpu.device, dtype=torch.bfloat16).requires_grad_()
    return lambda: torch.autograd.grad(gumbel_softmax(logits, 0.5, seed=1).float().sum(), logits)


def search(gpu: Gpu) -> Step:
    case = bench_beam.Case(batch=64, beams=50)
    made = beam.search_of(gpu, case.sids(), case)
    return lambda: beam_step(made.trie, made.logits[1], made.states[1], num_beams=case.beams)


KERNELS: dict[str, Callable[[Gpu], Step]] = {
    "flash_forward_kernel": lambda gpu: loss(gpu, 64),
    "flash_weight_kernel": lambda gpu: loss(gpu, 64),
    "flash_hidden_kernel": lambda gpu: loss(gpu, 64),
    "product_loss_kernel": lambda gpu: loss(gpu, 256),
    "product_gradient_kernel": lambda gpu: loss(gpu, 256),
    "level_kernel": lambda gpu: quantizer(gpu, 64),
    "usage_kernel": lambda gpu: quantizer(gpu, 64),
    "probability_kernel": lambda gpu: quantizer(gpu, 64),
    "weight_kernel": lambda gpu: quantizer(gpu, 64),
    "row_level_kernel": lambda gpu: quantizer(gpu, 256),
    "row_gradient_kernel": lambda gpu: quantizer(gpu, 768),
    "softmax_kernel": softmax,
    "softmax_backward_kernel": softmax,
    "parents_kernel": search,
    "select_kernel": search,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernel", nargs="?", choices=KERNELS)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    if options.list or options.kernel is None:
        print("\n".join(KERNELS))
        return 0
    gpu: Gpu = Gpu()
    context: contextlib.AbstractContextManager = contextlib.nullcontext()
    if options.rehearse:
        from .rehearsal import FakeGpu, pretended_gpu

        gpu, context = FakeGpu(), pretended_gpu()
    with context as launches:
        step = KERNELS[options.kernel](gpu)
        for _ in range(CALLS):
            step()
    if options.rehearse:
        names = sorted({launch.kernel for launch in launches.noted})
        print(f"launched of Triton's: {', '.join(names) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
