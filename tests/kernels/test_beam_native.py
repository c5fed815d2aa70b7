"""Beam steps in C++ against the reference and a brute-force float64 search, on every edge that breaks other systems."""

from __future__ import annotations

import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, library

from dgi_kernels import (
    BackendUnavailable,
    Beams,
    Trie,
    _extension,
    beam_search,
    beam_step,
    cosine_beam_step,
    cosine_logits,
)
from dgi_kernels.trie.arrays import TrieArrays
from dgi_kernels.trie.filters import check_filters, filter_arguments

from .beam_cases import (
    DTYPES,
    NORMALIZE,
    assert_exact_log_sum_exp,
    assert_extremes,
    assert_same,
    fused_walk,
    random_fused,
    steps,
)
from .sanitizers import assert_clean
from .shapes import name_of

pytestmark = pytest.mark.skipif(_extension.load_error is not None, reason=str(_extension.load_error))


@pytest.mark.parametrize("num_beams", [1, 7, 64, 65, 300])
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_many_children_and_equal_scores(normalize: str, num_beams: int) -> None:
    """The threshold rises several times within a row, and most candidates tie with it."""
    codes = torch.randint(0, 700, (20000, 2))
    trie = Trie.from_codes(codes, codebook_sizes=[700, 700])
    beams = trie.root(2)
    for _ in range(2):
        logits = torch.randint(0, 3, (2, 1, 700)).float().expand(-1, beams.nodes.shape[1], -1)
        got, expected = steps(trie, logits, beams, num_beams=num_beams, normalize=normalize)
        assert_same(got, expected, exact=normalize == "none")
        beams = got


@pytest.mark.parametrize("share", [0.02, 0.4, 1.0], ids=["few", "many", "all"])
@pytest.mark.parametrize("updates", [False, True], ids=["built", "updated"])
@pytest.mark.parametrize("masks", [True, False], ids=["masks", "no masks"])
def test_nodes_of_many_children_with_filters(
    share: float, updates: bool, masks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first cut is taken from a beam's own children, before the filter is asked: what lies below it must come back
    where the filter leaves too few, also where earlier beams have filled the list with less. Codes that pass the cut
    without being children must not count."""
    if not masks:
        monkeypatch.setattr(TrieArrays, "child_masks", lambda *_: None)
    codes = (torch.rand(40, 600) < share).nonzero()
    trie = Trie.from_codes(codes, codebook_sizes=[40, 600])
    if updates:
        added = torch.stack([torch.randint(0, 40, (300,)), torch.randint(0, 600, (300,))], 1)
        trie = trie.update(add=(added, torch.arange(300) + len(codes)), remove=torch.randperm(len(codes))[:50])
    root = trie.root(3)
    for num_beams in (1, 4, 30, 250):
        filters = [trie.filter(mask=torch.rand(trie.num_items) < kept) for kept in (0.9, 0.1)] + [None]
        beams = beam_step(trie, torch.randn(3, 1, 40), root, num_beams=7, filters=filters)
        logits = torch.randint(-9, 9, (3, 7, 600)).float()
        logits[torch.rand(logits.shape) < 0.05] = random.choice([-math.inf, math.nan, math.inf, 1e30])
        for normalize in NORMALIZE:
            got, expected = steps(trie, logits, beams, num_beams=num_beams, filters=filters, normalize=normalize)
            assert_same(got, expected, exact=normalize == "none")


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_peaked_rows_and_hopeless_beams(dtype: torch.dtype) -> None:
    """Beams below the threshold are skipped, their logits unread; the result must not show it."""
    trie = Trie.from_codes(torch.randint(0, 300, (5000, 3)), codebook_sizes=[300] * 3)
    for _ in range(5):
        beams = trie.root(2)
        for _ in range(3):
            logits = (20 * torch.randn(2, beams.nodes.shape[1], 300)).to(dtype)
            got, expected = steps(trie, logits, beams, num_beams=40)
            torch.testing.assert_close(got.scores, expected.scores, rtol=1e-5, atol=1e-4)
            beams = got


@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0], ids=["alike", "flat", "peaked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_fused_steps_skip_no_beam_that_counts(dtype: torch.dtype, spread: float) -> None:
    """With many beams of few children most are never multiplied; against float64 on the same numbers."""
    codes, items, dim = random.choice([97, 300, 1000]), 4000, random.choice([3, 33])
    ragged = [row[: random.choice([2, 3, 3])] for row in torch.randint(0, codes, (items, 3)).tolist()]
    trie = Trie.from_codes(ragged, codebook_sizes=[codes] * 3)
    filters = [trie.filter(mask=torch.rand(items) < 0.5), *[None] * 3] if random.random() < 0.5 else None
    beams = trie.root(4)
    for _ in range(3):
        codebook = torch.randn(codes, dim).to(dtype)
        near = codebook[torch.randint(0, codes, (4, beams.nodes.shape[1]))].float()
        h = (torch.randn(4, beams.nodes.shape[1], dim) / spread + near).to(dtype)
        h[random.randrange(4), -1, 0] = random.choice([math.nan, math.inf, 0.0])
        scale = random.choice([1.0, 30.0, 100.0, -5.0])
        got = cosine_beam_step(trie, h, codebook, scale, beams, num_beams=60, filters=filters, backend="native")
        expected = beam_step(
            trie,
            cosine_logits(h.double(), codebook.double(), scale),
            beams,
            num_beams=60,
            filters=filters,
            backend="reference",
        )
        assert torch.equal(got.scores == -math.inf, expected.scores == -math.inf)
        torch.testing.assert_close(got.scores, expected.scores, rtol=2e-5, atol=2e-4)
        again = cosine_beam_step(
            trie,
            h[1:],
            codebook,
            scale,
            Beams(*(part[1:] for part in beams[:4]), beams.depth),
            num_beams=60,
            filters=filters and filters[1:],
            backend="native",
        )
        assert torch.equal(again.scores, got.scores[1:])  # whichever rows share its tile
        beams = got


@pytest.mark.parametrize("codes", [1, 40])
@pytest.mark.parametrize("magnitude", [1.0, 1e3, 1e7])
def test_a_child_of_probability_one_ties_with_its_parent(magnitude: float, codes: int) -> None:
    """Exactly 0 is the largest log-probability: a beam that equals the threshold still counts."""
    beams = 200
    trie = Trie.from_codes([[i, 0] for i in range(beams)], codebook_sizes=[beams, codes])
    nodes = torch.arange(beams).flip(0).unsqueeze(0)
    logits = torch.full((1, beams, codes), -math.inf)
    logits[..., 0] = magnitude * torch.randn(beams)
    after = beam_step(
        trie, logits, Beams(nodes, nodes, nodes, torch.full((1, beams), -2.5), 1), num_beams=20, backend="native"
    )
    assert after.parents.tolist() == [list(range(20))] and after.scores.tolist() == [[-2.5] * 20]


def test_zeros_of_either_sign_tie() -> None:
    trie = Trie.from_codes([[0], [1], [2]], codebook_sizes=[3])
    root = trie.root(1)
    for sign in (1.0, -1.0):
        logits = torch.tensor([[[0.0, -0.0, 0.0]]]) * sign
        after = beam_step(
            trie, logits, root._replace(scores=torch.tensor([[-0.0]])), num_beams=3, normalize="none", backend="native"
        )
        assert after.tokens.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_numbers_at_the_end_of_the_range(dtype: torch.dtype, normalize: str) -> None:
    assert_extremes(200, dtype, normalize)


def test_the_log_sum_exp_is_exact_to_rounding() -> None:
    assert_exact_log_sum_exp((1, 15, 16, 17, 2047, 2048, 2049, 5000))


def test_a_search_is_the_same_on_any_number_of_threads() -> None:
    trie = Trie.from_codes(torch.randint(0, 50, (3000, 3)), codebook_sizes=[50] * 3)
    levels = torch.randn(3, 7, 30, 50)

    def search() -> tuple[Tensor, Tensor]:
        result = beam_search(
            trie,
            lambda depth, tokens, parents: levels[depth][:, : 1 if depth == 0 else 30],
            batch_size=7,
            num_beams=30,
            backend="native",
        )
        return result.codes, result.scores

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = search()
        torch.set_num_threads(2)
        two = search()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_cosine_steps_match_the_reference(dtype: torch.dtype, normalize: str) -> None:
    for _ in range(12):
        fused_walk(random_fused(), depth=3, dtype=dtype, normalize=normalize, backend="native")


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("scale", [1e25, -1e33, 3e37])
def test_scales_whose_products_leave_float32(scale: float, normalize: str) -> None:
    """Guards against an overflow of scale h^ . e before 1 / norm brings it back: by tiles, and by children alone."""
    for size, items in ((300, 4000), (40, 60)):
        trie = Trie.from_codes(torch.randint(0, size, (items, 2)), codebook_sizes=[size] * 2)
        beams = trie.root(3)
        for _ in range(2):
            h, codebook = 1e4 * torch.randn(3, beams.nodes.shape[1], 16), 1e12 * torch.randn(size, 16)
            got = cosine_beam_step(trie, h, codebook, scale, beams, num_beams=20, normalize=normalize, backend="native")
            expected = cosine_beam_step(
                trie,
                h.double(),
                codebook.double(),
                scale,
                beams,
                num_beams=20,
                normalize=normalize,
                backend="reference",
            )
            assert torch.equal(got.nodes < 0, expected.nodes < 0)
            live = expected.nodes >= 0
            torch.testing.assert_close(
                got.scores.double()[live] / abs(scale), expected.scores.double()[live] / abs(scale), rtol=0, atol=1e-5
            )
            beams = trie.root(3)._replace(depth=1, nodes=expected.nodes, scores=torch.zeros_like(expected.scores))
            beams = beams._replace(tokens=expected.nodes, parents=expected.nodes)


def test_gradients_need_the_reference() -> None:
    trie = Trie.from_codes([[0], [2]], codebook_sizes=[3])
    logits = torch.randn(1, 1, 3, requires_grad=True)
    beam_step(trie, logits, trie.root(1), num_beams=2).scores.sum().backward()
    assert logits.grad is not None and logits.grad.abs().sum() > 0
    with pytest.raises(BackendUnavailable, match="gives no gradients"):
        beam_step(trie, logits, trie.root(1), num_beams=2, backend="native")
    with torch.no_grad():
        beam_step(trie, logits, trie.root(1), num_beams=2, backend="native")


def test_the_ops_are_well_registered() -> None:
    trie = Trie.from_codes(torch.randint(0, 5, (30, 2)), codebook_sizes=[5, 5])
    changed = trie.update(add=([[1, 4], [0, 0]], [30, 31]), remove=[3])
    for index, filters in (
        (trie, None),
        (trie, [trie.filter(items=[1, 2, 3]), None]),
        (changed, None),
        (changed, changed.filter(items=[1, 30])),
    ):
        parts, (sets, set_of) = index.parts, filter_arguments(check_filters(filters, index, 2), 2, 1)
        base, added = parts.base, parts.added
        delta = [] if added is None else [added.tokens[0], added.child_start[0]]
        anchors = [] if added is None else list(parts.delta.anchors[:2])
        beams = index.root(2)
        depth = (base.tokens[0], base.child_start[0], delta, anchors, sets, set_of)
        library.opcheck(
            torch.ops.dgi_kernels.beam_step.default,
            (*depth, torch.randn(2, 1, 5), beams.nodes, beams.scores, torch.zeros(2, 1), 3, 0, base.child_masks(0, 5)),
        )
        library.opcheck(
            torch.ops.dgi_kernels.cosine_beam_step.default,
            (
                *depth,
                torch.randn(2, 1, 4),
                torch.randn(5, 4),
                torch.tensor(2.0),
                1e-12,
                beams.nodes,
                beams.scores,
                None,
                3,
                0,
            ),
        )
        of_delta = (
            ([], None, None, None)
            if added is None
            else (added.items_below(0), added.item_order, added.item_ids, parts.delta.anchors[0])
        )
        places, _ = filter_arguments(check_filters(filters, index, 2), 2, None)
        library.opcheck(
            torch.ops.dgi_kernels.rank_candidates.default,
            (
                torch.randn(2, 4),
                torch.randn(32, 4),
                1,
                base.items_below(0),
                base.item_order,
                base.item_ids,
                *of_delta,
                places,
                set_of,
                beams.nodes,
                beams.scores,
                3,
                1e-12,
            ),
        )


def test_direct_callers_are_stopped_too() -> None:
    trie = Trie.from_codes([[0], [1]], codebook_sizes=[2])
    root = trie.root(1)
    tokens, starts = trie.parts.base.tokens[0], trie.parts.base.child_start[0]
    words, ranks = torch.zeros(8, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    good = [tokens, starts, [], [], [], [], torch.zeros(1, 1, 2), root.nodes, root.scores, None, 2, 0, None]
    for place, value, message in (
        (0, tokens.long(), "tokens must be int16 or int32"),
        (0, tokens.unsqueeze(0), "tokens must be a contig"),
        (1, starts.short(), "child_start must be"),
        (2, [tokens], "delta and anchors do not fit"),
        (3, [ranks, ranks], "delta and anchors do not fit"),
        (4, [words, ranks, words], "four arrays each"),
        (4, [words, words, words, ranks], "8 words to a rank"),
        (4, [words, ranks] * 2, "set_of must have B"),
        (5, [0], None),
        (6, torch.zeros(1, 2), "logits must be"),
        (7, root.nodes + 1, "nodes must be in"),
        (7, root.nodes.int(), "nodes has the wrong dtype"),
        (8, root.scores.double(), "scores has the wrong dtype"),
        (9, torch.zeros(2, 1), "log_normalizer must be"),
        (10, 0, "num_beams must be at least 1"),
        (11, 3, "normalize must be"),
        (12, torch.zeros(1, 2, dtype=torch.int32), "child_masks must be"),
        (12, torch.zeros(2, 1, dtype=torch.int32), "child_masks must be"),
        (12, starts.view(1, -1), "child_masks must be"),
    ):
        arguments = [value if i == place else argument for i, argument in enumerate(good)]
        if message is None:
            torch.ops.dgi_kernels.beam_step(*arguments)
            continue
        with pytest.raises(RuntimeError, match=message):
            torch.ops.dgi_kernels.beam_step(*arguments)
    large = Trie.from_codes(torch.arange(600).unsqueeze(1)).parts.base
    with pytest.raises(RuntimeError, match="a set is over fewer places than there are"):
        torch.ops.dgi_kernels.beam_step(
            large.tokens[0], large.child_start[0], [], [], [words, ranks] * 2, [0], torch.zeros(1, 1, 600), *good[7:]
        )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_kernel_is_clean_under_sanitizers(tmp_path: Path, seed: int) -> None:
    """Random tries and beams through the same C++ with AddressSanitizer and UBSan, against a search of all children.

    For the two of the eight pairs of dtypes that between them have all of its code, but for the conversion of 16 bits.
    """
    pairs = "DGI_FOR_STORED_AND_TOKEN(F)=F(float, int16_t) F(double, int32_t)"
    assert_clean("beam_driver.cpp", ("cpu/beam/beam.cpp", "cpu/beam/cosine_beam.cpp"), tmp_path, seed, 500, [pairs])
