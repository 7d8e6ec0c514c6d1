"""The oracle itself: what it says in plain numbers, and its gradients in float64."""

from __future__ import annotations

import pytest
import torch

from step37_kernels import reference

PIC, CROP = 128000, 128003


def rows(*values: float) -> torch.Tensor:
    return torch.tensor([[float(v)] for v in values])


def fuse(ids: list[list[int]], groups: list[tuple[int, object]]) -> list[list[float]]:
    """Insert one-column features into zeros; columns of the result, one list a batch row."""
    input_ids = torch.tensor(ids)
    fused = torch.zeros(input_ids.shape[1], input_ids.shape[0], 1)
    for token, features in groups:
        fused = reference.insert_features(fused, features, input_ids, token)
    return fused[..., 0].T.tolist()


def test_rows_go_after_the_start_token():
    assert fuse([[1, PIC, 0, 0, 1]], [(PIC, [rows(5, 6)])]) == [[0, 0, 5, 6, 0]]


def test_locations_are_taken_in_row_major_order():
    ids = [[1, PIC, 0, 1], [PIC, 0, PIC, 0]]
    assert fuse(ids, [(PIC, [rows(1), rows(2), rows(3)])]) == [[0, 0, 1, 0], [0, 2, 0, 3]]


def test_a_span_is_cut_at_the_end_of_its_own_sequence():
    ids = [[1, 1, PIC, 0], [1, 1, 1, 1]]
    assert fuse(ids, [(PIC, [rows(1, 2, 3)])]) == [[0, 0, 0, 1], [0, 0, 0, 0]]


def test_a_start_token_in_the_last_column_inserts_nothing():
    assert fuse([[1, PIC], [1, 1]], [(PIC, [rows(1)])]) == [[0, 0], [0, 0]]


@pytest.mark.parametrize("features", [[rows(1)], [rows(1), rows(2), rows(3)]])
def test_unequal_counts_pair_up_to_the_smaller(features):
    wanted = [[0, 1, 0, 0, 0]] if len(features) == 1 else [[0, 1, 0, 2, 0]]
    assert fuse([[PIC, 0, PIC, 0, 1]], [(PIC, features)]) == wanted


def test_a_later_feature_wins_also_inside_a_longer_earlier_one():
    ids = [[PIC, PIC, 0, 0, 0, 0]]
    assert fuse(ids, [(PIC, [rows(1, 2, 3, 4, 5), rows(8, 9)])]) == [[0, 1, 8, 9, 4, 5]]


def test_a_later_group_overwrites_an_earlier_one():
    ids = [[PIC, 0, CROP, 0, 0]]
    groups = [(PIC, [rows(1, 2, 3, 4)]), (CROP, [rows(9)])]
    assert fuse(ids, groups) == [[0, 1, 2, 9, 4]]
    assert fuse(ids, groups[::-1]) == [[0, 1, 2, 3, 4]]


def test_lists_may_mix_single_features_and_stacks():
    stack = torch.stack([rows(2, 3), rows(4, 5)])
    ids = [[PIC, 0, PIC, 0, 0, PIC, 0, 0]]
    assert fuse(ids, [(PIC, [rows(1), stack])]) == [[0, 1, 0, 2, 3, 0, 4, 5]]


def test_other_ranks_are_errors():
    with pytest.raises(ValueError, match=r"expected \[N, L, C\], got \(2, 1\)"):
        reference.feature_list(rows(1, 2))
    with pytest.raises(ValueError, match=r"expected \[L, C\] or \[N, L, C\], got \(1,\)"):
        reference.feature_list([torch.zeros(1)])


def test_the_input_embeddings_are_left_as_they_are():
    embeddings = torch.zeros(3, 1, 1)
    reference.insert_features(embeddings, [rows(1)], torch.tensor([[PIC, 0, 0]]), PIC)
    assert embeddings.abs().sum() == 0


def test_a_row_that_lost_its_position_gets_no_gradient():
    first, second = rows(1, 2, 3).requires_grad_(), rows(9).requires_grad_()
    embeddings = torch.zeros(5, 1, 1, requires_grad=True)
    fused = reference.image_insert_embedding(
        embeddings,
        torch.tensor([[PIC, PIC, 0, 0, 0]]),
        [(PIC, [first, second])],
        torch.ones(1, 1),
    )
    fused.sum().backward()
    assert first.grad.flatten().tolist() == [1, 0, 1]
    assert second.grad.flatten().tolist() == [1]
    assert embeddings.grad.flatten().tolist() == [1, 0, 0, 0, 1]


def double(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


IDS = torch.tensor([[PIC, CROP, 0, 0, 1, PIC, 0], [1, PIC, 0, 0, CROP, 0, PIC]])


def test_autograd_of_the_whole_fusion_passes_gradcheck():
    def fusion(embeddings, pictures, crops, weight, bias):
        groups = [(CROP, crops), (PIC, [pictures[0], pictures[1:]])]
        return reference.image_insert_embedding(embeddings, IDS, groups, weight, bias)

    inputs = (
        double(7, 2, 3, seed=0),
        double(3, 3, 4, seed=1),
        double(2, 2, 4, seed=2),
        double(3, 4, seed=3),
        double(3, seed=4),
    )
    assert torch.autograd.gradcheck(fusion, inputs)


def test_row_by_row_insertion_along_the_plan_is_the_loop_over_features():
    embeddings, weight, bias = double(7, 2, 3, seed=0), double(3, 4, seed=1), double(3, seed=2)
    pictures, crops = double(4, 3, 4, seed=3), double(2, 2, 4, seed=4)
    plan = reference.plan_insert(IDS, [(CROP, [2, 2]), (PIC, [3, 3, 3, 3])])
    by_plan = reference.project_and_insert(embeddings, [crops, pictures], weight, bias, plan)
    by_loop = reference.image_insert_embedding(
        embeddings, IDS, [(CROP, crops), (PIC, pictures)], weight, bias
    )
    torch.testing.assert_close(by_plan, by_loop, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(
        lambda *a: reference.project_and_insert(a[0], [a[1], a[2]], a[3], a[4], plan),
        (embeddings, crops, pictures, weight, bias),
    )
