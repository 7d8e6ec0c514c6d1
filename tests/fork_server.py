"""Where the tests' ranks come from: a process that imports what they need once, and forks them.

Importing torch and Megatron takes a rank longer than what most tests have it do. A fork of the test
process itself would inherit whatever lock another of its threads holds at that moment, and now and
then wait for it for ever; the server has no threads.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext


def fork_server() -> ForkServerContext:
    """What starts ranks by ``Process(target=…)``.

    A target is a function of a module. The server starts with the first rank: what a test patches,
    and what it changes in ``os.environ`` later, does not reach the ranks.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.imported_by_ranks"])
    return context
