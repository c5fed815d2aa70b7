"""What rounding does to the quantizer's gradients of rows: the kernels' arithmetic and plain torch's, in float64.

    python bench/rounding.py

No GPU is needed: every number is computed in float64, and rounded to bfloat16 where the kernels of the flash form, or
torch's in bfloat16, store one or give one to a product. Printed is the relative error of each row's gradient, the
median and the ninth decile, against the gradient without rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS, CODES, DIM, SCALE = 512, 1024, 64, 10.0
CASES = ((None, 1.0), (None, 0.5), (1.0, 0.5), (0.3, 0.5), (0.3, 0.2), (0.1, 0.1))


def rounded(x: Tensor) -> Tensor:
    return x.float().bfloat16().double()


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def errors(noise: float | None, tau: float) -> tuple[float, dict[str, Tensor]]:
    """The median of the largest p, and each row's error by who makes it. ``noise``: of a component of a row that is
    near a code; None: rows anywhere."""
    e = rounded(randn(CODES, DIM))
    r = randn(ROWS, DIM) if noise is None else e[torch.randint(CODES, (ROWS,))] + noise * randn(ROWS, DIM)
    r, z, v = rounded(r), rounded(randn(ROWS, DIM)), 0.3 * randn(CODES)
    g = -torch.log(-torch.log(torch.rand(ROWS, CODES, dtype=torch.float64)))
    unit_e, unit_r = e / e.norm(dim=1, keepdim=True), r / r.norm(dim=1, keepdim=True)
    p = ((SCALE * unit_r @ unit_e.T + g) / tau).softmax(1)
    c = z @ e.T + v

    def gradient(w: Tensor) -> Tensor:
        out = w @ unit_e
        return out - (out * unit_r).sum(1, keepdim=True) * unit_r

    truth = gradient(p * (c - (p * c).sum(1, keepdim=True)))
    kept, mixed = rounded(p), rounded(p @ e)
    w = kept * (c - ((z * mixed).sum(1) + p @ v)[:, None])
    residue = w.sum(1)
    w = rounded(w / e.norm(dim=1)) * e.norm(dim=1)
    balanced = w.clone()
    balanced[torch.arange(ROWS), p.argmax(1)] -= residue

    scores = rounded(SCALE * rounded(rounded(unit_r) @ rounded(unit_e).T)) + rounded(g)
    usual, products = rounded(rounded(rounded(scores) / tau).softmax(1)), rounded(z @ e.T) + rounded(v)
    of_torch = rounded(usual * (products - (usual * products).sum(1, keepdim=True)))
    found = {"kernels": balanced, "without the last step": w, "torch": of_torch}
    size = truth.norm(dim=1)
    return p.amax(1).median().item(), {name: (gradient(x) - truth).norm(dim=1) / size for name, x in found.items()}


def main() -> None:
    torch.manual_seed(0)
    print(f"N={ROWS} K={CODES} D={DIM}, scale {SCALE:g}; relative error of a row's gradient, median (ninth decile)")
    for noise, tau in CASES:
        largest, found = errors(noise, tau)
        where = "anywhere" if noise is None else f"a code + {noise:g}"
        numbers = "   ".join(
            f"{name} {100 * x.median():.2g} % ({100 * x.quantile(0.9):.2g})" for name, x in found.items()
        )
        print(f"{where:12} tau {tau:g}: largest p {largest:.4f}   {numbers}")


if __name__ == "__main__":
    main()
