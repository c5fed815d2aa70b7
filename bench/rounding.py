"""What rounding does to the quantizer's gradients of rows: the kernels' arithmetic and plain torch's, in float64.

    python bench/rounding.py

No GPU is needed: every number is computed in float64, and rounded to bfloat16 where the kernels of the flash form, or
torch's in bfloat16, store one or give one to a product. Printed are the relative errors of each row's gradient, the
median and the ninth decile, and of the gradient of the codes, against those without rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS, CODES, DIM, SCALE = 512, 1024, 64, 10.0
# Noise of a component of a row that is near a code (None: rows are anywhere), temperature, what all vectors have added.
CASES = (
    (None, 1.0, 0.0),
    (None, 2.0, 1.0),
    (None, 2.0, 3.0),
    (1.0, 0.5, 0.0),
    (0.3, 0.5, 0.0),
    (0.3, 0.2, 0.0),
    (0.3, 0.2, 1.0),
)


def rounded(x: Tensor) -> Tensor:
    return x.float().bfloat16().double()


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def errors(noise: float | None, tau: float, common: float) -> tuple[float, dict[str, tuple[Tensor, float]]]:
    """The median of the largest p; by who makes it, each row's error and that of the gradient of the codes."""
    e = rounded(randn(CODES, DIM) + common)
    r = randn(ROWS, DIM) + common if noise is None else e[torch.randint(CODES, (ROWS,))] + noise * randn(ROWS, DIM)
    r, z, v = rounded(r), rounded(randn(ROWS, DIM) + 0.5 * (common > 0)), 0.3 * randn(CODES)
    g = -torch.log(-torch.log(torch.rand(ROWS, CODES, dtype=torch.float64)))
    factor = 1 / e.norm(dim=1)
    unit_e, unit_r = e * factor[:, None], r / r.norm(dim=1, keepdim=True)
    p = ((SCALE * unit_r @ unit_e.T + g) / tau).softmax(1)
    c = z @ e.T + v

    def of_rows(total: Tensor) -> Tensor:
        return total - (total * unit_r).sum(1, keepdim=True) * unit_r

    def of_codes(w: Tensor, y: Tensor) -> Tensor:
        key = w.T @ unit_r
        return SCALE / tau * factor[:, None] * (key - (key * unit_e).sum(1, keepdim=True) * unit_e) + y.T @ z

    exact = p * (c - (p * c).sum(1, keepdim=True))
    dr, de = of_rows(exact @ unit_e), of_codes(exact, p)

    kept, mixed = rounded(p), rounded(rounded(p) @ e)
    w = kept * (c - ((z * mixed).sum(1) + p @ v)[:, None])
    rest, (largest, code) = w.sum(1), kept.max(1)
    w = rounded(w * factor) / factor
    share = rest * largest * factor[code] + rest * (1 - largest) * factor.mean()
    changed = w.clone()
    changed[torch.arange(ROWS), code] -= rest * largest

    scores = rounded(SCALE * rounded(rounded(unit_r) @ rounded(unit_e).T)) + rounded(g)
    usual, products = rounded(rounded(rounded(scores) / tau).softmax(1)), rounded(rounded(z @ e.T) + rounded(v))
    of_torch = rounded(usual * (products - (usual * products).sum(1, keepdim=True)))
    found = {
        "kernels": (w @ unit_e - share[:, None] * mixed, changed, kept),
        "without the last step": (w @ unit_e, w, kept),
        "torch": (of_torch @ unit_e, of_torch, usual),
    }
    return p.amax(1).median().item(), {
        name: (
            (of_rows(total) - dr).norm(dim=1) / dr.norm(dim=1),
            ((of_codes(weights, y) - de).norm() / de.norm()).item(),
        )
        for name, (total, weights, y) in found.items()
    }


def main() -> None:
    torch.manual_seed(0)
    print(f"N={ROWS} K={CODES} D={DIM}, scale {SCALE:g}; relative errors in %:")
    print("of a row's gradient, median (ninth decile), and of that of the codes")
    for noise, tau, common in CASES:
        largest, found = errors(noise, tau, common)
        where = ("anywhere" if noise is None else f"a code + {noise:g}") + (f", all + {common:g}" if common else "")
        numbers = "   ".join(
            f"{name} {100 * rows.median():.2g} ({100 * rows.quantile(0.9):.2g}), {100 * codes:.2g}"
            for name, (rows, codes) in found.items()
        )
        print(f"{where:22} tau {tau:g}: largest p {largest:.4f}   {numbers}")


if __name__ == "__main__":
    main()
