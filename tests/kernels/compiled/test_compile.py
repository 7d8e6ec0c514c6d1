"""``torch.compile`` over the module: one graph, the same values, no recompile for new lengths."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

from step37_kernels import (
    ImageForInsert,
    ImageInsertEmbedding,
    automodel,
    embed_project_and_insert,
    image_insert_embedding,
    plan_insert,
    plan_placeholders,
    project_and_insert,
)
from step37_kernels.count_watch import count_watch
from step37_kernels.integration.parallel import SequenceLayout
from step37_kernels.runs import to_runs
from step37_kernels.testing import make_insert_case
from tests.kernels.strategies import FILLER, TOKENS

HIDDEN, WIDTH = 32, 48
IM_START, PATCH_START = TOKENS[0], TOKENS[1]


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, HIDDEN)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        del position_ids
        embedded: Tensor = self.table(input_ids % 64)
        return embedded.transpose(0, 1).contiguous()


def make_module(device: str, impl: str) -> tuple[ImageInsertEmbedding, Words]:
    torch.manual_seed(0)
    words = Words().to(device)
    module = ImageInsertEmbedding(words, WIDTH, HIDDEN, projector_bias=True, impl=impl)
    return module.to(device), words


def make_batch(device: str, pictures: int, crops: int, seq_len: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(pictures)
    ids = torch.full((1, seq_len), FILLER)
    ids[0, [9 * k for k in range(pictures)]] = IM_START
    ids[0, [seq_len - 6 * (k + 1) for k in range(crops)]] = PATCH_START
    picture_rows = torch.randn(pictures, WIDTH, 7, generator=generator).to(device)
    crop_rows = torch.randn(crops, 5, WIDTH, generator=generator).to(device)
    return ids.to(device), picture_rows.requires_grad_(), crop_rows.requires_grad_()


def groups_of(pictures: Tensor, crops: Tensor) -> list[ImageForInsert]:
    return [
        ImageForInsert(insert_start_token=PATCH_START, image_features=crops),
        ImageForInsert(insert_start_token=IM_START, image_features=pictures.transpose(1, 2)),
    ]


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_one_graph_forward_and_backward_for_all_lengths(device, impl):
    module, words = make_module(device, impl)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def step(ids: Tensor, pictures: Tensor, crops: Tensor) -> Tensor:
        return module(ids, groups_of(pictures, crops))

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    parameters = [*module.parameters(), words.table.weight]
    for number, (pictures, crops, seq_len) in enumerate(
        [(2, 2, 60), (3, 4, 90), (5, 3, 111), (7, 2, 128)]
    ):
        ids, *leaves = make_batch(device, pictures, crops, seq_len)
        eager, traced = step(ids, *leaves), compiled(ids, *leaves)
        assert torch.equal(eager, traced)
        gradient = torch.randn_like(eager)
        for one, other in zip(
            torch.autograd.grad(eager, [*parameters, *leaves], gradient),
            torch.autograd.grad(traced, [*parameters, *leaves], gradient),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        if number == 1:
            dynamic = len(graphs)
    assert dynamic <= 2
    assert len(graphs) == dynamic


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize(("dynamic", "most"), [(True, 2), (None, 2), (False, 3)])
def test_the_module_compiles_whole_whatever_is_dynamic(device, impl, dynamic, most):
    module, words = make_module(device, impl)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend=counter)
    parameters = [*module.parameters(), words.table.weight]
    # No two sizes of the first are equal, else the compiler takes them for one.
    for pictures, crops, seq_len in ((3, 4, 60), (4, 6, 90), (6, 2, 111)):
        ids, *leaves = make_batch(device, pictures, crops, seq_len)
        eager, traced = module(ids, groups_of(*leaves)), compiled(ids, groups_of(*leaves))
        assert torch.equal(eager, traced)
        gradient = torch.randn_like(eager)
        for one, other in zip(
            torch.autograd.grad(eager, [*parameters, *leaves], gradient),
            torch.autograd.grad(traced, [*parameters, *leaves], gradient),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= most


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("dynamic", [True, None, False])
@pytest.mark.parametrize("of", ["plan_insert", "plan_placeholders", "shard"])
def test_a_plan_is_traced_whole(device, impl, dynamic, of):
    def planned(ids: Tensor) -> tuple[Tensor, ...]:
        if of == "plan_placeholders":
            plan = plan_placeholders(ids, IM_START, 4, impl=impl)
        else:
            plan = plan_insert(ids, [(PATCH_START, [3, 3, 2]), (IM_START, [7] * 4)], impl=impl)
        if of == "shard":
            plan = plan.shard(torch.arange(3, ids.shape[1], 2, device=device))
        return plan.destinations, plan.row_at, plan.start_counts

    torch._dynamo.reset()
    compiled = torch.compile(planned, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for seq_len in (60, 90, 111):
        ids, _, _ = make_batch(device, 4, 3, seq_len)
        for one, other in zip(planned(ids), compiled(ids), strict=True):
            assert torch.equal(one, other)


class Embedded(nn.Module):
    """What is exported takes tensors, no groups."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.embedding, self.words = make_module(device, "torch")

    def forward(self, ids: Tensor, pictures: Tensor, crops: Tensor) -> Tensor:
        return self.embedding(ids, groups_of(pictures, crops))


@pytest.mark.no_launch
@pytest.mark.parametrize("strict", [True, False])
def test_the_module_is_exported_with_dynamic_sizes(device, strict):
    module = Embedded(device)
    size = torch.export.Dim
    sizes = {
        "ids": {1: size("s", min=4, max=4096)},
        "pictures": {0: size("p", min=2, max=100)},
        "crops": {0: size("c", min=2, max=100)},
    }
    example = tuple(tensor.detach() for tensor in make_batch(device, 3, 4, 60))
    exported = torch.export.export(module, example, dynamic_shapes=sizes, strict=strict)
    for batch in (example, make_batch(device, 5, 2, 111)):
        assert torch.equal(exported.module()(*batch), module(*batch))


def our_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The compiler logs as well."""
    name = "step37_kernels.count_watch"
    return [record.getMessage() for record in caplog.records if record.name == name]


def wait_for_counts(device: str) -> None:
    """On CUDA they are read by a later forward, once they have arrived."""
    if device == "cuda":
        torch.cuda.synchronize()
        count_watch.poll()


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("layout", [None, SequenceLayout()], ids=["whole", "shard"])
def test_a_count_mismatch_is_reported_out_of_a_compiled_graph(device, impl, layout, caplog):
    module, _ = make_module(device, impl)
    module.configure(impl=impl, layout=layout)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    ids, pictures, crops = make_batch(device, 3, 2, 60)
    compiled(ids, groups_of(pictures, crops))
    wait_for_counts(device)
    assert our_warnings(caplog) == []
    ids[0, 9] = FILLER
    for _ in range(2):
        compiled(ids, groups_of(pictures, crops)).sum().backward()
    wait_for_counts(device)
    sentence = f"start token {IM_START}: 2 in input_ids, 3 features; inserting 2"
    first, second = our_warnings(caplog)
    assert first == second
    assert first.endswith(sentence)


@pytest.mark.no_launch
def test_insert_features_reports_it_too(device, caplog):
    torch._dynamo.reset()
    compiled = torch.compile(
        ImageInsertEmbedding.insert_features, fullgraph=True, backend="aot_eager"
    )
    ids = torch.full((1, 8), FILLER, device=device)
    ids[0, 1] = IM_START
    compiled(torch.zeros(8, 1, 4, device=device), torch.ones(2, 2, 4, device=device), ids, IM_START)
    wait_for_counts(device)
    assert "1 in input_ids, 2 features; inserting 1" in caplog.text


class Placeholders(nn.Module):
    """The modules that a merge like Automodel's uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(image_token_id=IM_START)
        self.language_model = nn.Module()
        self.language_model.embed_tokens = nn.Embedding(IM_START + 1, HIDDEN)
        self.vision_model = None
        self.vit_large_projector = nn.Linear(WIDTH, HIDDEN)


class Merge(automodel.FusedMerge, Placeholders):
    """The merge of rows that the tower has made, ``[N, L, C]``."""

    def forward(self, ids: Tensor, rows: Tensor) -> Tensor:
        features = automodel._Features(projector=self.vit_large_projector, tensors=[rows])
        return self.prepare_inputs_embeds(ids, features)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_merge_into_placeholders_is_the_eager_one_and_reports_a_mismatch(
    device, impl, training, caplog
):
    model = Merge().to(device)
    model.step37_options = automodel._Options(impl=impl)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    told = []
    for length, held in ((20, 6), (30, 6), (30, 5), (30, 7)):
        ids = torch.full((2, length), FILLER, device=device)
        ids[:, 3:6] = IM_START
        ids[0, 3] += (held == 5) * (FILLER - IM_START)
        ids[1, 9:10] = IM_START if held == 7 else FILLER
        rows = torch.randn(2, 3, WIDTH, device=device)
        with torch.set_grad_enabled(training):
            eager, traced = model(ids, rows), compiled(ids, rows)
        assert torch.equal(eager, traced)
        assert traced.requires_grad == training
        wait_for_counts(device)
        told.append(our_warnings(caplog))
        caplog.clear()
    sentence = f"start token {IM_START}: {{}} in input_ids, 6 features; inserting {{}}"
    assert [len(messages) for messages in told] == [0, 0, 2, 2]
    for messages, numbers in zip(told[2:], ((5, 5), (7, 6)), strict=True):
        assert all(message.endswith(sentence.format(*numbers)) for message in messages)


def list_batch(device: str, pictures: int, kind: str) -> tuple[Tensor, list[Tensor]]:
    """Ids, and a tensor for each picture."""
    ids = torch.full((1, 7 * pictures + 7), FILLER, device=device)
    ids[0, : 7 * pictures : 7] = IM_START
    features = []
    for k in range(pictures):
        rows = 3 + (kind == "ragged") * (k % 3)
        shape = (1, rows, WIDTH) if kind == "[1, L, C]" else (rows, WIDTH)
        features.append(torch.randn(shape, device=device, requires_grad=True))
    return ids, features


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("kind", ["[L, C]", "[1, L, C]", "ragged"])
def test_graphs_do_not_grow_with_the_number_of_pictures_in_a_list(device, impl, kind, caplog):
    module, words = make_module(device, impl)
    head = nn.Linear(HIDDEN, HIDDEN, device=device)

    def step(ids: Tensor, features: list[Tensor]) -> Tensor:
        return head(module(ids, [ImageForInsert(IM_START, image_features=features)]))

    torch._dynamo.reset()
    image_insert_embedding._warn_untraced.cache_clear()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter)
    graphs = []
    # More than the compiler makes graphs of a function.
    for pictures in range(2, 12):
        ids, features = list_batch(device, pictures, kind)
        eager, traced = step(ids, features), compiled(ids, features)
        torch.testing.assert_close(eager, traced)
        leaves = [*module.parameters(), words.table.weight, *features]
        for one, other in zip(
            torch.autograd.grad(eager.sum(), leaves),
            torch.autograd.grad(traced.sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        graphs.append(counter.frame_count)
    # That of the linear layer, and again with its length dynamic.
    assert graphs[2:] == [graphs[2]] * 8
    assert graphs[2] <= 2
    ours = [r for r in caplog.records if r.name == "step37_kernels.image_insert_embedding"]
    assert ["pass one tensor [N, L, C]" in r.getMessage() for r in ours] == [True]


@pytest.mark.no_launch
@pytest.mark.parametrize("kind", ["[L, C]", "[1, L, C]", "ragged"])
@pytest.mark.parametrize("of", ["module", "insert_features"])
def test_a_list_of_pictures_is_an_error_that_says_what_to_pass_where_the_graph_may_not_break(
    device, kind, of
):
    ids, features = list_batch(device, 2, kind)
    module, _ = make_module(device, "torch")
    torch._dynamo.reset()
    arguments: tuple[object, ...] = (ids, [ImageForInsert(IM_START, image_features=features)])
    function: object = module
    if of == "insert_features":
        function = ImageInsertEmbedding.insert_features
        arguments = (torch.zeros(ids.shape[1], 1, WIDTH, device=device), features, ids, IM_START)
    whole = torch.compile(function, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"pass one tensor \[N, L, C\] .*torch\.stack"):
        whole(*arguments)
    torch._dynamo.reset()
    broken = torch.compile(function, backend="aot_eager")
    torch.testing.assert_close(broken(*arguments), function(*arguments))


@pytest.mark.no_launch
def test_a_list_of_one_tensor_is_traced_whole(device):
    module, _ = make_module(device, "torch")
    ids, features = list_batch(device, 4, "[L, C]")
    groups = [ImageForInsert(IM_START, image_features=[torch.stack(features)])]
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids, groups), module(ids, groups))


@pytest.mark.no_launch
@pytest.mark.parametrize("strict", [True, False])
def test_a_list_is_exported_with_its_number_of_tensors(device, strict):
    class Pair(Embedded):
        def forward(self, ids: Tensor, first: Tensor, second: Tensor) -> Tensor:
            return self.embedding(ids, [ImageForInsert(IM_START, image_features=[first, second])])

    module = Pair(device)
    ids, features = list_batch(device, 2, "ragged")
    example = (ids, *(feature.detach() for feature in features))
    exported = torch.export.export(module, example, strict=strict)
    assert torch.equal(exported.module()(*example), module(*example))


@pytest.mark.no_launch
def test_strict_breaks_the_graph_and_says_so_where_it_may_not(device):
    module, _ = make_module(device, "torch")
    module.configure(strict=True)
    ids, pictures, crops = make_batch(device, 3, 2, 60)
    right = module(ids, groups_of(pictures, crops))
    wrong = ids.clone()
    wrong[0, 9] = FILLER
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, groups_of(pictures, crops)), right)
    with pytest.raises(ValueError, match="2 in input_ids, 3 features"):
        compiled(wrong, groups_of(pictures, crops))
    torch._dynamo.reset()
    whole = torch.compile(module, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"strict=True .* compile without fullgraph=True"):
        whole(ids, groups_of(pictures, crops))


@pytest.mark.parametrize("triton", [True, False])
def test_the_operators_keep_what_their_schemas_say(device, triton):
    ids = torch.full((2, 20), FILLER)
    ids[:, 3] = IM_START
    case = make_insert_case(
        ids,
        [(IM_START, [(2, 6)])],
        hidden=HIDDEN,
        width=WIDTH,
        seed=0,
        dtype=torch.float32,
        layout="channels-first",
        bias=True,
        device=device,
    )
    (token, ((features, rows),)) = to_runs(case.plan_groups)[0]
    arguments = (case.input_ids, [token], [features], [features], [rows])
    operators = torch.ops.step37
    for how in itertools.product((0, 1), (True, False), (0, 9), [triton], (True, False)):
        torch.library.opcheck(operators.plan.default, (*arguments, *how))
    by_id = (case.input_ids.t(), 9, triton)
    torch.library.opcheck(operators.order_by_id.default, by_id)
    in_order = operators.order_by_id(*by_id)
    torch.library.opcheck(
        operators.table_gradient.default, (case.grad_output, *in_order, 9, torch.float16, triton)
    )
    torch.library.opcheck(
        operators.add_table_gradient.default,
        (case.grad_output, *in_order, torch.zeros(9, HIDDEN, device=device), triton),
    )
    if not triton:
        return
    destinations, row_at, _, _ = operators.plan(*arguments, 1, False, 0, True, False)
    weight, bias = case.weight.detach(), case.bias.detach()
    pictures = [case.features[0].detach()]
    torch.library.opcheck(operators.copy_rows.default, (pictures,))
    x = operators.copy_rows(pictures)
    words = case.embeddings.detach()
    torch.library.opcheck(
        operators.project_insert.default,
        (words, [x], weight, bias, destinations, row_at, None, None, False),
    )
    table = torch.randn(9, HIDDEN, device=device)
    turned = (case.input_ids % 9).t()
    torch.library.opcheck(
        operators.project_insert.default,
        (table, [x], weight, bias, destinations, row_at, None, turned, False),
    )
    torch.library.opcheck(operators.look_up.default, (table, turned, torch.full_like(row_at, -1)))
    for wanted in itertools.product((True, False), repeat=3):
        torch.library.opcheck(
            operators.gradient_rows.default,
            (case.grad_output, row_at, destinations, torch.float16, *wanted, None, 0),
        )
    asked = (case.grad_output, row_at, destinations, torch.float32, False, True, False)
    for vocabulary in (9, 2**31):  # whose ids are counted, and sorted by the library
        torch.library.opcheck(operators.gradient_rows.default, (*asked, turned, vocabulary))
    _, grad_rows, *_ = operators.gradient_rows(*asked, None, 0)
    for add in (True, False):
        torch.library.opcheck(
            operators.add_weight_gradient.default,
            (grad_rows, x, torch.ones(HIDDEN, WIDTH, device=device), add),
        )


@pytest.mark.no_launch
@pytest.mark.parametrize("placeholders", [False, True])
def test_plan_and_insertion_compile_whole_as_functions(device, placeholders):
    projector = nn.Linear(WIDTH, HIDDEN).to(device)

    def fuse(input_ids: Tensor, embeddings: Tensor, features: Tensor) -> Tensor:
        if placeholders:
            plan = plan_placeholders(input_ids, IM_START, features.shape[0], impl="torch")
        else:
            plan = plan_insert(input_ids, [(IM_START, [2, 1])], impl="torch")
        return project_and_insert(
            embeddings, features, projector.weight, projector.bias, plan, impl="torch"
        )

    compiled = torch.compile(fuse, fullgraph=True, dynamic=True, backend="aot_eager")
    for seq_len in (12, 17):
        input_ids = torch.full((1, seq_len), FILLER, device=device)
        input_ids[0, [1, 5, 9]] = IM_START
        embeddings = torch.randn(seq_len, 1, HIDDEN, device=device)
        features = torch.randn(3, WIDTH, device=device)
        assert torch.equal(
            compiled(input_ids, embeddings, features), fuse(input_ids, embeddings, features)
        )


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_the_whole_embedding_is_one_graph_for_all_lengths(device, impl):
    torch.manual_seed(0)
    words = nn.Embedding(64, HIDDEN).to(device)
    module = ImageInsertEmbedding(words, WIDTH, HIDDEN, impl=impl).to(device)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def step(ids: Tensor, features: Tensor) -> Tensor:
        return module(ids, [ImageForInsert(insert_start_token=7, image_features=features)])

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for seq_len in (20, 33, 50):
        ids = torch.arange(seq_len, device=device)[None] % 11
        ids[0, [1, 9]] = 7
        features = torch.randn(2, 3, WIDTH, device=device)
        results = []
        for function in (step, compiled):
            output = function(ids, features)
            grads = torch.autograd.grad(output.square().sum(), [words.weight, *module.parameters()])
            results.append([output, *grads])
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(eager, graph)
    assert len(graphs) == 1


@pytest.mark.no_launch
def test_embed_project_and_insert_compiles_whole_as_a_function(device):
    table = torch.randn(16, HIDDEN, device=device, requires_grad=True)
    weight = torch.randn(HIDDEN, WIDTH, device=device)

    def fuse(ids: Tensor, features: Tensor) -> Tensor:
        plan = plan_insert(ids, [(7, [2, 1])], impl="torch")
        return embed_project_and_insert(ids, table, features, weight, None, plan, impl="torch")

    compiled = torch.compile(fuse, fullgraph=True, dynamic=True, backend="aot_eager")
    for seq_len in (12, 17):
        ids = torch.arange(seq_len, device=device)[None] % 16
        features = torch.randn(3, WIDTH, device=device)
        assert torch.equal(compiled(ids, features), fuse(ids, features))


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_table_gradient_that_megatrons_hook_waits_for_stays_outside_of_the_graph(device, impl):
    """Autograd gets a sparse gradient, which no graph can hold."""
    torch.compiler.reset()
    words = nn.Embedding(64, 16, device=device)
    module = ImageInsertEmbedding(words, 24, 16, impl=impl, gradient_accumulation_fusion=True).to(
        device
    )
    parameters = (words.weight, module.align_projector.weight)
    for parameter in parameters:
        parameter.main_grad = torch.zeros_like(parameter)
        parameter.grad_added_to_main_grad = False
    ids = torch.arange(40, device=device).view(2, 20) % 6
    ids[:, 4] = 7
    features = torch.randn(2, 3, 24, device=device)
    images = [ImageForInsert(insert_start_token=7, image_features=features)]
    module(ids, images).square().sum().backward()
    wanted = [parameter.main_grad.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.main_grad.zero_()
        parameter.grad = None
    torch.compile(module, backend="aot_eager")(ids, images).square().sum().backward()
    for parameter, gradient in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(parameter.main_grad, gradient)
    torch.compiler.reset()
    whole = torch.compile(module, fullgraph=True, backend="aot_eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="sparse_coo_tensor"):
        whole(ids, images)
