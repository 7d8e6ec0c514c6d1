"""``report(model)`` of NeMo Automodel's own Step-3.7, and what its page shows of it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from step37_kernels import report
from step37_kernels.automodel import patch_step3p7, replace_in, unpatch_step3p7
from tests.real.automodel.automodel_model import batch, build

PAGE = Path(__file__).parents[3] / "docs" / "nemo-automodel.md"


@pytest.fixture(autouse=True)
def automodel() -> Iterator[None]:
    yield
    unpatch_step3p7()


def fsdp2(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    return fully_shard(model, mesh=mesh)


def projector_of_its_own(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    fully_shard(model.model.vit_large_projector, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def hooked(model: Any) -> Any:
    model.model.vit_large_projector.register_forward_hook(lambda *_: None)
    return model


WRAPPERS = {
    "bare": (lambda model: model, "PyTorch (impl='auto', on cpu)"),
    "DDP": (nn.parallel.DistributedDataParallel, "PyTorch (impl='auto', on cpu)"),
    "FSDP2": (fsdp2, "PyTorch (impl='auto', on cpu)"),
    "FSDP2, the projector a unit": (
        projector_of_its_own,
        "PyTorch (impl='auto', on cpu, within the call that FSDP's hooks need)",
    ),
    "a hook": (hooked, "called (it has hooks)"),
}


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize(("wrap", "projection"), WRAPPERS.values(), ids=WRAPPERS)
def test_a_replaced_model_says_what_its_first_merge_logs(wrap, projection, caplog):
    model = wrap(build())
    (stock,) = report(model).modules
    assert (stock.state, stock.stock) == ("stock", "Step3p7Model")
    (name,) = replace_in(model)
    found = report(model, rows=9)
    (ours,) = found.modules
    assert found.active
    assert (ours.name, ours.cls) == (name, "step37_kernels.automodel.FusedMerge")
    assert ours.ways is not None
    assert str(ours.ways.projection) == projection
    with caplog.at_level(logging.INFO, logger="step37_kernels.automodel"):
        model(**batch(0, [1, 0]))
        model(**batch(0, [1, 0]))
    (line,) = (r.message for r in caplog.records if "words: " in r.message)
    assert line.partition(": ")[2] == str(ours.ways)


def test_a_patched_model_is_ours_and_the_page_shows_what_is_printed():
    patch_step3p7()
    model = build()
    assert report(model).active
    shown = re.search(
        r"<!-- output: report -->\n```text\n(.*?)^```$", PAGE.read_text(), re.S | re.M
    )
    assert shown is not None
    assert shown[1] == f"{report(model)}\n"
