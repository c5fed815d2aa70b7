"""Hugging Face's generate on a trie, and without generate: against prefix_allowed_tokens_fn with a trie of dicts."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="needs transformers: pip install 'dgi-kernels[hf]'")
from transformers import LogitsProcessor  # noqa: E402

from dgi.integrations import TrieLogitsProcessor, constrained_generate  # noqa: E402
from dgi_kernels import Trie  # noqa: E402
from tests.dgi.integrations.cases import (  # noqa: E402
    END,
    PAD,
    REAL,
    Case,
    DecoderOnly,
    EncoderDecoder,
    assert_same,
    ragged_codes,
    real_codes,
)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize(("family", "end", "beams"), [("t5", END, 20), ("qwen2", None, 12), ("gpt2", END, 3)])
def test_real_semantic_ids(name: str, family: str, end: int | None, beams: int) -> None:
    codes = real_codes(name)
    case = Case(family, codes, [256] * codes.shape[1])
    expected = case.generate(end, beams, prefix_allowed_tokens_fn=case.allowed_tokens(end))
    generated = case.generate(end, beams, logits_processor=[case.processor(end)])
    assert torch.equal(generated.sequences, expected.sequences)
    assert torch.equal(generated.sequences_scores, expected.sequences_scores)
    assert_same(expected, case.constrained(end, beams), 3)


@pytest.mark.parametrize("family", [*EncoderDecoder, *DecoderOnly])
@pytest.mark.parametrize("end", [END, None])
def test_all_families(family: str, end: int | None) -> None:
    case = Case(family, np.random.randint(0, (6, 9, 7, 5), (300, 4)), (6, 9, 7, 5))
    expected = case.generate(end, 8, prefix_allowed_tokens_fn=case.allowed_tokens(end))
    generated = case.generate(end, 8, logits_processor=[case.processor(end)])
    assert torch.equal(generated.sequences, expected.sequences)
    assert torch.equal(generated.sequences_scores, expected.sequences_scores)
    assert_same(expected, case.constrained(end, 8), 3)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -0.7])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_ragged_semantic_ids(length_penalty: float, early_stopping: bool | str) -> None:
    case = Case("t5", ragged_codes(200, (5, 7, 6)), (5, 7, 6))
    options = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    expected = case.generate(END, 6, prefix_allowed_tokens_fn=case.allowed_tokens(END), **options)
    generated = case.generate(END, 6, logits_processor=[case.processor(END)], **options)
    assert torch.equal(generated.sequences, expected.sequences)
    assert torch.equal(generated.sequences_scores, expected.sequences_scores)
    ours = case.constrained(END, 6, **options)
    assert_same(expected, ours, 3)
    assert_items(case, ours)


def assert_items(case: Case, ours: Any) -> None:
    """Every live row is an item's codes, spelt in its sequence, and its node holds these items."""
    ids, depth = ours.sequences.view(*ours.nodes.shape, -1), case.trie.depth
    for codes, node, tokens in zip(ours.codes.flatten(0, 1), ours.nodes.flatten(), ids.flatten(0, 1), strict=True):
        if node < 0:
            assert (codes == -1).all() and (tokens[case.start :] == PAD).all()
            continue
        row = [code for code in codes.tolist() if code >= 0]
        items = case.trie.items(node, depth).item_ids.tolist()
        assert items == [item for item, own in enumerate(case.codes) if own == row]
        assert tokens[case.start :].tolist()[: len(row) + 1] == [*case.tokens(items[0]), END]


@pytest.mark.parametrize(
    "strategy",
    [{"use_cache": False}, {"do_sample": True}, {"num_beams": 1}, {"num_beams": 1, "do_sample": True}],
    ids=str,
)
def test_other_strategies(strategy: dict[str, Any]) -> None:
    """The same random numbers on the same scores; greedy search and sampling have one row per request."""
    case = Case("qwen2", ragged_codes(150, (6, 8, 5)), (6, 8, 5))
    options = {"num_beams": 5, "do_sample": False, "max_new_tokens": 4, **strategy}
    torch.manual_seed(1)
    expected = case.model.generate(**case.prompts, **options, prefix_allowed_tokens_fn=case.allowed_tokens(END))
    torch.manual_seed(1)
    generated = case.model.generate(**case.prompts, **options, logits_processor=[case.processor(END)])
    assert torch.equal(generated, expected)


@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_a_filter_per_request(family: str) -> None:
    case = Case(family, ragged_codes(200, (5, 7, 6)), (5, 7, 6))
    subsets: list[Sequence[int]] = [random.sample(range(240), 60), range(240), random.sample(range(240), 100)]
    filters = [case.trie.filter(items=subsets[0]), None, case.trie.filter(items=subsets[2])]
    expected = case.generate(END, 5, prefix_allowed_tokens_fn=case.allowed_tokens(END, subsets))
    generated = case.generate(END, 5, logits_processor=[case.processor(END, filters=filters)])
    assert torch.equal(generated.sequences, expected.sequences)
    assert torch.equal(generated.sequences_scores, expected.sequences_scores)
    assert_same(expected, case.constrained(END, 5, filters=filters), 3)

    one = case.generate(END, 5, logits_processor=[case.processor(END, filters=filters[0])])
    same = case.generate(END, 5, prefix_allowed_tokens_fn=case.allowed_tokens(END, [subsets[0]] * 3))
    assert torch.equal(one.sequences, same.sequences)
    assert_same(one, case.constrained(END, 5, filters=filters[0]), 3)


@pytest.mark.parametrize("end", [END, None])
def test_fewer_semantic_ids_than_beams(end: int | None) -> None:
    """All of them are found, by both ways, and none twice; generate fills up with rows of -1e9 and less."""
    case = Case("t5", [[0, 1], [0, 2], [3, 1]], (4, 4))
    generated = case.generate(end, 6, logits_processor=[case.processor(end)])
    ours = case.constrained(end, 6)
    assert_same(generated, ours, 3)
    assert (ours.nodes >= 0).sum(1).tolist() == [3, 3, 3]
    assert (ours.codes[ours.nodes < 0] == -1).all() and ours.sequences_scores.isneginf().sum() == 9
    assert all({*map(tuple, rows)} >= {(0, 1), (0, 2), (3, 1)} for rows in ours.codes.tolist())


def test_an_updated_trie() -> None:
    case = Case("t5", np.random.randint(0, 6, (40, 3)), (6, 6, 6))
    added = np.random.randint(0, 6, (15, 3))
    case.codes = case.codes[10:] + added.tolist()
    case.trie = case.trie.update(add=(added, list(range(100, 115))), remove=list(range(10)))
    expected = case.generate(END, 7, prefix_allowed_tokens_fn=case.allowed_tokens(END))
    generated = case.generate(END, 7, logits_processor=[case.processor(END)])
    assert torch.equal(generated.sequences, expected.sequences)
    assert_same(expected, case.constrained(END, 7), 3)


class LevelNormalizer(LogitsProcessor):
    """Normalises over the codes of one level alone, as normalize="full" does."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        depth = input_ids.shape[1] - self.case.start
        level = slice(self.case.offsets[depth], self.case.offsets[depth] + self.case.trie.codebook_sizes[depth])
        return scores - scores[:, level].logsumexp(dim=1, keepdim=True)


def test_normalizers() -> None:
    case = Case("qwen2", np.random.randint(0, 8, (200, 3)), (8, 8, 8))
    full = case.generate(None, 6, logits_processor=[LevelNormalizer(case), case.processor(None)])
    assert_same(full, case.constrained(None, 6, normalize="full"), 3)
    children = case.generate(None, 6, logits_processor=[case.processor(None)], renormalize_logits=True)
    assert_same(children, case.constrained(None, 6, normalize="children"), 3)
    ended = case.constrained(END, 6, normalize="children")  # the end is free, but counts as a token
    torch.testing.assert_close(ended.sequences_scores, children.sequences_scores * 3 / 4, rtol=1e-5, atol=1e-5)
    assert (ended.sequences[:, -1] == END).all()


def test_shorter_semantic_ids_end_for_free_without_an_end_token() -> None:
    case = Case("gpt2", [[0], [1, 0], [1, 2, 3]], (4, 4, 4), batch=1)
    ours = case.constrained(None, 3, normalize="children", length_penalty=0.0)
    scores = dict(zip(map(tuple, ours.codes[0].tolist()), ours.sequences_scores.tolist(), strict=True))
    real = case.prompts["attention_mask"][0] == 1
    logits = case.model(case.prompts["input_ids"][:, real]).logits[0, -1]
    first = logits[case.offsets[0] : case.offsets[0] + 2].log_softmax(0)
    assert scores[0, -1, -1] == pytest.approx(first[0].item(), abs=1e-5)


def test_results_by_number() -> None:
    case = Case("bart", np.random.randint(0, 8, (200, 3)), (8, 8, 8))
    every, best = case.constrained(END, 9), case.constrained(END, 9, num_return_sequences=4)
    assert torch.equal(best.codes, every.codes[:, :4]) and torch.equal(best.nodes, every.nodes[:, :4])
    assert torch.equal(best.sequences.view(3, 4, -1), every.sequences.view(3, 9, -1)[:, :4])
    assert torch.equal(best.sequences_scores.view(3, 4), every.sequences_scores.view(3, 9)[:, :4])
    alone = case.constrained(END, 1)
    greedy = case.model.generate(
        **case.prompts, max_new_tokens=4, num_beams=1, do_sample=False, logits_processor=[case.processor(END)]
    )
    assert torch.equal(alone.sequences, greedy)


def test_the_mask_is_told_from_padding() -> None:
    case = Case("qwen2", np.random.randint(0, 8, (100, 2)), (8, 8))
    given = case.constrained(END, 4)
    told = constrained_generate(
        case.model, case.trie, case.prompts["input_ids"], token_offsets=case.offsets, num_beams=4, eos_token_id=END
    )
    assert torch.equal(given.sequences_scores, told.sequences_scores)


def allowed(scores: Tensor) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in scores > -torch.inf]


TRIE = Trie.from_codes([[0], [1, 0], [1, 2], [3, 3, 1]], codebook_sizes=[4, 4, 4])
OFFSETS = [5, 10, 20]


def test_what_may_follow() -> None:
    """Root, prefixes, a prefix that is complete too, after the end, off the trie; and the kept scores are as given."""
    process = TrieLogitsProcessor(TRIE, OFFSETS, start=1, eos_token_id=END)
    scores = torch.randn(4, 30)
    constrained = process(torch.full((4, 1), PAD), scores)
    assert allowed(constrained) == [[5, 6, 8]] * 4
    assert torch.equal(constrained[:, [5, 6, 8]], scores[:, [5, 6, 8]])
    assert allowed(process(torch.tensor([[0, 5], [0, 6], [0, 7], [0, 9]]), scores)) == [[1], [10, 12], [1], [1]]
    assert allowed(process(torch.tensor([[0, 5, 1], [0, 6, 12], [0, 8, 13], [0, 8, 10]]), scores)) == [
        [1],
        [1],
        [21],
        [1],
    ]
    assert allowed(process(torch.tensor([[0, 8, 13, 21]] * 3 + [[0, 8, 13, 20]]), scores)) == [[1]] * 4
    assert allowed(process(torch.tensor([[0, 8, 13, 21, 1, 1]] * 4), scores)) == [[1]] * 4


def test_a_token_just_below_a_level_is_no_end() -> None:
    """Its code would be -1, which marks the end of a sequence in the trie."""
    process = TrieLogitsProcessor(TRIE, OFFSETS, start=0, eos_token_id=END, off_trie="keep")
    scores = torch.randn(1, 30)
    assert torch.equal(process(torch.tensor([[5, 9]]), scores), scores)


def test_a_prefix_with_no_continuation() -> None:
    """generate's own processor raises; ours ends the row, or leaves it as it is, as asked."""
    case = Case("t5", [[0, 1], [2, 3]], (4, 4))

    def nothing(request: int, ids: Tensor) -> list[int]:
        return [case.offsets[0]] if len(ids) == 1 else []

    with pytest.raises(ValueError, match="empty list"):
        case.generate(END, 2, prefix_allowed_tokens_fn=nothing)

    ids, scores = torch.tensor([[PAD, case.offsets[0] + 1]]), torch.randn(1, case.vocabulary)
    ended = case.processor(END)(ids, scores)
    assert allowed(ended) == [[END]] and ended[0, END] == scores[0, END]
    assert torch.equal(case.processor(END, off_trie="keep")(ids, scores), scores)
    assert torch.equal(case.processor(None)(ids, scores), scores)
    complete = torch.tensor([[PAD, *case.tokens(0)]])
    assert torch.equal(case.processor(None)(complete, scores), scores)
    assert allowed(case.processor(END, off_trie="keep")(complete, scores)) == [[END]]

    empty = case.trie.filter(items=[])
    root = torch.tensor([[PAD]])
    assert allowed(case.processor(END, filters=empty)(root, scores)) == [[END]]
    assert torch.equal(case.processor(None, filters=empty)(root, scores), scores)


def test_a_start_token() -> None:
    """Each row begins behind its own last marker; one without a marker is left alone."""
    process = TrieLogitsProcessor(TRIE, OFFSETS, start_token_id=3, eos_token_id=END)
    ids = torch.tensor([[4, 4, 4, 3], [3, 5, 3, 6], [4, 3, 8, 13], [4, 4, 4, 4], [3, 8, 13, 21], [4, 4, 3, 8]])
    scores = torch.randn(6, 30)
    constrained = process(ids, scores)
    assert allowed(constrained) == [[5, 6, 8], [10, 12], [21], list(range(30)), [1], [13]]
    filters = [TRIE.filter(items=[2, 3]), TRIE.filter(items=[1]), None]
    process = TrieLogitsProcessor(TRIE, OFFSETS, start_token_id=3, eos_token_id=END, filters=filters)
    assert allowed(process(ids, scores)) == [[6, 8], [12], [1], list(range(30)), [1], [13]]
    process = TrieLogitsProcessor(TRIE, OFFSETS, start_token_id=3, off_trie="keep")
    assert allowed(process(ids, scores)) == [[5, 6, 8], [10, 12], [21], list(range(30)), list(range(30)), [13]]


def test_an_empty_trie() -> None:
    trie = Trie.from_codes(torch.empty(0, 2, dtype=torch.int64), codebook_sizes=[4, 4])
    scores = torch.randn(2, 30)
    process = TrieLogitsProcessor(trie, [5, 9], start=1, eos_token_id=END)
    assert allowed(process(torch.tensor([[0], [0]]), scores)) == [[END], [END]]
    assert allowed(process(torch.tensor([[0, 5], [0, 6]]), scores)) == [[END], [END]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_of_any_dtype(dtype: torch.dtype) -> None:
    scores = torch.randn(2, 30, dtype=dtype)
    constrained = TrieLogitsProcessor(TRIE, OFFSETS, start=1)(torch.tensor([[0, 6], [0, 8]]), scores)
    assert constrained.dtype == dtype and allowed(constrained) == [[10, 12], [13]]
    assert constrained[0, 12] == scores[0, 12]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"start": None}, ValueError, "exactly one of start and start_token_id"),
        ({"start_token_id": 3}, ValueError, "exactly one of start and start_token_id"),
        ({"start": -1}, ValueError, "start must be at least 0"),
        ({"token_offsets": [5, 10]}, ValueError, "token_offsets must have one entry per level"),
        ({"token_offsets": [5, 10, 2.5]}, TypeError, r"token_offsets\[2\] must be an integer"),
        ({"token_offsets": 5}, TypeError, "token_offsets must be a sequence"),
        ({"eos_token_id": 12}, ValueError, "eos_token_id must not be the token of a code; 12 is code 2 of level 1"),
        ({"trie": [[1]]}, TypeError, "trie must be a Trie"),
        ({"off_trie": "error"}, ValueError, "off_trie must be one of"),
        ({"off_trie": "eos"}, ValueError, "needs an eos_token_id"),
        ({"filters": Trie.from_codes([[1]]).filter(items=[0])}, ValueError, "filters belongs to another trie"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TrieLogitsProcessor(**{"trie": TRIE, "token_offsets": OFFSETS, "start": 1, **options})


def test_wrong_calls() -> None:
    ids, scores = torch.tensor([[0, 6], [0, 8]]), torch.randn(2, 30)
    with pytest.raises(ValueError, match="start must be at most the number of tokens so far, 2; got 3"):
        TrieLogitsProcessor(TRIE, OFFSETS, start=3)(ids, scores)
    with pytest.raises(ValueError, match=r"token_offsets\[2\] must leave room for the 4 codes"):
        TrieLogitsProcessor(TRIE, OFFSETS, start=1)(ids, scores[:, :23])
    with pytest.raises(ValueError, match="eos_token_id must be below"):
        TrieLogitsProcessor(TRIE, OFFSETS, start=1, eos_token_id=30)(ids, scores)
    with pytest.raises(ValueError, match="filters must have one entry per request; got 3 for 2 rows"):
        TrieLogitsProcessor(TRIE, OFFSETS, start=1, filters=[None] * 3)(ids, scores)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_beams": 0}, ValueError, "num_beams must be at least 1"),
        ({"num_return_sequences": 9}, ValueError, "num_return_sequences must be at least 1 and at most 4"),
        ({"normalize": "none"}, ValueError, "normalize must be one of"),
        ({"early_stopping": 3}, ValueError, "early_stopping must be"),
        ({"length_penalty": float("nan")}, ValueError, "length_penalty must be finite"),
        ({"token_offsets": [5, 5000]}, ValueError, r"token_offsets\[1\] must leave room"),
        (
            {"input_ids": torch.zeros(0, 3, dtype=torch.int64), "attention_mask": None},
            ValueError,
            "at least one request",
        ),
        ({"attention_mask": torch.ones(1, 9)}, ValueError, "attention_mask must have shape"),
        ({"filters": [None]}, ValueError, "filters must have one entry per request"),
    ],
)
def test_wrong_arguments_of_constrained_generate(options: dict[str, Any], error: type[Exception], message: str) -> None:
    case = Case("gpt2", [[0, 1], [2, 3]], (4, 4))
    given = {**case.prompts, "token_offsets": case.offsets, "num_beams": 4, **options}
    with pytest.raises(error, match=message):
        constrained_generate(case.model, case.trie, **given)


def test_prompts_padded_on_the_right() -> None:
    case = Case("gpt2", [[0, 1], [2, 3]], (4, 4), batch=1)
    with pytest.raises(ValueError, match="padded on the left"):
        constrained_generate(
            case.model, case.trie, torch.tensor([[7, 8, PAD]]), token_offsets=case.offsets, num_beams=2
        )


def test_without_transformers() -> None:
    """The package imports; the names that need transformers say what to install."""
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import dgi.integrations\n"
        "try: dgi.integrations.TrieLogitsProcessor\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'dgi-kernels[hf]'" in done.stdout
