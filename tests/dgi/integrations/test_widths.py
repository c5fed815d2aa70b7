"""Generation whose number of beams differs by level, against a search that reads every prefix again."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="needs transformers: pip install 'dgi-kernels[hf]'")

from tests.dgi.integrations.cases import END, Case, DecoderOnly, EncoderDecoder  # noqa: E402

Rows = list[tuple[float, list[int]]]


def next_logp(case: Case, request: int, tokens: list[int], penalty: float) -> Tensor:
    """Log-probabilities (V,) behind a prompt and some tokens; tokens that have come before are penalised."""
    ids = case.prompts["input_ids"][request][case.prompts["attention_mask"][request].bool()][None]
    if case.family in EncoderDecoder:
        start = case.model.config.decoder_start_token_id
        seen = torch.tensor([[start, *tokens]])
        logits = case.model(input_ids=ids, decoder_input_ids=seen).logits
    else:
        seen = torch.cat([ids, torch.tensor([tokens], dtype=torch.int64)], 1)
        logits = case.model(input_ids=seen).logits
    logp = logits[0, -1].double().log_softmax(-1)
    before = seen.unique()
    return logp.scatter(0, before, logp[before] * penalty)


def brute_force(case: Case, request: int, widths: list[int], end: int | None, penalty: float) -> Rows:
    """(score, tokens), the best first."""
    beams: Rows = [(0.0, [])]
    for width in widths:
        candidates = []
        for score, tokens in beams:
            logp = next_logp(case, request, tokens, penalty)
            spelt = [case.tokens(item) for item in range(len(case.codes))]
            following = {row[len(tokens)] for row in spelt if row[: len(tokens)] == tokens}
            candidates += [(score + float(logp[token]), [*tokens, token]) for token in following]
        beams = sorted(candidates, reverse=True)[:width]
    if end is not None:
        beams = [(score + float(next_logp(case, request, tokens, penalty)[end]), tokens) for score, tokens in beams]
    length = len(widths) + (end is not None)
    return sorted(((score / length, tokens) for score, tokens in beams), reverse=True)


@pytest.mark.parametrize("family", [*EncoderDecoder, *DecoderOnly])
@pytest.mark.parametrize(("end", "widths"), [(END, [2, 7, 5]), (None, [9, 4, 6])], ids=["end", "no end"])
@pytest.mark.parametrize("penalty", [1.0, 1.5], ids=["plain", "penalised"])
def test_each_level_keeps_its_own_number(family: str, end: int | None, widths: list[int], penalty: float) -> None:
    case = Case(family, np.random.randint(0, (6, 7, 5), (60, 3)), (6, 7, 5), batch=2)
    options = {} if penalty == 1.0 else {"repetition_penalty": penalty}
    if family in DecoderOnly and options:
        case.prompts["attention_mask"].fill_(1)  # a penalty looks at padding too
    ours = case.constrained(end, widths, **options)
    scores = ours.sequences_scores.view(2, widths[-1])
    with torch.no_grad():
        for request in range(2):
            expected = brute_force(case, request, widths, end, penalty)
            found = [
                (score, [offset + code for offset, code in zip(case.offsets, codes, strict=True)])
                for score, codes in zip(scores[request].tolist(), ours.codes[request].tolist(), strict=True)
                if score > -math.inf
            ]
            assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-4)
            if len({round(score, 3) for score, _ in expected}) == len(expected):
                assert [tokens for _, tokens in found] == [tokens for _, tokens in expected]


def test_as_many_are_returned_as_survive_the_last_level() -> None:
    case = Case("gpt2", np.random.randint(0, (6, 7), (60, 2)), (6, 7))
    with pytest.raises(ValueError, match="num_return_sequences must be at least 1 and at most 3; got 5"):
        case.constrained(None, [8, 3], num_return_sequences=5)
    assert case.constrained(None, [8, 3], num_return_sequences=2).codes.shape == (3, 2, 2)
    with pytest.raises(ValueError, match="num_beams must be an integer, or have one per level of the trie, 2"):
        case.constrained(None, [8, 3, 2])


@pytest.mark.parametrize("end", [END, None], ids=["end", "no end"])
@pytest.mark.parametrize("normalize", ["vocabulary", "full"])
def test_node_scores_are_part_of_the_scores(end: int | None, normalize: str) -> None:
    """With as many beams as semantic IDs, each has its own score and the share of its items' weight on top."""
    case = Case("t5", np.random.randint(0, (4, 5), (30, 2)), (4, 5), batch=2)
    weights = torch.rand(30) + 0.01
    strength = torch.tensor([0.7, -1.3])
    options = {"normalize": normalize, "length_penalty": 0.0, "early_stopping": False}
    plain = case.constrained(end, 20, **options)
    ours = case.constrained(end, 20, node_scores=case.trie.node_scores(weights), strength=strength, **options)
    shares = {
        tuple(code): float(sum(weights[i] for i, own in enumerate(case.codes) if own == code) / weights.sum())
        for code in case.codes
    }
    for request in range(2):
        scores = {
            tuple(code): score
            for code, score in zip(
                plain.codes[request].tolist(), plain.sequences_scores.view(2, 20)[request].tolist(), strict=True
            )
            if score > -math.inf
        }
        assert scores.keys() == shares.keys()
        expected = {code: score + float(strength[request]) * math.log(shares[code]) for code, score in scores.items()}
        found = ours.sequences_scores.view(2, 20)[request]
        live = found > -math.inf
        assert found[live].tolist() == sorted(found[live].tolist(), reverse=True)
        codes = map(tuple, ours.codes[request][live].tolist())
        assert dict(zip(codes, found[live].tolist(), strict=True)) == pytest.approx(expected, abs=1e-4)
