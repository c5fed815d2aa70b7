"""Every Triton kernel, at the tiles that its launcher takes, against float64; its bits over many runs; with poison.

The sizes are the smallest at which a launch has several tiles each way, sorts its rows and splits its sums. A result
may be as wrong as what PyTorch computes in the same dtype, and a little more. Figures of a wrong kernel are worth
nothing, so this comes first.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from dgi_kernels import cosine_cross_entropy, debug, gumbel_noise, gumbel_softmax, residual_quantize, tiles
from dgi_kernels.types import Metric

from .device import Gpu
from .session import Session

REPEATS = 20
# Relative to the norm of a result, beside what PyTorch itself is wrong by in the dtype: some units in the last place of
# what is stored and of weights that are rounded on the way.
ROUNDING = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
OF_A_SCALAR = 10  # a sum that cancels, as the gradient of a scale does, is wrong by what its terms are

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Check:
    """One call: ``ours`` to be checked, ``eager`` in the same dtype, ``exact`` in float64; all give the same names."""

    name: str
    dtype: torch.dtype
    ours: Callable[[], Results]
    eager: Callable[[], Results]
    exact: Callable[[], Results]


def gradients(loss: Tensor, leaves: dict[str, Tensor]) -> Results:
    return dict(zip((f"d{name}" for name in leaves), torch.autograd.grad(loss, list(leaves.values())), strict=True))


def cosine(gpu: Gpu, dtype: torch.dtype, d: int, n: int, k: int, *, columns: bool = False) -> Check:
    """``columns``: with a bias, repeated items and log normalizers; some targets are far below the others."""
    torch.manual_seed(d)
    h, weight = (torch.randn(rows, d, device=gpu.device).to(dtype) for rows in (n, k))
    target = torch.randint(k, (n,), device=gpu.device)
    near = torch.arange(n, device=gpu.device) % 3 == 0  # rows near their target
    h = torch.where(near[:, None], weight[target] + 0.3 * h, h)
    options: dict[str, Any] = {"label_smoothing": 0.0 if columns else 0.1, "reduction": "sum"}
    given: dict[str, Tensor] = {}
    if columns:
        bias, same_as = 3 * torch.randn(k, device=gpu.device), torch.arange(k, device=gpu.device) // 2
        target[::5], bias[7] = 7, -1e4
        given = {"bias": bias, "same_as": same_as}

    def call(loss: Callable[..., Any], compute: torch.dtype) -> Results:
        leaves = {
            "h": h.to(compute),
            "weight": weight.to(compute),
            "scale": torch.full((), 30.0, device=gpu.device, dtype=torch.promote_types(compute, torch.float32)),
        }
        if columns:
            leaves["bias"] = given["bias"].to(leaves["scale"].dtype)
        leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
        found = loss(leaves["h"], leaves["weight"], target, leaves["scale"], **{**given, **dict([*leaves.items()][3:])})
        value, lse = found if columns else (found, None)
        results = {"loss": value.detach()} if lse is None else {"loss": value.detach(), "lse": lse.detach()}
        return {**results, **gradients(value if lse is None else value + lse.sum(), leaves)}

    def eager(h: Tensor, weight: Tensor, target: Tensor, scale: Tensor, **given: Tensor) -> Any:
        logits = scale * F.normalize(h, dim=-1) @ F.normalize(weight, dim=-1).T
        if not columns:
            return F.cross_entropy(logits, target, **options)
        same_as, row = given["same_as"], torch.arange(k, device=gpu.device)
        apart = (same_as == same_as[target, None]) & (row != target[:, None])
        logits = (logits + given["bias"]).masked_fill(apart, -torch.inf)
        return F.cross_entropy(logits, target, **options), logits.logsumexp(-1)

    def ours(*operands: Tensor, **given: Tensor) -> Any:
        return cosine_cross_entropy(*operands, backend="triton", return_log_normalizer=columns, **given, **options)

    return Check(
        f"cosine {'columns ' * columns}{short(dtype)} D={d}",
        dtype,
        lambda: call(ours, dtype),
        lambda: call(eager, dtype),
        lambda: call(eager, torch.float64),
    )


def quantize(
    gpu: Gpu, dtype: torch.dtype, d: int, n: int, sizes: Sequence[int], mode: str, metric: Metric = "cosine"
) -> Check:
    """``straight_through`` has one level: what follows a near-tie that rounding decides is another path."""
    torch.manual_seed(d)
    sizes = sizes if mode == "soft" else sizes[:1]
    vectors = [torch.randn(rows, d, device=gpu.device).to(dtype) for rows in (n, *sizes)]
    weight = torch.linspace(-1, 2, n, device=gpu.device, dtype=torch.float64)

    def call(compute: torch.dtype, backend: str) -> Results:
        leaves = {
            name: x.to(compute).detach().requires_grad_()
            for name, x in zip(("z", *(f"codebook{j}" for j in range(len(sizes)))), vectors, strict=True)
        }
        scale, tau = (
            torch.full((), value, device=gpu.device).requires_grad_()
            for value in (8.0 if metric == "cosine" else 8.0 / d, 0.7)
        )
        z, *codebooks = leaves.values()
        result = residual_quantize(z, codebooks, scale, tau, mode=mode, metric=metric, seed=7, backend=backend)
        usage = torch.cat(list(result.usage))
        loss = (
            (result.quantized.double() * weight[:, None, None]).sum()
            + 50 * (usage.double() ** 2).sum()
            + result.log_normalizer.double().sum()
        )
        return {
            "quantized": result.quantized.detach(),
            "usage": usage.detach(),
            "log_normalizer": result.log_normalizer.detach(),
            **gradients(loss, {**leaves, "scale": scale, "tau": tau}),
        }

    return Check(
        f"quantize {mode}{'' if metric == 'cosine' else f' {metric}'} {short(dtype)} D={d}",
        dtype,
        lambda: call(dtype, "triton"),
        lambda: call(dtype, "reference"),
        lambda: call(torch.float64, "reference"),
    )


def softmax(gpu: Gpu, dtype: torch.dtype, n: int, k: int) -> Check:
    torch.manual_seed(k)
    logits = (3 * torch.randn(n, k, device=gpu.device)).to(dtype)
    upstream = torch.randn(n, k, device=gpu.device)

    def call(compute: torch.dtype, backend: str) -> Results:
        x, tau = logits.to(compute).requires_grad_(), torch.full((), 0.7, device=gpu.device).requires_grad_()
        sample = gumbel_softmax(x, tau, seed=5, backend=backend)
        loss = (sample.double() * upstream).sum()
        return {"sample": sample.detach(), **gradients(loss, {"logits": x, "tau": tau})}

    return Check(
        f"softmax {short(dtype)} K={k}",
        dtype,
        lambda: call(dtype, "triton"),
        lambda: call(dtype, "reference"),
        lambda: call(torch.float64, "reference"),
    )


def noise(gpu: Gpu, n: int, k: int) -> Check:
    def call(backend: str) -> Results:
        return {"noise": gumbel_noise(11, 0, n, k, device=gpu.device, backend=backend)}

    return Check(
        f"noise ({n}, {k})", torch.float32, lambda: call("triton"), lambda: call("reference"), lambda: call("reference")
    )


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def checks(gpu: Gpu, *, flash: bool = False) -> Iterator[Check]:
    """All, most important first; ``flash``: of the kernels with products of their own."""
    half = (torch.bfloat16, torch.float16)
    sizes = {"n": 8500, "k": 1100}  # rows enough for the flash form
    for d in (64, 128, 256):
        yield cosine(gpu, half[0], d, **sizes)
    for d in (64, 128):
        yield cosine(gpu, half[0], d, **sizes, columns=True)
    for d in (64, 128):
        for mode in ("soft", "straight_through"):
            yield quantize(gpu, half[0], d, 8500, (1030, 260), mode)
    if flash:
        return
    yield cosine(gpu, half[1], 64, **sizes)
    yield quantize(gpu, half[1], 64, 8500, (1030, 260), "soft")
    yield cosine(gpu, half[0], 768, **sizes)
    yield cosine(gpu, torch.float32, 100, **sizes)
    yield cosine(gpu, half[0], 256, **sizes, columns=True)  # in chunks
    yield quantize(gpu, half[0], 256, 2500, (1030, 260), "soft")
    yield quantize(gpu, half[0], 64, 8500, (1030, 260), "soft", "dot")
    yield quantize(gpu, torch.float32, 64, 2500, (1030, 260), "soft")
    for k in (33, 250, 5000):
        yield softmax(gpu, half[0], 300, k)
    yield noise(gpu, 1000, 4099)
    yield noise(gpu, 1, 40_000_000)  # more tiles than a grid has in y


def error(actual: Tensor, exact: Tensor) -> Tensor:
    """Relative to the norm of what is expected; NaN where a number is missing."""
    return (actual.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30)


def judge(session: Session, check: Check, *, label: str = "", repeats: int = REPEATS) -> None:
    """Note what one check comes to: the largest error of all its results by its bound, and whether its bits repeat."""
    gpu, name = session.gpu, f"{check.name}{label}"
    repeats = repeats if gpu.here else 1
    kind = check.name.rsplit(maxsplit=2)[0]
    with session.guarded(name):
        if not gpu.here and kind in session.rehearsed:  # without numbers what it is compared with is seen once a kind
            check.ours()
            session.add("check", {"what": name}, "ours", [1.0])
            return
        session.rehearsed.add(kind)
        gpu.poison()
        start = time.perf_counter()
        actual, plain, exact = check.ours(), check.eager(), check.exact()
        worst, report, wrong = 0.0, [], []
        for key, truth in exact.items():
            off, theirs = gpu.number(error(actual[key], truth)), gpu.number(error(plain[key], truth))
            bound = 1.5 * theirs + ROUNDING[check.dtype] * (OF_A_SCALAR if truth.dim() == 0 else 1)
            report.append(f"{key} {off:.1e} (PyTorch {theirs:.1e})")
            worst = max(worst, off / bound) if off == off else float("inf")
            if not off <= bound:
                wrong.append(f"{key} is wrong by {off:.1e}, PyTorch by {theirs:.1e}")
        changed = {
            key
            for again in (check.ours() for _ in range(repeats))
            for key, value in again.items()
            if gpu.number((value.view(-1) != actual[key].view(-1)).any()) and key not in wrong
        }
        elsewhere = gpu.on_another_stream(check.ours)
        if gpu.here:  # it reads values, as only numbers that are there can be
            with debug():
                check.ours()
        if any(gpu.number((elsewhere[key] != actual[key]).any()) for key in actual):
            wrong.append("another stream gives other bits")
        if changed:
            wrong.append(f"bits of {', '.join(sorted(changed))} differ from run to run")
        seconds = time.perf_counter() - start
        session.add("check", {"what": name}, "ours", [seconds], worst=worst, errors=report, wrong=wrong)
        if wrong:
            session.fail(f"{name}: {'; '.join(wrong)}")
        else:
            session.say(f"{name}: right, {worst:.2f} of what is allowed; {repeats} runs alike")
        gpu.release()


def run(session: Session) -> None:
    for check in checks(session.gpu):
        judge(session, check)
    with tiles.override(tiles.FALLBACK):
        for check in checks(session.gpu, flash=True):
            judge(session, check, label=" with 4 warps")


def flash_alone(session: Session) -> None:
    """What the other assemblers and memcheck look at."""
    for check in checks(session.gpu, flash=True):
        judge(session, check, repeats=session.options.get("repeats", REPEATS))


def other_ptxas(session: Session) -> None:
    """The flash kernels again, each time in a process that assembles with another ptxas."""
    from .ahead import other_ptxas as found

    options = session.options
    paths = found(options["ptxas"])
    if options["rehearse"]:
        paths = paths[:1] or [triton.knobs.nvidia.ptxas.path]
    if not paths:
        session.say("there is no other ptxas than the one that Triton carries")
    for i, path in enumerate(paths):
        session.say(f"by {path}:")
        command = [sys.executable, "-m", "gpu.alone", "check:flash_alone", str(session.folder)]
        command += ["--name", f"{i}-{session.name}"] + ["--rehearse"] * bool(options["rehearse"])
        command += ["--stall", str(options["stall"])] if options.get("stall") else []
        done = subprocess.run(command, env=os.environ | {"TRITON_PTXAS_PATH": path}, check=False)
        if done.returncode:
            session.fail(f"with {path} kernels are wrong")


def sanitized(session: Session) -> None:
    """One small case of each flash kernel: under memcheck everything takes a hundred times as long."""
    gpu = session.gpu
    for check in (
        cosine(gpu, torch.bfloat16, 64, 8300, 200),
        quantize(gpu, torch.bfloat16, 64, 8300, (200, 70), "soft"),
        cosine(gpu, torch.bfloat16, 256, 300, 200),
        quantize(gpu, torch.bfloat16, 128, 8300, (200, 70), "straight_through"),
    ):
        judge(session, check, repeats=0)


def tiny(session: Session) -> None:
    """A few rows of everything, for Triton's interpreter: a test of these checks, and of nothing else."""
    gpu, half = session.gpu, torch.float16
    for check in (
        cosine(gpu, half, 64, 40, 70),
        cosine(gpu, torch.float32, 20, 40, 70),
        cosine(gpu, half, 64, 40, 70, columns=True),
        cosine(gpu, torch.float32, 20, 40, 70, columns=True),
        quantize(gpu, half, 64, 40, (70, 20), "soft"),
        quantize(gpu, half, 64, 40, (70, 20), "straight_through"),
        quantize(gpu, half, 64, 40, (70, 20), "soft", "dot"),
        softmax(gpu, half, 5, 33),
        noise(gpu, 3, 40),
    ):
        judge(session, check, repeats=1)
