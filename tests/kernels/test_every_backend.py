"""Every op on every backend, device and dtype against the reference in float64, values and gradients.

What a backend does not have on a device is skipped with its reason, so that a kernel is tested here the moment that
``dgi_kernels.backend`` names it.  ``bench/gpu.sh`` runs the CUDA half under compute-sanitizer too.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dgi_kernels import (
    DecoderLayer,
    EncoderLayer,
    Trie,
    assign_codes,
    attention,
    backend,
    balanced_codes,
    beam_search,
    beam_step,
    cosine_beam_step,
    cosine_cross_entropy,
    cosine_logits,
    decoder_step,
    dropout,
    encoder_layers,
    gumbel_noise,
    gumbel_softmax,
    kmeans,
    log_normalizer,
    noise,
    rank_candidates,
    residual_kmeans,
    residual_quantize,
    unique_codes,
)

from .near import ROUNDING, assert_all_near
from .shapes import name_of

BACKENDS = ("reference", "triton", "native")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)
Call = Callable[..., tuple[Tensor, ...]]


def lengths(rows: int, dim: int) -> Tensor:
    return torch.randn(rows, dim) * torch.empty(rows, 1).uniform_(0.5, 2)


def cosine_inputs() -> tuple[Tensor, Tensor, Tensor]:
    dim = random.choice([8, 17, 64, 100])
    return lengths(random.randint(1, 130), dim), lengths(random.randint(2, 300), dim), torch.tensor(20.0)


def logits_case() -> tuple[Call, tuple[Tensor, ...]]:
    return lambda h, weight, scale, backend: (cosine_logits(h, weight, scale, backend=backend),), cosine_inputs()


def cross_entropy_case() -> tuple[Call, tuple[Tensor, ...]]:
    h, weight, scale = cosine_inputs()
    target = torch.randint(len(weight), (len(h),))
    target[0] = 0
    reduction, smoothing = random.choice(["mean", "sum"]), random.choice([0.0, 0.1])

    def call(h: Tensor, weight: Tensor, scale: Tensor, backend: str) -> tuple[Tensor, ...]:
        return (
            cosine_cross_entropy(
                h, weight, target.to(h.device), scale, reduction=reduction, label_smoothing=smoothing, backend=backend
            ),
        )

    return call, (h, weight, scale)


def softmax_case() -> tuple[Call, tuple[Tensor, ...]]:
    seed = random.randrange(2**62)
    logits = torch.randn(random.randint(1, 70), random.choice([1, 33, 256, 1000, 5000]))
    return lambda logits, backend: (gumbel_softmax(logits, 0.7, seed=seed, backend=backend),), (logits,)


def quantize_case() -> tuple[Call, tuple[Tensor, ...]]:
    seed, dim = random.randrange(2**62), random.choice([8, 17, 64])
    z, *codebooks = (lengths(rows, dim) for rows in (random.randint(1, 130), 130, 65))

    def call(z: Tensor, first: Tensor, second: Tensor, scale: Tensor, backend: str) -> tuple[Tensor, ...]:
        result = residual_quantize(z, [first, second], scale, 0.8, seed=seed, backend=backend)
        return (result.quantized, *result.usage, result.log_normalizer)

    return call, (z, *codebooks, torch.tensor(8.0))


def quantize_options_case() -> tuple[Call, tuple[Tensor, ...]]:
    """By distance, with values, a scale of the noise, rows without noise, padding and leading dimensions."""
    seed, rows, width = random.randrange(2**62), random.randint(2, 40), random.choice([3, 16])
    z, *codebooks = (lengths(size, 12) for size in (3 * rows, 70, 33))
    values = [torch.randn(len(codebook), width) for codebook in codebooks]
    noisy, padding = torch.rand(3, rows) < 0.7, torch.rand(3, rows) < 0.2

    def call(z: Tensor, first: Tensor, second: Tensor, *others: Tensor, backend: str) -> tuple[Tensor, ...]:
        *values, scale, sigma = others
        result = residual_quantize(
            z.view(3, rows, 12),
            [first, second],
            scale,
            0.8,
            metric="euclidean",
            values=values,
            noise_scale=sigma,
            noise_rows=noisy.to(z.device),
            mask=padding.to(z.device),
            seed=seed,
            backend=backend,
        )
        return (result.quantized, *result.usage, result.log_normalizer, result.mixtures)

    return call, (z, *codebooks, *values, torch.tensor(0.3), torch.tensor(0.6))


def dropout_case() -> tuple[Call, tuple[Tensor, ...]]:
    seed, p, shape = random.randrange(2**62), random.choice([0.0, 0.3]), (random.randint(1, 70), random.choice([1, 33]))

    def call(x: Tensor, residual: Tensor, backend: str) -> tuple[Tensor, ...]:
        return (dropout(x, p, residual=residual, seed=seed, backend=backend),)

    return call, (torch.randn(shape), torch.randn(shape))


def attention_case() -> tuple[Call, tuple[Tensor, ...]]:
    seed, causal, slots = random.randrange(2**62), random.random() < 0.5, random.choice([1, 9, 33])
    mask = torch.rand(3, slots) < 0.7

    def call(queries: Tensor, keys_values: Tensor, backend: str) -> tuple[Tensor, ...]:
        own = mask.to(queries.device)
        return (attention(queries, keys_values, heads=4, mask=own, causal=causal, p=0.2, seed=seed, backend=backend),)

    return call, (torch.randn(3, random.randint(1, 20), 16), torch.randn(3, slots, 32))


DIFFERENTIABLE = {
    "attention": attention_case,
    "dropout": dropout_case,
    "cosine_logits": logits_case,
    "cosine_cross_entropy": cross_entropy_case,
    "gumbel_softmax": softmax_case,
    "residual_quantize": quantize_case,
    "residual_quantize, options": quantize_options_case,
}


def skip_without(op: str, name: str, device: str, dtype: torch.dtype | None = None) -> None:
    problem = backend.why_not(op, name, torch.device(device), dtype)
    if problem is not None:
        pytest.skip(problem)


def results(call: Call, inputs: tuple[Tensor, ...], upstream: list[Tensor] | None, name: str) -> list[Tensor]:
    """Outputs and, if ``upstream`` has their gradients, those of the inputs, all in float64 on the CPU."""
    leaves = [value.detach().clone().requires_grad_(upstream is not None) for value in inputs]
    outputs = call(*leaves, backend=name)
    found = list(outputs)
    if upstream is not None:
        total = sum((out.double() * up.to(out.device)).sum() for out, up in zip(outputs, upstream, strict=True))
        found += torch.autograd.grad(total, leaves)
    return [value.detach().double().cpu() for value in found]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_values_and_gradients(op: str, name: str, device: str, dtype: torch.dtype) -> None:
    skip_without(op.split(",")[0], name, device, dtype)
    for _ in range(2):
        call, inputs = DIFFERENTIABLE[op]()
        given = [value.to(dtype) if value.dim() else value for value in inputs]  # the scale stays float32
        exact = tuple(value.double() for value in given)
        upstream = [torch.randn_like(value) for value in call(*exact, backend="reference")]
        expected, usual = (results(call, values, upstream, "reference") for values in (exact, tuple(given)))
        actual = results(call, tuple(value.to(device) for value in given), upstream, name)
        outputs = len(upstream)
        names = [f"output {i}" if i < outputs else f"gradient of input {i - outputs}" for i in range(len(expected))]
        # A sum that cancels (the scale's gradient) is judged by what a row contributes to it.
        sizes = [1 + upstream[0].norm().item() if want.numel() == 1 else 0.0 for want in expected]
        assert_all_near(names, actual, expected, usual, dtype=dtype, sizes=sizes)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", BACKENDS)
def test_hard_and_straight_through_codes(name: str, device: str) -> None:
    """Every emitted row is a row of its codebook, the one that its code names."""
    skip_without("residual_quantize", name, device, torch.float32)
    z, codebooks = lengths(90, 32).to(device), [lengths(size, 32).to(device) for size in (64, 33)]
    for mode in ("hard", "straight_through"):
        result = residual_quantize(z, codebooks, 10.0, 0.5, mode=mode, noise=mode != "hard", seed=3, backend=name)
        codes = result.codes if mode == "hard" else result.sampled
        for level, codebook in enumerate(codebooks):
            assert torch.equal(result.quantized[:, level], codebook[codes[:, level]])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
def test_codes(metric: str, name: str, device: str, dtype: torch.dtype) -> None:
    """Assigned codes cost no more than rounding makes of the least cost, in float64."""
    skip_without("assign_codes", name, device, dtype)
    z, codebook = lengths(150, 24).to(dtype), lengths(70, 24).to(dtype)
    codes = assign_codes(z.to(device), [codebook.to(device)], metric=metric, backend=name).cpu()
    x, e = z.double(), codebook.double()
    if metric == "cosine":
        x, e = torch.nn.functional.normalize(x, dim=1), torch.nn.functional.normalize(e, dim=1)
    costs = torch.cdist(x, e).square() if metric == "euclidean" else -(x @ e.T)
    lost = costs.gather(1, codes)[:, 0] - costs.amin(1)
    assert (lost <= 1e-5 * costs.abs().amax(1) * (100 if dtype != torch.float32 and device != "cpu" else 1)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", BACKENDS)
def test_clusters(name: str, device: str, dtype: torch.dtype) -> None:
    """From equal centroids the rounds are those of the reference in float64; the same call gives the same bits."""
    skip_without("kmeans", name, device, dtype)
    centres = 8 * torch.randn(9, 6)
    x, weights = (centres.repeat(20, 1) + 0.3 * torch.randn(180, 6)).to(dtype), torch.rand(180)
    start = x[:9].clone()
    want = kmeans(x.double(), 9, init=start.double(), weights=weights, iterations=4, backend="reference")
    given = {"init": start.to(device), "weights": weights.to(device), "iterations": 4, "backend": name}
    got = kmeans(x.to(device), 9, **given)
    assert torch.equal(got.codes.cpu(), want.codes)
    torch.testing.assert_close(got.centroids.double().cpu(), want.centroids, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.inertia.double().cpu(), want.inertia, rtol=1e-4, atol=0.0)
    assert torch.equal(kmeans(x.to(device), 9, **given).centroids, got.centroids)
    codebooks, codes = residual_kmeans(x.to(device), [9, 4], seed=3, iterations=4, backend=name)
    assert torch.equal(codes, assign_codes(x.to(device, codebooks[0].dtype), codebooks, metric="euclidean"))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", BACKENDS)
def test_balanced_and_unique_codes(name: str, device: str) -> None:
    z, codebooks = lengths(90, 8), [lengths(10, 8), lengths(12, 8)]
    if backend.why_not("balanced_codes", name, torch.device(device), torch.float32) is None:
        got = balanced_codes(z.to(device), codebooks[0].to(device), epsilon=0.05, backend=name).cpu()
        want = balanced_codes(z.double(), codebooks[0].double(), epsilon=0.05, backend="reference")
        assert (got != want).sum() <= 1, "more than one near-tie"
    skip_without("unique_codes", name, device, torch.float32)
    codes = assign_codes(z, codebooks, metric="euclidean")
    got = unique_codes(
        codes.to(device), z.to(device), [c.to(device) for c in codebooks], metric="euclidean", backend=name
    )
    want = unique_codes(codes, z, codebooks, metric="euclidean", backend="reference")
    assert torch.equal(got.cpu(), want) and len(got.unique(dim=0)) == 90 > len(codes.unique(dim=0))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", BACKENDS)
def test_noise(name: str, device: str) -> None:
    skip_without("gumbel_noise", name, device)
    seed, rows, codes = random.randrange(2**62), random.randint(1, 100), random.choice([1, 33, 512, 4099])
    got = gumbel_noise(seed, 2, rows, codes, device=device, backend=name, row_offset=7)
    words = noise.random_words(torch.tensor([seed]), 2, rows, codes, 0, row_offset=7)
    exact = -(-torch.log1p(-(words.double() + 0.5) * 2.0**-32)).log()
    torch.testing.assert_close(got.double().cpu(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", BACKENDS)
def test_log_normalizer(name: str, device: str, dtype: torch.dtype) -> None:
    skip_without("log_normalizer", name, device, dtype)
    logits = (10 * torch.randn(3, random.choice([1, 33, 2049]))).to(dtype)
    logits[torch.rand(logits.shape) < 0.1] = -torch.inf
    logits[:, 0] = 1.0
    got = log_normalizer(logits.to(device), backend=name)
    assert got.dtype == torch.float32
    assert_all_near(["log_normalizer"], [got], [logits.double().logsumexp(-1)])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", BACKENDS)
def test_decoder_step(name: str, device: str, dtype: torch.dtype) -> None:
    """A position behind another, of beams that continue any of those before."""
    skip_without("decoder_step", name, device, dtype)
    dim, beams, slots = 8, random.choice([1, 17, 40]), random.choice([1, 12])

    def pair(*shape: int) -> tuple[Tensor, Tensor]:
        return torch.randn(shape) / shape[-1] ** 0.5, torch.randn(shape[0])

    norm, square = pair(dim), pair(dim, dim)
    layer = DecoderLayer(norm, pair(3 * dim, dim), square, norm, square, square, norm, pair(20, dim), pair(dim, 20))
    floats = [torch.randn(2, beams, dim), torch.randn(2, slots, 2 * dim), torch.randn(1, 2, 3, 2 * dim)]
    mask, ancestors = torch.rand(2, slots) < 0.8, torch.randint(3, (2, beams))

    def step(name: str, device: str, *dtypes: torch.dtype) -> tuple[Tensor, Tensor]:
        def cast(x: Tensor) -> Tensor:
            for dtype in dtypes:
                x = x.to(dtype)
            return x.to(device)

        states, memory, past = map(cast, floats)
        own = DecoderLayer(*((cast(weight), cast(bias)) for weight, bias in layer))
        places = ancestors.to(device)
        return decoder_step(states, [own], [memory], mask.to(device), [past], [places], heads=2, backend=name)

    want, usual = step("reference", "cpu", dtype, torch.float64), step("reference", "cpu", dtype)
    assert_all_near(["states", "keys and values"], step(name, device, dtype), want, usual)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", BACKENDS)
def test_encoder_layers(name: str, device: str, dtype: torch.dtype) -> None:
    skip_without("encoder_layers", name, device, dtype)
    dim, length = 8, random.choice([1, 11, 40])

    def pair(*shape: int) -> tuple[Tensor, Tensor]:
        return torch.randn(shape) / shape[-1] ** 0.5, torch.randn(shape[0])

    layer = EncoderLayer(pair(dim), pair(3 * dim, dim), pair(dim, dim), pair(dim), pair(20, dim), pair(dim, 20))
    states, mask = torch.randn(3, length, dim), torch.rand(3, length) < 0.8

    def run(name: str, device: str, *dtypes: torch.dtype) -> Tensor:
        def cast(x: Tensor) -> Tensor:
            for dtype in dtypes:
                x = x.to(dtype)
            return x.to(device)

        own = EncoderLayer(*((cast(weight), cast(bias)) for weight, bias in layer))
        return encoder_layers(cast(states), [own], mask.to(device), heads=2, backend=name)

    want, usual = run("reference", "cpu", dtype, torch.float64), run("reference", "cpu", dtype)
    assert_all_near(["states"], [run(name, device, dtype)], [want], [usual])


def catalog() -> tuple[Trie, int]:
    size, depth = random.choice([5, 64, 300]), 3
    return Trie.from_codes(torch.randint(size, (random.randint(1, 3000), depth)), codebook_sizes=[size] * depth), size


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("normalize", ["full", "children"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("op", ["beam_step", "cosine_beam_step"])
def test_search(op: str, weighted: bool, normalize: str, name: str, device: str, dtype: torch.dtype) -> None:
    """The same scores as the reference on the CPU, over the same filtered trie, with node scores or without."""
    skip_without(op, name, device, dtype)
    trie, size = catalog()
    weights = torch.rand(trie.num_items) + 0.01
    batch, beams, dim = random.randint(1, 4), random.choice([1, 7, 40]), 16
    keep = torch.rand(trie.num_items) < 0.5
    keep[0] = True
    codebooks = [lengths(size, dim).to(dtype) for _ in range(trie.depth)]
    # One state for all beams of a request: beams that rounding makes change places have the same next logits.
    hidden = [
        lengths(batch, dim).to(dtype).unsqueeze(1).expand(-1, beams if depth else 1, -1) for depth in range(trie.depth)
    ]

    def search(trie: Trie, name: str) -> object:
        state, options = trie.root(batch), {"filters": trie.filter(mask=keep.to(trie.device))}
        if weighted:
            options |= {
                "node_scores": trie.node_scores(weights),
                "strength": torch.linspace(-1, 2, batch).to(trie.device),
            }
        options |= {"num_beams": beams, "normalize": normalize, "backend": name}
        for h, codebook in zip(hidden, codebooks, strict=True):
            h, codebook = h.to(trie.device), codebook.to(trie.device)
            if op == "cosine_beam_step":
                state = cosine_beam_step(trie, h, codebook, 10.0, state, **options)
            else:
                logits = cosine_logits(h.double().cpu(), codebook.double().cpu(), 10.0).to(trie.device, dtype)
                state = beam_step(trie, logits, state, **options)
        return state

    got, want = search(trie.to(device), name), search(trie, "reference")
    tolerance = 1e-4 if op == "beam_step" or dtype == torch.float32 else 30 * ROUNDING[dtype]
    torch.testing.assert_close(got.scores.cpu(), want.scores, rtol=tolerance, atol=tolerance)
    assert torch.equal(got.nodes.cpu() < 0, want.nodes < 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", BACKENDS)
def test_ranking(name: str, device: str, dtype: torch.dtype) -> None:
    skip_without("rank_candidates", name, device, dtype)
    trie, size = catalog()
    query, vectors = lengths(3, 24).to(dtype), lengths(trie.num_items, 24).to(dtype)
    logits = torch.randn(trie.depth, 3, 1, size)

    def ranked(trie: Trie, name: str) -> object:
        beams = beam_search(
            trie,
            lambda depth, tokens, parents: logits[depth].to(trie.device),
            batch_size=3,
            num_beams=1,
            backend="reference",
        )
        return rank_candidates(query.to(trie.device), vectors.to(trie.device), trie, beams, 20, backend=name)

    got, want = ranked(trie.to(device), name), ranked(trie, "reference")
    assert torch.equal(got[0].cpu() < 0, want[0] < 0)
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=2 * ROUNDING[dtype], atol=2 * ROUNDING[dtype])
