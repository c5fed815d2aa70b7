"""How codes are spelt: by offsets or by tables, and which end tokens are refused."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="needs transformers: pip install 'dgi-kernels[hf]'")
from dgi.integrations import TrieLogitsProcessor, constrained_generate  # noqa: E402
from dgi.integrations.tokens import CodeTokens  # noqa: E402
from dgi_kernels import Trie  # noqa: E402
from tests.dgi.integrations.cases import END, Case, assert_same, ragged_codes  # noqa: E402

TRIE = Trie.from_codes([[0], [1, 0], [1, 2], [3, 3, 1]], codebook_sizes=[4, 4, 4])
TABLES = [torch.tensor([5, 9, 6, 8]), torch.tensor([10, 11, 12, 13]), torch.tensor([23, 20, 22, 21])]


def string_sorted_tables(case: Case) -> tuple[list[Tensor], Tensor]:
    """The tokens of each level, in the order of their names as strings; and where each token of the offsets went."""
    moved, tables = torch.arange(case.vocabulary), []
    for offset, size in zip(case.offsets, case.trie.codebook_sizes, strict=True):
        place = torch.tensor(sorted(range(size), key=str)).argsort()  # code c is the place[c]-th name
        tables.append(offset + place)
        moved[offset + torch.arange(size)] = offset + place
    return tables, moved


@pytest.mark.parametrize("family", ["t5", "gpt2"])
@pytest.mark.parametrize("end", [END, None])
def test_tables_of_a_tokenizer_that_sorts_names(family: str, end: int | None) -> None:
    """A model whose embeddings are permuted as its tokens are finds the same semantic IDs with the same scores."""
    sizes = (12, 11, 25)
    case = Case(family, ragged_codes(200, sizes) if end else np.random.randint(0, sizes, (300, 3)), sizes)
    by_offsets = case.constrained(end, 6)
    tables, moved = string_sorted_tables(case)
    for weight in {case.model.get_input_embeddings().weight, case.model.get_output_embeddings().weight}:
        weight.data = weight.data[moved.argsort()]
    case.prompts["input_ids"] = moved[case.prompts["input_ids"]]
    options: dict[str, Any] = {"num_beams": 6, "eos_token_id": end}
    ours = constrained_generate(case.model, case.trie, **case.prompts, token_ids=tables, **options)
    torch.testing.assert_close(ours.sequences_scores, by_offsets.sequences_scores, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.nodes, by_offsets.nodes)
    assert torch.equal(ours.sequences[:, case.start :], moved[by_offsets.sequences[:, case.start :]])
    processor = TrieLogitsProcessor(case.trie, token_ids=tables, start=case.start, eos_token_id=end)
    assert_same(case.generate(end, 6, logits_processor=[processor]), ours, 3)


def test_tables_spell_and_read_back() -> None:
    for tables in (TABLES, [list(range(5, 9)), np.arange(10, 14), torch.arange(20, 24, dtype=torch.int32)]):
        tokens = CodeTokens(TRIE, None, tables, END)
        codes = torch.randint(4, (50, 3))
        spelt = tokens.encode(codes, 0)
        for level, table in enumerate(tables):
            assert torch.equal(spelt[:, level], torch.as_tensor(table).long()[codes[:, level]])
        assert torch.equal(tokens.decode(spelt), codes)
        scores = torch.randn(2, 5, 30)
        for level, table in enumerate(tables):
            assert torch.equal(tokens.level(scores, level), scores[..., torch.as_tensor(table).long()])
    assert tokens.encode(torch.tensor([1, -1, -1]), 0).tolist() == [6, 0, 0]
    foreign = CodeTokens(TRIE, None, TABLES, END).decode(torch.tensor([[7, 14, 99], [1, 1, 1], [5, 5, 5]]))
    assert (foreign[0] >= 4).all() and (foreign[1] == -1).all() and foreign[2, 0] == 0 and (foreign[2, 1:] >= 4).all()


def test_an_end_token_among_the_numbers_of_a_level() -> None:
    """Codes that are token ids, offsets 0: token 1 lies below every level's size, but no code is 1."""
    ids = [[50, 60, 70], [50, 61], [120, 7]]
    trie = Trie.from_codes(ids)
    processor = TrieLogitsProcessor(trie, [0, 0, 0], start=1, eos_token_id=END)
    scores = torch.randn(3, 130)
    constrained = processor(torch.tensor([[0, 50], [0, 120], [0, 7]]), scores)
    assert [row.nonzero()[:, 0].tolist() for row in constrained > -torch.inf] == [[60, 61], [7], [END]]
    with pytest.raises(ValueError, match="eos_token_id must not be the token of a code; 7 is code 7 of level 1"):
        TrieLogitsProcessor(trie, [0, 0, 0], start=1, eos_token_id=7)

    added = trie.update(add=([[50, END, 2]], [10]))
    with pytest.raises(ValueError, match="1 is code 1 of level 1"):
        TrieLogitsProcessor(added, [0, 0, 0], start=1, eos_token_id=END)
    TrieLogitsProcessor(added.update(remove=[10]), [0, 0, 0], start=1, eos_token_id=END)
    TrieLogitsProcessor(trie.update(remove=[2]), [0, 0, 0], start=1, eos_token_id=7)  # no item left that spells it


@pytest.mark.parametrize("spelling", [{"token_offsets": [5, 10, 20]}, {"token_ids": TABLES}], ids=["offsets", "tables"])
def test_a_start_token_that_a_code_has(spelling: dict[str, Any]) -> None:
    """Behind that code the semantic ID would seem to begin again."""
    with pytest.raises(ValueError, match="start_token_id must not be the token of a code; 12 is code 2 of level 1"):
        TrieLogitsProcessor(TRIE, **spelling, start_token_id=12)
    TrieLogitsProcessor(TRIE, **spelling, start_token_id=3)


def test_codes_that_are_token_ids() -> None:
    case = Case("t5", [[random.randrange(5, 40) for _ in range(3)] for _ in range(100)], (40, 40, 40))
    case.offsets = [0, 0, 0]
    expected = case.generate(END, 5, prefix_allowed_tokens_fn=case.allowed_tokens(END))
    assert torch.equal(case.generate(END, 5, logits_processor=[case.processor(END)]).sequences, expected.sequences)
    assert_same(expected, case.constrained(END, 5), 3)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (TABLES[:2], "token_ids must have one tensor per level of the trie, 3; got 2"),
        (5, "token_ids must be a sequence of 3 integer tensors"),
        ([*TABLES[:2], TABLES[2][:3]], r"token_ids\[2\] must have shape \(K_2,\)"),
        ([*TABLES[:2], torch.tensor([23, 20, 23, 21])], r"token_ids\[2\] must not repeat a token; 23 is that of code"),
        ([*TABLES[:2], torch.tensor([23, 20, -1, 21])], r"token_ids\[2\] must hold tokens of at least 0; got -1"),
        ([*TABLES[:2], torch.tensor([23.0, 20, 22, 21])], r"token_ids\[2\] must have dtype"),
        ([*TABLES[:2], ["a", "b", "c", "d"]], r"token_ids\[2\] must be an integer tensor"),
        (
            [*TABLES[:2], torch.tensor([23, END, 22, 21])],
            "eos_token_id must not be the token of a code; 1 is code 1 of le",
        ),
    ],
)
def test_wrong_tables(tables: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        TrieLogitsProcessor(TRIE, token_ids=tables, start=1, eos_token_id=END)


def test_wrong_tokens() -> None:
    for given in ({}, {"token_offsets": [5, 10, 20], "token_ids": TABLES}):
        with pytest.raises(ValueError, match="exactly one of token_offsets and token_ids must be given"):
            TrieLogitsProcessor(TRIE, **given, start=1)
    process = TrieLogitsProcessor(TRIE, token_ids=TABLES, start=1)
    with pytest.raises(ValueError, match=r"token_ids\[2\] must be below the size of .* vocabulary, 23; got 23"):
        process(torch.tensor([[0]]), torch.randn(1, 23))
    for ends, message in (
        ([], "at least one"),
        ([1, 1], "must not repeat"),
        ([1, -2], r"eos_token_id\[1\] must be at"),
        ("1", "must be an integer"),
        (1.5, "must be an integer"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            TrieLogitsProcessor(TRIE, [5, 10, 20], start=1, eos_token_id=ends)
