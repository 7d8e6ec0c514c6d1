"""The forward step: padding, stages, prefetch, and real pipelines of megatron-core."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.bridge.training import train as bridge_train
from megatron.core import rerun_state_machine as rerun
from PIL import Image

from step37_data.forward_step import ForwardStep, Stage, forward_step, model_inputs
from step37_data.pack_transform import pack_samples
from step37_data.prefetch import PackError
from step37_kernels import ImageInsertEmbedding
from step37_kernels.megatron import patch_step37, unpatch_step37
from tests.megatron.processes import (
    CudaMeansCpu,
    let_the_cpu_play_the_gpu,
    run,
    start_megatron,
    stop_megatron,
)
from tests.real.bridge.bridge_model import (
    IM_START,
    PATCH_START,
    SIDE,
    VOCABULARY,
    build,
    set_weights,
)

DATASET = SimpleNamespace(
    img_start_token_id=IM_START,
    patch_start_token_id=PATCH_START,
    image_size=SIDE,
    patch_image_size=SIDE,
    encoder_patch_size=14,
)


class State:
    """What the step uses of Bridge's ``GlobalState``; counts its timer."""

    def __init__(self, dataset: Any = DATASET) -> None:
        self.cfg = SimpleNamespace(
            dataset=dataset,
            rerun_state_machine=SimpleNamespace(
                check_for_nan_in_loss=True, check_for_spiky_loss=False
            ),
        )
        self.straggler_timer = _StragglerTimer()
        self.calls: list[str] = []

    def timers(self, name: str, log_level: int | None = None) -> Any:
        del log_level
        assert name == "batch-generator"
        return SimpleNamespace(
            start=lambda: self.calls.append("start"), stop=lambda: self.calls.append("stop")
        )


class _StragglerTimer:
    """Used with and without a call, as Bridge uses it."""

    def __call__(self, bdata: bool = False) -> _StragglerTimer:
        del bdata
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def sample(number: int, image: str | None, length: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(10, VOCABULARY, (length,), generator=generator)
    if image is not None:
        tokens[2] = IM_START
    return {
        "tokens": tokens,
        "loss_mask": (torch.arange(length) > 8).float(),
        "image_paths": [] if image is None else [(image, 0)],
    }


def make_packs(folder: Path, count: int, divisible_by: int = 1) -> list[dict[str, Any]]:
    """Packs of two samples: one with an image, one without; packed lengths differ."""
    packs = []
    for i in range(count):
        path = folder / f"{i}.png"
        Image.new("RGB", (40 + i, 30), (20 * i, 90, 200 - 30 * i)).save(path)
        pieces = [sample(2 * i, str(path), 15 + i), sample(2 * i + 1, None, 12)]
        packs.append(pack_samples(pieces, seqlen_divisible_by=divisible_by))
    return packs


class Recorder:
    """Stands where the model stands, to see what it is given."""

    def __init__(
        self, pre_process: bool = True, post_process: bool = True, tp: int = 1, cp: int = 1
    ):
        size = {"tp": tp, "cp": cp}
        self.pg_collection = SimpleNamespace(
            **{name: SimpleNamespace(size=lambda n=n: n) for name, n in size.items()}
        )
        self.pre_process, self.post_process = pre_process, post_process
        self.config = SimpleNamespace(overlap_moe_expert_parallel_comm=False)
        self.seen: list[dict[str, Any]] = []

    def __call__(self, **inputs: Any) -> torch.Tensor:
        self.seen.append(inputs)
        return torch.zeros(1, 1)

    def build_schedule_plan(
        self, *, images, input_ids, position_ids, attention_mask, packed_seq_params, **of_the_loss
    ):
        del input_ids, position_ids, attention_mask, packed_seq_params
        assert of_the_loss.keys() == {"labels", "loss_mask"}
        return f"plan with {len(images)} groups"


@pytest.fixture
def packs(tmp_path: Path) -> list[dict[str, Any]]:
    return make_packs(tmp_path, 5)


@pytest.fixture
def step() -> Iterator[ForwardStep]:
    step = ForwardStep(device="cpu", dtype=torch.float32)
    yield step
    step.close()


# ---- one pack


def as_is(batch: dict[str, Any]) -> dict[str, Any]:
    """``preprocess_packed_batch`` without its images."""
    lengths = batch["cu_seqlens"].diff()
    layout = {key: batch[key] for key in ("cu_seqlens", "position_id")}
    layout["max_seq_len"] = lengths.max()
    if "tokens" not in batch:
        return layout
    rows = {
        name: batch[key][None]
        for name, key in (
            ("input_ids", "tokens"),
            ("labels", "labels"),
            ("loss_masks", "loss_masks"),
        )
    }
    return {**rows, "images": ["group"], **layout}


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=5),
    divisible_by=st.sampled_from([1, 16, 32, 48]),
)
def test_the_padding_is_a_sub_sequence_of_its_own_on_every_stage_alike(lengths, divisible_by):
    pack = pack_samples([sample(i, None, n) for i, n in enumerate(lengths)], seqlen_divisible_by=1)
    stages = [
        Stage(pre_process=first, post_process=last, divisible_by=divisible_by)
        for first, last in ((True, True), (True, False), (False, False), (False, True))
    ]
    total = sum(lengths) - len(lengths)
    padded = math.ceil(total / divisible_by) * divisible_by
    bounds = [*pack["cu_seqlens"].tolist(), *([padded] if padded > total else [])]
    before = {key: value.clone() for key, value in pack.items() if hasattr(value, "clone")}
    for stage in stages:
        inputs = model_inputs(pack, stage, preprocess=as_is)
        params = inputs["packed_seq_params"]
        assert inputs["cu_seqlens"].tolist() == bounds
        assert inputs["cu_seqlens"].dtype == torch.int32
        for name in (
            "cu_seqlens_q",
            "cu_seqlens_kv",
            "cu_seqlens_q_padded",
            "cu_seqlens_kv_padded",
        ):
            assert getattr(params, name).tolist() == bounds
        longest = max(b - a for a, b in itertools.pairwise(bounds))
        assert params.qkv_format == "thd"
        assert params.max_seqlen_q == params.max_seqlen_kv == longest
        assert inputs["position_ids"] is None
        assert inputs["attention_mask"] is None
        assert inputs["images"] == (["group"] if stage.pre_process else [])
        if stage.pre_process or stage.post_process:
            assert inputs["input_ids"].tolist() == [
                pack["tokens"].tolist() + [0] * (padded - total)
            ]
        else:
            assert inputs["input_ids"] is None
        assert ("labels" in inputs) == ("loss_mask" in inputs) == stage.post_process
        if stage.post_process:
            assert inputs["labels"][0, :total].tolist() == pack["labels"].tolist()
            assert inputs["labels"][0, total:].tolist() == [-100] * (padded - total)
            assert inputs["loss_mask"][0, :total].tolist() == pack["loss_masks"].tolist()
            assert not inputs["loss_mask"][0, total:].any()
    assert all(torch.equal(pack[key], value) for key, value in before.items())


@pytest.mark.parametrize(("first", "name"), [(True, "first"), (False, "last")])
def test_a_stage_that_needs_tokens_and_gets_none_says_so(first, name):
    batch = {"cu_seqlens": torch.tensor([0, 4]), "position_id": torch.arange(4)}
    stage = Stage(pre_process=first, post_process=not first, divisible_by=16)
    with pytest.raises(
        ValueError, match=rf"the {name} pipeline stage needs tokens, got \['cu_seqlens', 'pos"
    ):
        model_inputs(batch, stage, preprocess=as_is)


# ---- the step


@pytest.mark.parametrize(("tp", "multiple"), [(1, 16), (2, 16), (3, 48), (32, 32)])
def test_packs_are_padded_to_the_least_common_multiple_of_16_and_tp(step, packs, tp, multiple):
    model = Recorder(tp=tp)
    step(State(), iter(packs), model)
    (inputs,) = model.seen
    total = len(packs[0]["tokens"])
    assert inputs["input_ids"].shape == (1, math.ceil(total / multiple) * multiple)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_packs_come_in_order_with_their_images_whatever_is_prefetched(packs, depth):
    step = ForwardStep(device="cpu", prefetch_depth=depth)
    model, iterator, state = Recorder(), rerun.RerunDataIterator(iter(packs)), State()
    for _ in packs:
        step(state, iterator, model)
    step.close()
    for inputs, pack in zip(model.seen, packs, strict=True):
        total = len(pack["tokens"])
        assert inputs["input_ids"][0, :total].tolist() == pack["tokens"].tolist()
        (group,) = inputs["images"]
        assert group.insert_start_token == IM_START
        assert group.images.shape == (1, 3, SIDE, SIDE)
        assert group.images.dtype == torch.bfloat16
    assert state.calls == ["start", "stop"] * len(packs)


def test_the_end_of_the_data_is_the_end_of_the_iterator(step, packs):
    iterator = rerun.RerunDataIterator(iter(packs[:1]))
    step(State(), iterator, Recorder())
    for _ in range(2):
        with pytest.raises(StopIteration):
            step(State(), iterator, Recorder())


def test_two_iterators_do_not_mix(step, packs):
    train, validation = (rerun.RerunDataIterator(iter(p)) for p in (packs[:2], packs[2:4]))
    model = Recorder()
    for iterator in (train, validation, train, validation):
        step(State(), iterator, model)
    first_tokens = [inputs["input_ids"][0, 0].item() for inputs in model.seen]
    assert first_tokens == [packs[i]["tokens"][0].item() for i in (0, 2, 1, 3)]


def test_a_pack_that_fails_names_itself(step, packs):
    del packs[1]["tokens"]
    iterator, model = rerun.RerunDataIterator(iter(packs)), Recorder()
    step(State(), iterator, model)
    with pytest.raises(
        PackError, match="pack 1: ValueError: batch: the first pipeline stage needs"
    ):
        step(State(), iterator, model)


@pytest.mark.parametrize("depth", [0, 2])
def test_an_iterator_that_megatron_rewinds_gives_its_packs_again(packs, depth, monkeypatch):
    machine = SimpleNamespace(get_mode=lambda: rerun.RerunMode.VALIDATE_RESULTS)
    monkeypatch.setattr(rerun, "get_rerun_state_machine", lambda: machine)
    iterator, model = rerun.RerunDataIterator(iter(packs)), Recorder()
    with contextlib.closing(ForwardStep(device="cpu", prefetch_depth=depth)) as step:
        step(State(), iterator, model)
        iterator.rewind()
        step(State(), iterator, model)
        iterator.advance()
        step(State(), iterator, model)
    assert [of_pack(inputs, packs) for inputs in model.seen] == [0, 0, 1]


def of_pack(inputs: dict[str, Any], packs: list[dict[str, Any]]) -> int:
    """Which of the packs a model was given."""
    tokens = inputs["input_ids"][0]
    (number,) = (
        i for i, p in enumerate(packs) if torch.equal(tokens[: len(p["tokens"])], p["tokens"])
    )
    return number


class Training:
    """What Bridge's training loop reads when it decides whether an iteration is skipped."""

    def __init__(self, skipped: list[int]) -> None:
        self.cfg = SimpleNamespace(
            dataset=SimpleNamespace(**vars(DATASET), dataloader_type="single"),
            train=SimpleNamespace(iterations_to_skip=skipped, micro_batch_size=1),
        )
        self.train_state = SimpleNamespace(
            step=0, consumed_train_samples=0, skipped_train_samples=0
        )


@pytest.mark.parametrize("kind", ["Megatron's iterator", "Megatron's, of a generator", "generator"])
@given(
    skipped=st.sets(st.integers(1, 5)),
    microbatches=st.integers(1, 2),
    depth=st.integers(0, 3),
)
@settings(max_examples=10)
def test_the_packs_of_the_steps_that_run_are_stocks_when_bridge_skips_iterations(
    kind, skipped, microbatches, depth
):
    packs = text_packs(12)
    iterator: Any = iter(packs) if kind == "Megatron's iterator" else (pack for pack in packs)
    if kind != "generator":
        iterator = rerun.RerunDataIterator(iterator)
    one = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    training, model = Training(sorted(skipped)), Recorder()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.closing(ForwardStep(device="cpu", prefetch_depth=depth)) as step,
    ):
        patch.setattr(bridge_train, "get_num_microbatches", lambda: microbatches)
        while training.train_state.step < 5:
            if bridge_train._should_skip_and_handle_iteration(
                training, iterator, SimpleNamespace(pp=one, dp=one)
            ):
                continue
            for _ in range(microbatches):
                step(State(), iterator, model)
            training.train_state.step += 1
    stock = [
        iteration * microbatches + i
        for iteration in range(5)
        if iteration + 1 not in skipped
        for i in range(microbatches)
    ]
    assert [of_pack(inputs, packs) for inputs in model.seen] == stock
    # Nor is a pack lost to whoever goes on with the iterator.
    assert next(iterator) is packs[5 * microbatches]


def text_packs(count: int) -> list[dict[str, Any]]:
    return [pack_samples([sample(i, None, 12 + i)], seqlen_divisible_by=1) for i in range(count)]


def test_an_iterator_that_saves_its_state_is_not_read_ahead(packs):
    class Saving:
        def __init__(self) -> None:
            self.read = 0

        def __next__(self) -> Any:
            self.read += 1
            return packs[self.read - 1]

        def save_state(self) -> int:
            return self.read

    source = Saving()
    with contextlib.closing(ForwardStep(device="cpu", prefetch_depth=2)) as step:
        step(State(), rerun.RerunDataIterator(source), Recorder())
    assert source.save_state() == 1


def test_a_pack_that_cannot_be_prepared_is_no_matter_to_a_step_that_skips_it(step, packs):
    del packs[1]["tokens"]
    iterator, model = rerun.RerunDataIterator(iter(packs)), Recorder()
    step(State(), iterator, model)
    assert next(iterator) is packs[1]
    step(State(), iterator, model)
    assert [of_pack(inputs, [packs[0], *packs[2:]]) for inputs in model.seen] == [0, 1]


def test_a_chunk_behind_the_first_takes_no_images(step, packs):
    for post_process in (False, True):
        model = Recorder(pre_process=False, post_process=post_process)
        step(State(), iter(packs), model)
        (inputs,) = model.seen
        assert inputs["images"] == []
        assert (inputs["input_ids"] is not None) == post_process


def test_the_schedule_plan_gets_the_images_too(step, packs):
    model = Recorder()
    with pytest.raises(ValueError, match="needs the model's overlap_moe_expert_parallel_comm"):
        step(State(), iter(packs), model, return_schedule_plan=True)
    model.config.overlap_moe_expert_parallel_comm = True
    plan, _ = step(State(), iter(packs), model, return_schedule_plan=True)
    assert plan == "plan with 1 groups"


def test_what_cannot_run_is_an_error(step, packs):
    with pytest.raises(ValueError, match=r"context parallel size: expected 1 .*, got 2"):
        step(State(), iter(packs), Recorder(cp=2))
    with pytest.raises(ValueError, match="data_iterator: every pipeline stage needs one"):
        step(State(), None, Recorder())
    unresolved = SimpleNamespace(**{**vars(DATASET), "img_start_token_id": -1})
    with pytest.raises(ValueError, match=r"img_start_token_id .*build_datasets\(\) .*, got -1"):
        step(State(unresolved), iter(packs), Recorder())
    with pytest.raises(ValueError, match="prefetch_depth: expected at least 0, got -1"):
        ForwardStep(prefetch_depth=-1)
    with pytest.raises(TypeError, match="thread"):
        ForwardStep(thread=2)


def test_bridge_sees_the_state_as_the_first_parameter():
    import inspect

    assert next(iter(inspect.signature(forward_step).parameters)) == "state"


# ---- real pipelines


def train(folder: str, steps: int, parallel: dict[str, int]) -> list[float]:
    """With Megatron's own schedule; mean losses of the steps, on the last stage."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    stages = parallel.get("pipeline_model_parallel_size", 1)
    virtual = parallel.get("virtual_pipeline_model_parallel_size")
    chunks_per_rank = virtual or 1
    patch_step37(strict=True)
    packs = make_packs(Path(folder), 4)
    chunks = []
    for chunk in range(chunks_per_rank):
        stage = parallel_state.get_pipeline_model_parallel_rank() + chunk * stages
        model = build(
            seed=None,
            num_layers=4,
            pre_process=stage == 0,
            post_process=stage == stages * chunks_per_rank - 1,
            vp_stage=chunk if virtual else None,
            pipeline_dtype=torch.float32,
            variable_seq_lengths=True,
            moe_token_dispatcher_type="alltoall",
            batch_p2p_comm=False,
            deallocate_pipeline_outputs=False,
            **parallel,
        )
        fused = isinstance(model.image_insert_embedding, ImageInsertEmbedding)
        assert fused == (stage == 0)
        set_weights(model, first_layer=stage * (4 // (stages * chunks_per_rank)))
        chunks.append(model)
    optimizer = torch.optim.SGD([p for c in chunks for p in c.parameters()], lr=0.1)
    step, state = ForwardStep(device="cpu", dtype=torch.float32), State()
    iterators = [rerun.RerunDataIterator(iter(packs * steps)) for _ in chunks]
    results = []
    for _ in range(steps):
        optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=lambda data, model: step(state, data, model),
            data_iterator=iterators if virtual else iterators[0],
            model=chunks if virtual else chunks[0],
            num_microbatches=len(packs),
            seq_length=32,
            micro_batch_size=1,
            forward_only=False,
        )
        optimizer.step()
        if reports:
            total, tokens = torch.stack([r["lm loss"] for r in reports]).sum(0)
            results.append((total / tokens).item())
    step.close()
    return results


STEPS = 3
PIPELINES = {
    "2 stages": {"pipeline_model_parallel_size": 2},
    "2 stages of 2 chunks": {
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
    },
}


def train_in_pipelines(rank: int, folder: str) -> dict[str, list[float]]:
    from megatron.core import parallel_state

    results = {}
    for name, parallel in PIPELINES.items():
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(**parallel)
        own = Path(folder) / f"{name} {rank}"
        own.mkdir()
        results[name] = train(str(own), STEPS, parallel)
    return results


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[float]]]:
    return run(train_in_pipelines, str(tmp_path_factory.mktemp("pipelines")))


@pytest.fixture(scope="module")
def one_stage(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch, CudaMeansCpu():
        let_the_cpu_play_the_gpu(patch)
        start_megatron(str(folder / "store"), 0, 1)
        result = train(str(folder), STEPS, {})
        unpatch_step37()
        stop_megatron()
    return result


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_gives_the_losses_of_one_process(one_stage, pipelines, name):
    first, last = pipelines
    assert first[name] == []
    torch.testing.assert_close(torch.tensor(last[name]), torch.tensor(one_stage))
    assert one_stage[-1] < one_stage[0]
