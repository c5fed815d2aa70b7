"""vector-quantize-pytorch: a Euclidean ``ResidualVQ`` in evaluation mode."""

from __future__ import annotations

from pathlib import Path

from dropins import Change, DropIn, Outputs, Steps, common


def steps(data: Path | None) -> Steps:
    import torch
    from vector_quantize_pytorch.residual_vq import ResidualVQ

    inputs = common.vectors(data)
    torch.manual_seed(0)
    model = ResidualVQ(dim=inputs.shape[1], num_quantizers=3, codebook_size=1024).eval()
    tables = [torch.nn.Embedding(1024, inputs.shape[1]) for _ in model.layers]
    common.fill_codebooks(tables, inputs)
    for layer, table in zip(model.layers, tables, strict=True):
        layer._codebook.embed.data.copy_(table.weight[None])
    batch = inputs[: len(inputs) // 120 * 120].view(-1, 120, inputs.shape[1])

    @torch.no_grad()
    def forward() -> Outputs:
        quantized, codes, losses = model(batch)
        return {"quantized": quantized, "codes": codes, "losses": losses}

    return {"forward": forward}


DROPIN = DropIn(
    title="forward of a ResidualVQ, 3 x 1024 codes, D = 384",
    kind="quantizer step",
    source="pypi:vector-quantize-pytorch==1.32.0",
    commit="",
    data=common.VECTORS,
    packages=("einx", "einops", "loguru"),
    changes=(
        Change("vector_quantize_pytorch/residual_vq.py", "import random\n", "import random\nimport dgi_kernels\n"),
        Change(
            "vector_quantize_pytorch/residual_vq.py",
            "        all_losses = torch.empty((0,), device = device, dtype = torch.float32)\n",
            "        codes = None if self.training else "
            'dgi_kernels.assign_codes(x, list(self.codebooks), metric="euclidean")\n'
            "        if codes is not None: return self.get_output_from_indices(codes), codes, x.new_zeros(num_quant)\n"
            "        all_losses = torch.empty((0,), device = device, dtype = torch.float32)\n",
        ),
    ),
    steps=steps,
    tolerance={"quantized": 1e-6},
)
