"""One process that is a whole Megatron, for the tests that need no other rank."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.megatron.processes import (
    let_the_cpu_play_the_gpu,
    start_megatron,
    stop_megatron,
)


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Megatron's groups over gloo, until the module's tests are done."""
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    with pytest.MonkeyPatch.context() as patch:
        let_the_cpu_play_the_gpu(patch)
        start_megatron(str(tmp_path_factory.mktemp("gloo") / "store"), 0, 1)
        yield
        stop_megatron()
