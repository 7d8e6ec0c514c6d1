"""The insertion forward and backward, and its plan, against the reference's loop."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import nn

from step37_kernels import ImageForInsert, ImageInsertEmbedding, plan_insert, reference
from step37_kernels.testing import make_insert_case
from tests.kernels.checks import assert_gradients, assert_output
from tests.kernels.strategies import FILLER, TOKENS

HIDDEN, WIDTH = 16, 24


def case(rng: np.random.Generator, folder: Path) -> None:
    del folder
    batch_size, seq_len = int(rng.integers(1, 4)), int(rng.integers(1, 40))
    alphabet = [FILLER] * int(rng.choice([0, 3, 12])) + list(TOKENS)
    ids = torch.tensor(rng.choice(alphabet, (batch_size, seq_len)))
    if rng.random() < 0.3:
        ids[:, -1] = int(rng.choice(TOKENS))
    if rng.random() < 0.5:
        ids = ids.to(torch.int32)
    if rng.random() < 0.3:
        ids = ids.t().contiguous().t()
    groups = [
        (int(rng.choice(TOKENS)), [tuple(map(int, rng.integers(0, (5, 10)))) for _ in range(n)])
        for n in rng.integers(1, 4, int(rng.integers(1, 4)))
    ]
    insert = make_insert_case(
        ids,
        groups,
        hidden=HIDDEN,
        width=WIDTH,
        seed=int(rng.integers(2**31)),
        dtype=torch.float32,
        layout=rng.choice(["contiguous", "channels-first", "ragged"]),
        bias=bool(rng.random() < 0.5),
    )
    wanted = reference.plan_insert(insert.input_ids, insert.plan_groups)
    # Interpreted kernels are a thousand times slower.
    impl = "triton" if rng.random() < 0.05 else "torch"
    plan = plan_insert(insert.input_ids, insert.plan_groups, impl=impl)
    for name in ("destinations", "row_at"):
        assert torch.equal(getattr(plan, name), getattr(wanted, name).to(torch.int32)), name
    _check_shard(rng, insert.input_ids, insert.plan_groups)
    module = ImageInsertEmbedding(
        lambda **_: insert.embeddings * 1,
        WIDTH,
        HIDDEN,
        projector_bias=insert.bias is not None,
        impl=impl,
    )
    module.align_projector.weight = nn.Parameter(insert.weight.detach())
    if insert.bias is not None:
        module.align_projector.bias = nn.Parameter(insert.bias.detach())
    if rng.random() < 0.2 and impl == "torch":
        module.align_projector.register_forward_hook(lambda *_: None)
    projector = module.align_projector
    own = dataclasses.replace(insert, weight=projector.weight, bias=projector.bias)
    output = module(
        insert.input_ids,
        [
            ImageForInsert(insert_start_token=token, image_features=features)
            for token, features in insert.groups
        ],
    )
    assert_output(own, output)
    assert_gradients(own, output, insert.grad_output)


def _check_shard(
    rng: np.random.Generator, ids: torch.Tensor, groups: list[tuple[int, list[int]]]
) -> None:
    """Each rank of a random division holds, at its positions, what the whole plan has there."""
    whole = plan_insert(ids, groups)
    order = torch.tensor(rng.permutation(ids.shape[1]))
    for positions in order.tensor_split(int(rng.integers(1, 4))):
        part = whole.shard(positions)
        held = whole.row_at[positions]
        assert torch.equal(part.row_at >= 0, held >= 0)
        assert torch.equal(part.local_rows[part.row_at[part.row_at >= 0].long()], held[held >= 0])
