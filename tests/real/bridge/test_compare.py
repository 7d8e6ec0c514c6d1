"""``CompareWithStock`` in a training loop that fires Bridge's own callbacks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.bridge.training.callbacks import CallbackContext, CallbackManager

from step37_bridge import callbacks
from step37_bridge.callbacks import CompareWithStock, Measured
from step37_kernels import ImageInsertEmbedding
from step37_kernels.megatron import patch_step37
from tests.real.bridge.bridge_model import build, forward, train

pytestmark = pytest.mark.usefixtures("megatron", "bridge")


def trained(
    model: Any, callback: CompareWithStock, steps: int, **config: Any
) -> tuple[torch.Tensor, list[bool]]:
    """Losses of some steps of Adam, and whether each saw the fused embedding."""
    manager = CallbackManager()
    manager.add(callback)
    cfg = SimpleNamespace(
        model=SimpleNamespace(**config), train=SimpleNamespace(train_iters=10 + steps)
    )
    state: Any = SimpleNamespace(cfg=cfg, train_state=SimpleNamespace(step=10))
    context = CallbackContext(state=state, model=[model])
    manager.fire("on_train_start", context)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses, fused = [], []
    for _ in range(steps):
        manager.fire("on_train_step_start", context)
        optimizer.zero_grad()
        loss = forward(model).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        fused.append(isinstance(model.image_insert_embedding, ImageInsertEmbedding))
        manager.fire("on_train_step_end", context)
    return torch.stack(losses), fused


def test_steps_of_stock_come_first_then_ours_and_the_losses_are_those_of_stock(capsys):
    expected = train(build(), 9)
    callback = CompareWithStock(steps=2, warmup=1)
    losses, fused = trained(build(), callback, 9, cuda_graph_impl="none")
    assert fused == [False] * 3 + [True] * 6
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    assert list(callback.results) == ["stock", "fused"]
    for measured in callback.results.values():
        assert measured.seconds > 0
        assert (measured.peak_bytes is None) is (not torch.cuda.is_available())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("step37_bridge: 2 steps each on the first rank: stock ")
    assert "; fused " in line


def test_a_median_of_the_measured_steps_alone_is_told_and_the_peak_of_each_kind(monkeypatch):
    """A device that is not there: its clock and its memory are written down."""
    durations = iter([90.0, 3.0, 5.0, 4.0, 80.0, 2.0, 1.0, 9.0, 7.0])
    now = [0.0]
    ends = [False]

    def clock() -> float:
        if ends[0]:
            now[0] += next(durations)
        ends[0] = not ends[0]
        return now[0]

    peaks = iter([30, 20, 30, 10, 15, 10])
    resets: list[None] = []
    monkeypatch.setattr(callbacks, "_now", clock)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(peaks))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: resets.append(None))
    manager = CallbackManager()
    callback = CompareWithStock(steps=3, warmup=1)
    manager.add(callback)
    context = CallbackContext(state=SimpleNamespace(), model=[build()])  # type: ignore[arg-type]
    for _ in range(9):
        manager.fire("on_train_step_start", context)
        manager.fire("on_train_step_end", context)
    assert callback.results == {"stock": Measured(4.0, 30), "fused": Measured(2.0, 15)}
    assert len(resets) == 2
    assert str(Measured(0.0125, 3 * 2**29)) == "12.5 ms a step, at most 1.500 GiB"


def test_a_training_with_too_few_steps_left_is_refused_at_its_start():
    trained(build(), CompareWithStock(steps=2, warmup=1), 6)
    with pytest.raises(ValueError, match=r"are 6, and cfg\.train\.train_iters leaves 5$"):
        trained(build(), CompareWithStock(steps=2, warmup=1), 5)


def test_a_model_with_the_fused_embedding_is_refused():
    patch_step37()
    with pytest.raises(ValueError, match="has the fused embedding from the start"):
        trained(build(), CompareWithStock(), 46)


def test_captured_graphs_are_refused_because_they_run_what_was_there_at_first():
    with pytest.raises(ValueError, match="cuda_graph_impl is 'local'"):
        trained(build(), CompareWithStock(), 46, cuda_graph_impl="local")


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"warmup": 0}, {"impl": "none"}], ids=["steps", "warmup", "impl"]
)
def test_a_wrong_argument_is_named_before_there_is_a_model(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}: "):
        CompareWithStock(**options)
