"""GRID: training steps of its quantizers, straight-through and by the rotation trick.

Theirs forms the differences of all rows and codes, 256 rows at a time: N x K x D numbers for K distances.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import torch

from dropins import Change, DropIn, Outputs, Steps, common

ROWS, CODES = 2048, 256


def steps(data: Path | None) -> Steps:
    # Without what the rest of the package imports: lightning, hydra.
    utils = types.ModuleType("src.utils.utils")
    utils.gumbel_softmax_sample = None  # type: ignore[attr-defined]
    sys.modules |= {"src.utils": types.ModuleType("src.utils"), "src.utils.utils": utils}
    from src.components import quantization_strategies as strategies
    from src.components.distance_functions import BetaQuantizationLoss, SquaredEuclideanDistance

    inputs = common.vectors(data)
    torch.manual_seed(0)
    rows, codebook = inputs[torch.randperm(len(inputs))[: ROWS + CODES]].split([ROWS, CODES])
    loss_function = BetaQuantizationLoss()

    def step(kind: type) -> Outputs:
        strategy = kind(distance_function=SquaredEuclideanDistance())
        x, e = rows.clone().requires_grad_(), codebook.clone().requires_grad_()
        codes, quantized, decoded = strategy.quantize(codebook=e, batch=x)
        loss = loss_function(x, quantized) + decoded.pow(2).sum()
        loss.backward()
        return {"codes": codes, "loss": loss, "dx": x.grad, "de": e.grad}  # type: ignore[dict-item]

    return {
        "straight-through": lambda: step(strategies.STEQuantization),
        "rotation trick": lambda: step(strategies.RotationTrickQuantization),
    }


DROPIN = DropIn(
    title=f"a training step, {ROWS} rows, {CODES} codes, D = 384",
    kind="quantizer step",
    source="https://github.com/snap-research/GRID",
    commit="63e19a88af6977eba9c3dd1971030573968d99b7",
    data=common.VECTORS,
    packages=(),
    paths=("src/components",),
    changes=(
        Change("src/components/quantization_strategies.py", "import torch\n", "import torch\nimport dgi_kernels\n"),
        Change(
            "src/components/quantization_strategies.py",
            "        dists = self.distance_function.compute(batch, codebook)\n"
            "        ids = torch.argmin(dists, dim=-1)\n",
            '        ids = dgi_kernels.assign_codes(batch, [codebook], metric="euclidean")[:, 0]\n',
        ),
    ),
    steps=steps,
)
