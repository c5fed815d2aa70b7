"""torch.compile(fullgraph=True) over the ops: the same numbers, gradients and errors as without.

Most cases run on ``aot_eager``, which traces all that Inductor does, forward and backward, and leaves out only the code
generation; one graph of all ops goes through Inductor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from dgi_kernels import (
    DecoderLayer,
    EncoderLayer,
    Trie,
    assign_codes,
    balanced_codes,
    beam_step,
    cosine_cross_entropy,
    cosine_logits,
    decoder_step,
    encoder_layers,
    gumbel_noise,
    gumbel_softmax,
    log_normalizer,
    residual_quantize,
    unique_codes,
)


@pytest.fixture(autouse=True)
def fresh_cache() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., object], backend: str = "aot_eager") -> Callable[..., object]:
    return torch.compile(function, fullgraph=True, backend=backend)


def cosine_ops(h: Tensor, weight: Tensor, scale: float | Tensor, target: Tensor) -> tuple[Tensor, ...]:
    return (
        cosine_logits(h, weight, scale),
        cosine_cross_entropy(h, weight, target, scale, label_smoothing=0.1),
        cosine_cross_entropy(h, weight, target, scale, reduction="none"),
    )


def quantize(
    z: Tensor,
    codebooks: Sequence[Tensor],
    scale: float | Tensor,
    tau: float | Tensor,
    seed: int | Tensor,
    mode: str,
    backend: str,
) -> tuple[Tensor, ...]:
    r = residual_quantize(z, codebooks, scale, tau, mode=mode, seed=seed, row_offset=3, backend=backend)
    return r.quantized, *r.usage, r.residuals, r.log_normalizer, r.codes, r.sampled


def softmax(logits: Tensor, tau: float | Tensor, seed: int | Tensor | None, hard: bool, backend: str) -> tuple[Tensor]:
    return (gumbel_softmax(logits, tau, hard, seed=seed, backend=backend),)


def scalars(kind: str, *values: float) -> list[float | Tensor]:
    return [torch.tensor(value, requires_grad=True) if kind == "tensor" else value for value in values]


def leaves(arguments: Sequence[object]) -> list[Tensor]:
    flat = [x for a in arguments for x in (a if isinstance(a, (list, tuple)) else [a])]
    return [x for x in flat if isinstance(x, Tensor) and x.requires_grad]


def gradients(outputs: Sequence[Tensor], arguments: Sequence[object]) -> list[Tensor | None]:
    loss = sum((o.square().sum() for o in outputs if o.requires_grad), torch.zeros(()))
    return list(torch.autograd.grad(loss, leaves(arguments), allow_unused=True)) if loss.requires_grad else []


def assert_same(
    function: Callable[..., Sequence[Tensor]],
    arguments: Sequence[object],
    compiled_function: Callable[..., Sequence[Tensor]],
) -> None:
    expected, actual = function(*arguments), compiled_function(*arguments)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(actual, arguments), gradients(expected, arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["float", "tensor"])
def test_cosine(kind: str) -> None:
    run = compiled(cosine_ops)
    for rows, value in ((6, 20.0), (9, 21.0)):
        (scale,) = scalars(kind, value)
        arguments = [
            torch.randn(rows, 4, requires_grad=True),
            torch.randn(7, 4, requires_grad=True),
            scale,
            torch.randint(7, (rows,)),
        ]
        assert_same(cosine_ops, arguments, run)


@pytest.mark.parametrize("kind", ["float", "tensor"])
@pytest.mark.parametrize("mode", ["soft", "straight_through", "hard"])
def test_residual_quantize(mode: str, kind: str) -> None:
    """One function for all calls: another seed, another temperature, another batch and another kind of seed."""
    run = compiled(quantize)
    codebooks = [torch.randn(size, 4, requires_grad=True) for size in (5, 3)]
    for rows, seed, tau in ((6, 1, 1.0), (6, 2, 0.9), (8, -3, 0.8), (8, torch.tensor(4), 0.7)):
        arguments = [torch.randn(rows, 4, requires_grad=True), codebooks, *scalars(kind, 9.0, tau), seed, mode, "auto"]
        assert_same(quantize, arguments, run)


@pytest.mark.parametrize("mode", ["soft", "straight_through", "rotation"])
def test_options_of_residual_quantize(mode: str) -> None:
    def run(
        z: Tensor, codebooks: Sequence[Tensor], values: Sequence[Tensor], sigma: Tensor, rows: Tensor
    ) -> list[Tensor]:
        r = residual_quantize(
            z, codebooks, 2.0, metric="euclidean", values=values, noise_scale=sigma, noise_rows=rows, mask=~rows,
            mode=mode, seed=1,
        )  # fmt: skip
        return [r.quantized, *r.usage, r.residuals, r.log_normalizer, r.mixtures, r.codes]

    codebooks, values = ([torch.randn(size, 4, requires_grad=True) for size in (5, 3)] for _ in range(2))
    compiled_run = compiled(run)
    for leading in ((6,), (2, 3)):
        rows, sigma = torch.rand(leading) < 0.6, torch.tensor(0.4, requires_grad=True)
        rows.view(-1)[0] = True
        arguments = [torch.randn(*leading, 4, requires_grad=True), codebooks, values, sigma, rows]
        assert_same(run, arguments, compiled_run)


def test_codes_without_gradients() -> None:
    def run(z: Tensor, codebooks: Sequence[Tensor]) -> tuple[Tensor, ...]:
        codes = assign_codes(z, codebooks, metric="euclidean")
        return codes, balanced_codes(z, codebooks[0], epsilon=0.1), unique_codes(codes, z, codebooks)

    compiled_run = compiled(run)
    for rows in (9, 14):
        arguments = [torch.randn(rows, 4), [torch.randn(5, 4), torch.randn(3, 4)]]
        assert_same(run, arguments, compiled_run)


@pytest.mark.parametrize("mode", ["soft", "straight_through", "hard"])
def test_residual_quantize_traces_the_reference_of_the_noise(mode: str) -> None:
    codebooks = [torch.randn(5, 4, requires_grad=True)]
    arguments = [torch.randn(6, 4, requires_grad=True), codebooks, 9.0, 0.8, torch.tensor([-3]), mode, "reference"]
    assert_same(quantize, arguments, compiled(quantize))


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gumbel_softmax(backend: str, hard: bool) -> None:
    arguments = [torch.randn(6, 2, 5, requires_grad=True), *scalars("tensor", 0.8), 4, hard, backend]
    assert_same(softmax, arguments, compiled(softmax))


@pytest.mark.parametrize("seed", [2**64 - 1, 2**63, -(2**63)])
def test_seeds_at_the_ends_of_their_range(seed: int) -> None:
    torch.testing.assert_close(compiled(gumbel_noise)(seed, 0, 3, 4), gumbel_noise(seed, 0, 3, 4))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_no_seed_is_a_new_draw_at_every_call(backend: str) -> None:
    """Guards against a seed that is drawn while tracing and then baked into the graph."""
    run = compiled(softmax)
    logits = torch.randn(6, 5)
    first, second = (run(logits, 1.0, None, False, backend)[0] for _ in range(2))
    assert not torch.equal(first, second)
    torch.testing.assert_close(first.sum(-1), torch.ones(6))


def test_backward_sees_the_noise_of_forward() -> None:
    """Guards against a seed drawn again where backward recomputes: then the gradient belongs to another sample."""
    z, codebook = torch.randn(6, 4, requires_grad=True), torch.cat([torch.eye(4), torch.full((1, 4), -0.5)])

    def run(z: Tensor) -> tuple[Tensor, Tensor]:
        result = residual_quantize(z, [codebook], 9.0)
        return result.quantized, result.log_normalizer

    quantized, _ = compiled(run)(z)
    (gradient,) = torch.autograd.grad(quantized.sum(), z)
    # p from z~ = p E alone (5 codes in 4 dimensions, and sum p = 1), then the soft Jacobian by hand
    p = torch.linalg.solve(
        torch.cat([codebook.double().T, torch.ones(1, 5, dtype=torch.float64)]),
        torch.cat([quantized[:, 0].double(), torch.ones(6, 1, dtype=torch.float64)], 1).T,
    ).T
    dp = codebook.double().sum(1)
    ds = p * (dp - (p * dp).sum(1, keepdim=True))
    unit_z, unit_e = (torch.nn.functional.normalize(x.double(), dim=-1) for x in (z, codebook))
    radial = (ds * (unit_z @ unit_e.T)).sum(1, keepdim=True) * unit_z
    expected = 9.0 * (ds @ unit_e - radial) / z.double().norm(dim=1, keepdim=True)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())


def test_a_step_of_a_search() -> None:
    """An encoder, a decoder's position, the normalizer of a vocabulary, beams with node scores; the batch changes."""
    dim, codes = 4, 5
    trie = Trie.from_codes(torch.randint(codes, (20, 2)), codebook_sizes=[codes] * 2)
    scores = trie.node_scores(torch.rand(20) + 0.1)

    def pair(*shape: int) -> tuple[Tensor, Tensor]:
        return torch.randn(shape), torch.randn(shape[0])

    norm, square = pair(dim), pair(dim, dim)
    layer = DecoderLayer(norm, pair(3 * dim, dim), square, norm, square, square, norm, pair(6, dim), pair(dim, 6))
    read = EncoderLayer(norm, pair(3 * dim, dim), square, norm, pair(6, dim), pair(dim, 6))
    words = torch.randn(30, dim)

    def step(states: Tensor, memory: Tensor, mask: Tensor, strength: Tensor) -> tuple[Tensor, ...]:
        read_memory = encoder_layers(memory[..., :dim].contiguous(), [read], mask, heads=2)
        memory = torch.cat([read_memory, read_memory], -1)
        hidden, left = decoder_step(states, [layer], [memory], mask, heads=2)
        logits = hidden @ words.T
        options = {"log_normalizer": log_normalizer(logits), "node_scores": scores, "strength": strength}
        beams = beam_step(trie, logits[..., 7 : 7 + codes], trie.root(3), num_beams=4, **options)
        return hidden, left, *beams[:4]

    run = compiled(step)
    for slots in (3, 6):
        inputs = torch.randn(3, 1, dim), torch.randn(3, slots, 2 * dim), torch.rand(3, slots) < 0.8, torch.randn(3)
        for got, want in zip(run(*inputs), step(*inputs), strict=True):
            torch.testing.assert_close(got, want)


def test_autocast_and_no_grad() -> None:
    h, weight = (torch.randn(rows, 4, requires_grad=True) for rows in (6, 5))
    target = torch.arange(6) % 5

    def run(h: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            result = residual_quantize(h.bfloat16(), [weight], 9.0, seed=1)
            return *cosine_ops(h, weight, 9.0, target), result.quantized, gumbel_softmax(weight.bfloat16(), seed=1)

    assert_same(run, [h, weight], compiled(run))
    with torch.no_grad():
        assert_same(run, [h, weight], compiled(run))


def test_values_are_checked_when_the_compiled_code_runs() -> None:
    run = compiled(lambda h, weight, target, scale: cosine_cross_entropy(h, weight, target, scale))
    h, weight, target, scale = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 4, -100]), torch.tensor(9.0)
    torch.testing.assert_close(run(h, weight, target, scale), cosine_cross_entropy(h, weight, target, scale))
    with pytest.raises(ValueError, match="^target must"):
        run(h, weight, torch.tensor([0, 5, -100]), scale)
    with pytest.raises(ValueError, match="^scale must"):
        run(h, weight, target, torch.tensor(torch.nan))


@pytest.mark.slow
def test_all_ops_in_one_graph_through_inductor() -> None:
    def everything(z: Tensor, weight: Tensor, scale: Tensor, target: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        quantized = quantize(z, [weight], scale, 0.9, seed, "straight_through", "auto")
        return (*quantized, *cosine_ops(z, weight, scale, target), *softmax(z, 0.9, seed, False, "reference"))

    arguments = [
        torch.randn(6, 4, requires_grad=True),
        torch.randn(5, 4, requires_grad=True),
        torch.tensor(9.0, requires_grad=True),
        torch.arange(6) % 5,
        torch.tensor([3]),
    ]
    assert_same(everything, arguments, compiled(everything, "inductor"))


X, CODEBOOK, TARGET = torch.randn(6, 4), torch.randn(5, 4), torch.randint(5, (6,))
CHANGING: dict[str, Callable[[float], object]] = {  # of floats, and of the integers further down
    "tau of gumbel_softmax": lambda value: gumbel_softmax(X, value, seed=1),
    "tau of residual_quantize": lambda value: residual_quantize(X, [CODEBOOK], 20.0, value, seed=1).quantized,
    "scale of residual_quantize": lambda value: residual_quantize(X, [CODEBOOK], 20 * value, seed=1).quantized,
    "scale of cosine_logits": lambda value: cosine_logits(X, CODEBOOK, 30 * value),
    "scale of cosine_cross_entropy": lambda value: cosine_cross_entropy(X, CODEBOOK, TARGET, 30 * value),
    "row_offset": lambda value: residual_quantize(X, [CODEBOOK], 20.0, seed=1, row_offset=value).quantized,
    "seed": lambda value: gumbel_softmax(X, seed=value),
    "row_offset of the noise": lambda value: gumbel_noise(3, 0, 4, 5, row_offset=value),
}


@pytest.mark.parametrize("what", CHANGING)
def test_a_number_that_changes_from_step_to_step_needs_no_new_graph(what: str) -> None:
    """Guards against one graph a step, of which torch makes eight and then gives up: an annealed temperature."""
    torch._dynamo.utils.counters.clear()
    function = CHANGING[what]
    run = compiled(function)
    for step in range(6):
        value = 128 * step + 2 if "row_offset" in what or what == "seed" else 0.97**step
        torch.testing.assert_close(run(value), function(value))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # the first number, and all others
