"""The one time limit of the tests, and the end of what a test leaves behind.

The limit ends what hangs, and no test's verdict depends on how fast a machine is: a busy machine
may take many times as long as a quiet one.
"""

from __future__ import annotations

import multiprocessing
import os
import threading

HANGS_AFTER_S = 1800


def end_with_parent() -> None:
    """End this process of ``multiprocessing`` when the one that started it has ended.

    A test run that is killed leaves its ranks behind, which compute or wait for one another, and
    make every later run on the machine slow.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
