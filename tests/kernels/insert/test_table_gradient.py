"""The gradient of a table that is wider, and looked up more often, than one program handles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from step37_kernels import ImageForInsert, ImageInsertEmbedding

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
