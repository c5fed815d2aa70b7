"""Comparisons: a broken system comes last, measures are the library's, intervals cover, cells are resumed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from dgi.cli import main
from dgi.data import Catalog, Dataset, Interactions, Judgments, load_dataset, pad_histories, time_split
from dgi.evaluation import compare as comparing
from dgi.evaluation import metrics
from dgi.evaluation.compare import Comparison, compare
from dgi.evaluation.comparison_report import _bare, comparison_picture, data_markdown, markdown, tail_markdown
from dgi.evaluation.per_query import MEASURES, bucket_means, interval, measure_queries
from tests.dgi.retrieval.test_baselines import PLAN
from tests.dgi.tiny_folder import write_data

SYSTEMS = ("random", "popularity", "dense", "two_stage")


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgi.training.curve.training_curve", lambda *_: None)


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    return load_dataset(write_data(tmp_path / "clicks", np.random.default_rng(3)))


def skewed_data(items: int = 60, rows: int = 500) -> Dataset:
    """After items a, a + 1, … comes the next one, and some items are far more popular than others."""
    random = np.random.default_rng(4)
    first, length = np.minimum(random.geometric(0.08, rows), items - 5), random.integers(1, 4, rows)
    histories = [[a + step for step in range(n)] for a, n in zip(first, length, strict=True)]
    clicks = Interactions(("",) * rows, pad_histories(histories, 4), first + length, np.arange(rows, dtype=float))
    train, test = time_split(clicks, 0.3)
    texts = tuple(f"title{item} genre{item % 5}" for item in range(items))
    return Dataset(Catalog(tuple(map(str, range(items))), texts), train, test, "clicks")


def test_measures_of_one_target_are_those_of_metrics() -> None:
    ranked = np.stack([np.random.permutation(40)[:25] for _ in range(60)])
    targets = np.random.randint(0, 40, 60)
    values = dict(zip(MEASURES, measure_queries(ranked, targets).mean(axis=1), strict=True))
    ranks = metrics.target_ranks(ranked, targets)
    for k in metrics.CUTOFFS:
        assert values[f"recall@{k}"] == pytest.approx(metrics.hit_rate(ranks, k))
        assert values[f"ndcg@{k}"] == pytest.approx(metrics.ndcg(ranks, k))


def test_graded_measures_are_those_of_the_library() -> None:
    pytest.importorskip("ir_measures")
    ranked = np.stack([np.random.permutation(60)[:25] for _ in range(40)])
    ranked[3, 5:] = -1
    ratings = []
    for _ in range(40):
        items = np.random.choice(60, np.random.randint(1, 30), replace=False)
        ratings.append({int(item): int(np.random.randint(0, 4)) for item in items} | {int(items[0]): 2})
    values = dict(zip(MEASURES, measure_queries(ranked, np.zeros(40, int), ratings).mean(axis=1), strict=True))
    judged = Judgments(tuple(map(str, range(40))), tuple(ratings))
    expected = metrics.evaluate_judgments(ranked, judged)
    for k in metrics.CUTOFFS:
        assert values[f"ndcg@{k}"] == pytest.approx(expected[f"ndcg@{k}"], rel=1e-5)
        relevant = [{item for item, rating in row.items() if rating} for row in ratings]
        shares = [len(want & set(row[:k].tolist())) / len(want) for want, row in zip(relevant, ranked, strict=True)]
        assert values[f"recall@{k}"] == pytest.approx(np.mean(shares), rel=1e-5)


def test_buckets_add_up_to_the_whole() -> None:
    counts, targets, values = np.random.poisson(2, 50), np.random.randint(0, 50, 300), np.random.rand(300)
    means = bucket_means(values, targets, counts)
    buckets = metrics.popularity_buckets(counts)[targets]
    sizes = {name: (buckets == (-1 if name == "unseen" else int(name) - 1)).sum() for name in means}
    assert sum(sizes.values()) == 300
    assert sum((mean or 0) * sizes[name] for name, mean in means.items()) / 300 == pytest.approx(values.mean())


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        found = interval(random.random(200) < 0.3)
        covered += found["low"] <= 0.3 <= found["high"]
        assert found["low"] < found["mean"] < found["high"]
    assert 50 <= covered <= 60
    assert interval(np.ones(5)) == {"mean": 1.0, "low": 1.0, "high": 1.0}


def test_a_paired_interval_is_narrower_than_its_parts() -> None:
    random = np.random.default_rng(1)
    base = random.random(500)
    better = base + 0.02 + 0.01 * random.standard_normal(500)
    paired, alone = interval(better - base), interval(better)
    assert paired["low"] > 0 and paired["high"] - paired["low"] < 0.2 * (alone["high"] - alone["low"])


def test_a_broken_system_comes_last_and_cells_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random vectors are planted: by NDCG they are at the bottom, and every other system is far above them."""
    data = skewed_data()
    comparison = Comparison(PLAN, SYSTEMS, seeds=(0, 1), exclude_history=True)
    results = compare(data, comparison, tmp_path / "out")
    of_data = results["data"]["clicks"]
    systems = of_data["systems"]
    assert list(systems) == list(SYSTEMS)
    ndcgs = {name: system["measures"]["ndcg@10"]["mean"] for name, system in systems.items()}
    assert all(ndcg > 2 * ndcgs["random"] for name, ndcg in ndcgs.items() if name != "random")
    assert min(ndcgs["dense"], ndcgs["two_stage"]) > 1.2 * ndcgs["popularity"]
    assert of_data["best_baseline"] == "dense" and systems["dense"]["difference"] is None
    assert systems["random"]["difference"]["ndcg@10"]["high"] < 0
    assert systems["random"]["seeds"] == [0, 1] and systems["popularity"]["seeds"] == [0]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(results))
    for name, value in systems["dense"]["measures"].items():
        if "seeds" in value:
            assert value["mean"] == pytest.approx(np.mean(value["seeds"])), name
    assert any("validation_hit_rate@10" in row for row in systems["dense"]["curve"])
    for name in ("dense", "two_stage"):
        cells = [json.loads((tmp_path / f"out/cells/clicks/{name}-{seed}.json").read_text()) for seed in (0, 1)]
        for cell in cells:  # where the knob is as the validation set has chosen, the curve is the main figure
            chosen = [row for row in cell["tail"] if row["popularity_weight"] == cell["settings"]["popularity_weight"]]
            for row in chosen:
                assert row["recall@10"] == pytest.approx(cell["measures"]["recall@10"], abs=0.02)
        means = [row["recall@10"] for row in systems[name]["tail"]]
        assert means == pytest.approx(np.mean([[row["recall@10"] for row in cell["tail"]] for cell in cells], axis=0))
        first, last = systems[name]["tail"][0]["buckets"], systems[name]["tail"][-1]["buckets"]
        assert last["5"] >= first["5"] and last["1"] <= first["1"], "popularity taken off: tail for head"
        assert len({row["ndcg@10"] for row in systems[name]["tail"]}) > 3
    assert systems["popularity"]["tail"] is None and "| `dense` | -0.25 |" in tail_markdown(of_data)
    assert systems["two_stage"]["curve"][-1]["step"] == 120 and systems["dense"]["curve"][-1]["step"] == 120

    text = data_markdown(of_data)
    for name, ndcg in ndcgs.items():
        assert f"`{name}`" in text and _bare(f"{ndcg:.4f}") in text
    assert "left out of the rankings" in text and "120 steps" in text
    comparison_picture(of_data, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000

    # What is there is not made again; what is missing is.
    made: list[str] = []
    run_cell = comparing._run_cell
    monkeypatch.setattr(
        comparing, "_run_cell", lambda system, name, *rest: (made.append(name), run_cell(system, name, *rest))
    )
    (tmp_path / "out" / "cells" / "clicks" / "popularity-0.json").unlink()
    again = compare(data, comparison, tmp_path / "out")
    assert made == ["popularity"]
    assert again["data"]["clicks"]["systems"]["dense"] == systems["dense"]

    other = dataclasses.replace(comparison, max_queries=10)
    with pytest.raises(ValueError, match=r"was made with queries = 150, now it is 10; choose another output"):
        compare(data, other, tmp_path / "out")


def test_cells_of_another_comparison_join(tmp_path: Path) -> None:
    """Systems run apart give the results of one run; cells of another budget or of an older version are told apart."""
    data, folders = skewed_data(), [tmp_path / name for name in ("first", "second", "both", "none")]
    for folder, systems in zip(folders, (("popularity",), ("random",), ("popularity", "random")), strict=False):
        together = compare(data, Comparison(PLAN, systems, seeds=(0,)), folder)
    assert [path.name for path in comparing.join(folders[0], folders[1])] == ["random-0.json"]
    assert comparing.join(folders[0], folders[1]) == []
    ours, expected = (results["data"]["clicks"]["systems"] for results in (comparing.collect(folders[0]), together))
    assert list(ours) == list(expected)
    for name, system in expected.items():
        assert ours[name] | {"seconds": None} == system | {"seconds": None}

    path = folders[1] / "cells" / "clicks" / "random-0.json"
    cell = json.loads(path.read_text())
    del cell["about"]["model"]["causal"], cell["about"]["batches_of"]
    path.write_text(json.dumps(cell))
    (folders[0] / "cells" / "clicks" / "random-0.json").unlink()
    assert len(comparing.join(folders[0], folders[1])) == 1, "settings that are newer than a cell are as they were"
    cell["about"]["steps"] += 1
    path.write_text(json.dumps(cell))
    with pytest.raises(ValueError, match="was made with steps = 121, now it is 120"):
        comparing.join(folders[0], folders[1])
    with pytest.raises(FileNotFoundError, match="holds no cells"):
        comparing.join(folders[0], folders[3])


def test_dgi_is_compared_with_two_stage_retrieval_too(tmp_path: Path) -> None:
    """By the cells of other systems under these names; the column is there only where there is such a difference."""
    folder = tmp_path / "out"
    results = compare(skewed_data(), Comparison(PLAN, ("random", "popularity"), seeds=(0,)), folder)
    assert "two-stage" not in markdown(results)
    for name, kind in (("random", "two_stage"), ("popularity", "dgi")):
        source = folder / "cells" / "clicks" / f"{name}-0.json"
        cell = json.loads(source.read_text()) | {"system": kind}
        source.with_name(f"{kind}-0.json").write_text(json.dumps(cell))
        source.with_name(f"{kind}-0.npy").write_bytes(source.with_suffix(".npy").read_bytes())
    results = comparing.collect(folder)
    systems = results["data"]["clicks"]["systems"]
    means = {name: one["measures"]["ndcg@10"]["mean"] for name, one in systems.items()}
    found = systems["dgi"]["over_two_stage"]["ndcg@10"]
    assert found["mean"] == pytest.approx(means["popularity"] - means["random"]) and found["low"] > 0
    assert [name for name, one in systems.items() if "over_two_stage" in one] == ["dgi"]
    text = markdown(results)
    assert "| Δ NDCG, two-stage |" in text and "against two-stage retrieval with the same encoder" in text


def test_the_best_baseline_is_chosen_on_validation_requests(tmp_path: Path) -> None:
    """What a system has on the test requests plays no part."""
    folder = tmp_path / "out"
    compare(skewed_data(), Comparison(PLAN, ("popularity", "random", "cooccurrence"), seeds=(0,)), folder)
    assert comparing.collect(folder)["data"]["clicks"]["best_baseline"] == "cooccurrence"
    path = folder / "cells" / "clicks" / "popularity-0.json"
    cell = json.loads(path.read_text())
    path.write_text(json.dumps(cell | {"validation": {"ndcg@10": 2.0}}))
    of_data = comparing.collect(folder)["data"]["clicks"]
    assert of_data["best_baseline"] == "popularity" and of_data["systems"]["popularity"]["difference"] is None
    assert of_data["systems"]["cooccurrence"]["difference"]["ndcg@10"]["low"] > 0
    for old in path.parent.glob("*.json"):
        cell = json.loads(old.read_text())
        del cell["validation"]
        old.write_text(json.dumps(cell))
    as_before = comparing.collect(folder)["data"]["clicks"]
    assert as_before["best_baseline"] == "cooccurrence", "cells of earlier versions have the test alone"
    assert "against `cooccurrence`, the best baseline." in " ".join(data_markdown(as_before).split())
    assert "against `popularity`, the best baseline on validation requests" in " ".join(data_markdown(of_data).split())


def test_minutes_become_steps_once(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "_step_seconds", lambda *_: 0.5)
    comparison = Comparison(PLAN, ("popularity",), minutes=0.25)
    assert compare(data, comparison, tmp_path / "out")["data"]["clicks"]["steps"] == 30
    monkeypatch.setattr(comparing, "_step_seconds", lambda *_: 0.1)
    assert compare(data, comparison, tmp_path / "out")["data"]["clicks"]["steps"] == 30, "as when it began"
    with pytest.raises(ValueError, match="is of 0.25 minutes"):
        compare(data, dataclasses.replace(comparison, minutes=1.0), tmp_path / "out")


def test_a_step_takes_time(data: Dataset) -> None:
    assert 1e-4 < comparing._step_seconds(PLAN, data) < 10


def test_unknown_systems_are_named() -> None:
    with pytest.raises(ValueError, match="got 'nonsense'"):
        Comparison(PLAN, ("nonsense",))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Judged queries, with pseudo-queries in training, from the command line to the files."""
    folder, output = tmp_path / "judged", tmp_path / "out"
    folder.mkdir()
    (folder / "items.tsv").write_text("id\ttitle\n" + "".join(f"{i}\tname{i} kind{i % 3}\n" for i in range(25)))
    lines = [f"name{i}\t{i}\t{i % 3 + 1}\t{'train' if i < 12 else 'test'}" for i in range(25)]
    (folder / "ratings.tsv").write_text("query\titem_id\trating\tsplit\n" + "\n".join(lines) + "\n")
    arguments = ["compare", "--data", str(folder), "--text", "title", "--systems", "popularity,dense", "--seeds", "1"]
    arguments += ["--pseudo-queries", "6", "--budget", "60", "--output", str(output), "--no-progress"]
    for setting in ("dim=16", "batch_size=32", "backbone_lr=0.01", "vocabulary_size=128"):
        arguments += ["--set", setting]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    results = json.loads((output / "results.json").read_text())["data"]["judged"]
    assert results["judged"] and results["steps"] == 60 and results["split"] == "given"
    assert results["systems"]["dense"]["measures"]["ndcg@10"]["mean"] > 0.7
    assert (output / "results.md").read_text() in printed and (output / "judged.png").exists()
    assert "results.json, results.md, judged.png" in printed


@pytest.mark.parametrize(
    ("budget", "expected"), [("0", "must be positive"), ("x", "must be steps"), ("-3m", "positive")]
)
def test_a_wrong_budget_is_told(budget: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compare", "--data", "d", "--output", "o", f"--budget={budget}"])
    assert expected in capsys.readouterr().err
