"""The forward step on a GPU machine, where Bridge may not be: it waits for nothing on the device.

Everything else about it: tests/real/bridge/test_forward_step.py, on Bridge's own classes.
"""

from __future__ import annotations

import contextlib
import sys
import types
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from step37_data.forward_step import ForwardStep
from step37_data.pack_transform import pack_samples

IM_START, SIDE = 7, 28
CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)


class Recorder:
    """Stands where the model stands."""

    def __init__(self) -> None:
        one = SimpleNamespace(size=lambda: 1)
        self.pg_collection = SimpleNamespace(tp=one, cp=one)
        self.pre_process = self.post_process = True
        self.seen: list[dict[str, Any]] = []

    def __call__(self, **inputs: Any) -> torch.Tensor:
        self.seen.append(inputs)
        return torch.zeros(1, 1)


class Timer(contextlib.nullcontext):
    def __call__(self, *_: Any, **__: Any) -> Timer:
        return self

    def start(self) -> None: ...

    def stop(self) -> None: ...


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_the_host_waits_for_nothing(device, tmp_path, monkeypatch):
    rerun = pytest.importorskip(
        "megatron.core.rerun_state_machine", reason="megatron-core is not installed"
    )
    losses = types.ModuleType("megatron.bridge.training.losses")
    losses.create_masked_next_token_loss_function = lambda *_: None
    monkeypatch.setitem(sys.modules, losses.__name__, losses)
    for name in ("megatron.bridge", "megatron.bridge.training"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    packs = []
    for number in range(4):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (40, 30), (60 * number, 90, 20)).save(path)
        tokens = torch.arange(10, 26)
        tokens[2] = IM_START
        sample = {"tokens": tokens, "loss_mask": torch.ones(16), "image_paths": [(str(path), 0)]}
        packs.append(pack_samples([sample], seqlen_divisible_by=1))
    checks = SimpleNamespace(check_for_nan_in_loss=True, check_for_spiky_loss=False)
    dataset = SimpleNamespace(
        img_start_token_id=IM_START,
        patch_start_token_id=8,
        image_size=SIDE,
        patch_image_size=SIDE,
        encoder_patch_size=14,
    )
    cfg = SimpleNamespace(dataset=dataset, rerun_state_machine=checks)
    state = SimpleNamespace(cfg=cfg, timers=Timer(), straggler_timer=Timer())
    model, iterator = Recorder(), rerun.RerunDataIterator(iter(packs))
    with contextlib.closing(ForwardStep(device=device)) as step:
        step(state, iterator, model)
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            step(state, iterator, model)
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    for inputs in model.seen:
        (group,) = inputs["images"]
        assert group.images.device.type == device
        assert group.images.shape == (1, 3, SIDE, SIDE)
    assert not torch.equal(*(inputs["images"][0].images for inputs in model.seen))
    assert next(iterator) is packs[2]
