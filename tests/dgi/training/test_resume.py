"""A run that was killed and resumed ends with the files of one that was not, bit for bit."""

from __future__ import annotations

import json
import logging
import multiprocessing
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dgi.config import WORDS_1
from dgi.training.checkpoint import CheckpointError, MetricsLog, load_model, read_tensors, write_tensors
from tests.dgi.tiny_runs import tiny_trainer, train_until_killed

# Processes start from one that has imported everything (an optimizer imports torch._dynamo), in milliseconds.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.dgi.tiny_runs", "torch._dynamo"])


@pytest.fixture(autouse=True)
def no_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the picture out, which takes longest in a run so small."""
    monkeypatch.setattr("dgi.training.curve.training_curve", lambda *_: None)


def start(
    output: Path, seed: int, train: dict[str, Any], function: str | None = None, calls: int = 0
) -> multiprocessing.process.BaseProcess:
    process = processes.Process(target=train_until_killed, args=(output, seed, train, function, calls))
    process.start()
    return process


def finish(output: Path, seed: int, train: dict[str, Any]) -> None:
    process = start(output, seed, train)
    process.join()
    assert process.exitcode == 0


def rows_without_time(output: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def assert_same_files(actual: Path, expected: Path) -> None:
    """Weights, optimizer state and metrics agree to the bit, and nothing else is left behind."""
    assert sorted(p.relative_to(actual) for p in actual.rglob("*")) == sorted(
        p.relative_to(expected) for p in expected.rglob("*")
    )
    for path in expected.rglob("*.safetensors"):
        assert (actual / path.relative_to(expected)).read_bytes() == path.read_bytes(), path.name
    assert rows_without_time(actual) == rows_without_time(expected)


def newest_step(output: Path) -> int:
    steps = [int(path.stem.removeprefix("step-")) for path in output.glob("checkpoints/step-*.safetensors")]
    return max(steps, default=0)


def test_killed_at_random_moments_and_resumed(tmp_path: Path, seed: int) -> None:
    train = {"epochs": 8}  # 24 steps with dropout, noise, revival and a checkpoint
    finish(tmp_path / "whole", seed, train)
    for step in sorted(random.sample(range(20), 3)):
        process = start(tmp_path / "killed", seed, train)
        while process.is_alive() and newest_step(tmp_path / "killed") < step:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.05))
        process.kill()
        process.join()
    finish(tmp_path / "killed", seed, train)
    assert_same_files(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("function", ["fsync", "replace", "unlink"])
def test_killed_within_a_write_and_resumed(function: str, tmp_path: Path, seed: int) -> None:
    """Guards moments that a random kill seldom hits: before the bytes are out, before the rename, before pruning."""
    finish(tmp_path / "whole", seed, {})
    for calls in (1, random.randint(2, 5), random.randint(2, 5)):
        process = start(tmp_path / "killed", seed, {}, function, calls)
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
    finish(tmp_path / "killed", seed, {})
    assert_same_files(tmp_path / "killed", tmp_path / "whole")


def test_half_a_line_of_metrics_is_dropped(tmp_path: Path, seed: int) -> None:
    tiny_trainer(tmp_path / "whole", seed).fit()
    tiny_trainer(tmp_path / "cut", seed).fit()
    (tmp_path / "cut/checkpoints/step-00000006.safetensors").unlink()
    with open(tmp_path / "cut/metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    tiny_trainer(tmp_path / "cut", seed).fit(resume=True)
    assert rows_without_time(tmp_path / "cut") == rows_without_time(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_newest_checkpoint_is_passed_over(
    damage: str, tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_trainer(tmp_path / "whole", seed).fit()
    tiny_trainer(tmp_path / "damaged", seed).fit()
    newest = tmp_path / "damaged/checkpoints/step-00000006.safetensors"
    content = bytearray(newest.read_bytes())
    content[random.randrange(len(content) // 2, len(content))] ^= 1
    newest.write_bytes(content[: -random.randrange(1, len(content))] if damage == "truncated" else content)
    tiny_trainer(tmp_path / "damaged", seed).fit(resume=True)
    assert "step-00000006.safetensors" in caplog.text and "trying the checkpoint before it" in caplog.text
    assert_same_files(tmp_path / "damaged", tmp_path / "whole")


def test_where_all_checkpoints_are_damaged_nothing_is_overwritten(tmp_path: Path, seed: int) -> None:
    tiny_trainer(tmp_path, seed).fit()
    for path in tmp_path.glob("checkpoints/*"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read; remove the folder to start over"):
        tiny_trainer(tmp_path, seed).fit(resume=True)
    assert len(rows_without_time(tmp_path)) == 6


def test_without_a_checkpoint_training_starts_afresh_and_says_so(
    tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_trainer(tmp_path / "whole", seed).fit()
    tiny_trainer(tmp_path / "resumed", seed).fit(resume=True)
    assert "to resume from: training starts from the beginning" in caplog.text
    assert_same_files(tmp_path / "resumed", tmp_path / "whole")


def test_a_finished_run_resumes_to_its_end(tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    metrics = tiny_trainer(tmp_path, seed).fit()
    model = (tmp_path / "model.safetensors").read_bytes()
    trainer = tiny_trainer(tmp_path, seed)
    torch.nn.utils.vector_to_parameters(torch.zeros(10**6), trainer.model.parameters())
    assert trainer.fit(resume=True) == metrics
    assert "step-00000006.safetensors" in caplog.text
    assert (tmp_path / "model.safetensors").read_bytes() == model


@pytest.mark.parametrize(
    ("field", "model", "train"),
    [
        ("train_config.backbone_lr is 0.5 now and was 0.001", {}, {"backbone_lr": 0.5}),
        ("train_config.loss_weights.ntp is 2.0 now and was None", {}, {"loss_weights": {"ntp": 2.0}}),
        (r"model_config.codebook_sizes is \[5, 3\] now and was \[5, 4\]", {"codebook_sizes": [5, 3]}, {}),
    ],
)
def test_another_configuration_is_refused_by_field(
    field: str, model: dict[str, Any], train: dict[str, Any], tmp_path: Path, seed: int
) -> None:
    tiny_trainer(tmp_path, seed).fit()
    with pytest.raises(ValueError, match=field):
        tiny_trainer(tmp_path, seed, model, train).fit(resume=True)


def test_other_data_is_refused(tmp_path: Path, seed: int) -> None:
    tiny_trainer(tmp_path, seed).fit()
    with pytest.raises(ValueError, match="data is '.*' now and was '"):
        tiny_trainer(tmp_path, seed + 1, train={"seed": seed}).fit(resume=True)


def test_a_run_is_not_overwritten_by_accident(tmp_path: Path, seed: int) -> None:
    tiny_trainer(tmp_path, seed).fit()
    with pytest.raises(FileExistsError, match="holds checkpoints of an earlier run: resume it, remove the folder"):
        tiny_trainer(tmp_path, seed).fit()


def test_resume_needs_an_output_folder(seed: int) -> None:
    with pytest.raises(ValueError, match="resume needs the output folder"):
        tiny_trainer(None, seed).fit(resume=True)


def test_a_run_of_a_version_without_tokenizers_goes_on(tmp_path: Path, seed: int) -> None:
    """Guards against a field of the configuration, added later, that keeps an older run from being resumed."""
    old = {"tokenizer": WORDS_1}
    tiny_trainer(tmp_path, seed, old).fit()
    for path in (tmp_path / "checkpoints").iterdir():
        tensors, description = read_tensors(path, "checkpoint")
        del description["model_config"]["tokenizer"], description["version"]
        write_tensors(path, tensors, description)
    model = (tmp_path / "model.safetensors").read_bytes()
    tiny_trainer(tmp_path, seed, old).fit(resume=True)
    assert (tmp_path / "model.safetensors").read_bytes() == model
    with pytest.raises(ValueError, match="model_config.tokenizer is 'words-2' now and was 'words-1'"):
        tiny_trainer(tmp_path, seed).fit(resume=True)


def test_the_model_is_there_whatever_happens_to_the_picture(
    tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against training that is lost to the picture drawn at its end."""

    def fails(*_: object) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr("dgi.training.curve.training_curve", fails)
    assert tiny_trainer(tmp_path, seed).fit()["step"] == 6
    assert load_model(tmp_path / "model.safetensors").depth == 2
    assert "training_curve.png was not drawn: no fonts" in caplog.text


def test_a_disk_without_room_is_told_before_training(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny_trainer(tmp_path, seed)
    state = sum(tensor.nbytes for tensor in trainer._state().values())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4 * state - 1))
    with pytest.raises(OSError, match="MiB left, and .* MiB will be written"):
        trainer.fit()
    assert not (tmp_path / "metrics.jsonl").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4 * state))
    trainer.fit()


@pytest.mark.parametrize(("line", "message"), [("{nonsense}", "not JSON"), ('{"loss": 1}', "without a step")])
def test_damaged_metrics_are_told_by_file(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(line + '\n{"step": 1}\n')
    with pytest.raises(CheckpointError, match=f"metrics.jsonl is damaged: it holds a line .*{message[:7]}"):
        MetricsLog(tmp_path / "metrics.jsonl").cut(1)
