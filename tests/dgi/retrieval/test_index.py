"""The index: built, stored, searched; every search against scoring all items one by one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dgi.retrieval.index
from dgi.config import ModelConfig
from dgi.data import Catalog, Interactions, pad_histories
from dgi.data.batches import Batch
from dgi.evaluation.tuning import tune_cosine_weight
from dgi.model.dgi_model import DGIModel, DualEncoder
from dgi.retrieval.guide import Guide, fit_guides
from dgi.retrieval.index import DGIIndex, IndexFormatError
from dgi.retrieval.search import Requests, Searcher
from dgi.training.checkpoint import read_tensors, save_model, write_tensors
from dgi_kernels import HiddenStates, Trie, beam_search

ITEMS = 40


def make_model(**changes: Any) -> DGIModel:
    sizes = {
        "dim": 16,
        "codebook_sizes": (6, 4),
        "attention_heads": 2,
        "history_layers": 1,
        "text_layers": 1,
        "decoder_layers": 1,
        "vocabulary_size": 128,
        "max_tokens": 4,
        "max_history": 3,
    }
    model = DGIModel(ModelConfig(**{**sizes, **changes}))
    with torch.no_grad():
        model.quantizer.log_scale.copy_(torch.tensor(5.0).log())  # soft enough for all items to have a score
    return model.eval()


def make_catalog() -> Catalog:
    """Items of which every eighth has the text, and so the semantic ID, of the one before."""
    texts = [f"title{row} word{row % 3}x" if row % 8 < 6 else f"twin{row // 8}" for row in range(ITEMS)]
    return Catalog(tuple(f"Ω-{row}" for row in range(ITEMS)), tuple(texts))


@pytest.fixture
def searcher() -> Searcher:
    model, catalog = make_model(), make_catalog()
    return Searcher(model, DGIIndex.build(model, catalog), catalog)


def make_requests() -> Interactions:
    """Requests with a query, with a history, with both, and with a history longer than the model reads."""
    histories = pad_histories([[], [3], [1, 2, 30], [5, 4, 3, 2, 1]], 5)
    return Interactions(("title3", "", "word1x unknown", ""), histories, np.zeros(4, dtype=np.int64), np.zeros(4))


def batch_of(searcher: Searcher, interactions: Interactions) -> Batch:
    requests = Requests.of(searcher.model, interactions)
    return next(requests.batches(searcher.item_features, len(interactions)))[1]


@torch.no_grad()
def scores_one_by_one(searcher: Searcher, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probability (B, N, m) of the codes of each item by teacher forcing, and cosine (B, N), in float64."""
    model, codes = searcher.model, searcher.index.codes
    query = model.encode_queries(batch)
    inputs = torch.stack([book[codes[:, level]] for level, book in enumerate(model.quantizer.codebooks)], 1)
    scores = torch.zeros(len(batch), ITEMS, model.depth, dtype=torch.float64)
    for row in range(len(batch)):
        memory, mask = query.memory[row].expand(ITEMS, -1, -1), query.mask[row].expand(ITEMS, -1)
        hidden = model.decoder(inputs[:, :-1], memory, mask).double()
        for level, book in enumerate(model.quantizer.codebooks):
            cosines = F.normalize(hidden[:, level], dim=1) @ F.normalize(book.double(), dim=1).T
            logp = (model.quantizer.scale.double() * cosines).log_softmax(1)
            scores[row, :, level] = logp[torch.arange(ITEMS), codes[:, level]]
    z = model.encoder.encode_items(searcher.item_features).double()
    return scores, F.normalize(query.vector.double(), dim=1) @ F.normalize(z, dim=1).T


def same_results(a: dgi.retrieval.index.SearchResult, b: dgi.retrieval.index.SearchResult) -> bool:
    return (
        torch.equal(a.items, b.items)
        and torch.equal(a.scores, b.scores)
        and torch.equal(a.cosines, b.cosines)
        and a.ids == b.ids
    )


def test_search_ranks_all_items_as_scoring_them_one_by_one_does(searcher: Searcher) -> None:
    batch = batch_of(searcher, make_requests())
    found = searcher.index.search(searcher.model, batch, ITEMS, num_beams=ITEMS)
    levels, cosines = scores_one_by_one(searcher, batch)
    scores = levels.sum(2)
    for row, items in enumerate(found.items.tolist()):
        assert sorted(items) == list(range(ITEMS)), "every item is found once"
        torch.testing.assert_close(found.scores[row].double(), scores[row][items], atol=1e-4, rtol=0)
        torch.testing.assert_close(found.cosines[row].double(), cosines[row][items], atol=1e-5, rtol=0)
        keys = list(zip((-found.scores[row]).tolist(), (-found.cosines[row]).tolist(), items, strict=True))
        assert keys == sorted(keys), "by score, then cosine, then row"
        assert found.ids[row] == [f"Ω-{item}" for item in items]


def test_a_guide_decides_which_beams_survive_and_is_in_no_score(searcher: Searcher) -> None:
    """Level by level, against all prefixes scored one by one; one beam per level, and several."""
    index, batch, weight = searcher.index, batch_of(searcher, make_requests()), 7.0
    levels, _ = scores_one_by_one(searcher, batch)
    with torch.no_grad():
        unit = F.normalize(searcher.model.encode_queries(batch).vector.double(), dim=1)
    added = torch.stack([unit @ guide.double()[index.codes[:, level]].T for level, guide in enumerate(index.guides)], 2)
    guided = (levels + weight * added).cumsum(2)
    changed = 0
    for widths in ((1, 1), (3, 3), (2, 5)):
        found = index.search(searcher.model, batch, ITEMS, num_beams=widths, guide_weight=weight)
        plain = index.search(searcher.model, batch, ITEMS, num_beams=widths)
        changed += sum({*a} != {*b} for a, b in zip(found.ids, plain.ids, strict=True))
        for row in range(len(batch)):
            survivors = {()}
            for level, width in enumerate(widths, start=1):
                prefixes = {
                    tuple(codes[:level]): float(guided[row, item, level - 1])
                    for item, codes in enumerate(index.codes.tolist())
                    if tuple(codes[: level - 1]) in survivors
                }
                survivors = set(sorted(prefixes, key=prefixes.__getitem__, reverse=True)[:width])
            expected = {item for item, codes in enumerate(index.codes.tolist()) if tuple(codes) in survivors}
            items = [item for item in found.items[row].tolist() if item >= 0]
            assert set(items) == expected, widths
            own = found.scores[row, : len(items)].double()
            torch.testing.assert_close(own, levels[row].sum(1)[items], atol=1e-4, rtol=0)
            assert own.tolist() == sorted(own.tolist(), reverse=True), "by the decoder's score alone"
    assert changed, "or it has decided nothing"
    wide = {"num_beams": ITEMS}
    one, other = (index.search(searcher.model, batch, ITEMS, guide_weight=w, **wide) for w in (0.0, weight))
    torch.testing.assert_close(one.scores, other.scores, atol=1e-4, rtol=0)
    own = index.replaced(guide_weight=weight).search(searcher.model, batch, 5, num_beams=2)
    assert same_results(own, index.search(searcher.model, batch, 5, num_beams=2, guide_weight=weight))
    with pytest.raises(ValueError, match="guide_weight must be finite"):
        index.search(searcher.model, batch, guide_weight=float("nan"))
    with pytest.raises(ValueError, match="guide_weight must be within"):
        index.replaced(guide_weight=1e5)


def test_guides_of_half_precision_and_of_ids_that_end_early() -> None:
    """Scores without the guide are those of a search without one, also in bfloat16, and an end has no guide."""
    sids = [[0, 1, 2], [0, 1, -1], [1, 2, 0], [1, 0, 1], [2, -1, -1]]
    trie = Trie.from_codes(torch.tensor(sids), codebook_sizes=(3, 3, 3))
    books = [torch.randn(3, 8).bfloat16() for _ in range(3)]
    states = [torch.randn(2, 1 if level == 0 else 5, 8).bfloat16() for level in range(3)]
    guides = fit_guides(F.normalize(torch.randn(5, 8), dim=1), torch.tensor(sids), (3, 3, 3))

    def step(depth: int, tokens: Tensor | None, parents: Tensor | None) -> HiddenStates:
        return HiddenStates(states[depth], books[depth], 30.0)

    plain = beam_search(trie, step, batch_size=2, num_beams=5)
    guide = Guide(torch.randn(2, 8), guides, 1e-6)
    guided = guide.without(beam_search(trie, guide.guided(step), batch_size=2, num_beams=5, normalize="none"))
    assert torch.equal(guided.nodes, plain.nodes)
    torch.testing.assert_close(guided.scores, plain.scores, atol=1e-4, rtol=0)
    strong = Guide(torch.randn(2, 8), guides, 50.0)
    found = strong.without(beam_search(trie, strong.guided(step), batch_size=2, num_beams=5, normalize="none"))
    assert found.scores.isfinite().all(), "an end is found too"


def test_guides_are_means_of_what_is_left_of_the_vectors(searcher: Searcher) -> None:
    index = searcher.index
    rest = index.vectors.double()
    for level, (guide, size) in enumerate(zip(index.guides, index.trie.codebook_sizes, strict=True)):
        own = index.codes[:, level]
        for code in range(size):
            mean = rest[own == code].mean(0) if bool((own == code).any()) else torch.zeros(rest.shape[1]).double()
            torch.testing.assert_close(guide[code].double(), mean, atol=1e-6, rtol=0)
        rest = rest - guide.double()[own]


def test_items_that_share_a_semantic_id_are_all_found(searcher: Searcher) -> None:
    """Of each pair with equal texts both come, side by side, even with one beam."""
    codes = [tuple(code) for code in searcher.index.codes.tolist()]
    found = searcher.index.search(searcher.model, batch_of(searcher, make_requests()), ITEMS, num_beams=1)
    for items in found.items.tolist():
        kept = [item for item in items if item >= 0]
        assert sorted(kept) == [item for item in range(ITEMS) if codes[item] == codes[kept[0]]]
    assert searcher.index.items_of_id().tolist() == [codes.count(code) for code in codes]
    everything = searcher.search(["twin0"], k=ITEMS, num_beams=ITEMS).items[0].tolist()
    assert abs(everything.index(6) - everything.index(7)) == 1


def test_missing_results_are_padded(searcher: Searcher) -> None:
    found = searcher.search(["title3"], k=2 * ITEMS, num_beams=ITEMS)
    assert (found.items[0, ITEMS:] == -1).all() and (found.scores[0, ITEMS:] == -torch.inf).all()
    assert (found.cosines[0, ITEMS:] == -1).all() and len(found.ids[0]) == ITEMS


def test_excluded_items_are_left_out_and_nothing_else(searcher: Searcher) -> None:
    requests = make_requests()
    everything = searcher.search_interactions(requests, k=ITEMS, num_beams=ITEMS)
    kept = searcher.search_interactions(requests, k=ITEMS - 4, num_beams=ITEMS, exclude_history=True)
    for row, history in enumerate(requests.histories.tolist()):
        expected = [item for item in everything.items[row].tolist() if item not in history]
        expected = (expected + [-1] * ITEMS)[: ITEMS - 4]
        assert kept.items[row].tolist() == expected
        where = [everything.items[row].tolist().index(item) for item in expected if item >= 0]
        assert torch.equal(kept.scores[row, : len(where)], everything.scores[row, where])
        assert torch.equal(kept.cosines[row, : len(where)], everything.cosines[row, where])


def test_an_item_far_back_in_the_history_is_excluded_too(searcher: Searcher) -> None:
    """The model reads the last three items only; those before them were chosen all the same."""
    history = [f"Ω-{row}" for row in (9, 8, 5, 4, 3)]
    found = searcher.search(histories=[history], k=ITEMS, num_beams=ITEMS, exclude_history=True)
    assert set(found.ids[0]) == set(searcher.catalog.ids) - set(history)


def test_filters_restrict_each_request(searcher: Searcher) -> None:
    allowed = [{1, 2, 3}, None, {7}, {6, 20}]
    filters = [None if rows is None else searcher.index.trie.filter(items=list(rows)) for rows in allowed]
    requests = make_requests()
    everything = searcher.search_interactions(requests, k=ITEMS, num_beams=ITEMS)
    batch = batch_of(searcher, requests)
    found = searcher.index.search(searcher.model, batch, ITEMS, num_beams=3, filters=filters)
    for row, rows in enumerate(allowed):
        if rows is not None:
            expected = [item for item in everything.items[row].tolist() if item in rows]
            assert found.items[row].tolist()[: len(expected) + 1] == [*expected, -1]


def test_searching_in_parts_changes_nothing(searcher: Searcher, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = make_requests()
    whole = searcher.search_interactions(requests, k=7, exclude_history=True)
    monkeypatch.setattr(dgi.retrieval.index, "MEMORY_FLOATS", 1)
    parts = searcher.search_interactions(requests, k=7, exclude_history=True)
    assert torch.equal(whole.items, parts.items)
    torch.testing.assert_close(whole.scores, parts.scores, atol=1e-5, rtol=0)


def test_texts_and_ids_find_what_recorded_interactions_find(searcher: Searcher) -> None:
    requests = make_requests()
    histories = [[f"Ω-{row}" for row in rows if row >= 0] for rows in requests.histories.tolist()]
    assert same_results(searcher.search(requests.queries, histories, k=5), searcher.search_interactions(requests, k=5))


def test_build_assigns_in_evaluation_mode_whatever_the_batch_size() -> None:
    model, catalog = make_model(dropout=0.5), make_catalog()
    with torch.no_grad():
        z = model.encoder.encode_items(model.encoder.prepare_items(catalog))
    model.train()
    index = DGIIndex.build(model, catalog, batch_size=7)
    assert model.training and model.decoder.training, "the mode before is restored"
    assert torch.equal(index.codes, model.quantizer.assign(z))
    torch.testing.assert_close(index.vectors, z / z.norm(dim=1, keepdim=True))
    assert index.ids == catalog.ids and index.trie.codebook_sizes == (6, 4)


def test_every_item_has_an_id_of_its_own_where_there_are_as_many_ids() -> None:
    model, catalog = make_model(codebook_sizes=(8, 8)), make_catalog()
    shared, unique, default = (DGIIndex.build(model, catalog, unique=choice) for choice in (False, True, None))
    assert len(shared.codes.unique(dim=0)) < ITEMS, "twins have one text, and so one ID"
    assert len(unique.codes.unique(dim=0)) == ITEMS and torch.equal(unique.codes, default.codes)
    moved = (shared.codes != unique.codes).any(1)
    assert int(moved.sum()) == ITEMS - len(shared.codes.unique(dim=0))
    assert torch.equal(shared.vectors, unique.vectors) and unique.trie.num_items == ITEMS
    found = Searcher(model, unique, catalog).search(["twin1"], k=ITEMS, num_beams=64)
    assert sorted(found.items[0].tolist()) == list(range(ITEMS))
    few = make_model()
    with pytest.raises(ValueError, match="at least as many semantic IDs"):
        DGIIndex.build(few, catalog, unique=True)
    assert torch.equal(DGIIndex.build(few, catalog).codes, DGIIndex.build(few, catalog, unique=False).codes)


def test_what_cannot_be_indexed_is_named() -> None:
    model, catalog = make_model(), make_catalog()
    with pytest.raises(ValueError, match="at least one item"):
        DGIIndex.build(model, Catalog((), ()))
    with pytest.raises(TypeError, match="DGIModel; got DualEncoder"):
        DGIIndex.build(DualEncoder(model.config), catalog)  # type: ignore[arg-type]
    with torch.no_grad():
        model.encoder.tower.words.weight[1:].fill_(torch.nan)
    with pytest.raises(ValueError, match="40 items a vector that is not finite, first 'Ω-0'"):
        DGIIndex.build(model, catalog)


def test_a_loaded_index_searches_as_the_one_saved(searcher: Searcher, tmp_path: Path) -> None:
    path = tmp_path / "index.safetensors"
    searcher.index.save(path)
    content = path.read_bytes()
    loaded = DGIIndex.load(path)
    assert loaded.ids == searcher.index.ids and torch.equal(loaded.codes, searcher.index.codes)
    again = Searcher(searcher.model, loaded, searcher.catalog)
    assert same_results(again.search_interactions(make_requests()), searcher.search_interactions(make_requests()))
    loaded.save(path)
    assert path.read_bytes() == content, "the same index gives the same bytes"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_damaged_index_is_refused(searcher: Searcher, tmp_path: Path) -> None:
    path = tmp_path / "index.safetensors"
    searcher.index.save(path)
    content = path.read_bytes()
    for place in [*np.random.randint(0, len(content), 60), 0, 8, len(content) - 1]:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(IndexFormatError):
            DGIIndex.load(path)
    for length in (0, 7, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(IndexFormatError):
            DGIIndex.load(path)
    save_model(searcher.model, path)
    with pytest.raises(IndexFormatError, match="holds a DGIModel; a DGIIndex is needed"):
        DGIIndex.load(path)
    with pytest.raises(FileNotFoundError):
        DGIIndex.load(tmp_path / "nothing")


ALTERATIONS = {
    "an item left out of the trie": lambda t: t.update(
        {"trie.item_ids": torch.zeros(len(t["vectors"]), dtype=torch.int64)}
    ),
    "a code out of its codebook": lambda t: t.update({"trie.tokens.0": t["trie.tokens.0"] + 6}),
    "no vectors": lambda t: t.pop("vectors"),
    "too few vectors": lambda t: t.update({"vectors": t["vectors"][1:]}),
    "vectors in half precision": lambda t: t.update({"vectors": t["vectors"].half()}),
    "a vector that is not finite": lambda t: t["vectors"][3].fill_(torch.nan),
    "vectors of another length": lambda t: t["vectors"].mul_(2),
    "an id cut in the middle of a character": lambda t: t["id_offsets"][1:-1].add_(1),
    "offsets beyond the ids": lambda t: t["id_offsets"][-1].add_(1),
    "offsets that go back": lambda t: t["id_offsets"][2].mul_(0),
    "one id twice": lambda t: t["id_bytes"][t["id_offsets"][1] : t["id_offsets"][2]].copy_(
        t["id_bytes"][: t["id_offsets"][1]]
    ),
}


@pytest.mark.parametrize("alteration", ALTERATIONS.values(), ids=ALTERATIONS)
def test_a_file_that_describes_no_index_is_refused(searcher: Searcher, tmp_path: Path, alteration: Any) -> None:
    """A right checksum over wrong content, so that nothing a search relies on rests on the checksum alone."""
    path = tmp_path / "index.safetensors"
    searcher.index.save(path)
    tensors, description = read_tensors(path, "DGIIndex")
    alteration(tensors)
    write_tensors(path, tensors, description)
    with pytest.raises(IndexFormatError, match="describes no index"):
        DGIIndex.load(path)


def test_an_index_of_another_model_is_refused(searcher: Searcher) -> None:
    index, catalog = searcher.index, searcher.catalog
    for changes in ({"codebook_sizes": (6, 5)}, {"codebook_sizes": (6,)}, {"dim": 8}):
        with pytest.raises(ValueError, match="index the catalog with this model"):
            index.search(make_model(**changes), batch_of(searcher, make_requests()))
    with pytest.raises(ValueError, match="another model or other texts"):
        Searcher(make_model(), index, catalog)
    other_texts = Catalog(catalog.ids, tuple(reversed(catalog.texts)))
    with pytest.raises(ValueError, match="another model or other texts"):
        Searcher(searcher.model, index, other_texts)
    with pytest.raises(ValueError, match="their ids or order differ"):
        Searcher(searcher.model, index, Catalog(tuple(reversed(catalog.ids)), catalog.texts))


def test_requests_that_make_no_sense_are_named(searcher: Searcher) -> None:
    with pytest.raises(ValueError, match="no item 'nothing'"):
        searcher.search(histories=[["Ω-1", "nothing"]])
    with pytest.raises(ValueError, match="one length"):
        searcher.search(["a", "b"], [["Ω-1"]])
    for nothing in ((), ([],)):
        with pytest.raises(ValueError, match="at least 1"):
            searcher.search(*nothing)
    batch = batch_of(searcher, make_requests())
    with pytest.raises(ValueError, match="exclude must have shape"):
        searcher.index.search(searcher.model, batch, exclude=torch.zeros(3, 2, dtype=torch.int64))


def test_a_model_that_reads_vectors_is_not_searched_with_texts_alone() -> None:
    """Guards against a query that is silently ignored."""
    model = make_model(encoder="vectors", vector_dim=5)
    catalog = Catalog(("a", "b", "c"), ("A", "B", "C"), np.random.randn(3, 5).astype(np.float32))
    searcher = Searcher(model, DGIIndex.build(model, catalog), catalog)
    with pytest.raises(ValueError, match="reads query vectors, not texts"):
        searcher.search(["A"])
    assert sorted(searcher.search(["A"], query_vectors=np.ones((1, 5), np.float32), k=3).ids[0]) == ["a", "b", "c"]
    assert sorted(searcher.search(histories=[["a"]], k=3).ids[0]) == ["a", "b", "c"]


def test_weights_widths_and_sums_are_those_of_the_ops(searcher: Searcher, tmp_path: Path) -> None:
    """The options of a search arrive where they count: scores move by the share of the leaf, sums by the weight."""
    index, requests = searcher.index, make_requests()
    clicks = torch.arange(1, ITEMS + 1)
    scores = index.trie.node_scores(clicks)
    plain = searcher.search_interactions(requests, k=ITEMS, num_beams=ITEMS)
    weighted = searcher.search_interactions(requests, k=ITEMS, num_beams=[6, 24], node_scores=scores, strength=-0.8)
    codes = index.codes
    same = (codes.unsqueeze(0) == codes.unsqueeze(1)).all(-1).double()
    bonus = -0.8 * ((same @ clicks.double()) / clicks.sum()).log()
    for b in range(len(requests)):
        before = dict(zip(plain.items[b].tolist(), plain.scores[b].tolist(), strict=True))
        for item, score in zip(weighted.items[b].tolist(), weighted.scores[b].tolist(), strict=True):
            assert score == pytest.approx(before[item] + float(bonus[item]), abs=1e-4)
    own = dataclasses.replace(index, cosine_weight=3.0, guide_weight=2.0)
    own.save(tmp_path / "index")
    loaded = DGIIndex.load(tmp_path / "index")
    assert loaded.cosine_weight == 3.0 and index.cosine_weight is None
    assert loaded.guide_weight == 2.0 and loaded.to("cpu").guide_weight == 2.0
    assert "guides" in vars(loaded) and "guides" in vars(loaded.to("cpu").replaced(guide_weight=1.0)), "fitted once"
    assert all(map(torch.equal, loaded.guides, index.guides))
    ranked = Searcher(searcher.model, loaded, searcher.catalog).search_interactions(
        requests, k=ITEMS, num_beams=ITEMS, order="sum"
    )
    crowd = same.sum(1).log()
    for b in range(len(requests)):
        cosines = dict(zip(plain.items[b].tolist(), plain.cosines[b].tolist(), strict=True))
        before = dict(zip(plain.items[b].tolist(), plain.scores[b].tolist(), strict=True))
        for item, score in zip(ranked.items[b].tolist(), ranked.scores[b].tolist(), strict=True):
            assert score == pytest.approx(before[item] + 3 * cosines[item] - float(crowd[item]), abs=1e-4)
        assert ranked.scores[b].tolist() == sorted(ranked.scores[b].tolist(), reverse=True)


def test_the_weight_of_the_cosine_is_the_best_of_those_tried(searcher: Searcher) -> None:
    requests = make_requests()
    best, found = tune_cosine_weight(searcher, requests, weights=[0.0, 1.0, 50.0], num_beams=ITEMS)
    assert list(found) == [0.0, 1.0, 50.0] and found[best] == max(found.values())
    assert best == min(weight for weight, measure in found.items() if measure == found[best])
    with pytest.raises(ValueError, match="there must be interactions and weights"):
        tune_cosine_weight(searcher, requests, weights=[])
