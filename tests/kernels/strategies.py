"""Hypothesis strategies for token ids and insertion groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

TOKENS = (128000, 128003, 7)
FILLER = 5


@st.composite
def token_ids(
    draw: Callable[[st.SearchStrategy[Any]], Any], max_batch: int = 3, max_seq: int = 40
) -> torch.Tensor:
    """``[B, S]`` ids: from no start token to nothing but start tokens, also in the last column."""
    batch_size = draw(st.integers(1, max_batch))
    seq_len = draw(st.integers(1, max_seq))
    alphabet = [FILLER] * draw(st.sampled_from([0, 3, 12])) + list(TOKENS)
    flat = draw(
        st.lists(
            st.sampled_from(alphabet),
            min_size=batch_size * seq_len,
            max_size=batch_size * seq_len,
        )
    )
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    ids = torch.tensor(flat, dtype=dtype).view(batch_size, seq_len)
    if draw(st.booleans()):
        ids[:, -1] = draw(st.sampled_from(TOKENS))
    return ids


def plan_groups() -> st.SearchStrategy[list[tuple[int, list[int]]]]:
    """Up to three groups with distinct or equal tokens and features of 0 to 12 rows."""
    group = st.tuples(st.sampled_from(TOKENS), st.lists(st.integers(0, 12), max_size=7))
    return st.lists(group, max_size=3)


def feature_groups() -> st.SearchStrategy[list[tuple[int, list[tuple[int, int]]]]]:
    """Like :func:`plan_groups`, as ``(N, L)`` of feature tensors: uniform, ragged, empty."""
    tensor = st.tuples(st.integers(0, 4), st.integers(0, 9))
    group = st.tuples(st.sampled_from(TOKENS), st.lists(tensor, min_size=1, max_size=3))
    return st.lists(group, min_size=1, max_size=3)
