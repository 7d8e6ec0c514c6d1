"""A test run that is killed leaves no processes behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.fork_server import fork_server
from tests.limits import HANGS_AFTER_S, end_with_parent

ROOT = Path(__file__).parents[2]
START = "from tests.project.test_limits import start; start()"


def stay() -> None:
    """What a rank does that waits for one that is gone."""
    end_with_parent()
    print("here", flush=True)
    time.sleep(HANGS_AFTER_S)


def start() -> None:
    """What a test run does that starts a rank and waits for it."""
    rank = fork_server().Process(target=stay)
    rank.start()
    rank.join()


def test_ranks_end_when_the_run_that_started_them_is_killed():
    with subprocess.Popen(
        [sys.executable, "-c", START], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "here\n"
        run.send_signal(signal.SIGKILL)
        # The rank has the pipe, too: its end is read when the last of both is gone.
        began = time.monotonic()
        assert run.stdout.read() == ""
    assert time.monotonic() - began < HANGS_AFTER_S / 2
