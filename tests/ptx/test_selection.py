"""Which tests of the kernels ``make ptx`` leaves to ``make test``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests import ptx
from tests.kernels.conftest import pytest_collection_modifyitems


def item(marked: bool = False, **parameters: object) -> Any:
    made = SimpleNamespace(get_closest_marker=lambda name: name if marked else None)
    if parameters:
        made.callspec = SimpleNamespace(params=parameters)
    return made


@pytest.mark.parametrize("architecture", [None, "sm_90"])
def test_what_pytorch_computes_and_what_launches_nothing_is_left_out_where_ptx_is_interpreted(
    architecture: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ptx, "ARCHITECTURE", architecture)
    stays = [item(), item(impl="triton"), item(impl="auto"), item(triton=True), item(of="torch")]
    goes = [item(impl="torch"), item(triton=False), item(True), item(True, impl="triton")]
    told: list[Any] = []
    hook = SimpleNamespace(pytest_deselected=lambda items: told.extend(items))
    items = [*stays, *goes]
    pytest_collection_modifyitems(SimpleNamespace(hook=hook), items)  # type: ignore[arg-type]
    assert items == (stays if architecture else stays + goes)
    assert told == (goes if architecture else [])
