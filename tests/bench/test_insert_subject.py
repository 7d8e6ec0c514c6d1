from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from bench import oracle, peers
from bench.harness import Settings
from bench.oracle import Oracle
from bench.shapes import IM_PATCH, SHAPES, Shape, make_batch, make_case, shapes_named
from bench.subjects import insert, plan, step
from step37_kernels import ImageInsertEmbedding, reference
from step37_kernels.ops import project
from step37_kernels.testing import expected

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", [*SHAPES, "images-1", "images-16", "images-200"])
def test_named_shapes_hold_their_pictures_where_the_reference_finds_them(name: str) -> None:
    (shape,) = shapes_named([name])
    batch = make_batch(shape, CPU)
    assert batch.input_ids.shape == (1, shape.seq_len)
    assert batch.destinations.shape == (shape.num_rows,)
    starts = [
        position
        for token, _, _ in batch.groups
        for _, position in reference.insert_locations(batch.input_ids, token)
    ]
    counts = torch.tensor([rows for _, n, rows in batch.groups for _ in range(n)])
    assert batch.destinations[counts.cumsum(0) - counts].tolist() == starts
    assert (batch.input_ids.flatten()[batch.destinations] == IM_PATCH).all()
    assert batch.destinations.unique().numel() == shape.num_rows


def test_the_shapes_are_those_of_the_models_work() -> None:
    rows = {name: SHAPES[name].num_rows for name in SHAPES}
    assert (rows["one-image"], rows["flickr8k"]) == (169, 1521)
    assert [SHAPES[name].seq_len for name in ("flickr8k", "long", "huge")] == [2048, 8192, 32768]
    assert [shape.images for shape in shapes_named(["images-1", "images-200"])] == [1, 200]


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="'images-0': expected one of one-image, flickr8k"):
        shapes_named(["images-0"])


def test_pictures_that_do_not_fit_are_refused(tiny: Shape) -> None:
    with pytest.raises(ValueError, match="tiny: the pictures take 8 tokens too many"):
        make_batch(dataclasses.replace(tiny, seq_len=49), CPU)


@pytest.mark.parametrize("layout", ["contiguous", "channels-first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_oracle_says_what_the_reference_says(tiny: Shape, layout, dtype) -> None:
    batch = make_batch(tiny, CPU)
    case = make_case(batch, dtype=dtype, layout=layout, seed=3)
    wanted = expected(case)
    width = tiny.width
    products = Oracle(case, batch)._products
    for name, exact, bound in (
        (
            "projected",
            wanted.output.reshape(-1, tiny.hidden)[batch.destinations],
            wanted.output_bound.reshape(-1, tiny.hidden)[batch.destinations],
        ),
        (
            "grad_features",
            torch.cat([grad.reshape(-1, width) for grad in wanted.grad_features]),
            torch.cat([grad.reshape(-1, width) for grad in wanted.grad_features_bound]),
        ),
        ("grad_weight", wanted.grad_weight, wanted.grad_weight_bound),
    ):
        ours = products[name]
        # Two float64 sums of the same terms, each off by a last place or so of their magnitude.
        torch.testing.assert_close(ours.exact, exact, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.bound, bound, rtol=1e-12, atol=1e-12)
        assert (ours.loose_bound >= ours.bound).all()
    gradient = Oracle(case, batch)._grad_embeddings
    assert torch.equal(gradient.double(), wanted.grad_embeddings.reshape(-1, tiny.hidden))


@pytest.mark.parametrize("layout", insert.LAYOUTS)
def test_the_rows_of_ours_take_the_path_where_the_product_starts_beside_the_plan(
    tiny: Shape, layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[bool] = []
    launched = project.project_insert

    def spy(*arguments, **options):  # type: ignore[no-untyped-def]
        starts.append(options["after_plan"])
        return launched(*arguments, **options)

    monkeypatch.setattr(project, "project_insert", spy)
    batch = make_batch(tiny, CPU)
    case = make_case(batch, dtype=torch.bfloat16, layout=layout, seed=0)
    ours, *_ = peers.peers(tiny.hidden, tiny.width, "triton", None)
    one = insert.insertion(ours, "forward", insert.Inputs(batch, [case]))
    one.run(one.prepare(0))
    assert starts == [True]


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels-first"])
def test_all_implementations_pass_the_gate_in_every_operation(
    tiny: Shape,
    settings: Settings,
    *,
    layout,
    sampled: bool,
    impl,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if sampled:
        monkeypatch.setattr(oracle, "EXACT_BELOW", 0)
    # Compiled kernels where there is a GPU, else interpreted ones.
    device = torch.device("cuda" if impl == "triton" and torch.cuda.is_available() else "cpu")
    settings = dataclasses.replace(settings, impl=impl, device=device)
    batch = make_batch(tiny, device)
    inputs = insert.Inputs(
        batch, [make_case(batch, dtype=torch.bfloat16, layout=layout, seed=i) for i in range(2)]
    )
    judge = Oracle(inputs.cases[0], batch)
    module = peers.module_peer(ImageInsertEmbedding, tiny.hidden, tiny.width)
    every = peers.peers(tiny.hidden, tiny.width, impl, None)
    every.append(peers.Peer("module", "peer", module))
    for operation in insert.OPERATIONS:
        compared = insert.implementations(
            operation, inputs, layout, insertions=every, settings=settings
        )
        names = {one.name for one in compared}
        assert {"step37", "GEMM alone"} <= names
        on_forward_only = {"step37 kernel alone", "cuBLAS + scatter"}
        assert names & on_forward_only == (on_forward_only if operation == "forward" else set())
        assert ("step37, graph replay" in names) == (
            device.type == "cuda" and operation != "backward"
        )
        for one in compared:
            problem = insert.check_results(judge, one, one.run(one.prepare(2)))
            assert problem is None, (operation, one.name)


def break_text(output: Tensor) -> Tensor:
    output = output.clone()
    output[0] += 1
    return output


def break_one_element(output: Tensor) -> Tensor:
    """Of a picture: the sequence's middle is one."""
    output = output.clone()
    output[output.shape[0] // 2, 0, 3] += 0.1
    return output


def leave_unwritten(output: Tensor) -> Tensor:
    output = output.clone()
    output[-1, 0, -1] = float("nan")
    return output


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (break_text, "output: a text row differs"),
        (break_one_element, "output: off by 0.1"),
        (leave_unwritten, "output: holds NaN"),
    ],
)
def test_the_gate_stops_a_wrong_output(tiny: Shape, spoil, message: str) -> None:
    batch = make_batch(tiny, CPU)
    case = make_case(batch, dtype=torch.float32, layout="contiguous", seed=0)
    inputs = insert.Inputs(batch, [case])

    def wrong(*arguments) -> Tensor:
        return spoil(peers.index_copy(*arguments))

    one = insert.insertion(peers.Peer("wrong", "ours", wrong), "forward", inputs)
    problem = insert.check_results(Oracle(case, batch), one, one.run(one.prepare(0)))
    assert problem is not None
    assert message in problem


def test_the_gate_stops_wrong_gradients(tiny: Shape) -> None:
    batch = make_batch(tiny, CPU)
    case = make_case(batch, dtype=torch.float32, layout="contiguous", seed=0)
    inputs = insert.Inputs(batch, [case])
    one = insert.insertion(peers.Peer("stock", "stock", peers.stock), "backward", inputs)
    grads = one.run(one.prepare(0))
    judge = Oracle(case, batch)
    assert judge.check(grads, narrow_partial_sums=False) is None
    for name, tensors in grads.items():
        spoilt = {**grads, name: [tensors[0] + 0.5, *tensors[1:]]}
        problem = judge.check(spoilt, narrow_partial_sums=False)
        assert problem is not None
        assert problem.startswith(name)


def test_the_least_work_counts_each_tensor_once() -> None:
    shape = Shape(name="", seq_len=10, images=1, image_rows=3, hidden=4, width=5)
    forward = insert.work_of("forward", shape, 2)
    # Features, weight; seven text rows are read, and all ten rows written.
    assert (forward.flops, forward.bytes, forward.rows) == (120, 2 * (15 + 20 + 28 + 40), 3)
    backward = insert.work_of("backward", shape, 2)
    # grad_output and the embeddings' gradient; features and theirs; weight and its gradient.
    assert (backward.flops, backward.bytes) == (240, 2 * (2 * 40 + 2 * 15 + 2 * 20))


def test_the_subject_insert_gives_one_group_an_operation_and_layout(
    tiny: Shape, settings: Settings
) -> None:
    quick = dataclasses.replace(settings, compile_backend="aot_eager")
    groups = list(insert.run_shape(tiny, quick))
    assert len(groups) == len(insert.LAYOUTS) * len(insert.OPERATIONS)
    names = {row.implementation for group in groups for row in group}
    assert {"torch.compile index_copy", "stock", "step37 kernel alone"} <= names
    for group in groups:
        assert [row.problem for row in group] == [None] * len(group)
        assert all(row.median_us > 0 for row in group)


def test_the_subject_plan_finds_the_rows_where_they_were_laid(
    tiny: Shape, settings: Settings
) -> None:
    rows = plan.run_shape(tiny, settings)
    assert [row.problem for row in rows] == [None] * 3


def test_the_subject_step_goes_from_pictures_to_fused_embeddings(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pictures of 112 and 56 pixels.
    monkeypatch.setattr(step, "PICTURE", (40, 60))
    shape = Shape(
        name="tiny", seq_len=32, images=1, crops=2, image_rows=4, crop_rows=1, hidden=8, width=12
    )
    rows = step.run_shape(shape, torch.bfloat16, settings)
    assert [(row.implementation, row.problem) for row in rows] == [
        ("step37", None),
        ("stock", None),
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu_everything_is_counted_and_ours_never_waits(settings: Settings) -> None:
    on_gpu = dataclasses.replace(
        settings,
        device=torch.device("cuda"),
        impl="auto",
        dtypes=(torch.bfloat16,),
        compile_backend="aot_eager",
    )
    shape = Shape(name="small", seq_len=512, images=2, crops=1, hidden=256, width=384)
    for group in insert.run_shape(shape, on_gpu):
        for row in group:
            assert row.problem is None, row
            assert row.launches is not None
            assert row.peak_bytes is not None
            if row.kind == "ours":
                assert row.host_syncs == 0, row
            if row.kind == "stock" and row.key.operation == "forward":
                # Two reads for each of three pictures and crops, at the least.
                assert row.host_syncs >= 6
