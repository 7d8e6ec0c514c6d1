"""One process that is a whole Megatron, for the tests that need no other rank."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from step37_kernels.megatron import unpatch_step37
from tests.megatron.stand_ins import bridge
from tests.megatron.stand_ins.processes import (
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


@pytest.fixture
def stand_ins() -> Iterator[None]:
    """The stand-ins for Megatron-Bridge's two modules; whatever is patched is undone."""
    with bridge.installed():
        yield
        unpatch_step37()
