"""The interfaces of others over our ops, against plain Python on small inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgi.integrations import GridBeamSearch, RqVaeGeneration, SidGrBeamSearch, extend_beams
from dgi_kernels import Trie

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'dgi-kernels[hf]'")
from dgi.integrations import (  # noqa: E402
    ConstrainedLogitsProcessor,
    TrieItemMaskProvider,
    prefix_allowed_tokens_fn,
)
from dgi.integrations.mask_adapters import FRESH_PAGES  # noqa: E402

SIZE, LEVELS, OFFSETS, END, VOCABULARY = 5, 3, (10, 20, 30), 3, 40


def some_codes(items: int = 12) -> list[tuple[int, ...]]:
    return [tuple(row) for row in torch.randint(0, SIZE, (items, LEVELS)).tolist()]


def brute_force(
    codes: Iterable[tuple[int, ...]], logp_of: Any, widths: list[int]
) -> list[tuple[float, tuple[int, ...]]]:
    """Beam search of one request over dict-like prefixes; ``logp_of(prefix)`` is a list of log-probabilities."""
    beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for level, width in enumerate(widths):
        found = {
            (*prefix, code): score + logp_of(prefix)[code]
            for score, prefix in beams
            for code in {row[level] for row in codes if row[:level] == prefix}
        }
        beams = sorted(((score, prefix) for prefix, score in found.items()), reverse=True)[:width]
    return beams


class Tables:
    """A model of logits that depend on request, level, and the last code."""

    def __init__(self, batch: int) -> None:
        self.logits = 2 * torch.randn(batch, LEVELS, SIZE + 1, SIZE)

    def of(self, request: int, prefix: tuple[int, ...]) -> Tensor:
        return self.logits[request, len(prefix), prefix[-1] if prefix else SIZE]

    def all(self, codes: Tensor | None) -> Tensor:
        """(B, M, K) of codes (B, M, t)."""
        batch = range(len(self.logits))
        if codes is None:
            return torch.stack([self.of(b, ())[None] for b in batch])
        return torch.stack([torch.stack([self.of(b, tuple(row)) for row in codes[b].tolist()]) for b in batch])

    def logp_of(self, request: int) -> Any:
        return lambda prefix: self.of(request, prefix).double().log_softmax(-1).tolist()


def assert_found(
    codes: Tensor, scores: Tensor, items: list[tuple[int, ...]], tables: Tables, widths: list[int]
) -> None:
    for b in range(len(codes)):
        expected = brute_force(set(items), tables.logp_of(b), widths)
        live = scores[b] > -math.inf
        assert scores[b][live].tolist() == pytest.approx([score for score, _ in expected], abs=1e-5)
        assert list(map(tuple, codes[b][live].tolist())) == [prefix for _, prefix in expected]
        assert (codes[b][~live] >= 0).all()  # so that a model can embed them


@pytest.mark.parametrize("widths", [[7, 7, 7], [2, 9, 30]], ids=str)
def test_sid_gr_beam_search(widths: list[int]) -> None:
    items, tables = some_codes(), Tables(3)
    search = SidGrBeamSearch(widths, LEVELS, [SIZE] * LEVELS, torch.tensor(items), prefix_valid_check=True)
    previous = torch.empty(0)
    for step in range(LEVELS):
        sids, log_probs = search.propagate(tables.all(search.generated_sids).log_softmax(-1))
        assert sids.shape[2] == step + 1 and search.parent_indices[step].shape == log_probs.shape
        if step:
            before = sids[:, :, :-1]
            parents = search.parent_indices[step].unsqueeze(2).expand_as(before)
            assert torch.equal(before, previous.gather(1, parents))
        previous = sids
    assert search.get_sids() is sids and search.get_log_probs() is log_probs
    assert torch.equal(search.get_sids(1), sids[:, :, 1])
    kept = [min(width, SIZE * before) for width, before in zip(widths, [1, *widths], strict=False)]
    assert_found(sids, log_probs, items, tables, kept)
    with pytest.raises(ValueError, match="Reached the last hierarchy"):
        search.propagate(log_probs.unsqueeze(2))
    search.reset()
    assert search.step == 0 and search.get_sids() is None


class FakeCache:
    """Notes by which rows it was reordered."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None

    def reorder_cache(self, rows: Tensor) -> None:
        self.rows = rows


def test_grid_beam_search() -> None:
    items, tables, width = some_codes(), Tables(2), 6

    class Model(GridBeamSearch):
        codebooks, num_embeddings_per_hierarchy = torch.tensor(items), SIZE
        top_k_for_generation, num_hierarchies = width, LEVELS

    model, codes, probas = Model(), None, None
    for level in range(LEVELS):
        cache, before = FakeCache(), codes
        logits = tables.all(codes).flatten(0, 1)
        codes, probas, found = model._beam_search_one_step(logits, codes, probas, cache, level, 2)
        if before is None:
            assert isinstance(found, transformers.EncoderDecoderCache)
        else:
            assert found is cache and cache.rows is not None
            assert torch.equal(codes[:, :, :-1].flatten(0, 1), before.flatten(0, 1)[cache.rows])
    assert codes is not None and probas is not None
    assert_found(codes, probas.log(), items, tables, [width] * LEVELS)


def test_rq_vae_generation() -> None:
    items, tables, width = some_codes(), Tables(2), 6

    class Model(RqVaeGeneration):
        codebooks, num_embeddings_per_hierarchy = torch.tensor(items), SIZE
        top_k_for_generation, num_hierarchies = width, LEVELS
        decoder_mlp = [nn.Identity()] * LEVELS

        def encoder_forward_pass(
            self, attention_mask: Tensor, input_ids: Tensor, user_id: Any
        ) -> tuple[Tensor, Tensor]:
            return input_ids.float(), attention_mask

        def decoder_forward_pass(self, future_ids: Tensor | None, encoder_output: Tensor, **rest: Any) -> Any:
            assert (
                len(encoder_output)
                == len(rest["attention_mask_for_encoder"])
                == (2 if future_ids is None else 2 * width)
            )
            assert encoder_output[:, 0].tolist() == [b for b in range(2) for _ in range(len(encoder_output) // 2)]
            codes = None if future_ids is None else future_ids.view(2, width, -1)
            return tables.all(codes).flatten(0, 1).unsqueeze(1), rest["past_key_values"]

    codes, scores = Model().generate(torch.ones(2, 1), torch.arange(2).unsqueeze(1))
    assert_found(codes, scores, items, tables, [width] * LEVELS)


def test_the_trie_of_other_codebooks_is_another() -> None:
    model = type("Model", (GridBeamSearch,), {})()
    model.num_embeddings_per_hierarchy = SIZE
    model.codebooks = torch.tensor([[0, 1]])
    first = model.trie_of_codebooks()
    assert model.trie_of_codebooks() is first
    model.codebooks = torch.tensor([[2, 1]])
    assert model.trie_of_codebooks().children(0, 0).tolist() == [2]


def test_extend_beams_takes_options() -> None:
    trie = Trie.from_codes([[0], [1], [2]])
    codes, scores, rows = extend_beams(
        trie, torch.zeros(2, 3), None, None, 2, normalize="none", filters=[trie.filter(items=[2]), None]
    )
    assert codes.tolist() == [[[2], [0]], [[0], [1]]] and scores.tolist() == [[0.0, -math.inf], [0.0, 0.0]]
    assert rows.tolist() == [0, 0, 1, 1]


def allowed_by_hand(rows: list[list[int]], prefix: list[int], end: int | None) -> set[int]:
    if end is not None and end in prefix:
        return {end}
    following = {row[len(prefix)] for row in rows if row[: len(prefix)] == prefix and len(row) > len(prefix)}
    return following | ({end} if end is not None and prefix in rows else set())


@pytest.mark.parametrize("vocabulary", [VOCABULARY, FRESH_PAGES])
@pytest.mark.parametrize("end", [END, None])
def test_item_masks(end: int | None, vocabulary: int) -> None:
    codes = [list(row[: 2 + i % 2]) for i, row in enumerate(some_codes())]
    rows = [[offset + code for offset, code in zip(OFFSETS, row, strict=False)] for row in codes]
    trie = Trie.from_codes(codes, codebook_sizes=[SIZE] * LEVELS)
    masks = TrieItemMaskProvider(trie, vocab_size=vocabulary, eos_token_id=end, token_offsets=OFFSETS)
    assert set(masks.initial_mask(None).nonzero()[:, 0].tolist()) == allowed_by_hand(rows, [], end)
    for length in (1, 2, 3):
        prefixes = [row[:length] for row in rows if len(row) >= length] + [[11, 12, 13][:length]]
        if end is not None and length == 3:
            prefixes += [[*row, end] for row in rows if len(row) == 2]
        path = SimpleNamespace(steps_done=length, token_trace=lambda beam, prefixes=prefixes: prefixes[beam])
        mask = masks.step_mask(SimpleNamespace(beam_path=path), torch.zeros(1, len(prefixes), vocabulary))
        assert mask.dtype == torch.bool and mask.shape == (len(prefixes), vocabulary)
        for prefix, row in zip(prefixes, mask, strict=True):
            expected = allowed_by_hand(rows, prefix, end)
            assert set(row.nonzero()[:, 0].tolist()) == masks.allowed_next(prefix) == expected
            assert masks.is_complete(prefix) == (prefix in rows or (end is not None and prefix[:-1] in rows))
    assert masks.stop_token_ids == (() if end is None else (END,))
    strict = TrieItemMaskProvider(
        trie, vocab_size=vocabulary, eos_token_id=END, allow_eos_for_terminal=False, token_offsets=OFFSETS
    )
    assert END not in strict.allowed_next(rows[0])


def test_nvidia_items_of_beams() -> None:
    """Guards items of beams that ended early, of prefixes, and of what is no semantic ID."""
    rows = [[11, 22], [11, 22, 33], [12, 20, 30], [11, 22]]
    codes = [[token - offset for token, offset in zip(row, OFFSETS, strict=False)] for row in rows]
    masks = TrieItemMaskProvider(
        Trie.from_codes(codes), vocab_size=VOCABULARY, eos_token_id=END, token_offsets=OFFSETS, item_ids="abcd"
    )
    beams = [(11, 22, END), (11, 22, 33), (12, 20), (12, 20, 30, END), (11, 22, 33, 30), (END,)]
    items = [("a", "d"), ("b",), (), ("c",), (), ()]
    assert [masks.resolve_item_ids(beam) for beam in beams] == items
    found = masks.beam_item_results(SimpleNamespace(token_trace=lambda beam: beams[beam]), beam_width=len(beams))
    assert [one["item_ids"] for one in found] == items and [one["rank"] for one in found] == [*range(6)]
    assert [one["item_id"] for one in found] == [None, "b", None, "c", None, None]
    assert [one["is_complete"] for one in found] == [bool(item) for item in items]
    assert found[3]["token_ids"] == beams[3] and found[3]["semantic_token_ids"] == (12, 20, 30)


def test_mini_one_rec_processor() -> None:
    items = some_codes()
    rows = [[offset + code for offset, code in zip(OFFSETS, row, strict=True)] for row in items]
    processor = ConstrainedLogitsProcessor(
        Trie.from_codes(items, codebook_sizes=[SIZE] * LEVELS), 2, "gpt2", token_offsets=OFFSETS, eos_token_id=END
    )
    prompt = torch.randint(4, 9, (4, 6))
    for length in range(LEVELS + 1):
        ids = torch.cat([prompt, torch.tensor(rows[:4])[:, :length]], dim=1)
        scores = torch.randn(4, VOCABULARY)
        got = processor(ids, scores)
        for b in range(4):
            allowed = allowed_by_hand(rows, rows[b][:length], END)
            mask = torch.tensor([0.0 if token in allowed else -1e6 for token in range(VOCABULARY)])
            torch.testing.assert_close(got[b], scores[b].log_softmax(-1) + mask)


def test_lc_rec_allowed_tokens() -> None:
    items = some_codes()
    rows = [[offset + code for offset, code in zip(OFFSETS, row, strict=True)] for row in items]
    allowed = prefix_allowed_tokens_fn(
        Trie.from_codes(items, codebook_sizes=[SIZE] * LEVELS), [7, 8], token_offsets=OFFSETS, eos_token_id=END
    )
    for row in rows[:5]:
        for length in range(LEVELS + 1):
            sentence = torch.tensor([7, 8, 1, 7, 7, 8, *row[:length]])
            assert set(allowed(0, sentence)) == allowed_by_hand(rows, row[:length], END)
    assert allowed(0, torch.tensor([7, 1])) == [END]
    with pytest.raises(ValueError, match="separator must hold at least one token"):
        prefix_allowed_tokens_fn(Trie.from_codes(items), [], token_offsets=OFFSETS, eos_token_id=END)
