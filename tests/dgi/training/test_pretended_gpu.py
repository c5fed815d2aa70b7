"""Steps of training on a GPU that is pretended: what it would refuse, and where its host would wait, raises.

Its kernels' launchers run and the other operators make tensors without numbers; see ``bench/gpu/rehearsal.py``.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dgi.training.update import CapturedUpdate, Update
from dgi_kernels import _extension, cuda_graphs
from tests.dgi.tiny_runs import tiny_trainer
from tests.dgi.training.test_update import CASES

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "bench"))

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
    pytest.mark.skipif(_extension.load_error is not None, reason=str(_extension.load_error)),
]


def take_steps(case: str, seed: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> int:
    """One step of every stage; return how many kernels of ours were launched."""
    from gpu.rehearsal import pretended_gpu

    monkeypatch.setattr(cuda_graphs, "possible", lambda device: True)
    monkeypatch.setattr(cuda_graphs, "aside", lambda function, device: function())
    model, train, kind = CASES[case]
    with pretended_gpu() as launches:
        launches.calls = []
        trainer = tiny_trainer(None, seed, model, train, kind, device="cuda:0", **options)
        for span in trainer.schedule.spans:
            if span.start < span.end:
                update = trainer._stage_update(span)
                assert type(update) is (CapturedUpdate if options.get("cuda_graph") else Update)
                trainer._update(update, trainer._batch(span.start, span), span.start)
        return sum(not isinstance(call.what, torch._ops.OpOverload) for call in launches.calls)


@pytest.mark.parametrize(("case", "captured"), [("dgi", False), *((case, True) for case in CASES)])
def test_a_step_has_all_on_the_gpu_and_waits_for_nothing(
    case: str, captured: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert take_steps(case, seed, monkeypatch, cuda_graph=captured) > 0


def test_a_count_of_steps_on_the_cpu_is_noticed(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the fused update of AdamW would read memory of the CPU by its address."""
    update = Update._step

    def misplaced(self: Update, *arguments: Any) -> Any:
        for state in self.optimizer.state.values():
            state["step"] = torch.zeros(())
        return update(self, *arguments)

    monkeypatch.setattr(Update, "_step", misplaced)
    with pytest.raises(RuntimeError, match="_fused_adamw_.*expected all tensors to be on the same device"):
        take_steps("dgi", seed, monkeypatch)
