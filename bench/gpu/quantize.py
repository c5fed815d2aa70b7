"""Residual quantization, forward and backward, its noise and the Gumbel-softmax: ours, the floor, and what users write.

The floor is the seven products of a level that no dense method can do without, 14 N K D operations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dgi_kernels import assign_codes, gumbel_noise, gumbel_softmax, residual_quantize
from dgi_kernels.backend import why_not

from .device import Gpu, Step
from .session import Session, lazily

SIZES, SCALE, TAU, SEED = (4096, 1024, 256), 30.0, 0.5, 42
FIRST = [(65536, 64, "flat"), (65536, 256, "flat"), (65536, 64, "peaked")]
MORE = [(65536, 128, "flat"), (65536, 768, "flat"), (16384, 64, "flat"), (65536, 256, "peaked")]
WITH_PEERS = [(65536, 64, "flat")]
SOFTMAX = (256, 4096, 32768)  # codes; 64 million logits each
ASSIGNED = 1_000_000  # items that get their codes

Quantize = Callable[[Tensor, list[Tensor], Tensor, float], tuple[Tensor, list[Tensor]]]


def inputs(
    gpu: Gpu, n: int, d: int, assignments: str, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, list[Tensor]]:
    """Peaked, as of a trained quantizer: codebooks in families of 64 at cosine 0.8, rows near a path of codes."""
    torch.manual_seed(d)

    def unit(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, d, device=gpu.device), dim=-1)

    z, codebooks = unit(n), []
    if assignments == "peaked":
        z = 0.02 * z
    for level, size in enumerate(SIZES):
        codebook = unit(size)
        if assignments == "peaked":
            families = unit(size // 64).repeat_interleave(64, 0, output_size=size)
            codebook = 0.5**level * F.normalize(0.8**0.5 * families + 0.2**0.5 * codebook, dim=-1)
            z = z + codebook[torch.randint(size, (n,), device=gpu.device)]
        codebooks.append(codebook.to(dtype))
    return z.to(dtype), codebooks


def eager(z: Tensor, codebooks: list[Tensor], scale: Tensor, tau: float) -> tuple[Tensor, list[Tensor]]:
    quantized, usage = [], []
    for codebook in codebooks:
        logits = scale * F.normalize(z, dim=-1) @ F.normalize(codebook, dim=-1).T
        p = F.gumbel_softmax(logits.to(z.dtype), tau)
        quantized.append(p @ codebook)
        usage.append(p.mean(0))
        z = z - quantized[-1]
    return torch.stack(quantized, 1), usage


def ours(z: Tensor, codebooks: list[Tensor], scale: Tensor, tau: float) -> tuple[Tensor, list[Tensor]]:
    result = residual_quantize(z, codebooks, scale, tau, seed=SEED)
    return result.quantized, result.usage


def step(quantize: Quantize, z: Tensor, codebooks: list[Tensor]) -> Step:
    leaves = [x.detach().requires_grad_() for x in (z, *codebooks)]
    scale = torch.full((), SCALE, device=z.device).requires_grad_()
    weight = torch.randn(len(z), len(codebooks), z.shape[1], device=z.device, dtype=z.dtype)

    def run() -> object:
        quantized, usage = quantize(leaves[0], leaves[1:], scale, TAU)
        loss = (quantized * weight).float().sum()
        for u in usage:
            loss = loss + (u.float() * u.float().add(1e-9).log()).sum()
        return torch.autograd.grad(loss, (*leaves, scale))

    return run


def floor(z: Tensor, codebooks: list[Tensor]) -> Step:
    def run() -> object:
        for e in codebooks:
            for _ in range(3):  # logits, again in backward, and dP
                tile = z @ e.T
            for _ in range(2):  # z~ and dr; dE as key and as value
                rows, codes = tile @ e, tile.T @ z
        return rows, codes

    return run


def shape(n: int, d: int, assignments: str) -> dict[str, object]:
    return {
        "N": n,
        "K": ", ".join(map(str, SIZES)),
        "D": d,
        "assignments": assignments,
        "tau": TAU,
        "dtype": "bfloat16",
    }


def figures(session: Session, cases: list[tuple[int, int, str]]) -> None:
    for n, d, assignments in cases:
        with session.guarded(f"quantize N={n} D={d}"):
            z, codebooks = inputs(session.gpu, n, d, assignments)
            own = step(ours, z, codebooks)
            median = session.measure(
                "residual_quantize",
                shape(n, d, assignments),
                {
                    "ours": own,
                    "floor": floor(z, codebooks),
                    "eager": step(eager, z, codebooks),
                    "ours, graph": lazily(functools.partial(session.gpu.graphed, own)),
                },
                rounds=5,
                calls=10,
            )
            session.share_of_ceiling(14 * n * sum(SIZES) * d, median)


def run(session: Session) -> None:
    figures(session, FIRST)


def more(session: Session) -> None:
    figures(session, MORE)
    with session.guarded("assign_codes"):
        z, codebooks = inputs(session.gpu, ASSIGNED, 64, "peaked")
        session.measure(
            "assign_codes",
            {"N": ASSIGNED, "K": str(SIZES), "D": 64, "dtype": "bfloat16"},
            {
                "ours": lambda: assign_codes(z, codebooks),
                "floor": lambda: [
                    z[first : first + 65536] @ e.T for e in codebooks for first in range(0, ASSIGNED, 65536)
                ],
            },
        )


def samples(session: Session) -> None:
    """Gumbel-softmax and noise, of every backend that has them."""
    device, dtype = session.gpu.device, torch.bfloat16
    for codes in SOFTMAX:
        with session.guarded(f"gumbel_softmax K={codes}"):
            rows = (1 << 26) // codes
            logits = torch.randn(rows, codes, device=device, dtype=dtype).requires_grad_()

            def sample(draw: Callable[[Tensor], Tensor], logits: Tensor = logits) -> Step:
                return lambda: torch.autograd.grad(draw(logits).float().sum(), logits)

            systems = {
                "ours": sample(lambda x: gumbel_softmax(x, 0.5, seed=SEED)),
                "eager": sample(lambda x: F.gumbel_softmax(x, 0.5)),
            }
            systems |= {
                f"ours, {name}": sample(lambda x, name=name: gumbel_softmax(x, 0.5, seed=SEED, backend=name))
                for name in ("triton", "native")
                if why_not("gumbel_softmax", name, device, dtype) is None
            }
            session.measure("gumbel_softmax", {"N": rows, "K": codes, "dtype": "bfloat16"}, systems, budget=2.0)
            session.measure(
                "gumbel_noise",
                {"N": rows, "K": codes},
                {
                    "ours": lambda rows=rows, codes=codes: gumbel_noise(SEED, 0, rows, codes, device=device),
                    "eager": lambda rows=rows, codes=codes: torch.empty(rows, codes, device=device).exponential_(),
                },
                budget=1.0,
            )


def with_peers(session: Session) -> None:
    for n, d, assignments in WITH_PEERS:
        z, codebooks = inputs(session.gpu, n, d, assignments)
        compiled = functools.partial(step, session.gpu.compile(eager), z, codebooks)
        session.measure(
            "residual_quantize",
            shape(n, d, assignments),
            {"ours": step(ours, z, codebooks), "compile": lazily(compiled)},
            rounds=5,
        )
