"""The scripts under runs/ work: on tiny data, and with a clear message where arguments are missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.dgi.tiny_folder import ITEMS, SETTINGS, write_data

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "runs").glob("*.sh"))


def run_script(script: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "QUERY": "genre1"}
    return subprocess.run(["bash", str(script), *map(str, arguments)], env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_your_data_goes_from_files_to_metrics(tmp_path: Path) -> None:
    data, output = write_data(tmp_path / "data", np.random.default_rng(3)), tmp_path / "output"
    settings = [f"{name}={json.dumps(value)}" for name, value in SETTINGS.items()]
    done = run_script(ROOT / "runs/your-data.sh", data, output, *settings)
    assert done.returncode == 0, done.stderr
    config = json.loads((output / "config.json").read_text())
    assert {name: config[name] for name in SETTINGS} == SETTINGS and config["quantizer_lr"] == 1e-3
    assert "genre" in done.stdout and "exact cosine" in done.stdout
    assert (output / "evaluation/buckets.png").stat().st_size > 0
    metrics = json.loads((output / "evaluation/metrics.json").read_text())
    assert metrics["index"]["items"] == ITEMS and metrics["queries"] == metrics["test_interactions"]


def test_your_data_explains_itself_without_arguments() -> None:
    shown = run_script(ROOT / "runs/your-data.sh")
    assert shown.returncode == 2 and "bash runs/your-data.sh DATA OUTPUT" in shown.stderr and not shown.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_scripts_state_cost_and_expectation_and_are_valid(script: Path) -> None:
    text = script.read_text()
    assert "# Cost: " in text and "# Expect" in text and os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
