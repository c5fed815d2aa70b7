"""What an import costs and survives: nothing large is imported, and broken neighbours leave the rest working."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dgi_kernels
from dgi_kernels import _extension

LARGE = ("torch._dynamo", "torch._inductor", "sympy", "triton", "scipy", "matplotlib", "transformers")


def run(code: str, **environment: str) -> str:
    """The last line that another interpreter prints."""
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


def broken_triton(folder: Path, fault: str) -> str:
    """A path on which there is a Triton whose import fails."""
    (folder / "triton").mkdir()
    (folder / "triton" / "__init__.py").write_text(f"raise {fault}\n")
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def test_the_import_takes_nothing_large_with_it() -> None:
    """Guards against a second for torch.compile's tracer, which one decorator imported, and half of one for Triton."""
    loaded = run(
        f"import sys, torch; before = set(sys.modules); import dgi_kernels; "
        f"print([name for name in {LARGE} if name in sys.modules and name not in before])",
        TRITON_INTERPRET="0",
    )
    assert loaded == "[]"


def test_eager_ops_take_nothing_large_with_them() -> None:
    code = (
        "import sys, torch, dgi_kernels as dk; h = torch.randn(3, 4, requires_grad=True); "
        "w, target = torch.randn(5, 4), torch.tensor([0, 1, 2]); "
        "dk.vocabulary_parallel_cosine_cross_entropy(h, w, target, 3.0).backward(); "
        "dk.gumbel_softmax(h, 0.5).sum().backward(); dk.residual_quantize(h, [torch.randn(5, 4)], 3.0); "
        f"print([name for name in {LARGE} if name in sys.modules])"
    )
    assert run(code, TRITON_INTERPRET="0") == "[]"


@pytest.mark.parametrize("fault", ["ImportError('libcuda.so.1: cannot open')", "RuntimeError('0 active drivers')"])
def test_a_broken_triton_is_a_backend_that_is_not_available(tmp_path: Path, fault: str) -> None:
    """Guards against a Triton that takes all of dgi_kernels with it, and the report that is to say why."""
    path, message = broken_triton(tmp_path, fault), fault.split("'")[1]
    use = (
        "import torch, dgi_kernels as dk; dk.cosine_logits(torch.ones(2, 3), torch.ones(4, 3), 1.0); "
        "print(dk.backends()['triton'].reason)"
    )
    assert message in run(use, PYTHONPATH=path, TRITON_INTERPRET="1")  # it would be used
    run(use, PYTHONPATH=path, TRITON_INTERPRET="0")
    report = run(
        "import dgi_kernels.info as info; print(info.report().replace(chr(10), ' '))",
        PYTHONPATH=path,
        TRITON_INTERPRET="1",
    )
    assert message in report


def test_a_placeholder_for_triton() -> None:
    code = (
        "import sys, types; sys.modules['triton'] = types.ModuleType('triton'); import dgi_kernels; "
        "print(dgi_kernels.backends()['triton'].reason)"
    )
    assert "cannot be found" in run(code)


@pytest.mark.skipif(sys.platform != "linux", reason="loads an ELF file")
def test_a_library_that_cannot_be_loaded_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "_C.abi3.so"
    library.write_bytes(b"\x7fELF not really")
    monkeypatch.setattr(_extension, "LIBRARY", library)
    reason = _extension._load()
    assert reason is not None and "could not be loaded" in reason
    assert "file too short" in reason or "invalid ELF header" in reason


def test_a_library_of_another_version_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an import that fails where the library was not built again after an update."""
    monkeypatch.setattr("torch.ops.load_library", lambda _: None)
    monkeypatch.setattr(_extension, "OPS", ("of_tomorrow",))
    monkeypatch.setattr(_extension, "LIBRARY", Path(dgi_kernels.__file__))
    with pytest.warns(RuntimeWarning, match="has no of_tomorrow.* build it again"):
        reason = _extension._load()
    assert reason is not None and "is of another version of dgi-kernels" in reason and "has no of_tomorrow" in reason


@pytest.mark.skipif(_extension.load_error is not None, reason=str(_extension.load_error))
def test_a_library_whose_ops_take_something_else_is_told_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a TypeError of torch in the first call, deep below the public op."""
    monkeypatch.setattr(_extension, "load_error", None)
    with pytest.warns(
        RuntimeWarning, match=r"its run_starts takes 2 arguments \(starts, runs\), not 3.* build it again"
    ):
        _extension.fake_kernel("run_starts")(lambda starts, runs, of_tomorrow: runs)
    status = dgi_kernels.backends()["native"]
    assert not status.available and "run_starts takes 2 arguments" in status.reason
    dgi_kernels.cosine_logits(torch.ones(2, 3), torch.ones(4, 3), 1.0)  # by the reference
    with pytest.raises(dgi_kernels.BackendUnavailable, match="run_starts takes 2 arguments"):
        dgi_kernels.cosine_logits(torch.ones(2, 3), torch.ones(4, 3), 1.0, backend="native")


def test_every_fake_kernel_takes_what_its_op_takes() -> None:
    """By number, or all that its own parameters leave as one."""
    assert _extension._difference("cosine_logits", lambda h, weight, scale, eps: h) == ""
    assert _extension._difference("cosine_logits", lambda h, *others: h) == ""
    assert "takes 4 arguments" in _extension._difference("cosine_logits", lambda h: h)


def test_bfloat16_is_not_for_the_interpreter() -> None:
    """Guards against products of raw bits: nonsense, where an error belongs."""
    pytest.importorskip("triton")
    code = (
        "import torch, dgi_kernels as dk; x = torch.ones(2, 16, dtype=torch.bfloat16)\n"
        "try: dk.cosine_cross_entropy(x, x, torch.tensor([0, 1]), 1.0, backend='triton')\n"
        "except dk.BackendUnavailable as error: print(error)"
    )
    assert "no triton kernel for torch.bfloat16 on cpu" in run(code, TRITON_INTERPRET="1")
