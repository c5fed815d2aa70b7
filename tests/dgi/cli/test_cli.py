"""The command line, in this process: train, index, search, eval on a tiny data set, and what users get wrong."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dgi
from dgi.cli import COMMANDS, build_parser, main
from dgi.cli.train import _settings, configs
from dgi.config import BEFORE
from dgi.data import load_dataset
from dgi.evaluation.evaluate import sample
from dgi.retrieval.fused import COSINE_WEIGHTS
from dgi.retrieval.index import DGIIndex
from tests.dgi.tiny_folder import ITEMS, SETTINGS, write_data, write_judgments

QUIET = "--no-progress"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, and the model and index that the command line made of them."""
    folder = tmp_path_factory.mktemp("run")
    write_data(folder / "data", np.random.default_rng(1))
    (folder / "settings.json").write_text(json.dumps({**SETTINGS, "epochs": 1}))
    assert (
        main(
            [
                "train",
                "--data",
                str(folder / "data"),
                "--output",
                str(folder / "model"),
                "--config",
                str(folder / "settings.json"),
                "--set",
                "epochs=2",
                "--set",
                "codebook_sizes=8,3",
                "--set",
                "dropout=.1",
                QUIET,
            ]
        )
        == 0
    )
    assert (
        main(
            [
                "index",
                "--model",
                str(folder / "model"),
                "--data",
                str(folder / "data"),
                "--output",
                str(folder / "new" / "index.safetensors"),
                QUIET,
            ]
        )
        == 0
    )
    (folder / "utf16.json").write_bytes("{}".encode("utf-16"))
    (folder / "deep.json").write_text("[" * 100_000)
    return folder


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the picture out, which takes longest in a run so small."""
    monkeypatch.setattr("dgi.evaluation.plots.bucket_picture", lambda *_, **__: None)


def search(run: Path, *arguments: str) -> int:
    return main(
        [
            "search",
            "--index",
            str(run / "new/index.safetensors"),
            "--model",
            str(run / "model"),
            "--data",
            str(run / "data"),
            *arguments,
        ]
    )


def evaluate(run: Path, output: Path, *arguments: str) -> dict[str, Any]:
    assert (
        main(
            [
                "eval",
                "--model",
                str(run / "model"),
                "--index",
                str(run / "new/index.safetensors"),
                "--data",
                str(run / "data"),
                "--output",
                str(output),
                QUIET,
                *arguments,
            ]
        )
        == 0
    )
    return json.loads((output / "metrics.json").read_text())


def test_training_leaves_what_it_announces(run: Path) -> None:
    settings = json.loads((run / "model/config.json").read_text())
    assert settings["epochs"] == 2 and settings["codebook_sizes"] == [8, 3] and settings["dim"] == SETTINGS["dim"]
    assert (run / "model/training_curve.png").read_bytes().startswith(b"\x89PNG")
    assert DGIIndex.load(run / "new/index.safetensors").trie.codebook_sizes == (8, 3)


def test_every_result_is_an_item_of_the_catalog(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = ["film-3", "film-4"]
    assert search(run, "--query", "genre0", "--history", *history, "--k", str(ITEMS), "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    ids = [result["id"] for result in answer["results"]]
    catalog = load_dataset(run / "data").catalog
    assert sorted(ids) == sorted(set(catalog.ids) - set(history))
    assert [result["rank"] for result in answer["results"]] == list(range(1, len(ids) + 1))
    assert all(result["text"] == catalog.texts[catalog.row(result["id"])] for result in answer["results"])
    assert search(run, "--history", *history, "--keep-history", "--k", str(ITEMS), "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["results"]) == ITEMS


def test_search_prints_titles(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert search(run, "--query", "genre0", "--k", "3", "--json") == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert search(run, "--query", "genre0", "--k", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for line, result in zip(lines, results, strict=True):
        assert line.split()[0] == str(result["rank"]) and line.endswith(f"{result['id']}  {result['text']}")


def test_popularity_is_added_to_the_scores(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the share of all training clicks, one more for each item, of the items with the same semantic ID."""

    def scores(*arguments: str) -> dict[str, float]:
        command = ["--query", "genre0", "--k", str(ITEMS), "--num-beams", "8,24", "--json", *arguments]
        assert search(run, *command) == 0
        return {result["id"]: result["score"] for result in json.loads(capsys.readouterr().out)["results"]}

    data, index = load_dataset(run / "data"), DGIIndex.load(run / "new/index.safetensors")
    clicks = 1 + np.bincount(data.train.items, minlength=ITEMS)
    codes = index.codes.numpy()
    below = ((codes[:, None] == codes[None]).all(-1) * clicks).sum(1) / clicks.sum()
    plain, moved = scores(), scores("--popularity", "-0.7")
    assert moved.keys() == plain.keys()
    for item, score in moved.items():
        expected = plain[item] - 0.7 * np.log(below[data.catalog.row(item)])
        assert score == pytest.approx(expected, abs=1e-4)
    assert list(moved.values()) == sorted(moved.values(), reverse=True)


def test_the_tuned_weight_ranks_by_the_sum(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "tuned.safetensors"
    command = ["index", "--model", str(run / "model"), "--data", str(run / "data"), "--output", str(output), QUIET]
    assert main([*command, "--tune"]) == 0
    assert capsys.readouterr().out.count("(chosen)") == 1
    index = DGIIndex.load(output)
    assert index.cosine_weight in COSINE_WEIGHTS
    request = ["search", "--index", str(output), *command[1:5], QUIET, "--query", "genre0", "--k", str(ITEMS), "--json"]
    found = {}
    for order in ("lexicographic", "sum"):
        assert main([*request, "--order", order]) == 0
        found[order] = json.loads(capsys.readouterr().out)["results"]
    crowd = (index.codes[:, None] == index.codes[None]).all(-1).sum(1).log()
    before = {result["id"]: result for result in found["lexicographic"]}
    learnt = torch.zeros(ITEMS) if index.item_scores is None else index.item_scores
    for result in found["sum"]:
        own = before[result["id"]]
        row = index.ids.index(result["id"])
        expected = own["score"] + index.cosine_weight * own["cosine"] - float(crowd[row]) + float(learnt[row])
        assert result["score"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("scoring", [[], ["--popularity", "-2", "--order", "sum"]], ids=["plain", "scored"])
def test_eval_counts_the_hits_that_searching_gives(
    scoring: list[str], run: Path, tmp_path: Path, no_picture: None, capsys: pytest.CaptureFixture[str]
) -> None:
    results = evaluate(run, tmp_path / "out", "--max-queries", "10", *scoring)
    test = sample(load_dataset(run / "data").test, 10)
    hits = []
    for query, history, target in zip(test.queries, test.histories.tolist(), test.items.tolist(), strict=True):
        before = [f"film-{item}" for item in history if item >= 0]
        request = ["--query", query] + (["--history", *before] if before else [])
        capsys.readouterr()
        assert search(run, *request, "--k", "5", "--json", *scoring) == 0
        found = json.loads(capsys.readouterr().out)["results"]
        hits.append(f"film-{target}" in [result["id"] for result in found])
    assert set(results["systems"]) == {"popularity", "exact cosine", "DGI"}
    assert results["systems"]["DGI"]["overall"]["queries"] == results["queries"] == 10
    assert results["systems"]["DGI"]["overall"]["hit_rate@5"] == pytest.approx(np.mean(hits))


def test_index_says_where_there_are_too_few_ids_for_all_items(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """8 x 3 codes for 30 items: they share IDs, unless each is to have its own."""
    arguments = ["index", "--model", str(run / "model"), "--data", str(run / "data"), QUIET, "--output"]
    for choice in ([], ["--no-unique"]):
        assert main([*arguments, str(tmp_path / "shared"), *choice]) == 0
        assert "indexed 30 items under" in capsys.readouterr().out
    assert main([*arguments, str(tmp_path / "unique"), "--unique"]) == 2
    assert "give 24, for 30 items" in capsys.readouterr().err


def test_eval_reports_index_judgments_and_a_sample_and_is_deterministic(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    judgments = write_judgments(tmp_path / "judgments.tsv")
    results = evaluate(run, tmp_path / "a", "--judgments", str(judgments), "--max-queries", "7")
    assert results["queries"] == 7 and results["systems"]["DGI"]["overall"]["queries"] == 7
    assert [level["size"] for level in results["index"]["codes"]] == [8, 3]
    assert set(results["judgments"]) == {"DGI", "exact cosine"} and results["judgments"]["DGI"]["queries"] == 2
    assert (tmp_path / "a/buckets.png").read_bytes().startswith(b"\x89PNG")
    assert "metrics.json" in capsys.readouterr().out
    monkeypatch.setattr("dgi.evaluation.plots.bucket_picture", lambda *_, **__: None)
    again = evaluate(run, tmp_path / "b", "--judgments", str(judgments), "--max-queries", "7")
    assert again == results


def test_a_target_in_its_history_is_told_and_can_be_kept(
    run: Path, tmp_path: Path, no_picture: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against clicks on known items that silently count as misses."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "items.tsv").write_text((run / "data/items.tsv").read_text())
    rows = [{"history": ["film-1"], "item_id": "film-1"}, {"history": ["film-1"], "item_id": "film-2"}]
    for part in ("train", "test"):
        (data / f"interactions.{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [
        "eval",
        "--model",
        str(run / "model"),
        "--index",
        str(run / "new/index.safetensors"),
        "--data",
        str(data),
        "--output",
        str(tmp_path / "out"),
        "--num-beams",
        str(ITEMS),
        QUIET,
    ]
    assert main(common) == 0
    assert "1 of 2 test interactions choose an item of their own history" in capsys.readouterr().err
    assert main([*common, "--keep-history"]) == 0
    assert "own history" not in capsys.readouterr().err


def test_resume_takes_the_settings_of_the_run(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dgi.training.curve.training_curve", lambda *_: None)
    model = (run / "model/model.safetensors").read_bytes()
    common = ["train", "--data", str(run / "data"), "--output", str(run / "model"), QUIET]
    assert main(common) == 2
    assert "holds checkpoints of an earlier run" in capsys.readouterr().err
    assert main([*common, "--resume", "--set", "epochs=3"]) == 2
    assert "epochs is 3 now and was 2" in capsys.readouterr().err
    assert main([*common, "--resume"]) == 0
    assert (run / "model/model.safetensors").read_bytes() == model
    assert json.loads((run / "model/config.json").read_text())["epochs"] == 2


def test_settings_are_split_and_checked() -> None:
    model, training = configs({"dim": 8, "epochs": 3, "loss_weights": {"ntp": 2}}, 0)
    assert (model.dim, training.epochs, training.loss_weights) == (8, 3, {"ntp": 2.0})
    assert configs({"encoder": "vectors"}, 384)[0].vector_dim == 384
    with pytest.raises(ValueError, match="unknown setting 'epoch'; known are .*epochs"):
        configs({"epoch": 3}, 0)


# What is typed -> what the message must say.  {run} is the folder of the fixture.
MISTAKES = {
    "train --data {run}/nothing --output {run}/x": "nothing: there is no such folder",
    "train --data {run}/data --output {run}/x --set epochs": "--set takes NAME=VALUE; got 'epochs'",
    "train --data {run}/data --output {run}/x --set epochs=many": "epochs must be int; got 'many'",
    "train --data {run}/data --output {run}/x --set encoder=vectors": "vector_dim must be the width",
    "train --data {run}/data --output {run}/x --config {run}/data/items.tsv": "items.tsv is not JSON",
    "train --data {run}/data --output {run}/x --config {run}/utf16.json": "utf16.json: not UTF-8",
    "train --data {run}/data --output {run}/x --config {run}/deep.json": "deep.json is not JSON",
    "train --data {run}/data --output {run}/x --set vocabulary_size=1": "vocabulary_size must be at least 2; got 1",
    "train --data {run}/data --output {run}/x --set seed=99999999999999999999": (
        "seed must be at most 9223372036854775807"
    ),
    "train --data {run}/data --output {run}/x --set dim=99999999999": "dim must be at most 2147483647",
    "train --data {run}/data --output {run}/x --set codebook_sizes=16": (
        "must be a list of integers, such as [16]; got 16"
    ),
    "train --data {run}/data --output {run}/x --set backbone_lr=NaN": (
        "backbone_lr must be positive and finite; got nan"
    ),
    "train --data {run}/data --output {run}/x --set tau_end=Infinity": "tau_end must be positive and finite; got inf",
    'train --data {run}/data --output {run}/x --set loss_weights={{"ntp":null}}': "must map names to numbers",
    "train --data {run}/data --output {run}/x --set "
    'loss_weights={{"ntp":0,"global":0,"local":0,"infonce":0,"diversity":0}}': "loss_weights must not all be 0",
    "train --data {run}/data --output {run}/settings.json": "settings.json is a file; a folder is needed",
    "train --data {run}/data --output {run}/settings.json/x": "settings.json/x cannot be written to",
    "train --data {run}/data --output {run}/x --set tokenizer={run}/none.json": "none.json: there is no such file",
    "train --data {run}/data --output {run}/x --device meta": "--device meta cannot be used: it holds no numbers",
    "index --model {run}/model --data {run}/data --output {run}/model": "model is a folder; a file of that name",
    "eval --model {run}/none --index {run}/none --data {run}/none --output {run}/settings.json": (
        "settings.json is a file; a folder is needed"
    ),
    "train --data {run}/data --output {run}/x --device cpu --cuda-graph": "cuda_graph needs a CUDA device; the",
    "train --data {run}/data --output {run}/x --device warp": "--device warp cannot be used",
    "index --model {run}/data --data {run}/data --output {run}/x": "data/model.safetensors: there is no such file",
    "search --index {run}/new/index.safetensors --model {run}/model --data {run}/data": (
        "give --query, --history or both"
    ),
    "search --index {run}/x --model {run}/model --data {run}/data --query a": "dgi index --output",
    "search --index {run}/model/model.safetensors --model {run}/model --data {run}/data --query a": (
        "holds a DGIModel; a DGIIndex is needed"
    ),
    "search --index {run}/new/index.safetensors --model {run}/model --data {run}/data --history film-99": (
        "no item 'film-99'"
    ),
    "eval --model {run}/model --index {run}/new/index.safetensors --data {run}/data --output {run}/x --judgments "
    "{run}/none.tsv": "none.tsv: there is no such file",
    "demo --data {run}/model --output {run}/x": "there is no items file",
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_is_told_in_one_message(run: Path, capsys: pytest.CaptureFixture[str], typed: str) -> None:
    words = [word.format(run=run) for word in typed.split()]
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"dgi {words[0]}: error: ") and "Traceback" not in captured.err
    assert MISTAKES[typed] in captured.err
    with pytest.raises((ValueError, OSError)):
        main([*words, "--debug"])


def test_a_configuration_with_a_byte_order_mark_is_read(run: Path, tmp_path: Path) -> None:
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + json.dumps({"epochs": 7}).encode())
    arguments = build_parser().parse_args(
        ["train", "--data", "d", "--output", str(tmp_path), "--config", str(tmp_path / "bom.json")]
    )
    assert _settings(arguments) == {"epochs": 7}


def test_a_run_of_version_0_1_0_goes_on_with_its_words(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"epochs": 7}))
    arguments = build_parser().parse_args(["train", "--data", "d", "--output", str(tmp_path), "--resume"])
    assert _settings(arguments) == BEFORE | {"epochs": 7} and BEFORE["tokenizer"] == "words-1"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 9 GiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't "
            "allocate memory: you tried to allocate 9 bytes."
        ),
    ],
    ids=str,
)
def test_too_little_memory_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def too_large(_: object) -> None:
        raise error

    monkeypatch.setattr(COMMANDS["index"], "run", too_large)
    assert main(["index", "--model", "m", "--data", "d", "--output", "o"]) == 2
    assert "dgi index: error: not enough memory (" in capsys.readouterr().err


def test_what_the_terminal_cannot_show_ends_no_search(run: Path, tmp_path: Path) -> None:
    """Guards against a search that fails on an ASCII terminal, and against a closed pipe that ends in an error."""
    code = "import sys, dgi.cli; sys.exit(dgi.cli.main(sys.argv[1:]))"
    arguments = [
        "search",
        "--index",
        str(run / "new/index.safetensors"),
        "--model",
        str(run / "model"),
        "--data",
        str(run / "data"),
        "--query",
        "genre0 é日",
    ]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", code, *arguments, "--json", "--k", "3"]
    found = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert json.loads(found.stdout)["query"] == "genre0 é日"
    reader, writer = os.pipe()
    os.close(reader)
    closed = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--k", "3"], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (closed.returncode, closed.stderr) == (141, b"")


def test_commands_to_copy_are_quoted(capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my $data"
    shutil.copytree(run / "data", folder)
    assert (
        main(["index", "--model", str(run / "model"), "--data", str(folder), "--output", str(tmp_path / "i"), QUIET])
        == 0
    )
    line = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(line)[1:] == [
        "dgi",
        "search",
        "--index",
        str(tmp_path / "i"),
        "--model",
        str(run / "model"),
        "--data",
        str(folder),
        "--query",
        "TEXT",
    ]


def test_a_fault_that_is_no_mistake_of_the_user_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise AttributeError("ours")

    monkeypatch.setattr(COMMANDS["index"], "run", broken)
    with pytest.raises(AttributeError, match="ours"):
        main(["index", "--model", "m", "--data", "d", "--output", "o"])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_each_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"dgi {command}" in capsys.readouterr().out.split("example")[1]


def test_help_does_not_wait_for_torch() -> None:
    """Guards against an import at the top of a command's file, which costs seconds on every --help."""
    code = "import sys, dgi.cli; dgi.cli.build_parser(); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_bench_passes_arguments_on_and_says_where_benchmarks_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr("dgi.cli.bench.FOLDER", tmp_path)
    monkeypatch.setattr("subprocess.call", lambda command: calls.append(command) or 0)
    assert main(["bench"]) == 2
    assert "clone the repository" in capsys.readouterr().err
    (tmp_path / "bench_a.py").touch()
    with monkeypatch.context() as without:
        without.setattr("importlib.util.find_spec", lambda _: None)
        assert main(["bench"]) == 2
    assert "pip install 'dgi-kernels[bench]'" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    assert main(["bench", "-k", "trie"]) == 0
    assert calls == [[sys.executable, "-m", "pytest", str(tmp_path / "bench_a.py"), "-k", "trie"]]


def test_an_unknown_argument_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against one that is passed over, since bench passes unknown ones on."""
    with pytest.raises(SystemExit):
        main(["demo", "--ful"])
    assert "--ful" in capsys.readouterr().err


def test_every_public_name_of_the_package_is_there() -> None:
    assert {name: getattr(dgi, name).__name__.rpartition(".")[2] for name in dgi.__all__} == {n: n for n in dgi.__all__}
    assert set(dgi.__all__) <= set(dir(dgi))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dgi.nothing  # noqa: B018


def test_a_validation_set_is_held_out_of_training(
    run: Path, tmp_path: Path, no_picture: None, capsys: pytest.CaptureFixture[str]
) -> None:
    data = load_dataset(run / "data")
    command = ["train", "--data", str(run / "data"), "--config", str(run / "settings.json"), "--output"]
    assert main([*command, str(tmp_path / "out"), "--hold-out", QUIET]) == 0
    printed = capsys.readouterr().out
    assert f"on {len(data.train) - len(data.train) // 10:,} interactions" in printed
    assert printed.startswith("training in stages (encoder 0.333 epochs, quantizer, joint 0.667 epochs)")
