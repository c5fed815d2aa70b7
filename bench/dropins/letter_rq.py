"""LETTER: codes of all items from its RQ-VAE (RQ-VAE/generate_indices.py calls ``get_indices``).

Theirs also computes the diversity loss of each level, row by row in Python, and throws it away.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import torch

from dropins import Change, DropIn, Steps, common


def steps(data: Path | None) -> Steps:
    sys.path.insert(0, "RQ-VAE")
    sys.modules["wandb"] = types.ModuleType("wandb")  # imported there, used in a comment only
    from models.rqvae import RQVAE

    inputs = common.vectors(data)
    torch.manual_seed(0)
    model = RQVAE(inputs.shape[1], [256] * 4, e_dim=32, layers=[512, 256, 128, 64], sk_epsilons=[0.0] * 4).eval()
    # generate_indices.py clusters each codebook into ten groups for the loss; any groups give the same codes.
    labels = {str(level): [code % 10 for code in range(256)] for level in range(4)}
    return common.get_indices_steps(model, inputs, lambda batch: model.get_indices(batch, labels))


DROPIN = DropIn(
    title="codes of a catalog by a Euclidean RQ-VAE, 4 x 256 codes, D = 32",
    kind="assignment",
    source="https://github.com/HonghuiBao2000/LETTER",
    commit="8d0154e28de37dbb6e24871c508ad8ddb1921cda",
    data=common.VECTORS,
    packages=("sklearn",),
    paths=("RQ-VAE/models",),
    changes=(
        Change("RQ-VAE/models/rqvae.py", "import numpy as np\n", "import numpy as np\nimport dgi_kernels\n"),
        Change(
            "RQ-VAE/models/rqvae.py",
            "        _, _, indices = self.rq(x_e, labels, use_sk=use_sk)\n        return indices\n",
            '        return dgi_kernels.assign_codes(x_e, list(self.rq.get_codebook()), metric="euclidean")\n',
        ),
    ),
    steps=steps,
)
