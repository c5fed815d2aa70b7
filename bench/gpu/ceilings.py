"""What this GPU can do: a copy, and products of matrices; other figures are shares of these."""

from __future__ import annotations

import statistics

import torch

from .session import Session

BYTES, N = 1 << 30, 8192


def run(session: Session) -> None:
    device = session.gpu.device
    source = torch.empty(BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(N, N, device=device, dtype=torch.bfloat16) for _ in range(2))
    single = [matrix.float() for matrix in (left, right)]
    for name, work, unit, call in (
        ("copy", 2 * BYTES, "TB/s", lambda: target.copy_(source)),
        ("bfloat16 product", 2 * N**3, "TFLOP/s", lambda: left @ right),
        ("float32 product", 2 * N**3, "TFLOP/s", lambda: single[0] @ single[1]),
    ):
        with session.guarded(name):
            session.gpu.seconds(call)
            times = [session.gpu.seconds(call, 3) for _ in range(7)]
            rate = work / statistics.median(times)
            session.add("ceiling", {"what": name}, "ours", times, rate=rate)
            session.say(f"{name}: {rate / 1e12:.3g} {unit}")
