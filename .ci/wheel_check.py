"""Checks an installed wheel: the extension loads, its CPU ops agree with their references, named ops have CUDA kernels.

python wheel_check.py [OP ...]      each OP must be registered for CUDA; no GPU is needed to see that
"""

import sys

import torch

import dgi_kernels

status = dgi_kernels.backends()["native"]
assert status.available, status.reason
h, weight, scale = torch.randn(64, 32), torch.randn(100, 32), torch.tensor(30.0)
target = torch.randint(100, (64,))
for call in (
    lambda backend: dgi_kernels.cosine_cross_entropy(h, weight, target, scale, backend=backend),
    lambda backend: dgi_kernels.gumbel_softmax(h, 0.5, seed=1, backend=backend),
    lambda backend: dgi_kernels.residual_quantize(h, [weight, weight], scale, 0.5, seed=1, backend=backend).quantized,
):
    native, reference = call("native"), call("reference")
    assert (native - reference).norm() <= 1e-4 * reference.norm(), (native, reference)
trie = dgi_kernels.Trie.from_codes(torch.randint(8, (100, 3)), codebook_sizes=(8, 8, 8))
logits, beams = torch.randn(2, 1, 8), trie.root(2)
native, reference = (
    dgi_kernels.beam_step(trie, logits, beams, num_beams=5, backend=backend) for backend in ("native", "reference")
)
assert torch.equal(native.nodes, reference.nodes)

for op in sys.argv[1:]:
    registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"dgi_kernels::{op}", "CUDA")
    assert registered, f"{op} has no CUDA kernel in {dgi_kernels.__file__}"
print(
    f"dgi-kernels {dgi_kernels.__version__}, Python {sys.version.split()[0]}, torch {torch.__version__}: "
    f"the extension loads, its ops agree with the reference; with CUDA: {', '.join(sys.argv[1:]) or '-'}"
)
