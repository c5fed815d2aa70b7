"""OpenOneRec: codes of all items from its residual K-means (tokenizer/infer_res_kmeans.py calls ``encode``)."""

from __future__ import annotations

from pathlib import Path

import torch

from dropins import Change, DropIn, Steps, common


def steps(data: Path | None) -> Steps:
    from tokenizer.res_kmeans import ResKmeans

    inputs = common.vectors(data)
    torch.manual_seed(0)
    model = ResKmeans(n_layers=3, codebook_size=2048, dim=inputs.shape[1])
    tables = [torch.nn.Embedding(2048, inputs.shape[1], _weight=centroids.data) for centroids in model.centroids]
    common.fill_codebooks(tables, inputs)
    return {"encode": lambda: {"codes": torch.cat([model.encode(batch) for batch in inputs.split(10_000)])}}


DROPIN = DropIn(
    title="codes of a catalog by residual K-means, 3 x 2048 codes, D = 384",
    kind="assignment",
    source="https://github.com/Kuaishou-OneRec/OpenOneRec",
    commit="1f4a99ea4708254c7236bb8a306fdfc82ecd0758",
    data=common.VECTORS,
    packages=(),
    paths=("tokenizer",),
    changes=(
        Change("tokenizer/res_kmeans.py", "import torch\n", "import torch\nimport dgi_kernels\n"),
        Change(
            "tokenizer/res_kmeans.py",
            "        out = []\n",
            '        return dgi_kernels.assign_codes(x, list(self.centroids)[:n_layers], metric="euclidean")\n',
        ),
    ),
    steps=steps,
)
