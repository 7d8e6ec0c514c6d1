"""The gradient of a table that is wider, and looked up more often, than one program handles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from step37_kernels import ImageForInsert, ImageInsertEmbedding
from step37_kernels.lookup_tensors import order_by_id, put_table_gradient

IM_START = 5
HIDDEN, WIDTH, VOCABULARY = 1100, 16, 9


@pytest.mark.parametrize("text_only", [False, True])
def test_every_row_and_column_of_a_wide_table_gets_its_gradient(device, text_only):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, IM_START, (2, 30), generator=generator)
    ids[:, 3] = IM_START
    features = torch.randn(2, 4, WIDTH, generator=generator).to(device)
    images = (
        [] if text_only else [ImageForInsert(insert_start_token=IM_START, image_features=features)]
    )
    grad_output = torch.randn(30, 2, HIDDEN, generator=generator).to(device)

    def gradient(impl: str) -> Tensor:
        torch.manual_seed(1)
        words = nn.Embedding(VOCABULARY, HIDDEN)
        module = ImageInsertEmbedding(words, WIDTH, HIDDEN, impl=impl)
        module = module.to(device)
        words.to(device)
        module(ids.to(device), images).backward(grad_output)
        assert words.weight.grad is not None
        return words.weight.grad

    torch.testing.assert_close(gradient("triton"), gradient("torch"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("add", [True, False])
def test_ids_outside_the_table_touch_nothing_beside_it(device, triton, add):
    memory = torch.full((VOCABULARY + 2, 8), 3.0, device=device)
    table = memory[1:-1]
    held = 3.0 if add else 0.0
    table.fill_(held)
    ids = torch.tensor([[-1] * 40 + [2] * 40 + [VOCABULARY] * 40 + [VOCABULARY + 1] * 40])
    grad_output = torch.ones(160, 1, 8, device=device)
    in_order = order_by_id(ids.to(device), VOCABULARY, triton=triton)
    put_table_gradient(grad_output, in_order, table, add=add, triton=triton)
    wanted = torch.full((VOCABULARY + 2, 8), 3.0)
    wanted[1:-1] = held
    wanted[1 + 2] = held + 40.0
    assert torch.equal(memory.cpu(), wanted)


@pytest.mark.parametrize("positions", [1, 6, 17, 35])
@pytest.mark.parametrize("add", [True, False])
def test_positions_past_the_last_belong_to_no_row(device, positions, add):
    generator = torch.Generator().manual_seed(positions)
    ids = torch.randint(0, 4, (1, positions), generator=generator)
    grad_output = torch.randn(positions, 1, 8, generator=generator)
    wanted = torch.full((4, 8), 2.0 if add else 0.0)
    wanted.index_add_(0, ids[0], grad_output[:, 0])
    table = torch.full((4, 8), 2.0 if add else 0.0, device=device)
    in_order = order_by_id(ids.to(device), 4, triton=True)
    put_table_gradient(grad_output.to(device), in_order, table, add=add, triton=True)
    torch.testing.assert_close(table.cpu(), wanted)
