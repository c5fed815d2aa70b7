"""pytest bench runs every op's target case, and a comparison with figures of before fails where something is slower."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .processes import outside_of_pytest

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_COMPILING = {"TORCHDYNAMO_DISABLE": "1"}  # torch.compile's peers run uncompiled: no test looks at their time


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "bench", "-v", "-p", "no:cacheprovider", *options],
        cwd=ROOT,
        env=outside_of_pytest() | WITHOUT_COMPILING,
        capture_output=True,
        text=True,
    )


def test_every_target_case_runs() -> None:
    run = bench("--benchmark-disable")
    assert run.returncode == 0, run.stdout + run.stderr
    passed = set(re.findall(r"test_target\[(\w+)-.*\] PASSED", run.stdout))
    recorded = {
        figure["extra_info"]["op"].replace(" ", "_")
        for path in (ROOT / "bench" / "results").glob("cpu-*.json")
        for figure in json.loads(path.read_text())["benchmarks"]
    }
    # These are beam_search and beam_step again, in whole searches, or need transformers; a training step beside another
    # commit needs its checkout, and catalogs of 1e8 items are no target case.
    elsewhere = {"trie_search", "dgi_search", "vocabulary_selection", "constrained_generate"}
    assert passed >= recorded - elsewhere - {"training_step_with_dropout", "scale"}


def test_a_comparison_fails_where_something_is_slower(tmp_path: Path) -> None:
    options = (
        "-k",
        "gumbel_noise-ours",
        "--benchmark-storage",
        str(tmp_path),
        "--benchmark-min-rounds",
        "3",
        "--benchmark-max-time",
        "0.1",
    )
    before = bench(*options, "--benchmark-save", "before")
    assert before.returncode == 0, before.stdout + before.stderr
    (file,) = tmp_path.rglob("0001_before.json")
    document = json.loads(file.read_text())
    (figure,) = document["benchmarks"]
    assert figure["name"] == "test_target[gumbel_noise-ours]" and figure["stats"]["rounds"] >= 3
    figure["stats"]["median"] /= 100
    file.write_text(json.dumps(document))
    after = bench(*options, "--benchmark-compare", "0001", "--benchmark-compare-fail", "median:50%")
    assert after.returncode != 0 and "Performance has regressed" in after.stdout + after.stderr
    assert "(0001_before)" in after.stdout and "(NOW)" in after.stdout
