"""``tools/gpu.py`` with phases made up for it, and its smoke test on what runs here."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import shapes
from bench.shapes import Shape
from tests.limits import HANGS_AFTER_S
from tools import gpu, smoke
from tools.gpu import Phase

CPU = torch.device("cpu")


def run(todo: list[Phase], out: Path, limit: float = HANGS_AFTER_S) -> dict[str, str]:
    return {one.phase.name: one.result for one in gpu.run(todo, out, sys.executable, limit)}


def python(name: str, code: str, seconds: float = HANGS_AFTER_S, **more: object) -> Phase:
    return Phase(name, ("-c", code), seconds, **more)


def test_a_phase_that_fails_or_takes_too_long_ends_only_itself(tmp_path: Path) -> None:
    started = tmp_path / "started"
    child = f"import time; open({str(started)!r}, 'w').write('x'); time.sleep({HANGS_AFTER_S})"
    slow = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    todo = [
        python("bad", "import os; print('before'); os.abort()"),
        Phase("slow", ("-c", slow, child), 5),
        python("lacks", "", needs=("no_such_module",)),
        python("good", "print('hello')"),
    ]
    begin = time.monotonic()
    results = run(todo, tmp_path)
    assert results == {
        "bad": "FAILED (-6)",
        "slow": "stopped after 5 s",
        "lacks": "not run: no_such_module not installed",
        "good": "ok",
    }
    assert started.exists()
    assert time.monotonic() - begin < HANGS_AFTER_S
    assert (tmp_path / "03-good.log").read_text().splitlines()[1:] == ["hello"]
    assert "before" in (tmp_path / "00-bad.log").read_text()


def test_what_a_stopped_phase_has_started_is_stopped_too(tmp_path: Path) -> None:
    number = tmp_path / "number"
    child = f"import os, time; open({str(number)!r}, 'w').write(str(os.getpid())); "
    child += f"time.sleep({HANGS_AFTER_S})"
    start = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    run([Phase("slow", ("-c", start, child), 5)], tmp_path)
    for _ in range(100):
        if not Path(f"/proc/{int(number.read_text())}").exists():
            return
        time.sleep(0.05)
    pytest.fail("still there")


def test_without_time_left_nothing_is_begun(tmp_path: Path) -> None:
    results = run([python("first", "import time; time.sleep(9)"), python("next", "")], tmp_path, 2)
    assert results["first"].startswith("stopped after")
    assert results["next"] == "not run: no time left"


def test_launches_are_synchronous_where_asked_for_and_never_interpreted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code = "import os; print(*(os.environ.get(k) for k in "
    code += "('CUDA_LAUNCH_BLOCKING', 'TRITON_INTERPRET')))"
    run([python("one", code, synchronous=True), python("two", code)], tmp_path)
    assert (tmp_path / "00-one.log").read_text().splitlines()[1] == "1 None"
    assert (tmp_path / "01-two.log").read_text().splitlines()[1] == "None None"


def test_the_phases_fit_and_name_what_exists(tmp_path: Path) -> None:
    todo = gpu.phases(tmp_path)
    assert [phase.name for phase in todo[:3]] == ["smoke", "GPU tests", "insert flickr8k"]
    # All but the last, which takes what is left.
    assert sum(phase.seconds for phase in todo[:-1]) + gpu.RESERVE <= gpu.LIMIT
    from bench import __main__ as command

    for phase in todo:
        if phase.arguments[:2] == ("-m", "bench"):
            assert command.parse(phase.arguments[2:]).out == tmp_path


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so_and_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    assert said == f"no GPU: torch {torch.__version__} sees no CUDA device; nothing was run\n"
    assert not (tmp_path / "out").exists()


def test_a_table_of_all_phases_ends_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    todo = [python("good", ""), python("bad", "raise SystemExit(3)")]
    monkeypatch.setattr(gpu, "WHERE", "print('a device')")
    monkeypatch.setattr(gpu, "phases", lambda _: todo)
    assert gpu.main(["--out", str(tmp_path), "--limit", "120"]) == 1
    summary = (tmp_path / "summary.md").read_text().splitlines()
    assert summary[0] == "a device"
    assert summary[4].startswith("| good | ok |")
    assert summary[5].startswith("| bad | FAILED (3) |")
    assert "# Predicted times" in (tmp_path / "predicted.md").read_text()
    assert f"everything is in {tmp_path}" in capsys.readouterr().out


def test_smoke_runs_what_there_is_and_stops_at_the_first_wrong_result(
    tiny: Shape, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(shapes.SHAPES, "tiny", tiny)
    smoke.main(["tiny"], CPU, "triton")
    done = [line.split(" ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert done == [
        "insert tiny, contiguous: ok",
        "insert tiny, channels-first: ok",
        "normalize: ok",
        "resize: ok",
    ]
    right = smoke.step37("torch")
    monkeypatch.setattr(smoke, "step37", lambda _: lambda *given: right(*given) + 1)
    with pytest.raises(SystemExit):
        smoke.main(["tiny"], CPU, "torch")
    assert "insert tiny, contiguous: output: a text row differs" in capsys.readouterr().out


def test_the_variables_of_a_phase_lead_to_this_checkout() -> None:
    first, *_ = gpu.environment()["PYTHONPATH"].split(os.pathsep)
    assert Path(first) == Path(__file__).parents[2]
