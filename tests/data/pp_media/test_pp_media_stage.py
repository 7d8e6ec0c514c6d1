"""Staged media under real schedules in one process: the right chunk for each forward, no trace."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.utils.checkpoint import checkpoint

from step37_data.pp_media import (
    VLM_PP_MEDIA_KEY,
    prepare_vlm_media_for_pp,
    stage_vlm_media_for_pp,
)

N_MICROBATCHES = 4
MICROBATCH_ROWS = 2  # rows of the largest microbatch of 5 to 8 samples
ATTRIBUTES = (
    "_vlm_pixel_values_chunks",
    "_vlm_image_grid_hws_chunks",
    "_vlm_num_patches_chunks",
    "_vlm_patch_pixel_values_chunks",
    "_vlm_patch_newline_mask_chunks",
    "_vlm_pixel_values_videos_chunks",
    "_vlm_video_grid_thw_chunks",
    "_vlm_chunk_idx",
)


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class FirstStage(torch.nn.Module):
    """Adds to every row the mean of the pixels that it is given; notes which pixels those were."""

    def __init__(self, takes: str = "always", recompute: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.takes = takes
        self.recompute = recompute
        self.seen: list[tuple[list[float], list[float]]] = []
        self.before_reading = lambda _rows: None

    def forward(self, rows: torch.Tensor, **_kwargs: object) -> torch.Tensor:
        if self.recompute:
            return checkpoint(self.run, rows, use_reentrant=False)
        return self.run(rows)

    def run(self, rows: torch.Tensor) -> torch.Tensor:
        self.before_reading(rows)
        if self.takes == "always" or bool((rows >= 0).any()):
            # As the stock models do it: only a microbatch with media moves the cursor.
            pixels = self._vlm_pixel_values_chunks[self._vlm_chunk_idx]
            self._vlm_chunk_idx += 1
        else:
            pixels = rows.new_zeros(0)
        self.seen.append((rows.flatten().tolist(), pixels.flatten().tolist()))
        # Stages of torch 2.11 demand one shape of all microbatches.
        padded = torch.cat([rows, rows.new_zeros(MICROBATCH_ROWS - len(rows), 1)])
        return self.weight * (padded + pixels.sum())


def build(model: FirstStage, schedule: str = "gpipe") -> tuple[SimpleNamespace, list]:
    """Make a pipeline of one stage; several on one rank need torch 2.13."""
    stage = PipelineStage(model, 0, 1, torch.device("cpu"))

    def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output[: len(target)] * target).sum()

    kwargs = {"n_microbatches": N_MICROBATCHES, "loss_fn": loss_fn, "scale_grads": False}
    if schedule == "gpipe":
        pipeline = ScheduleGPipe(stage, **kwargs)
    else:
        pipeline = ScheduleInterleaved1F1B([stage], **kwargs)
    info = SimpleNamespace(schedule=pipeline, stages=[stage], has_first_stage=True)
    return SimpleNamespace(info=info), [model]


def make_batch(rows: list[float]) -> dict:
    """A row that is not negative has one image, filled with its value."""
    pixels = torch.tensor([row for row in rows if row >= 0], dtype=torch.float64)
    batch = {
        "input_ids": torch.tensor(rows, dtype=torch.float64).reshape(-1, 1),
        "pixel_values": pixels.reshape(-1, 1, 1, 1),
        "n_images_per_sample": [int(row >= 0) for row in rows],
    }
    return prepare_vlm_media_for_pp(batch, len(rows), N_MICROBATCHES)  # type: ignore[return-value]


def step(pp: SimpleNamespace, parts: list, batch: dict, method: str = "step") -> None:
    rows = batch.pop("input_ids")
    with stage_vlm_media_for_pp(pp, parts, batch):
        # A keyword keeps torch 2.11 from demanding equal microbatches of its first stage.
        run = getattr(pp.info.schedule, method)
        run(rows, target=torch.ones_like(rows), position_ids=torch.zeros_like(rows), **batch)


def traces(pp: SimpleNamespace, model: torch.nn.Module) -> list[object]:
    found: list[object] = [name for name in vars(model) if name.startswith("_vlm_")]
    found += [*model._forward_hooks.values(), *model._forward_pre_hooks.values()]
    return found + [
        name
        for stage in pp.info.stages
        for name in vars(stage)
        if "_chunk" in name and callable(vars(stage)[name])
    ]


def own_pixels(rows: list[float]) -> list[float]:
    return [row for row in rows if row >= 0]


UNEVEN = [10.0, 11.0, -1.0, -2.0, 12.0, 13.0]  # over 4: two, two (text only), one, one
TEXT_FIRST = [-1.0, -2.0, 10.0, 11.0, -3.0, 12.0, 13.0]  # over 4: two (text only), two, two, one


@pytest.mark.parametrize("rows", [UNEVEN, TEXT_FIRST])
@pytest.mark.parametrize("takes", ["always", "with media"])
@pytest.mark.parametrize("schedule", ["gpipe", "interleaved"])
def test_every_forward_of_a_microbatch_reads_its_own_images(
    schedule: str, takes: str, rows: list[float]
) -> None:
    pp, parts = build(FirstStage(takes), schedule)
    for n_probes in (1, 0):
        model = parts[0]
        model.seen.clear()
        step(pp, parts, make_batch(rows))
        # The first step starts with a forward that probes shapes; it must not take a chunk.
        assert len(model.seen) == n_probes + N_MICROBATCHES
        assert [row for seen, _ in model.seen[n_probes:] for row in seen] == rows
        for seen, pixels in model.seen[n_probes:]:
            assert pixels == own_pixels(seen)


def test_evaluation_between_training_steps_keeps_images_in_place() -> None:
    pp, parts = build(FirstStage("with media"))
    model = parts[0]
    for method in ("step", "eval", "step", "eval"):
        model.seen.clear()
        step(pp, parts, make_batch(UNEVEN), method)
        assert [row for seen, _ in model.seen[-N_MICROBATCHES:] for row in seen] == UNEVEN
        for seen, pixels in model.seen[-N_MICROBATCHES:]:
            assert pixels == own_pixels(seen)


def test_a_first_stage_recomputed_in_the_backward_pass_reads_its_own_images() -> None:
    pp, parts = build(FirstStage("with media", recompute=True))
    model = parts[0]
    step(pp, parts, make_batch(UNEVEN))
    model.seen.clear()
    step(pp, parts, make_batch(UNEVEN))
    assert len(model.seen) == 2 * N_MICROBATCHES
    for seen, pixels in model.seen:
        assert pixels == own_pixels(seen)


def test_a_backward_in_another_thread_does_not_move_the_cursor_of_a_running_forward() -> None:
    pp, parts = build(FirstStage())
    model, stage = parts[0], pp.info.stages[0]
    step(pp, parts, make_batch(UNEVEN))
    batch = make_batch(UNEVEN)
    rows = torch.tensor_split(batch.pop("input_ids"), N_MICROBATCHES)
    stage.clear_runtime_states()
    model.seen.clear()
    with stage_vlm_media_for_pp(pp, parts, batch):
        loss = stage.forward_one_chunk(0, (rows[0],), {"position_ids": rows[0]}).sum()

        def run_backward(_rows: torch.Tensor) -> None:
            thread = threading.Thread(target=stage.backward_one_chunk, args=(0, loss))
            thread.start()
            thread.join()

        model.before_reading = run_backward
        stage.forward_one_chunk(2, (rows[2],), {"position_ids": rows[2]})
    assert model.seen == [([10.0, 11.0], [10.0, 11.0]), ([12.0], [12.0])]


@pytest.mark.parametrize("schedule", ["gpipe", "interleaved"])
def test_a_hundred_steps_leave_no_chunk_no_hook_and_no_tensor(schedule: str) -> None:
    pp, parts = build(FirstStage(), schedule)
    alive: list[weakref.ref] = []
    for _ in range(100):
        batch = make_batch(UNEVEN)
        alive += [weakref.ref(chunk) for chunk in batch[VLM_PP_MEDIA_KEY]["pixel_values"]]
        step(pp, parts, batch)
        assert VLM_PP_MEDIA_KEY not in batch
    assert traces(pp, parts[0]) == []
    assert len(alive) == 100 * N_MICROBATCHES
    assert [ref for ref in alive if ref() is not None] == []


@pytest.mark.parametrize("schedule", ["gpipe", "interleaved"])
def test_a_step_that_raises_leaves_no_trace_and_the_next_one_is_right(schedule: str) -> None:
    pp, parts = build(FirstStage("with media"), schedule)
    model = parts[0]
    step(pp, parts, make_batch(UNEVEN))

    def fail_on_the_third(rows: torch.Tensor) -> None:
        if 12.0 in rows:
            raise RuntimeError("third microbatch")

    model.before_reading = fail_on_the_third
    with pytest.raises(RuntimeError) as caught:
        step(pp, parts, make_batch(UNEVEN))
    assert str(caught.value.__cause__) == "third microbatch"
    assert traces(pp, model) == []

    model.before_reading = lambda _rows: None
    model.seen.clear()
    # Losses that the failed step left in a schedule would make it refuse the next step.
    step(*build(model, schedule), make_batch(TEXT_FIRST))
    for seen, pixels in model.seen[-N_MICROBATCHES:]:
        assert pixels == own_pixels(seen)


def test_the_first_stage_carries_all_chunks_and_a_cursor_at_zero() -> None:
    pp, parts = build(FirstStage())
    batch = {
        "input_ids": torch.zeros(6, 3),
        "pixel_values": torch.zeros(6, 3, 4, 4),
        "num_patches": [1, 0, 0, 0, 0, 2],
        "patch_pixel_values": torch.zeros(3, 3, 2, 2),
        "patch_newline_mask": torch.zeros(3),
    }
    prepare_vlm_media_for_pp(batch, 6, N_MICROBATCHES)
    chunks = batch[VLM_PP_MEDIA_KEY]
    index = chunks["pp_media_index"]
    assert index.tolist() == [0, 0, 1, 1, 2, 3]
    with stage_vlm_media_for_pp(pp, parts, batch):
        assert batch.keys() == {"input_ids"}
        values = {name: getattr(parts[0], name) for name in ATTRIBUTES}
        by_key = parts[0]._pp_media_chunks
    assert values == {
        "_vlm_pixel_values_chunks": chunks["pixel_values"],
        "_vlm_num_patches_chunks": chunks["num_patches"],
        "_vlm_patch_pixel_values_chunks": chunks["patch_pixel_values"],
        "_vlm_patch_newline_mask_chunks": chunks["patch_newline_mask"],
        "_vlm_image_grid_hws_chunks": None,
        "_vlm_pixel_values_videos_chunks": None,
        "_vlm_video_grid_thw_chunks": None,
        "_vlm_chunk_idx": 0,
    }
    assert by_key == {key: cut for key, cut in chunks.items() if key != "pp_media_index"}
    assert not hasattr(parts[0], "_pp_media_chunks")
    assert not any(hasattr(parts[0], name) for name in ATTRIBUTES)


def test_attributes_that_the_model_had_before_come_back() -> None:
    pp, parts = build(FirstStage())
    parts[0]._vlm_pixel_values_chunks = None
    parts[0]._vlm_chunk_idx = None
    step(pp, parts, make_batch(UNEVEN))
    assert parts[0]._vlm_pixel_values_chunks is None
    assert parts[0]._vlm_chunk_idx is None
    assert not hasattr(parts[0], "_vlm_image_grid_hws_chunks")


def test_other_ranks_drop_the_media_and_touch_no_model() -> None:
    model = torch.nn.Linear(1, 1)
    pp = SimpleNamespace(info=SimpleNamespace(has_first_stage=False, stages=[]))
    batch = make_batch(UNEVEN)
    with stage_vlm_media_for_pp(pp, [model], batch):
        assert batch.keys() == {"input_ids"}
        assert not any(hasattr(model, name) for name in ATTRIBUTES)


def test_a_batch_of_text_alone_stages_nothing() -> None:
    pp, parts = build(FirstStage())
    with stage_vlm_media_for_pp(pp, parts, {"input_ids": torch.zeros(4, 1)}):
        assert not any(hasattr(parts[0], name) for name in ATTRIBUTES)


def test_without_stages_each_forward_is_the_next_microbatch() -> None:
    model = FirstStage("with media")
    pp = SimpleNamespace(info=SimpleNamespace(has_first_stage=True))
    batch = make_batch(UNEVEN)
    rows = torch.tensor_split(batch.pop("input_ids"), N_MICROBATCHES)
    with stage_vlm_media_for_pp(pp, [model], batch):
        for microbatch in rows:
            model(microbatch)
    for seen, pixels in model.seen:
        assert pixels == own_pixels(seen)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_media_that_no_stage_takes_are_refused() -> None:
    pp, parts = build(FirstStage())
    staging = stage_vlm_media_for_pp(pp, parts, {VLM_PP_MEDIA_KEY: {"sound": []}})
    with pytest.raises(ValueError, match="unknown media \\['sound'\\]"), staging:
        pass
    with (
        pytest.raises(ValueError, match="model_parts is empty"),
        stage_vlm_media_for_pp(pp, [], make_batch(UNEVEN)),
    ):
        pass


def test_a_backward_pass_that_ends_within_a_forward_leaves_its_microbatch() -> None:
    backward_runs, forward_runs, backward_is_over = (threading.Event() for _ in range(3))
    model = torch.nn.Linear(1, 1)
    seen = []

    class Stage:
        is_first = True

        def forward_one_chunk(self, _index: int) -> None:
            forward_runs.set()
            assert backward_is_over.wait(10)
            seen.append(model._vlm_chunk_idx)

        def backward_one_chunk(self, _index: int) -> None:
            seen.append(model._vlm_chunk_idx)
            backward_runs.set()
            assert forward_runs.wait(10)

    stage = Stage()
    pp = SimpleNamespace(info=SimpleNamespace(has_first_stage=True, stages=[stage]))
    with stage_vlm_media_for_pp(pp, [model], make_batch(UNEVEN)):
        backward = threading.Thread(target=stage.backward_one_chunk, args=(0,))
        backward.start()
        assert backward_runs.wait(10)
        forward = threading.Thread(target=stage.forward_one_chunk, args=(1,))
        forward.start()
        backward.join(10)
        backward_is_over.set()
        forward.join(10)
    assert seen == [0, 1]


class ByIndex(FirstStage):
    """Takes its media as NeMo Automodel's newer models do: by the index that it is given."""

    def forward(self, rows, pp_media_index=None, **_kwargs):
        number = int(pp_media_index[0])
        assert pp_media_index.tolist() == [number] * len(rows)
        pixels = self._pp_media_chunks["pixel_values"][number]
        self.seen.append((rows.flatten().tolist(), pixels.flatten().tolist()))
        padded = torch.cat([rows, rows.new_zeros(MICROBATCH_ROWS - len(rows), 1)])
        return self.weight * (padded + pixels.sum())


@pytest.mark.parametrize("rows", [UNEVEN, TEXT_FIRST])
def test_a_model_that_is_told_its_microbatch_reads_its_own_images(rows: list[float]) -> None:
    pp, parts = build(ByIndex())
    model = parts[0]
    for _ in range(2):
        model.seen.clear()
        batch = make_batch(rows)
        step(pp, parts, batch)
        assert batch == {}
        # Before the first step some releases of PyTorch run the stage on rows of zeros.
        seen_in_step = model.seen[-N_MICROBATCHES:]
        assert [row for seen, _ in seen_in_step for row in seen] == rows
        for seen, pixels in seen_in_step:
            assert pixels == own_pixels(seen)
    assert traces(pp, model) == []
    assert not hasattr(model, "_pp_media_chunks")


def test_a_model_that_does_not_name_the_index_is_given_it_if_its_framework_knows_it(
    monkeypatch,
) -> None:
    _, parts = build(FirstStage())
    pp = SimpleNamespace(info=SimpleNamespace(has_first_stage=True))
    batch = make_batch(UNEVEN)
    with stage_vlm_media_for_pp(pp, parts, batch):
        assert "pp_media_index" not in batch
    newer = SimpleNamespace(PP_MEDIA_INDEX_KEY="pp_media_index")
    monkeypatch.setitem(sys.modules, "nemo_automodel.shared.pipeline", newer)
    batch = make_batch(UNEVEN)
    with stage_vlm_media_for_pp(pp, parts, batch):
        assert batch["pp_media_index"].tolist() == [0, 0, 1, 1, 2, 3]
    assert "pp_media_index" not in batch


class Blind(FirstStage):
    """Knows of no media."""

    def run(self, rows):
        return self.weight * torch.cat([rows, rows.new_zeros(MICROBATCH_ROWS - len(rows), 1)])


def test_a_model_that_looks_at_no_media_is_an_error_and_not_a_loss_without_images() -> None:
    pp, parts = build(Blind())
    with pytest.raises(
        RuntimeError, match=r"microbatches \[0, 2, 3\] have .*, but Blind looked at"
    ):
        step(pp, parts, make_batch(UNEVEN))
    assert traces(pp, parts[0]) == []
    # Nothing is dropped where there is nothing to see, or once media were taken.
    step(*build(Blind()), make_batch([-1.0, -2.0, -3.0, -4.0]))
    pp, parts = build(FirstStage("with media"))
    step(pp, parts, make_batch(UNEVEN))
    parts[0].run = lambda rows: Blind.run(parts[0], rows)
    step(pp, parts, make_batch(UNEVEN))
