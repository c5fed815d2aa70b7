"""The comparison of drop-ins notices what differs, refuses what is no drop-in, and leaves the source as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture(autouse=True)
def bench_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)


CODE = "import torch\n\n\ndef nearest(x, e):\n    d = torch.cdist(x, e)\n    return d.argmin(1)\n"


def test_every_drop_in_changes_three_lines_at_most_and_names_a_whole_commit() -> None:
    import dropins

    assert len(dropins.names()) >= 6
    for name in dropins.names():
        dropin = dropins.load(name)
        added = sum(change.after.count("\n") for change in dropin.changes)
        kept = sum(change.after.count(line) for change in dropin.changes for line in change.before.splitlines(True))
        assert 1 <= added - kept <= dropins.MOST_LINES, name
        assert all(change.before != change.after and change.before.endswith("\n") for change in dropin.changes)
        assert dropin.source.startswith("pypi:") or len(dropin.commit) == 40
        assert dropin.kind in dropins.KINDS
        assert any("dgi_kernels" in change.after or "dgi." in change.after for change in dropin.changes)


def test_changes_are_applied_once_and_shown(tmp_path: Path) -> None:
    from dropin import apply, changed_lines
    from dropins import Change

    (tmp_path / "a.py").write_text(CODE)
    diff = apply(
        [
            Change("a.py", "import torch\n", "import torch, dgi_kernels\n"),
            Change(
                "a.py",
                "    d = torch.cdist(x, e)\n    return d.argmin(1)\n",
                '    return dgi_kernels.assign_codes(x, [e], metric="euclidean")[:, 0]\n',
            ),
        ],
        tmp_path,
    )
    assert changed_lines(diff) == 3 and "+import torch, dgi_kernels" in diff.splitlines()
    x, e, names = torch.randn(50, 4), torch.randn(9, 4), {}
    exec((tmp_path / "a.py").read_text(), names)
    assert torch.equal(names["nearest"](x, e), torch.cdist(x, e).argmin(1))
    with pytest.raises(SystemExit, match="a.py has the lines to change 0 times, not once"):
        apply([Change("a.py", "nowhere\n", "here\n")], tmp_path)


def test_what_differs_is_found(tmp_path: Path) -> None:
    from dropin import difference
    from dropins import load

    one = {"codes": torch.arange(6), "scores": torch.tensor([1.0, 2.0, float("-inf")])}

    def compared(**changed: torch.Tensor) -> tuple[list[str], float]:
        save_file(one, tmp_path / "one")
        save_file(one | changed, tmp_path / "other")
        return difference(load("openonerec"), tmp_path / "one", tmp_path / "other")

    assert compared() == ([], 0.0)
    assert compared(codes=torch.tensor([0, 1, 2, 3, 5, 4]))[0] == ["codes: 2 of 6 differ"]
    assert "differs by 0.0005" in compared(scores=torch.tensor([1.0, 2.001, float("-inf")]))[0][0]
    assert compared(scores=torch.tensor([1.0, 2.0, 3.0]))[0] == ["scores: not finite in other places"]
    assert compared(scores=torch.zeros(2))[0][0].startswith("scores: torch.float32 (3,)")
    assert compared(more=torch.zeros(1))[0][0].startswith("outputs")


def test_what_is_missing_is_named_with_how_to_get_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dropin import main

    assert main(["--list"]) == 0 and "openonerec" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"--data FOLDER must hold it"):
        main(["openonerec", "--source", str(tmp_path)])
    (tmp_path / "genrec_beauty").mkdir()
    (tmp_path / "genrec_beauty" / "items.minilm.f16.npy").touch()
    with pytest.raises(SystemExit, match=r"--source DIR is needed: a clone of https://"):
        main(["openonerec", "--data", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"does not have commit 1f4a99.*git clone https://"):
        main(["openonerec", "--data", str(tmp_path), "--source", str(tmp_path)])
