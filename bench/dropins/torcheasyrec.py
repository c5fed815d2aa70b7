"""TorchEasyRec: ``get_codes`` of its residual quantizers, RQ-VAE and RQ-K-means alike."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import torch

from dropins import Change, DropIn, Outputs, Steps, common


def steps(data: Path | None) -> Steps:
    # Without what the rest of the package imports: torchrec, fbgemm, its own table formats.
    for name in ("tzrec", "tzrec.modules", "tzrec.utils", "tzrec.ops"):
        package = types.ModuleType(name)
        package.__path__ = [name.replace(".", "/")]
        sys.modules[name] = package
    sys.modules["tzrec.ops"].Kernel = type("Kernel", (), {})  # type: ignore[attr-defined]
    from tzrec.modules.sid.residual_vector_quantizer import ResidualVectorQuantizer

    inputs = common.vectors(data)
    torch.manual_seed(0)
    model = ResidualVectorQuantizer(inputs.shape[1], 3, n_embed=1024).eval()
    common.fill_codebooks([layer.embedding for layer in model.layers], inputs)

    def get_codes() -> Outputs:
        return {"codes": torch.cat([model.get_codes(batch) for batch in inputs.split(4096)])}

    return {"get_codes": get_codes}


DROPIN = DropIn(
    title="codes of a catalog by residual quantization, 3 x 1024 codes, D = 384",
    kind="assignment",
    source="https://github.com/alibaba/TorchEasyRec",
    commit="54cac3165a2adece9a932616463a5b6a2095b0ce",
    data=common.VECTORS,
    packages=(),
    paths=("tzrec/modules", "tzrec/utils"),
    changes=(
        Change("tzrec/modules/sid/residual_quantizer.py", "import torch\n", "import torch\nimport dgi_kernels\n"),
        Change(
            "tzrec/modules/sid/residual_quantizer.py",
            "        return self._residual_pass(input).cluster_ids\n",
            "        codebooks = [self.get_codebook_embeddings(i) for i in range(self.n_layers)]\n"
            '        return dgi_kernels.assign_codes(input, codebooks, metric="euclidean")\n',
        ),
    ),
    steps=steps,
)
