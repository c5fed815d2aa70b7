"""What the tests of residual quantization share: inputs, and a float64 oracle, level by level."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dgi_kernels import ResidualQuantization, gumbel_noise, residual_quantize

from .near import ROUNDING, assert_all_near, gradients
from .shapes import Quantize

GRADIENT_MODES = ("soft", "straight_through")


class Inputs(NamedTuple):
    z: Tensor
    codebooks: list[Tensor]
    scale: Tensor
    tau: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [self.z, *self.codebooks, self.scale, self.tau]


def make(shape: Quantize, dtype: torch.dtype = torch.float64) -> Inputs:
    def vectors(rows: int) -> Tensor:  # norms that are neither tiny nor huge keep the gradients' condition in hand
        unit = F.normalize(torch.randn(rows, shape.d, dtype=torch.float64), dim=-1)
        return (unit * torch.empty(rows, 1, dtype=torch.float64).uniform_(0.5, 2)).to(dtype).requires_grad_()

    scale, tau = (
        torch.tensor(random.uniform(low, 6), dtype=torch.float64).to(dtype).requires_grad_() for low in (2, 1)
    )
    return Inputs(vectors(shape.n), [vectors(k) for k in shape.sizes], scale, tau)


def peaked(n: int, d: int, sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Inputs:
    """Like a trained quantizer: codes in families of neighbours at cosine 0.8, rows near a path of codes."""
    codebooks, z = [], torch.zeros(n, d)
    for level, size in enumerate(sizes):
        centre = F.normalize(torch.randn(-(-size // 8), d), dim=-1).repeat_interleave(8, 0)[:size]
        codebook = 0.5**level * F.normalize(0.8 * centre + 0.6 * F.normalize(torch.randn(size, d), dim=-1), dim=-1)
        codebooks.append(codebook.to(dtype).requires_grad_())
        z += codebook[torch.randint(size, (n,))]
    z = z + 0.02 * torch.randn(n, d)
    return Inputs(z.detach().to(dtype).requires_grad_(), codebooks, torch.tensor(30.0), torch.tensor(1.0))


def scores(metric: str, r: Tensor, codebook: Tensor, scale: Tensor, eps: float = 1e-12) -> Tensor:
    if metric == "cosine":
        r, codebook = F.normalize(r, dim=-1, eps=eps), F.normalize(codebook, dim=-1, eps=eps)
    if metric == "euclidean":
        return -scale * (r.unsqueeze(1) - codebook).square().sum(-1)
    return scale * (r @ codebook.T)


def oracle(
    inputs: Inputs,
    mode: str,
    seed: int | Tensor | None,
    result: ResidualQuantization,
    row_offset: int = 0,
    eps: float = 1e-12,
    metric: str = "cosine",
    *,
    sigma: Tensor | None = None,
    values: list[Tensor] | None = None,
    padding: Tensor | None = None,
) -> ResidualQuantization:
    """docs/method.md in float64, one level after the other, with an explicit one-hot where the mode has one.

    The one-hot follows the codes of ``result``, which must be as good as the best: at a near-tie rounding decides.
    ``sigma`` (N,) multiplies the noise; ``padding`` (N,) is left out of the usage alone.
    """
    # Products of 16-bit vectors on a GPU are rounded as their factors are.
    near_tie = max(1e-4, ROUNDING[result.quantized.dtype] * inputs.scale.abs().max().item() * result.codes.is_cuda)
    residual, scale, tau = inputs.z.double(), inputs.scale.double(), inputs.tau.double()
    columns: list[list[Tensor]] = [[] for _ in range(7)]
    counted = residual.new_ones(len(residual)) if padding is None else (~padding).double()
    counted = counted / counted.sum().clamp(min=1)
    for level, codebook in enumerate(codebook.double() for codebook in inputs.codebooks):
        s = scores(metric, residual, codebook, scale, eps)
        g = torch.zeros_like(s)
        if seed is not None:
            g = gumbel_noise(
                seed, level, *s.shape, row_offset=row_offset, device=s.device, backend="reference"
            ).double()
        if sigma is not None:
            g = sigma.double().unsqueeze(1) * g
        p = ((s + g) / tau).softmax(-1)
        codes, sampled = result.codes[:, level], result.sampled[:, level]
        for name, seen, chosen in (("codes", s, codes), ("sampled", s + g, sampled)):
            lost = seen.amax(1) - seen.gather(1, chosen.unsqueeze(1)).squeeze(1)
            assert (lost <= near_tie).all(), f"{name} of level {level} are worse than the best by {lost.max():.3g}"
        one_hot = F.one_hot(codes if mode == "hard" else sampled, len(codebook)).double()
        assignment = {"soft": p, "straight_through": one_hot + p - p.detach(), "hard": one_hot}[mode]
        quantized = assignment @ codebook
        usage = counted @ (one_hot if mode == "hard" else p)
        normalizer = ((s + g) / tau).exp().sum(-1).log()
        mixture = assignment @ (codebook if values is None else values[level].double())
        found = (quantized, codes, sampled, usage, residual, normalizer, mixture)
        for column, value in zip(columns, found, strict=True):
            column.append(value)
        residual = residual - quantized
    result = ResidualQuantization(*(c if i == 3 else torch.stack(c, 1) for i, c in enumerate(columns)))
    return result if values is not None else result._replace(mixtures=None)


def differentiable(result: ResidualQuantization) -> list[Tensor]:
    mixtures = [] if result.mixtures is None else [result.mixtures]
    return [result.quantized, *result.usage, result.residuals, result.log_normalizer, *mixtures]


def result_names(inputs: Inputs) -> list[str]:
    """Of :func:`differentiable`."""
    usage = [f"usage[{level}]" for level in range(len(inputs.codebooks))]
    return ["quantized", *usage, "residuals", "log_normalizer"]


def gradient_names(inputs: Inputs) -> list[str]:
    """Of the gradients of ``inputs.leaves``."""
    return [
        f"gradient of {name}"
        for name in ("z", *(f"codebooks[{level}]" for level in range(len(inputs.codebooks))), "scale", "tau")
    ]


def largest_norm(tensors: list[Tensor]) -> float:
    """What gradients that cancel to nothing are judged by: they are rounded as what they are summed from."""
    return max(x.norm().item() for x in tensors)


def weighted_sum(tensors: list[Tensor], weights: list[Tensor]) -> Tensor:
    return sum(((t.double() * w).sum() for t, w in zip(tensors, weights, strict=True)), torch.tensor(0.0))


def assert_matches_oracle(
    inputs: Inputs,
    mode: str,
    seed: int | None,
    with_tau: bool = True,
    *,
    metric: str = "cosine",
    backend: str = "native",
) -> None:
    """Results and all gradients of a backend. Those of scale and tau are sums that cancel: rounded as what rows add."""
    row_offset = random.randrange(2**31)
    tau = inputs.tau if with_tau else float(inputs.tau.detach())
    result, usual = (
        residual_quantize(
            inputs.z,
            inputs.codebooks,
            inputs.scale,
            tau,
            mode=mode,
            metric=metric,
            noise=seed is not None,
            seed=seed,
            row_offset=row_offset,
            backend=name,
        )
        for name in (backend, "reference")
    )
    expanded = Inputs(
        inputs.z,
        inputs.codebooks,
        *(scalar.detach().expand(len(inputs.z), 1).clone().requires_grad_() for scalar in (inputs.scale, inputs.tau)),
    )
    truth = oracle(expanded, mode, seed, result, row_offset, metric=metric)
    # At a near-tie the reference goes another way; a soft path does not follow the codes.
    comparable = mode == "soft" or torch.equal(result.codes, usual.codes) and torch.equal(result.sampled, usual.sampled)
    results, truths, theirs = map(differentiable, (result, truth, usual))
    assert all(actual.dtype == inputs.z.dtype for actual in results)
    assert_all_near(result_names(inputs), results, truths, theirs if comparable else None)
    if mode == "hard":
        return
    weights = [torch.randn_like(expected) for expected in truths]
    leaves = inputs.leaves if with_tau else inputs.leaves[:-1]
    ours, own = (gradients(weighted_sum(c, weights), leaves) for c in (results, theirs))
    wanted = gradients(weighted_sum(truths, weights), expanded.leaves[: len(leaves)])
    # A softmax carries the rounding of its logits, of which float32 keeps a share of their size.
    condition = max(1.0, float(inputs.scale.detach() / inputs.tau.detach()) / 32)
    sizes = [
        condition * (x.abs().sum() if gradient.ndim == 0 else x.norm()).clamp_min(1e-2).item()
        for x, gradient in zip(wanted, ours, strict=True)
    ]
    wanted = [x.sum() if gradient.ndim == 0 else x for x, gradient in zip(wanted, ours, strict=True)]
    assert_all_near(
        gradient_names(inputs)[: len(leaves)],
        ours,
        wanted,
        own if comparable else None,
        dtype=inputs.z.dtype,
        sizes=sizes,
    )
