"""The search handed to ``generate`` as its ``custom_generate``, against ``constrained_generate``; string keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install 'dgi-kernels[hf]'")
from transformers import GenerationConfig, MaxTimeCriteria, StoppingCriteriaList  # noqa: E402

from dgi.integrations import TrieSearch  # noqa: E402
from tests.dgi.integrations.cases import END, Case, ragged_codes  # noqa: E402

SIZES = (6, 9, 7)
SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "by name": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "length_penalty": 0.3, "early_stopping": True},
    "of the encoder": {"encoder_no_repeat_ngram_size": 1, "encoder_repetition_penalty": 1.4},
}


def generate(case: Case, search: TrieSearch, beams: int = 5, **options: Any) -> Any:
    return case.model.generate(
        **case.prompts,
        **{"max_new_tokens": 8, "num_beams": beams, "num_return_sequences": beams, "do_sample": False} | options,
        eos_token_id=END,
        return_dict_in_generate=True,
        output_scores=True,
        custom_generate=search,
    )


@pytest.mark.parametrize("family", ["t5", "bart", "gpt2", "qwen2"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_generate_hands_over_to_the_search(family: str, settings: str) -> None:
    """Guards inputs that generate has repeated for every beam: rows, masks, positions and what the encoder gave."""
    case = Case(family, ragged_codes(150, SIZES), SIZES)
    ours = generate(case, TrieSearch(case.trie, case.offsets, eos_token_id=END), **SETTINGS[settings])
    wanted = case.constrained(END, 5, **SETTINGS[settings])
    for name, value in dict(wanted).items():
        assert torch.equal(ours[name], value), name


def test_fewer_results_beams_by_level_filters_and_plain_sequences() -> None:
    case = Case("t5", np.random.randint(0, SIZES, (200, 3)), SIZES)
    allowed = case.trie.filter(items=range(0, 200, 3))
    search = TrieSearch(
        case.trie, case.offsets, eos_token_id=END, num_beams=[3, 7, 5], filters=[allowed, None, allowed]
    )
    config = GenerationConfig(num_beams=5, num_return_sequences=2, max_new_tokens=4, eos_token_id=END)
    found = case.model.generate(**case.prompts, generation_config=config, custom_generate=search)
    wanted = case.constrained(END, [3, 7, 5], num_return_sequences=2, filters=[allowed, None, allowed])
    assert isinstance(found, torch.Tensor) and torch.equal(found, wanted.sequences)


def test_one_beam_is_not_repeated() -> None:
    case = Case("gpt2", ragged_codes(50, SIZES), SIZES)
    found = generate(case, TrieSearch(case.trie, case.offsets, eos_token_id=END), beams=1)
    assert torch.equal(found.sequences, case.constrained(END, 1).sequences)


def test_what_cannot_be_followed_is_refused() -> None:
    case = Case("t5", ragged_codes(50, SIZES), SIZES)
    search = TrieSearch(case.trie, case.offsets, eos_token_id=END)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 4, .* generate would stop at 3"):
        generate(case, search, max_new_tokens=3)
    with pytest.raises(ValueError, match="prefix_allowed_tokens_fn must not be given with a TrieSearch"):
        generate(case, search, prefix_allowed_tokens_fn=case.allowed_tokens(END))
    with pytest.raises(ValueError, match="stopping_criteria must not be given with a TrieSearch.*MaxTimeCriteria"):
        generate(case, search, stopping_criteria=StoppingCriteriaList([MaxTimeCriteria(9.0)]))
    with pytest.raises(ValueError, match=r"num_beams of the search must end with the 5 of generate; got \[3, 7, 4\]"):
        generate(case, TrieSearch(case.trie, case.offsets, num_beams=[3, 7, 4]))
    with pytest.raises(ValueError, match="do_sample=True .* cannot be followed"):
        generate(case, search, do_sample=True)
    with pytest.raises(ValueError, match="exactly one of token_offsets and token_ids must be given"):
        TrieSearch(case.trie)


def test_results_have_the_string_keys_of_generate() -> None:
    case = Case("t5", ragged_codes(50, SIZES), SIZES)
    found = case.constrained(END, 3)
    assert found["sequences"] is found.sequences is found[0] and found["sequences_scores"] is found[1]
    assert dict(found).keys() == {"sequences", "sequences_scores", "codes", "nodes"}
    assert "sequences" in found and "scores" not in found and found.codes in found
    assert found.get("nodes") is found.nodes and found.get("scores") is None
    assert [len(part) for part in found[1:3]] == [9, 3]
    with pytest.raises(KeyError, match="scores"):
        found["scores"]


def test_a_search_of_whole_sequences() -> None:
    """What others give their dict tries, GENRE's among them: start token, semantic ID, end token."""
    codes = ragged_codes(40, SIZES)
    case = Case("t5", codes, SIZES)
    rows = [
        [0, *(offset + int(code) for offset, code in zip(case.offsets, row, strict=False) if code >= 0), END]
        for row in codes
    ]
    expected = generate(case, TrieSearch(case.trie, case.offsets, eos_token_id=END))
    found = generate(case, TrieSearch.of_sequences(iter(rows)))
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.sequences_scores, expected.sequences_scores)
    narrow = generate(case, TrieSearch.of_sequences(rows, num_beams=[2, 3, 5]))
    wanted = generate(case, TrieSearch(case.trie, case.offsets, eos_token_id=END, num_beams=[2, 3, 5]))
    assert torch.equal(narrow.sequences, wanted.sequences)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0, 5, 1], [0, 1]], "one has fewer than 3"),
        ([[0, 5, 1], [2, 5, 1]], r"begin with the same token; got \[0, 2\]"),
        ([[0, 5, 1], [0, 5, 3]], r"end with the same token; got \[1, 3\]"),
        ([], "begin with the same token"),
    ],
)
def test_sequences_that_are_none(rows: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrieSearch.of_sequences(rows)
