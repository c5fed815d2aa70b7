"""Beam steps and searches against a brute-force float64 search, on every edge that breaks other systems."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from dgi_kernels import (
    BackendUnavailable,
    BeamResult,
    Beams,
    HiddenStates,
    Trie,
    beam_search,
    beam_step,
    cosine_beam_step,
    cosine_logits,
    debug,
)

from . import beam_cases
from .beam_cases import BACKENDS, DTYPES, NORMALIZE, cosine_walk, hurt, prefixes_of, walk
from .shapes import name_of
from .tries import make, names, random_catalog, random_filters

CASES = 300


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_steps_are_the_top_of_all_allowed_children(dtype: torch.dtype, normalize: str, backend: str) -> None:
    for _ in range(CASES // 7):
        walk(random_catalog(), dtype=dtype, normalize=normalize, exact=False, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_ties_go_to_the_lower_parent_then_the_lower_token(dtype: torch.dtype, backend: str) -> None:
    for _ in range(CASES // 4):
        walk(random_catalog(max_items=40), dtype=dtype, normalize="none", exact=True, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_searches_find_exactly_what_brute_force_finds(backend: str) -> None:
    for _ in range(CASES):
        catalog = random_catalog(max_items=30)
        trie = make(catalog)
        batch, num_beams = random.randint(1, 3), random.choice([1, 3, 8, 40])
        filters, allowed = random_filters(catalog, trie, batch)
        levels = [hurt(torch.randint(-5, 5, (batch, 1, size)).float()) for size in catalog.sizes]
        result = beam_search(
            trie,
            lambda depth, tokens, parents, levels=levels, width=num_beams: levels[depth].expand(
                -1, 1 if depth == 0 else width, -1
            ),
            batch_size=batch,
            num_beams=num_beams,
            normalize="none",
            filters=filters,
            backend=backend,
        )
        for b in range(batch):
            expected = beam_cases.search(catalog, [level[b, 0].tolist() for level in levels], num_beams, allowed[b])
            dead = num_beams - len(expected)
            assert result.scores[b].tolist() == [score for score, _ in expected] + [-math.inf] * dead
            assert list(map(tuple, result.codes[b].tolist())) == (
                [code for _, code in expected] + [(-1,) * catalog.depth] * dead
            )
            assert prefixes_of(names(trie, catalog, catalog.depth), result.nodes[b].tolist()) == (
                [code for _, code in expected] + [None] * dead
            )


def test_step_is_called_as_promised() -> None:
    trie = Trie.from_codes([[0, 1, 2], [0, 2], [1, 0, 0]], codebook_sizes=[2, 3, 3])
    calls = []

    def step(depth: int, tokens: Tensor | None, parents: Tensor | None) -> Tensor:
        calls.append((depth, tokens, parents))
        return torch.zeros(2, 1 if depth == 0 else 4, trie.codebook_sizes[depth])

    result = beam_search(trie, step, batch_size=2, num_beams=4, normalize="none")
    assert [depth for depth, _, _ in calls] == [0, 1, 2]
    assert calls[0][1:] == (None, None)
    assert calls[1][1].tolist() == [[0, 1, -1, -1]] * 2 and calls[1][2].tolist() == [[0, 0, -1, -1]] * 2
    assert calls[2][1].tolist() == [[1, 2, 0, -1]] * 2 and calls[2][2].tolist() == [[0, 0, 1, -1]] * 2
    assert result.codes.tolist() == [[[0, 1, 2], [0, 2, -1], [1, 0, 0], [-1, -1, -1]]] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_model_is_not_asked_once_all_sequences_have_ended(backend: str) -> None:
    """The long sequence is filtered out for one request and banned for the other; the ended ones go down to leaves."""
    trie = Trie.from_codes([[0], [1, 0], [2, 1, 0, 2]], [7, 8, 9], codebook_sizes=[3, 2, 1, 3])
    calls = []

    def step(depth: int, tokens: Tensor | None, parents: Tensor | None) -> Tensor:
        calls.append(depth)
        logits = torch.zeros(2, 1 if depth == 0 else 3, trie.codebook_sizes[depth])
        if depth == 0:
            logits[1, :, 2] = -math.inf
        return logits

    result = beam_search(
        trie,
        step,
        batch_size=2,
        num_beams=3,
        normalize="none",
        backend=backend,
        filters=[trie.filter(items=[7, 8]), None],
    )
    assert calls == [0, 1, 2]  # two codes at depth 1 are still followed by an end at depth 2
    assert result.codes.tolist() == [[[0, -1, -1, -1], [1, 0, -1, -1], [-1] * 4]] * 2
    assert result.scores.tolist() == [[0.0, 0.0, -math.inf]] * 2
    assert trie.items(result.nodes[:, :2], trie.depth).item_ids.tolist() == [7, 8] * 2
    calls.clear()
    result = beam_search(
        trie,
        lambda depth, tokens, parents: step(depth, tokens, parents).fill_(-math.inf),
        batch_size=2,
        num_beams=3,
        backend=backend,
    )
    assert calls == [0] and (result.nodes == -1).all() and (result.codes == -1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_states_take_the_place_of_logits(backend: str) -> None:
    for _ in range(CASES // 30):
        catalog = random_catalog()
        trie = make(catalog)
        heads = [(torch.randn(2, 6, 5), torch.randn(size, 5)) for size in catalog.sizes]

        def states(depth: int, tokens: Tensor | None, parents: Tensor | None, heads: list = heads) -> HiddenStates:
            h, codebook = heads[depth]
            return HiddenStates(h[:, : 1 if depth == 0 else 6], codebook, 7.0, 1e-6)

        normalize = random.choice(NORMALIZE)
        options = {"batch_size": 2, "num_beams": 6, "normalize": normalize, "backend": backend}
        found = beam_search(trie, states, **options)
        expected = beam_search(trie, lambda *given: states(*given).logits(), **options)
        assert torch.equal(found.scores == -math.inf, expected.scores == -math.inf)
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_ended_sequence_keeps_its_score_whatever_the_logits(backend: str) -> None:
    trie = Trie.from_codes([[0], [1, 0], [1]], codebook_sizes=[2, 1])
    beams = beam_step(trie, torch.log(torch.tensor([[[0.25, 0.75]]])), trie.root(1), num_beams=2, backend=backend)
    for normalize in ("full", "children"):
        after = beam_step(
            trie, torch.full((1, 2, 1), math.nan), beams, num_beams=3, normalize=normalize, backend=backend
        )
        assert after.tokens.tolist() == [[-1, -1, -1]]
        assert after.parents.tolist() == [[0, 1, -1]]
        assert after.scores[0, :2].tolist() == pytest.approx([math.log(0.75), math.log(0.25)])
        after = beam_step(trie, torch.zeros(1, 2, 1), beams, num_beams=3, normalize=normalize, backend=backend)
        assert after.tokens.tolist() == [[-1, 0, -1]]  # the end and code 0 tie, both at log-probability 0
        assert after.nodes.tolist() == [[1, 2, 0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_dead_beams_never_come_back(backend: str) -> None:
    trie = Trie.from_codes([[0, 0], [1, 1]])
    nodes = torch.tensor([[0, -1, 1, 1, 0]])
    scores = torch.tensor([[-math.inf, 0.0, math.nan, -1.0, -math.inf]])
    beams = Beams(nodes, nodes, nodes, scores, 1)
    after = beam_step(trie, torch.zeros(1, 5, 2), beams, num_beams=5, normalize="none", backend=backend)
    assert after.parents.tolist() == [[3, -1, -1, -1, -1]]
    assert after.scores.tolist() == [[-1.0] + [-math.inf] * 4]


def test_banning_every_code_leaves_nothing() -> None:
    trie = Trie.from_codes([[0, 0], [1, 1]])
    for value in (-math.inf, math.nan):
        for normalize in NORMALIZE:
            result = beam_search(
                trie,
                lambda depth, tokens, parents, value=value: torch.full((1, 1 if depth == 0 else 3, 2), value),
                batch_size=1,
                num_beams=3,
                normalize=normalize,
            )
            assert (result.nodes == -1).all() and (result.codes == -1).all() and (result.scores == -math.inf).all()


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_infinite_logits_count_as_the_largest_number(normalize: str) -> None:
    trie = Trie.from_codes([[0, 0], [1, 1], [2, 0]])
    logits = torch.tensor([[[1.0, math.inf, math.inf]]])
    after = beam_step(trie, logits, trie.root(1), num_beams=3, normalize=normalize)
    assert after.tokens[0, :2].tolist() == [1, 2]
    assert torch.isfinite(after.scores[0, :2]).all() and after.scores[0, 0] == after.scores[0, 1]
    if normalize != "none":
        assert after.scores[0, 0].item() == pytest.approx(-math.log(2))
    again = beam_step(trie, torch.full((1, 3, 2), math.inf), after, num_beams=4, normalize=normalize)
    assert not again.scores.isnan().any() and (again.nodes[0, :2] >= 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_log_normalizer_that_is_not_finite_kills_its_beam(backend: str) -> None:
    trie = Trie.from_codes([[0, 0], [0, 1], [1, 0], [2, 0], [3, 1]])
    beams = beam_step(trie, torch.zeros(1, 1, 4), trie.root(1), num_beams=4, backend=backend)
    after = beam_step(
        trie,
        torch.zeros(1, 4, 2),
        beams,
        num_beams=6,
        log_normalizer=torch.tensor([[math.nan, math.inf, -math.inf, 1.0]]),
        backend=backend,
    )
    assert after.parents.tolist() == [[3, -1, -1, -1, -1, -1]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_tries_batches_and_wide_logits(backend: str) -> None:
    empty = Trie.from_codes(torch.empty(0, 2), codebook_sizes=[3, 4])
    result = beam_search(
        empty,
        lambda depth, tokens, parents: torch.zeros(2, 1 if depth == 0 else 5, 3 + depth),
        batch_size=2,
        num_beams=5,
        backend=backend,
    )
    assert (result.nodes == -1).all() and (result.codes == -1).all() and (result.scores == -math.inf).all()
    inferred = Trie.from_codes([[0, 1], [2, 0]])  # codebooks may be larger than the codes in use
    result = beam_search(
        inferred,
        lambda depth, tokens, parents: torch.zeros(0, 1 if depth == 0 else 5, 7),
        batch_size=0,
        num_beams=5,
        filters=[],
        backend=backend,
    )
    assert result.codes.shape == (0, 5, 2) and result.scores.shape == (0, 5)
    wide = beam_step(inferred, torch.zeros(1, 1, 8), inferred.root(1), num_beams=2, backend=backend)
    assert wide.scores.tolist() == [pytest.approx([-math.log(8)] * 2)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_int32_nodes_and_no_beams(backend: str) -> None:
    trie = Trie.from_codes([[0, 1], [1, 0]])
    root = trie.root(2)
    after = beam_step(trie, torch.zeros(2, 1, 2), root._replace(nodes=root.nodes.int()), num_beams=2, backend=backend)
    assert after.nodes.tolist() == [[0, 1], [0, 1]]
    none = Beams(*(part[:, :0] for part in root[:4]), 0)
    assert (beam_step(trie, torch.zeros(2, 0, 2), none, num_beams=2, backend=backend).nodes == -1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_cosine_steps_are_steps_on_cosine_logits(dtype: torch.dtype, backend: str) -> None:
    for _ in range(CASES // 12):
        cosine_walk(random_catalog(), dtype=dtype, backend=backend)


def test_cosine_steps_take_a_log_normalizer_and_mixed_dtypes_under_autocast() -> None:
    trie = Trie.from_codes([[0], [2], [3]])
    h, codebook = torch.randn(2, 1, 8), torch.randn(4, 8)
    lse = cosine_logits(h, codebook, 5.0).logsumexp(-1)
    given = cosine_beam_step(trie, h, codebook, 5.0, trie.root(2), num_beams=3, log_normalizer=lse)
    computed = cosine_beam_step(trie, h, codebook, 5.0, trie.root(2), num_beams=3)
    assert torch.equal(given.tokens, computed.tokens)
    torch.testing.assert_close(given.scores, computed.scores)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = cosine_beam_step(trie, h.bfloat16(), codebook, 5.0, trie.root(2), num_beams=3)
    plain = cosine_beam_step(trie, h.bfloat16(), codebook.bfloat16(), 5.0, trie.root(2), num_beams=3)
    assert torch.equal(mixed.scores, plain.scores)


@pytest.fixture(scope="module")
def catalog_trie() -> Trie:
    codes = torch.randint(0, 5, (30, 3), generator=torch.Generator().manual_seed(3))
    return Trie.from_codes(codes, codebook_sizes=[5, 5, 5])


@pytest.mark.parametrize("filtered", [False, True], ids=["all", "filtered"])
def test_compiled_steps_match(catalog_trie: Trie, filtered: bool) -> None:
    trie = catalog_trie
    filters = [trie.filter(items=range(0, 30, 2)), None] if filtered else None

    def step(logits: Tensor, beams: Beams) -> Beams:
        return beam_step(trie, logits, beams, num_beams=4, filters=filters)

    def cosine_step(h: Tensor, codebook: Tensor, scale: Tensor, beams: Beams) -> Beams:
        return cosine_beam_step(trie, h, codebook, scale, beams, num_beams=4, filters=filters)

    torch._dynamo.reset()
    compiled, compiled_cosine = (torch.compile(f, fullgraph=True, backend="eager") for f in (step, cosine_step))
    beams = trie.root(2)
    for _ in range(2):
        logits = torch.randn(2, beams.nodes.shape[1], 5)
        cosine_args = torch.randn(2, beams.nodes.shape[1], 6), torch.randn(5, 6), torch.tensor(4.0), beams
        for got, expected in (
            (compiled(logits, beams), step(logits, beams)),
            (compiled_cosine(*cosine_args), cosine_step(*cosine_args)),
        ):
            assert torch.equal(got.nodes, expected.nodes) and torch.equal(got.parents, expected.parents)
            torch.testing.assert_close(got.scores, expected.scores)
        beams = step(logits, beams)


def search(trie: Trie, levels: Tensor, filters: object) -> BeamResult:
    """A search of two requests, four beams wide, whose logits are ``levels`` (depth, 2, 4, K)."""
    return beam_search(
        trie,
        lambda depth, tokens, parents: levels[depth][:, : 1 if depth == 0 else 4],
        batch_size=2,
        num_beams=4,
        filters=filters,
    )


def test_a_compiled_search_matches(catalog_trie: Trie) -> None:
    levels = torch.randn(3, 2, 4, 5)
    torch._dynamo.reset()
    compiled = torch.compile(search, fullgraph=True, backend="aot_eager")(catalog_trie, levels, None)
    expected = search(catalog_trie, levels, None)
    assert torch.equal(compiled.codes, expected.codes)
    torch.testing.assert_close(compiled.scores, expected.scores)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_search_on_cuda_is_the_same_and_captures_in_one_graph(catalog_trie: Trie) -> None:
    levels = torch.randn(3, 2, 4, 5)
    trie, static = catalog_trie.to("cuda"), torch.zeros_like(levels, device="cuda")
    for items in (None, range(0, 30, 2)):
        here, there = (None if items is None else [t.filter(items=items), None] for t in (catalog_trie, trie))
        expected = search(catalog_trie, levels, here)
        search(trie, static, there)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = search(trie, static, there)
        static.copy_(levels)
        graph.replay()
        assert torch.equal(captured.codes.cpu(), expected.codes) and torch.equal(captured.nodes.cpu(), expected.nodes)
        torch.testing.assert_close(captured.scores.cpu(), expected.scores)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_a_node_out_of_range_is_dead_and_named_in_debug(catalog_trie: Trie) -> None:
    trie = catalog_trie.to("cuda")
    beams = trie.root(2)._replace(nodes=torch.tensor([[0], [10**12]], device="cuda"))
    logits = torch.zeros(2, 1, 5, device="cuda")
    nodes = beam_step(trie, logits, beams, num_beams=3).nodes.cpu()
    assert (nodes[0] >= 0).all() and (nodes[1] == -1).all()
    with debug(), pytest.raises(ValueError, match="beams.nodes must be in"):
        beam_step(trie, logits, beams, num_beams=3)


def step_with(trie: Trie, changes: dict[str, object]) -> Beams:
    arguments = {"trie": trie, "logits": torch.zeros(2, 1, 3), "beams": trie.root(2), "num_beams": 2}
    return beam_step(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"trie": [[0, 1]]}, TypeError, "trie must be a Trie"),
        ({"beams": (0, 1)}, TypeError, "beams must be Beams"),
        ({"logits": [[0.0]]}, TypeError, "logits must be a torch.Tensor"),
        ({"logits": torch.zeros(2, 1, 3, dtype=torch.int64)}, TypeError, "logits must have dtype"),
        ({"logits": torch.zeros(2, 3)}, ValueError, "logits must have 3 dimensions"),
        ({"logits": torch.zeros(2, 1, 4)}, ValueError, "logits must be over 3 codes, the codebook of level 0; got 4"),
        ({"logits": torch.zeros(2, 1, 2)}, ValueError, "logits must be over 3 codes"),
        ({"logits": torch.zeros(2, 2, 3)}, ValueError, "logits must have shape"),
        ({"logits": torch.zeros(1, 1, 3)}, ValueError, "logits must have shape"),
        ({"num_beams": 0}, ValueError, "num_beams must be at least 1"),
        ({"num_beams": 2.0}, TypeError, "num_beams must be an integer"),
        ({"normalize": "softmax"}, ValueError, "normalize must be one of"),
        ({"log_normalizer": torch.zeros(2)}, ValueError, "log_normalizer must have shape"),
        ({"log_normalizer": 1.0}, TypeError, "log_normalizer must be a torch.Tensor"),
        ({"log_normalizer": torch.zeros(2, 1), "normalize": "none"}, ValueError, "log_normalizer must be None"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
        ({"backend": "triton"}, BackendUnavailable, "beam_step"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, object], error: type[Exception], message: str) -> None:
    trie = Trie.from_codes([[0, 1], [2, 1]], codebook_sizes=[3, 2])
    with pytest.raises(error, match=message):
        step_with(trie, changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"depth": 2}, ValueError, "beams.depth must be less than the trie's depth 2"),
        ({"depth": -1}, ValueError, "beams.depth must be at least 0"),
        ({"nodes": torch.tensor([[0], [1]])}, ValueError, r"beams.nodes must be in \[0, 1\) or -1; got 1"),
        ({"nodes": torch.tensor([[0], [-2]])}, ValueError, "beams.nodes must be in"),
        ({"nodes": torch.zeros(2, 1)}, TypeError, "beams.nodes must have dtype"),
        ({"nodes": torch.tensor([0, 0])}, ValueError, "beams.nodes must have 2 dimensions"),
        ({"scores": torch.zeros(2, 2)}, ValueError, "beams.scores must have shape"),
    ],
)
def test_bad_beams_are_named(changes: dict[str, object], error: type[Exception], message: str) -> None:
    trie = Trie.from_codes([[0, 1], [2, 1]], codebook_sizes=[3, 2])
    with pytest.raises(error, match=message):
        step_with(trie, {"beams": trie.root(2)._replace(**changes)})


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (None, TypeError, "step must be callable"),
        (lambda depth, tokens, parents: None, TypeError, r"logits of step\(depth=0\) must be a torch.Tensor"),
        (lambda depth, tokens, parents: torch.zeros(2, 1, 3), ValueError, r"logits of step\(depth=1\) must have shape"),
        (lambda depth, tokens, parents: torch.zeros(2, 1, 2), ValueError, r"step\(depth=0\) must be over 3 codes"),
    ],
)
def test_a_bad_step_function_is_named(step: object, error: type[Exception], message: str) -> None:
    trie = Trie.from_codes([[0, 1], [2, 1]], codebook_sizes=[3, 3])
    with pytest.raises(error, match=message):
        beam_search(trie, step, batch_size=2, num_beams=4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"h": torch.zeros(2, 2, 4)}, ValueError, "h must have shape"),
        ({"codebook": torch.zeros(3, 5)}, ValueError, "codebook must have shape"),
        ({"codebook": torch.zeros(4, 4)}, ValueError, "codebook must be over 3 codes"),
        ({"codebook": torch.zeros(3, 4, dtype=torch.float64)}, TypeError, "codebook"),
        ({"scale": math.inf}, ValueError, "scale must be finite"),
        ({"eps": 0.0}, ValueError, "eps must be positive"),
        ({"num_beams": 0}, ValueError, "num_beams must be at least 1"),
    ],
)
def test_bad_cosine_arguments_are_named(changes: dict[str, object], error: type[Exception], message: str) -> None:
    trie = Trie.from_codes([[0, 1], [2, 1]], codebook_sizes=[3, 2])
    arguments = {
        "trie": trie,
        "h": torch.zeros(2, 1, 4),
        "codebook": torch.zeros(3, 4),
        "scale": 1.0,
        "beams": trie.root(2),
        "num_beams": 2,
    } | changes
    with pytest.raises(error, match=message):
        cosine_beam_step(**arguments)
