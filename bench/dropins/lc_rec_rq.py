"""LC-Rec: codes of all items from its RQ-VAE (index/generate_indices.py calls ``get_indices``)."""

from __future__ import annotations

from pathlib import Path

import torch

from dropins import Change, DropIn, Steps, common


def steps(data: Path | None) -> Steps:
    from index.models.rqvae import RQVAE

    inputs = common.vectors(data)
    torch.manual_seed(0)
    sizes, layers = [256, 256, 256, 256], [512, 256, 128, 64]
    model = RQVAE(inputs.shape[1], sizes, e_dim=32, layers=layers, sk_epsilons=[0.0] * 4).eval()
    return common.get_indices_steps(model, inputs, model.get_indices)


DROPIN = DropIn(
    title="codes of a catalog by a Euclidean RQ-VAE, 4 x 256 codes, D = 32",
    kind="assignment",
    source="https://github.com/RUCAIBox/LC-Rec",
    commit="e6f1b3b3f8b4fee55a49a7b3dfeba29dbfcf0669",
    data=common.VECTORS,
    packages=("sklearn",),
    paths=("index",),
    changes=(
        Change("index/models/rqvae.py", "import numpy as np\n", "import numpy as np\nimport dgi_kernels\n"),
        Change(
            "index/models/rqvae.py",
            "        _, _, indices = self.rq(x_e, use_sk=use_sk)\n        return indices\n",
            '        return dgi_kernels.assign_codes(x_e, list(self.rq.get_codebook()), metric="euclidean")\n',
        ),
    ),
    steps=steps,
)
