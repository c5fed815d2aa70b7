"""semantic-id: ``RQKMeans.encode``, the codes of a catalog by residual K-means."""

from __future__ import annotations

from pathlib import Path

from dropins import Change, DropIn, Outputs, Steps, common


def steps(data: Path | None) -> Steps:
    import torch
    from semantic_id.algorithms.rq_kmeans_torch import RQKMeansTorch

    inputs = common.vectors(data)
    torch.manual_seed(0)
    model = RQKMeansTorch(3, [256] * 3, "l2", "kmeans", 5, 1e-4, 0, False, "cpu")
    tables = [torch.nn.Embedding(256, inputs.shape[1]) for _ in range(3)]
    common.fill_codebooks(tables, inputs)
    model.codebooks_ = [table.weight.detach() for table in tables]

    def encode() -> Outputs:
        return {"codes": torch.from_numpy(model.encode(inputs, batch_size=4096))}

    return {"encode": encode}


DROPIN = DropIn(
    title="codes of a catalog by residual K-means, 3 x 256 codes, D = 384",
    kind="assignment",
    source="pypi:semantic-id==0.2.5",
    commit="",
    data=common.VECTORS,
    packages=("sklearn",),
    changes=(
        Change("semantic_id/algorithms/rq_kmeans_torch.py", "import torch\n", "import torch\nimport dgi_kernels\n"),
        Change(
            "semantic_id/algorithms/rq_kmeans_torch.py",
            "            residuals = batch_X.clone()  # We modify residuals\n",
            "            codes[start_idx:end_idx] = dgi_kernels.assign_codes("
            'batch_X, self.codebooks_, metric="euclidean").cpu()\n'
            "            continue\n",
        ),
    ),
    steps=steps,
)
