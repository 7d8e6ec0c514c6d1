"""``torch.compile`` over the module: one graph, the same values, no recompile for new lengths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from step37_kernels import ImageForInsert, ImageInsertEmbedding
from step37_kernels._plan import to_runs
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
    arguments = (case.input_ids, [token], [1], [features], [rows], triton)
    operators = torch.ops.step37
    torch.library.opcheck(operators.plan.default, arguments)
    if not triton:
        return
    destinations, row_at, _, _ = operators.plan(*arguments)
    weight, bias = case.weight.detach(), case.bias.detach()
    pictures = [case.features[0].detach()]
    torch.library.opcheck(operators.pack_rows.default, (pictures,))
    x = operators.pack_rows(pictures)
    out = case.embeddings.detach().clone()
    torch.library.opcheck(
        operators.project_scatter.default, (x, weight, bias, destinations, None, out)
    )
    torch.library.opcheck(operators.embedding_grad.default, (case.grad_output, row_at))
    for bias_sum in (True, False):
        torch.library.opcheck(
            operators.gather_grad.default,
            (case.grad_output, destinations, torch.float16, bias_sum),
        )
    grad_rows, _ = operators.gather_grad(case.grad_output, destinations, torch.float32, False)
    torch.library.opcheck(operators.grad_features.default, (grad_rows, weight, None))
    torch.library.opcheck(operators.grad_weight.default, (grad_rows, x, None))
