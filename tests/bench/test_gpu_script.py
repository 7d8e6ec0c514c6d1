"""``tools/gpu.py``: with phases made up for it, its rehearsal, its smoke test on what runs here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch

from bench import shapes
from bench.shapes import Shape
from tests.limits import HANGS_AFTER_S
from tools import gpu, smoke
from tools.gpu import Phase

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
THERE = ("torch", "triton", "numpy", "pillow", "pytest", "hypothesis")
"""Distributions that a lent machine with a GPU has; it has what these require, too."""
NEVER = {"jinja2", "setuptools", "yaml"}
"""Required by torch for things that no test does."""


def missing_there() -> list[str]:
    """Names of all modules installed here that a lent machine need not have."""
    there, todo = set(), list(THERE)
    while todo:
        name = todo.pop().lower().replace("_", "-")
        if name not in there:
            there.add(name)
            try:
                required = metadata.requires(name) or []
            except metadata.PackageNotFoundError:  # of another platform
                continue
            todo += [re.split(r"[^\w.-]", one)[0] for one in required if "extra ==" not in one]
    ours = {path.name for path in ROOT.iterdir()} | set(sys.stdlib_module_names)
    return [
        module
        for module, distributions in metadata.packages_distributions().items()
        if module not in ours
        and (module in NEVER or not there & {d.lower().replace("_", "-") for d in distributions})
    ]


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
    run([python("one", code, variables=gpu.SYNCHRONOUS), python("two", code)], tmp_path)
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


def test_every_test_marked_gpu_is_in_the_files_that_the_phase_names() -> None:
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("*.py")
        if re.search(r"\bpytest\.mark\.gpu\b", path.read_text("utf-8"))
    }
    assert sorted(marked) == sorted(gpu.GPU_TESTS)
    (phase,) = (phase for phase in gpu.phases(Path("out")) if phase.name == "GPU tests")
    assert phase.arguments[-len(gpu.GPU_TESTS) :] == gpu.GPU_TESTS


@pytest.mark.parametrize("name", ["GPU tests", "kernel tests"])
def test_the_tests_can_be_collected_where_only_torch_triton_and_pillow_are_installed(
    name: str, tmp_path: Path
) -> None:
    (phase,) = (phase for phase in gpu.rehearsals(tmp_path) if phase.name == name)
    module, *arguments = phase.arguments[1:]
    assert module == "pytest"
    missing = missing_there()
    assert not {"torch", "triton", "numpy", "PIL", "pytest", "hypothesis"} & set(missing)
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({missing}))\n"
        "import pytest\n"
        f"sys.exit(pytest.main(['-p', '_hypothesis_pytestplugin', *{arguments}]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**gpu.environment(), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    if name == "GPU tests":
        assert all(f"{file}: " in done.stdout for file in gpu.GPU_TESTS), done.stdout


@pytest.mark.parametrize(("module", "package"), [("numpy", "NumPy"), ("PIL", "Pillow")])
def test_a_missing_package_is_said_before_anything_is_run(module: str, package: str) -> None:
    well, line = gpu.told(
        sys.executable, f"import sys; sys.modules[{module!r}] = None" + gpu.NEEDED
    )
    assert not well
    assert line.startswith(f"{package} is not installed for ")


def test_a_missing_compiler_or_header_is_said_before_anything_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'Python.h: No such file' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert gpu.main(["--rehearse", "--out", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(f"{compiler} cannot compile with Python.h of .*: Python.h: No such.*", line)
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("CC", str(tmp_path / "none"))
    assert "does not start" in gpu.told(sys.executable, gpu.NEEDED)[1]
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    well, line = gpu.told(sys.executable, gpu.NEEDED)
    assert (well, line.partition(",")[0]) == (False, "no C compiler")


def test_a_rehearsal_goes_through_every_phase_and_says_what_time_it_would_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [phase.name for phase in gpu.phases(tmp_path)]
    rehearsed = gpu.rehearsals(tmp_path)
    assert [phase.name for phase in rehearsed] == [*names, "compile for Hopper"]
    from bench import __main__ as command

    for phase in rehearsed:
        assert phase.variables["CUDA_VISIBLE_DEVICES"] == ""
        if phase.arguments[:2] == ("-m", "bench"):
            assert command.parse(phase.arguments[2:]).out == tmp_path
        if phase.arguments[0] == "-c":
            compile(phase.arguments[1], phase.name, "exec")
    monkeypatch.setattr(gpu, "NEEDED", "")
    one = Phase("one", ("-c", "raise SystemExit(3)"), 70, rehearsal=python("", "print('tried')"))
    monkeypatch.setattr(gpu, "phases", lambda _: [one])
    monkeypatch.setattr(gpu, "rehearsals", lambda _: [one.rehearsal])
    assert gpu.main(["--rehearse", "--out", str(tmp_path), "--limit", "120"]) == 0
    said = capsys.readouterr().out
    assert "with a GPU: one, at most 70 s" in said
    assert "rehearsal, no GPU is used: torch" in said


@pytest.mark.parametrize("code", ["SMALL_SMOKE", "SMALL_BENCH"])
def test_small_shapes_pass_their_gates_in_a_rehearsal(code: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    names = ("torch", "plan", "normalize") if code == "SMALL_BENCH" else ()
    phase = Phase("", ("-c", getattr(gpu, code), *names), 0, variables=gpu.INTERPRETED)
    assert gpu.run_one(phase, sys.executable, log, HANGS_AFTER_S) == "ok", log.read_text()


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
    monkeypatch.setattr(gpu, "NEEDED", "")
    monkeypatch.setattr(gpu, "phases", lambda _: todo)
    assert gpu.main(["--out", str(tmp_path), "--limit", "120"]) == 1
    summary = (tmp_path / "summary.md").read_text().splitlines()
    assert summary[0] == "a device"
    assert summary[4].startswith("| good | ok |")
    assert summary[5].startswith("| bad | FAILED (3) |")
    assert "# Predicted times" in (tmp_path / "predicted.md").read_text()
    assert f"everything is in {tmp_path}" in capsys.readouterr().out


def test_a_comparison_that_takes_too_long_leaves_its_command_and_not_an_error(
    tmp_path: Path,
) -> None:
    gpu.compare(tmp_path, sys.executable, 0.01)
    text = (tmp_path / "predicted.md").read_text()
    assert text.startswith("not made within 0 s; to make it: ")
    assert f"-m bench predict --out={tmp_path} --measured" in text


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
    right = smoke.step37("torch", tiny.hidden, tiny.width)
    monkeypatch.setattr(smoke, "step37", lambda *_: lambda *given: right(*given) + 1)
    with pytest.raises(SystemExit):
        smoke.main(["tiny"], CPU, "torch")
    assert "insert tiny, contiguous: output: a text row differs" in capsys.readouterr().out


def test_the_variables_of_a_phase_lead_to_this_checkout() -> None:
    first, *_ = gpu.environment()["PYTHONPATH"].split(os.pathsep)
    assert Path(first) == Path(__file__).parents[2]
