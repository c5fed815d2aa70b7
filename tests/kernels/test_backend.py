"""The one place that knows which backend runs: choice, reasons, fallbacks, debug mode and the printed report."""

from __future__ import annotations

import logging
import re
import subprocess
import sys

import pytest
import torch

import dgi_kernels
from dgi_kernels import BackendUnavailable, backend, info
from dgi_kernels.backend import KERNELS, choose, why_not

CPU = torch.device("cpu")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op with both kernels, on a machine that has both backends; nothing has been logged yet."""
    both = {"native": {"cpu": frozenset({torch.float32}), "cuda": frozenset({torch.float16})}, "triton": {"cuda": None}}
    monkeypatch.setattr(backend, "KERNELS", {"op": both, "plain": {}})
    monkeypatch.setattr(backend, "_BACKEND_PROBLEM", {"reference": None, "triton": None, "native": None})
    monkeypatch.setattr(backend, "_logged", set())
    monkeypatch.setattr(backend._extension, "has_cuda", True)


@pytest.mark.parametrize(
    ("device", "dtype", "chosen"),
    [
        ("cpu", torch.float32, "native"),
        ("cpu", torch.float64, "reference"),
        ("cuda", torch.float64, "triton"),
        ("cuda", torch.float16, "triton"),
        ("mps", torch.float32, "reference"),
    ],
)
def test_auto_takes_the_first_kernel_that_runs(kernels: None, device: str, dtype: torch.dtype, chosen: str) -> None:
    assert choose("op", "auto", torch.device(device), dtype) == chosen
    assert choose("op", "reference", torch.device(device), dtype) == "reference"


def test_a_named_backend_that_cannot_run_says_why(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose("op", "native", CPU, torch.float32) == "native"
    for name, device, dtype, reason in (
        ("native", "cpu", torch.float64, "op has no native kernel for torch.float64 on cpu (it takes torch.float32)"),
        ("native", "cuda", torch.float32, "op has no native kernel for torch.float32 on cuda (it takes torch.float16)"),
        ("native", "mps", torch.float32, "op has no native kernel for mps tensors (it runs on cpu, cuda)"),
        ("triton", "cpu", torch.float32, "op has no triton kernel for cpu tensors (it runs on cuda)"),
    ):
        assert why_not("op", name, torch.device(device), dtype) == reason
        with pytest.raises(BackendUnavailable) as error:
            choose("op", name, torch.device(device), dtype)
        assert str(error.value) == f'backend="{name}" cannot run op here: {reason}'
    with pytest.raises(BackendUnavailable, match="plain has no native kernel in this version"):
        choose("plain", "native", CPU)
    monkeypatch.setattr(backend._extension, "has_cuda", False)
    with pytest.raises(BackendUnavailable, match="the extension was built without CUDA kernels"):
        choose("op", "native", torch.device("cuda"), torch.float16)
    monkeypatch.setitem(backend._BACKEND_PROBLEM, "native", "the disk was full")
    with pytest.raises(BackendUnavailable, match="the native backend is not available: the disk was full"):
        choose("op", "native", CPU, torch.float32)


@pytest.mark.parametrize("name", ["cuda", "", None, 3, ("auto",)])
def test_unknown_backend(name: object) -> None:
    with pytest.raises(ValueError, match="^backend must be one of 'auto', 'reference', 'triton', 'native'; got "):
        choose("gumbel_noise", name, CPU)


def test_a_fallback_is_logged_once_with_its_reason(kernels: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dgi_kernels"):
        for _ in range(3):
            choose("op", "auto", CPU, torch.float64)
            choose("op", "auto", CPU, torch.float32)
            choose("plain", "auto", CPU, torch.float32)
        choose("op", "auto", CPU, torch.float16)
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        "op: falling back to the PyTorch reference"
    ] * 2
    assert "no native kernel for torch.float64" in caplog.messages[0]
    assert "no native kernel for torch.float16" in caplog.messages[1]


def test_an_option_that_a_kernel_lacks(
    kernels: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backend, "LACKS", {("op", "native"): {"metric=dot": "nobody wrote it"}})
    reason = "op has no native kernel for metric=dot: nobody wrote it"
    assert choose("op", "auto", CPU, torch.float32, {"metric": "cosine", "mode": "dot"}) == "native"
    with caplog.at_level(logging.INFO, logger="dgi_kernels"):
        for _ in range(2):
            assert choose("op", "auto", CPU, torch.float32, {"metric": "dot"}) == "reference"
    assert len(caplog.messages) == 1 and reason in caplog.messages[0]
    assert why_not("op", "native", CPU, torch.float32, {"metric": "dot"}) == reason
    with pytest.raises(BackendUnavailable, match=f'backend="native" cannot run op here: {reason}'):
        choose("op", "native", CPU, torch.float32, {"metric": "dot"})
    assert choose("op", "auto", torch.device("cuda"), torch.float16, {"metric": "dot"}) == "triton"


def test_what_is_lacking_belongs_to_a_kernel_that_exists() -> None:
    for op, name in backend.LACKS:
        assert name in backend.KERNELS[op]


def test_backends_lists_what_is_here_and_why_not_where_it_is_not(
    kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(backend._BACKEND_PROBLEM, "triton", "no CUDA device is available")
    status = dgi_kernels.backends()
    assert list(status) == ["reference", "triton", "native"]
    assert status["reference"] == backend.BackendStatus(True, "", ("op", "plain"))
    assert status["triton"] == backend.BackendStatus(False, "no CUDA device is available", ("op",))
    assert status["native"] == backend.BackendStatus(True, "", ("op",))


def test_here_a_reason_is_given_exactly_where_a_backend_is_missing() -> None:
    status = dgi_kernels.backends()
    assert status["reference"].available
    for name in ("triton", "native"):
        assert bool(status[name].reason) != status[name].available


def test_debug_checks_values_off_the_cpu_and_ends_with_its_block() -> None:
    cuda, before = torch.device("cuda"), backend._debug
    assert backend.checks_values(CPU)
    with dgi_kernels.debug():
        assert backend.checks_values(cuda)
        with dgi_kernels.debug():
            pass
        assert backend.checks_values(cuda)
    with pytest.raises(KeyError), dgi_kernels.debug():
        raise KeyError
    assert backend._debug == before == backend.checks_values(cuda)


def test_a_fallback_that_forms_logits_warns_on_an_accelerator(
    kernels: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards against a slow path that nobody sees: Python hides messages of level INFO."""
    monkeypatch.setattr(backend, "FORMS_LOGITS", {"op"})
    monkeypatch.setitem(backend.KERNELS, "other", {"native": {"cpu": None}})
    cuda = torch.device("cuda")
    monkeypatch.setitem(backend.KERNELS, "op", {"native": {"cpu": frozenset({torch.float32})}})
    with caplog.at_level(logging.INFO, logger="dgi_kernels"):
        for _ in range(2):
            choose("op", "auto", CPU, torch.float64)
            choose("op", "auto", cuda, torch.float32)
            choose("other", "auto", cuda, torch.float32)
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING", "INFO"]
    assert caplog.messages[1] == (
        "op: falling back to the PyTorch reference, which forms all rows x codes logits on cuda "
        "(op has no native kernel for cuda tensors (it runs on cpu))"
    )


def test_ops_that_form_logits_are_ops() -> None:
    assert set(KERNELS) > backend.FORMS_LOGITS


def test_the_public_why_not_takes_names(kernels: None) -> None:
    assert dgi_kernels.why_not("op", "native", "cpu", torch.float32) is None
    assert dgi_kernels.why_not("op", "triton", "cpu") == "op has no triton kernel for cpu tensors (it runs on cuda)"
    with pytest.raises(ValueError, match="op must be one of 'op', 'plain'; got 'cosine'"):
        dgi_kernels.why_not("cosine", "native", "cpu")
    with pytest.raises(ValueError, match="backend must be one of 'reference', 'triton', 'native'; got 'auto'"):
        dgi_kernels.why_not("op", "auto", "cpu")


def test_report_names_versions_backends_and_what_runs(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a report that lists kernels without asking for which device they are."""
    monkeypatch.setattr(backend._extension, "has_cuda", True)
    monkeypatch.setattr(info, "KERNELS", backend.KERNELS)
    monkeypatch.setitem(backend._BACKEND_PROBLEM, "triton", "the disk was full")
    monkeypatch.setattr(info, "_devices", lambda: ["cpu", "cuda"])
    facts, status, cpu, cpu_reasons, cuda, cuda_reasons = (
        [re.split(r"\s{2,}", line) for line in section.splitlines()] for section in info.report().split("\n\n")
    )
    assert facts[0] == ["dgi-kernels", dgi_kernels.__version__] and facts[2] == ["torch", torch.__version__]
    assert status == [
        ["backend", "available", "why not"],
        ["reference", "yes"],
        ["triton", "no", "the disk was full"],
        ["native", "yes"],
    ]
    assert cpu == [
        ["op on cpu", "float32", "bfloat16", "float16", "float64"],
        ["op", "native", "reference", "reference", "reference"],
        ["plain", *["reference"] * 4],
    ]
    assert cuda[1] == ["op", "reference", "reference", "native", "reference"]
    takes, full = "it has no native kernel for this dtype on", "the triton backend is not available: the disk was full"
    assert cpu_reasons == [
        ["reference on cpu", "dtypes", "why no kernel"],
        ["op", "bfloat16, float16, float64", f"{takes} cpu (it takes torch.float32); {full}"],
        ["plain", "all", "it has no kernel"],
    ]
    assert cuda_reasons[1:] == [
        ["op", "float32, bfloat16, float64", f"{full}; {takes} cuda (it takes torch.float16)"],
        ["plain", "all", "it has no kernel"],
    ]


def test_report_tells_what_auto_takes() -> None:
    """Also for CUDA, whose kernels need no GPU to be listed."""
    for device in ("cpu", "cuda"):
        for op, *chosen in info._ops(device)[1:]:
            assert chosen == [choose(op, "auto", torch.device(device), dtype) for dtype in info.DTYPES]


def test_module_prints_the_report() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-m", "dgi_kernels.info"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.startswith("dgi-kernels") and "residual_quantize" in run.stdout and not run.stderr
