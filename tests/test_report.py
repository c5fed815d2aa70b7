"""README.md and docs/ show what bench/report.py makes of bench/results/, and it makes the right numbers."""

from __future__ import annotations

import importlib.util
import json
import re
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
compare, comparison_pictures, measure, report, svg = (
    importlib.import_module(name) for name in ("compare", "comparison_pictures", "measure", "report", "svg")
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> report.Run:
    results = measure.Results()
    for dim in (64, 256):
        for system, factor in (("floor", 0.8), ("ours", 1.0), ("eager", 3.0)):
            results.add(
                "op",
                {"N": 4096, "D": dim, "threads": 2},
                system,
                [dim * factor * t for t in (9.0, 1.0, 0.5)],
                memory=int(factor * 1e6),
            )
    results.add("other", {"N": 1}, "ours", [1.0])
    results.write(tmp_path / "cpu-sample.json")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return report.Run.load("cpu-sample")


def test_pages_show_the_committed_results() -> None:
    check = subprocess.run([sys.executable, "bench/report.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert check.returncode == 0, f"{check.stdout}{check.stderr}\nrun `make report`"


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "results").glob("[cg]pu-*.json")), ids=lambda path: path.stem)
def test_results_are_quantiles_that_pytest_benchmark_compares(path: Path) -> None:
    document = json.loads(path.read_text())
    assert all("data" not in benchmark["stats"] for benchmark in document["benchmarks"])
    assert path.read_text() == measure.json_text(document)
    table = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert table.returncode == 0, table.stderr
    assert all(benchmark["name"] in table.stdout for benchmark in document["benchmarks"])


def test_quantiles_of_a_run() -> None:
    stats = measure.quantiles([5.0, 1.0, 2.0, 4.0, 3.0, 60.0, 2.5])
    assert {name: stats[name] for name in ("min", "q1", "median", "q3", "max", "rounds", "total", "outliers")} == {
        "min": 1.0,
        "q1": 2.0,
        "median": 3.0,
        "q3": 5.0,
        "max": 60.0,
        "rounds": 7,
        "total": 77.5,
        "outliers": "1;1",
    }
    assert (stats["mean"], stats["stddev"]) == pytest.approx((77.5 / 7, statistics.stdev([5, 1, 2, 4, 3, 60, 2.5])))
    one = measure.quantiles([2.0])
    assert {one[name] for name in ("min", "q1", "median", "q3", "max", "mean")} == {2.0} and one["stddev"] == 0


def test_a_table_has_ratios_of_medians(run: report.Run) -> None:
    rows = run.rows({"op": "op", "D": "64"})
    text = report.table(run, "op", rows["op"])
    header, _, cells = text.splitlines()[2:5]
    assert list(rows) == ["op"] and text.splitlines()[0] == "**`op`**, N = 4,096, D = 64, threads = 2"
    assert header == "|  | **ours ÷ floor** | eager ÷ ours | MB: ours | MB: eager |"
    assert cells == "|  | 1.25 | 3.00 | 1.0 | 3.0 |"
    assert "2 threads" in text and f"commit `{run.document['commit_info']['id'][:10]}" in text
    assert run.document["command"] in text


def test_a_page_is_rendered_once_and_for_all(run: report.Run) -> None:
    page = (
        "before\n<!-- report:cpu-sample op=op -->\nstale\n<!-- /report -->\nbetween\n"
        "<!-- picture:cpu-sample op=op -->\n<!-- /picture -->\n<!-- report:missing -->\nold\n<!-- /report -->\n"
    )
    once, shown = report.rendered(report.ROOT / "README.md", page)
    again, shown_again = report.rendered(report.ROOT / "README.md", once)
    assert again == once and [picture.stem for picture in shown_again] == [picture.stem for picture in shown]
    assert "Not measured yet" in once and "make" not in once.partition("between")[0]
    assert "stale" not in once and "old" not in once and once.startswith("before\n") and "\nbetween\n" in once
    assert "| 64 | 1.25 | 3.00 |" in once and "cpu-sample-op-dark.svg" in once and len(shown) == 1


def test_our_system_may_have_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = measure.Results()
    for system, seconds in (("STATIC", 8.0), ("native", 2.0), ("floor", 1.0)):
        results.add("beam_search", {"M": 50}, system, [seconds])
    results.write(tmp_path / "cpu-beam.json")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    run = report.Run.load("cpu-beam")
    header, _, cells = report.table(run, "beam_search", run.rows({})["beam_search"]).splitlines()[2:5]
    assert (header, cells) == ("|  | **ours ÷ floor** | STATIC ÷ ours |", "|  | 2.00 | 4.00 |")


def test_the_summary_names_the_fastest_peer_also_where_it_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = measure.Results()
    for system, seconds in (
        ("floor", 1.0),
        ("ours", 2.0),
        ("eager", 5.0),
        ("compile", 3.0),
        ("other", 1.9),
        ("filtered", 0.1),
    ):
        results.add("op", {"N": 4096, "D": 64}, system, [seconds], memory=int(seconds * 1e6))
    results.write(tmp_path / "cpu-sample.json")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "SUMMARY", (("cpu-sample", "op=op", "N"), ("cpu-missing", "op=op", "N")))
    page, _ = report.rendered(ROOT / "README.md", "<!-- summary -->\nold\n<!-- /summary -->\n")
    row, where = page.splitlines()[4], page.splitlines()[6]
    assert row == "| `op` | N 4,096 | 2.00 | 2.50 | 0.95 (other) | 2.0 / 5.0 |" and "old" not in page
    assert where.startswith("<sub>`op`: ") and f"commit `{measure.get_commit_info()['id'][:10]}`" in where


def test_every_row_of_the_summary_is_measured() -> None:
    for name, filters, said in report.SUMMARY:
        (rows,) = report.Run.load(name).rows(report.parsed(filters)).values()
        assert rows and all(set(said.split()) <= set(row.shape) for row in rows)


def test_two_versions_are_compared_by_the_medians_of_their_runs() -> None:
    base, head = [{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 2.0}, {"a": 2.0, "b": 2.0}], [{"a": 1.0, "c": 1.0}] * 3
    lines = [line.split() for line in compare.table(base, head).splitlines()]
    assert lines[1:] == [["a", "2000", "1000", "0.500"]]


def test_the_table_of_kernels_is_what_the_ops_choose_from() -> None:
    table = "| op | what | C++ | Triton | CUDA C++ |\n|---|---|---|---|---|\n| `cosine_cross_entropy` | x |  |  | ✓ |\n"
    page, _ = report.rendered(ROOT / "README.md", f"<!-- kernels -->\n{table}<!-- /kernels -->\n")
    assert page.splitlines()[3] == "| `cosine_cross_entropy` | x | ✓ | ✓ |   |"


def files_of(picture: report.Picture) -> dict[Path, str]:
    return dict(svg.render(picture.draw, picture.stem, picture.salt))


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_pictures_are_drawn_light_and_dark_and_repeat(run: report.Run) -> None:
    first, again = (files_of(report.chart(run, {"op": "op"})) for _ in range(2))
    assert first == again and [path.name for path in first] == ["cpu-sample-op-light.svg", "cpu-sample-op-dark.svg"]
    assert all(text.startswith("<?xml") for text in first.values())


def labels(run: report.Run, filters: dict[str, str]) -> Counter[str]:
    """What a picture must say, counted from the results alone: each system of each shape that has one of ours."""
    shapes = [row for rows in run.rows(filters).values() for row in rows if set(report.OURS) & set(row.seconds)]
    ours = [next(row.seconds[name] for name in report.OURS if name in row.seconds) for row in shapes]
    return Counter(
        f"{name}  {report.significant(seconds / one)}"
        for row, one in zip(shapes, ours, strict=True)
        for name, seconds in row.seconds.items()
    )


def check_bars(text: str, expected: Counter[str]) -> None:
    """An SVG of matplotlib has each text as a comment before its outlines."""
    drawn = Counter(said for said in re.findall(r"<!-- (.*?) -->", text) if "  " in said)
    assert drawn == expected and text.count('<g id="bar-') == expected.total()


PICTURES = [picture for page in report.PAGES for picture in report.rendered(page, page.read_text())[1]]
SHOWN = {picture.stem: picture.draw.args for picture in PICTURES if picture.draw.func is report.bars}
COMPARISONS = {picture.stem: picture for picture in PICTURES if picture.draw.func is comparison_pictures.draw}


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("name", SHOWN)
def test_a_committed_picture_has_a_bar_and_a_label_for_every_system(name: str, mode: str) -> None:
    text = (svg.ASSETS / f"{name}-{mode}.svg").read_text()
    expected = labels(*SHOWN[name])
    check_bars(text, expected)
    fills = set(re.findall(r'<g id="bar-.*?style="fill: (#\w+)', text, re.DOTALL))
    assert len(fills) == len({label.split("  ")[0] for label in expected}) >= 2  # every system has its own colour


def check_texts(figure: Any, least: int) -> None:
    """At least so many texts, none of them cut or on another."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    texts = [*axes.texts, axes.xaxis.label, axes.yaxis.label, *figure.texts]
    for limits, axis in ((axes.get_xlim(), axes.xaxis), (axes.get_ylim(), axes.yaxis)):
        (low, high), ticks = sorted(limits), zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
        texts += [text for at, text in ticks if low <= at <= high]
    places = [text.get_window_extent() for text in texts if text.get_text()]
    assert len(places) > least
    assert all(
        figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
        for box in places
    )
    assert not [(a, b) for i, a in enumerate(places) for b in places[:i] if a.overlaps(b)]


def curves_of(tmp_path: Path, batches: tuple[int, ...]) -> report.Run:
    results = measure.Results()
    for batch in batches:
        for items in (100_000, 1_000_000):
            for system, seconds in (("ours", 0.004), ("exact", items * 2e-8), ("graph", 0.006)):
                if system != "graph" or items < 1_000_000:
                    results.add("search", {"items": items, "batch": batch}, system, [seconds])
    results.write(tmp_path / "cpu-curve.json")
    return report.Run.load("cpu-curve")


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_a_curve_has_a_line_for_every_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for one that is not measured at the largest value."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    run, filters = curves_of(tmp_path, (1, 64)), {"batch": "1", "over": "items"}
    page, shown = report.rendered(
        ROOT / "README.md", "<!-- picture:cpu-curve batch=1 over=items -->\n<!-- /picture -->\n"
    )
    said = "ours 4.00 at 100,000, 4.00 at 1,000,000; exact 2.00 at 100,000, 20.0 at 1,000,000; graph 6.00 at 100,000."
    assert f"Lines of milliseconds over items. search, batch = 1: {said}" in page and len(shown) == 1
    pictures = files_of(report.chart(run, filters))
    assert [path.name for path in pictures] == ["cpu-curve-1-items-light.svg", "cpu-curve-1-items-dark.svg"]
    for text in pictures.values():
        assert re.findall('<g id="line-(.*?)"', text) == ["ours", "exact", "graph"]
        assert {"ours 4.00", "exact 20.0", "graph 6.00"} <= set(re.findall(r"<!-- (.*?) -->", text))
    with pytest.raises(SystemExit, match="hold all else equal; items, batch vary in cpu-curve"):
        report.chart(run, {"over": "items"})


def test_medians_of_drop_ins_are_of_equal_results_by_kind(tmp_path: Path) -> None:
    from dropin_tables import dropin_tables

    for name, ratios in {"grid": (2.0, 8.0), "vector-quantize-pytorch": (3.0,), "hstu": (5.0, 7.0)}.items():
        results = measure.Results()
        for step, ratio in enumerate(ratios):
            equal = (name, step) != ("hstu", 1)
            for system, seconds in (("theirs", ratio), ("ours", 1.0)):
                shape = {"codebase": name, "step": str(step) if equal else "128 negatives drawn"}
                results.add("drop-in", shape, system, [seconds], 10**6, lines=2, equal=equal)
        results.write(tmp_path / f"dropin-{name}.json")
    text = dropin_tables(tmp_path)
    assert "| quantizer step | 2 | 3 | 3.00 | 2.00 | 8.00 |" in text and "| loss | 1 | 1 | 5.00 | 5.00 | 5.00 |" in text
    assert "| `hstu` | 128 negatives drawn | 2 | 7.00 | 1.0 / 1.0 | differs: " in text


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
@pytest.mark.parametrize("name", SHOWN)
def test_no_text_of_a_picture_is_cut_or_lies_on_another(name: str) -> None:
    figure = report.bars(*SHOWN[name], svg.THEMES["light"][1].split())
    check_texts(figure, labels(*SHOWN[name]).total() + 5)  # groups, ticks, the axis and a title


CURVES = {picture.stem: picture for picture in PICTURES if picture.draw.func is report.curve}


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
@pytest.mark.parametrize("name", CURVES)
def test_no_text_of_a_curve_is_cut_or_lies_on_another(name: str) -> None:
    """Guards labels of lines that end at nearly the same height."""
    assert all(path.stat().st_size for path in svg.files(name))
    points = CURVES[name].draw.args[2]
    check_texts(CURVES[name].draw(svg.THEMES["light"][1].split()), len(points) + 5)
    near = {system: [(1, 0.001), (10, 0.002 * 1.001**i)] for i, system in enumerate("abcdefg")}
    check_texts(report.curve("title", "items", near, svg.THEMES["light"][1].split()), 7 + 5)


@pytest.mark.parametrize("name", SHOWN)
def test_an_alternative_text_says_what_the_picture_shows(name: str) -> None:
    text = report.alt_text(*SHOWN[name])
    assert {label.split("  ")[0] for label in labels(*SHOWN[name])} - set(report.OURS) <= set(
        re.split(r" [\d.,]+(?: to [\d.,]+)?[;.] ?", text.partition(": ")[2])
    )


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_a_new_picture_has_a_bar_and_a_label_for_every_system(run: report.Run) -> None:
    for text in files_of(report.chart(run, {"op": "op"})).values():
        check_bars(text, Counter({"floor  0.80": 2, "ours  1.00": 2, "eager  3.00": 2}))


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
@pytest.mark.parametrize("kind", comparison_pictures.KINDS)
def test_a_picture_of_a_comparison_shows_its_systems(kind: str) -> None:
    names = ["dense_bias", "dgi"]
    picture = report.figure("compare-movielens-12", {"kind": kind, "systems": ",".join(names)})
    assert all(name in picture.alt for name in names)
    for path, text in files_of(picture).items():
        assert path.name.startswith(f"compare-movielens-12-{kind}-dense-bias-dgi-")
        assert {f"<!-- {name} -->" for name in names} <= set(re.findall("<!-- .*? -->", text))
    with pytest.raises(ValueError, match="has no system 'other'"):
        report.figure("compare-movielens-12", {"kind": kind, "systems": "other"})


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_picture_of_a_comparison_is_committed(name: str) -> None:
    assert all(path.stat().st_size for path in svg.files(name))


def test_a_page_shows_a_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``dgi compare`` wrote becomes tables between the markers; without it nothing is claimed."""
    pytest.importorskip("scipy")
    import numpy as np

    from dgi.config import ModelConfig, TrainConfig
    from dgi.data import load_dataset
    from dgi.evaluation.compare import Comparison, compare
    from dgi.retrieval.baselines import Plan
    from tests.dgi.tiny_folder import write_data

    monkeypatch.setattr(report, "RESULTS", tmp_path)
    page, text = tmp_path / "page.md", "before\n<!-- comparison:compare-x -->\nold\n<!-- /comparison -->\nafter\n"
    assert "nothing is claimed" in report.rendered(page, text)[0]
    data = load_dataset(write_data(tmp_path / "shop", np.random.default_rng(0)))
    results = compare(data, Comparison(Plan(ModelConfig(), TrainConfig()), ("random", "popularity")), tmp_path / "out")
    (tmp_path / "compare-x.json").write_text(json.dumps(results))
    shown = report.rendered(page, text)[0]
    assert shown.startswith("before\n<!-- comparison") and shown.endswith("<!-- /comparison -->\nafter\n")
    assert "## shop" not in shown and "| system |" in shown and "old" not in shown  # the page has its own title
    measures = results["data"]["shop"]["systems"]["popularity"]["measures"]
    assert f"{measures['recall@10']['mean']:.4f}".removeprefix("0") in shown
    text = "<!-- side-by-side:compare-x,compare-x systems=popularity,dense -->\nold\n<!-- /side-by-side -->"
    *_, popularity, dense = [row for row in report.rendered(page, text)[0].splitlines() if row.startswith("|")]
    assert popularity.count(f"{measures['ndcg@10']['mean']:.4f}".removeprefix("0")) == 2  # a column each
    assert dense.endswith("| – | – |")
    assert "nothing is claimed: compare-y" in report.rendered(page, text.replace("x,compare-x", "x,compare-y"))[0]
