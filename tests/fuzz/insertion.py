"""The insertion forward and backward, and its plan, against the reference's loop.

Drawn as well: where the words come from, what is around the projector, how its parameters were
replaced, and how the layout was set. None of them changes what comes out; what must be called says
that it was.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from step37_kernels import ImageForInsert, ImageInsertEmbedding, plan_insert, reference
from step37_kernels.integration.parallel import SequenceLayout
from step37_kernels.testing import InsertCase, expected, make_insert_case
from tests.kernels.checks import assert_gradients, assert_output, assert_within
from tests.kernels.strategies import FILLER, TOKENS

HIDDEN, WIDTH = 16, 24
VOCABULARY, KNOWN_TOKENS = 20, (11, 13, 7)
"""Of the tables that words are looked up in, which :data:`TOKENS` are too large for."""


def case(rng: np.random.Generator, folder: Path) -> None:
    del folder
    words_kind = str(rng.choice(list(WORDS)))
    insert = _random_case(rng, TOKENS if words_kind == "called" else KNOWN_TOKENS)
    wanted = reference.plan_insert(insert.input_ids, insert.plan_groups)
    # Interpreted kernels are a thousand times slower.
    impl = "triton" if rng.random() < 0.05 else "torch"
    plan = plan_insert(insert.input_ids, insert.plan_groups, impl=impl)
    for name in ("destinations", "row_at"):
        assert torch.equal(getattr(plan, name), getattr(wanted, name).to(torch.int32)), name
    _check_shard(rng, insert.input_ids, insert.plan_groups)

    words_called: Calls = []
    words, table = WORDS[words_kind](insert, words_called)
    if table is not None:
        looked_up = table.detach()[insert.input_ids.t().long()]
        insert = dataclasses.replace(insert, embeddings=looked_up.requires_grad_())
    module = ImageInsertEmbedding(
        words,
        WIDTH,
        HIDDEN,
        projector_bias=insert.bias is not None,
        impl=impl,
        lookup=str(rng.choice(["auto", "call"])),
    )
    images = [
        ImageForInsert(insert_start_token=token, image_features=features)
        for token, features in insert.groups
    ]
    position_ids = torch.arange(insert.input_ids.shape[1]).expand_as(insert.input_ids)
    if rng.random() < 0.5:
        # What the forward before has seen must not be used again.
        module(insert.input_ids, images, position_ids)
    projector = REPLACE[str(rng.choice(list(REPLACE)))](module, insert)
    projector_called: Calls = []
    wrapper = str(rng.choice(list(WRAP))) if impl == "torch" else "nothing"
    module.align_projector = WRAP[wrapper](projector, projector_called)
    own = dataclasses.replace(insert, weight=projector.weight, bias=projector.bias)
    output = module(insert.input_ids, images, position_ids)
    assert_output(own, output)
    if table is None:
        assert_gradients(own, output, insert.grad_output)
    else:
        _assert_gradients_of_table(own, output, table)
    assert bool(words_called) == (words_kind != "nn.Embedding")
    has_rows = any(math.prod(feature.shape[:2]) for feature in own.features)
    assert bool(projector_called) == (wrapper != "nothing" and has_rows), wrapper
    if impl == "torch":
        leaves = [insert.embeddings if table is None else table, *own.features, own.weight]
        _check_layouts(rng, module, (insert.input_ids, images, position_ids), leaves)


def _random_case(rng: np.random.Generator, tokens: tuple[int, ...]) -> InsertCase:
    batch_size, seq_len = int(rng.integers(1, 4)), int(rng.integers(1, 40))
    alphabet = [FILLER] * int(rng.choice([0, 3, 12])) + list(tokens)
    ids = torch.tensor(rng.choice(alphabet, (batch_size, seq_len)))
    if rng.random() < 0.3:
        ids[:, -1] = int(rng.choice(tokens))
    if rng.random() < 0.5:
        ids = ids.to(torch.int32)
    if rng.random() < 0.3:
        ids = ids.t().contiguous().t()
    groups = [
        (int(rng.choice(tokens)), [tuple(map(int, rng.integers(0, (5, 10)))) for _ in range(n)])
        for n in rng.integers(1, 4, int(rng.integers(1, 4)))
    ]
    return make_insert_case(
        ids,
        groups,
        hidden=HIDDEN,
        width=WIDTH,
        seed=int(rng.integers(2**31)),
        dtype=torch.float32,
        layout=rng.choice(["contiguous", "channels-first", "ragged"]),
        bias=bool(rng.random() < 0.5),
    )


Calls = list[None]
"""An entry for each call of what must be called, as it is more than its parameters."""

Words = tuple[Callable[..., Tensor], nn.Parameter | None]
"""The language embedding, and its table if it has one."""


def _called(insert: InsertCase, calls: Calls) -> Words:
    def words(input_ids: Tensor, position_ids: Tensor) -> Tensor:
        del input_ids
        calls.append(None)
        return insert.embeddings[position_ids[0]]

    return words, None


def _embedding(_: InsertCase, calls: Calls) -> Words:
    del calls
    embedding = nn.Embedding(VOCABULARY, HIDDEN)
    return embedding, embedding.weight


def _hooked_embedding(_: InsertCase, calls: Calls) -> Words:
    embedding = nn.Embedding(VOCABULARY, HIDDEN)
    embedding.register_forward_hook(lambda *_: calls.append(None))
    return embedding, embedding.weight


def _derived_embedding(_: InsertCase, calls: Calls) -> Words:
    class Derived(nn.Embedding):
        def __call__(self, *arguments: Any, **keywords: Any) -> Any:
            calls.append(None)
            return super().__call__(*arguments, **keywords)

    embedding = Derived(VOCABULARY, HIDDEN)
    return embedding, embedding.weight


def _module(_: InsertCase, calls: Calls) -> Words:
    class WordsAndPositions(nn.Module):
        """As Megatron's: called with both, gives ``[S, B, H]``."""

        def __init__(self) -> None:
            super().__init__()
            self.word_embeddings = nn.Embedding(VOCABULARY, HIDDEN)

        def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
            calls.append(None)
            assert position_ids.shape == input_ids.shape
            rows: Tensor = self.word_embeddings(input_ids).transpose(0, 1)
            return rows

    words = WordsAndPositions()
    return words, words.word_embeddings.weight


WORDS: dict[str, Callable[[InsertCase, Calls], Words]] = {
    "called": _called,
    "nn.Embedding": _embedding,
    "nn.Embedding with a hook": _hooked_embedding,
    "a class derived from nn.Embedding": _derived_embedding,
    "a module": _module,
}


def _values(insert: InsertCase) -> dict[str, Tensor]:
    values = {"weight": insert.weight.detach().clone()}
    if insert.bias is not None:
        values["bias"] = insert.bias.detach().clone()
    return values


def _set(module: ImageInsertEmbedding, insert: InsertCase) -> nn.Linear:
    for name, value in _values(insert).items():
        setattr(module.align_projector, name, nn.Parameter(value))
    return module.align_projector


def _copy(module: ImageInsertEmbedding, insert: InsertCase) -> nn.Linear:
    with torch.no_grad():
        for name, value in _values(insert).items():
            getattr(module.align_projector, name).copy_(value)
    return module.align_projector


def _load(module: ImageInsertEmbedding, insert: InsertCase, **options: bool) -> nn.Linear:
    state = {f"align_projector.{name}": value for name, value in _values(insert).items()}
    module.load_state_dict(state, **options)
    for parameter in module.parameters():
        parameter.requires_grad_()
    return module.align_projector


def _empty_and_load(module: ImageInsertEmbedding, insert: InsertCase) -> nn.Linear:
    module.to("meta").to_empty(device="cpu")
    return _load(module, insert)


def _another(module: ImageInsertEmbedding, insert: InsertCase) -> nn.Linear:
    module.align_projector = nn.Linear(WIDTH, HIDDEN, bias=insert.bias is not None)
    return _copy(module, insert)


REPLACE: dict[str, Callable[[ImageInsertEmbedding, InsertCase], nn.Linear]] = {
    "parameters that are set": _set,
    "values that are copied": _copy,
    "load_state_dict": _load,
    "load_state_dict, assigned": lambda m, insert: _load(m, insert, assign=True),
    "to_empty": _empty_and_load,
    "another projector": _another,
}


class LowRank(nn.Module):
    """As PEFT's LoRA before its first step: what it adds is zero."""

    def __init__(self, base_layer: nn.Linear, calls: Calls) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Linear(WIDTH, 2, bias=False)
        self.up = nn.Linear(2, HIDDEN, bias=False)
        nn.init.zeros_(self.up.weight)
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(None)
        rows: Tensor = self.base_layer(x) + self.up(self.down(x))
        return rows


def _derived(projector: nn.Linear, calls: Calls) -> nn.Module:
    class Derived(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(None)
            return super().forward(x)

    projector.__class__ = Derived
    return projector


def _with_hook(projector: nn.Linear, calls: Calls, register: str) -> nn.Module:
    getattr(projector, register)(lambda *_: calls.append(None))
    return projector


def _with_own_forward(projector: nn.Linear, calls: Calls) -> nn.Module:
    old = projector.forward

    def forward(x: Tensor) -> Tensor:
        calls.append(None)
        return old(x)

    projector.forward = forward  # type: ignore[method-assign]
    return projector


def _in_a_sequence(projector: nn.Linear, calls: Calls) -> nn.Module:
    return nn.Sequential(_with_own_forward(projector, calls))


WRAP: dict[str, Callable[[nn.Linear, Calls], nn.Module]] = {
    "nothing": lambda projector, _: projector,
    "a forward hook": lambda p, calls: _with_hook(p, calls, "register_forward_hook"),
    "a forward pre-hook": lambda p, calls: _with_hook(p, calls, "register_forward_pre_hook"),
    "a backward hook": lambda p, calls: _with_hook(p, calls, "register_full_backward_hook"),
    "a derived class": _derived,
    "a low-rank adapter": LowRank,
    "a sequence": _in_a_sequence,
    "a forward of the instance": _with_own_forward,
}


def _assert_gradients_of_table(insert: InsertCase, output: Tensor, table: Tensor) -> None:
    """Of everything that is trained where words come out of a table."""
    wanted = expected(insert)
    leaves = [table, insert.weight, *insert.features]
    bounds = [(wanted.grad_weight, wanted.grad_weight_bound)]
    bounds += zip(wanted.grad_features, wanted.grad_features_bound, strict=True)
    if insert.bias is not None:
        leaves.append(insert.bias)
        bounds.append((wanted.grad_bias, wanted.grad_bias_bound))
    of_table, *rest = torch.autograd.grad(
        output,
        leaves,
        insert.grad_output,
        allow_unused=True,
        materialize_grads=True,
    )
    for number, (gradient, (exact, bound)) in enumerate(zip(rest, bounds, strict=True)):
        assert_within(f"gradient {number}", gradient, exact, bound)
    rows = wanted.grad_embeddings.flatten(0, 1)
    summed = rows.new_zeros(table.shape).index_add_(0, insert.input_ids.t().flatten().long(), rows)
    torch.testing.assert_close(of_table.double(), summed, rtol=1e-5, atol=1e-4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part(SequenceLayout):
    """The layout of a rank that looks up some positions, without other ranks."""

    positions: Tensor

    def positions_looked_up(self, seq_len: int, device: torch.device) -> Tensor:
        del seq_len, device
        return self.positions


def _by_property(module: ImageInsertEmbedding, layout: Any) -> None:
    module.layout = layout


def _by_configure(module: ImageInsertEmbedding, layout: Any) -> None:
    module.configure(impl=module.impl, lookup=module.lookup, layout=layout)


def _by_options(module: ImageInsertEmbedding, layout: Any) -> None:
    module.options = dataclasses.replace(module.options, layout=layout)


SET_LAYOUT = [_by_property, _by_configure, _by_options]


def _check_layouts(
    rng: np.random.Generator,
    module: ImageInsertEmbedding,
    arguments: tuple[Any, ...],
    leaves: list[Tensor],
) -> None:
    """Each layout, however it is set, gives the rows of the whole at its positions."""
    whole = module(*arguments)
    seq_len = len(whole)
    for _ in range(int(rng.integers(0, 4))):
        held = torch.tensor(rng.permutation(seq_len)[: int(rng.integers(1, seq_len + 1))])
        layouts = [None, "auto", SequenceLayout(), Part(positions=held)]
        layout = layouts[int(rng.integers(len(layouts)))]
        positions = held if isinstance(layout, Part) else torch.arange(seq_len)
        given = layout
        if layout != "auto" and rng.random() < 0.3:

            def given(_: object, layout: Any = layout) -> Any:
                return layout

        SET_LAYOUT[int(rng.integers(len(SET_LAYOUT)))](module, given)
        if rng.random() < 0.2:
            assert repr(copy.copy(module)) == repr(module)
        output = module(*arguments)
        torch.testing.assert_close(output, whole[positions])
        gradient = torch.randn_like(output)
        ours, wanted = (
            torch.autograd.grad(
                rows,
                leaves,
                gradient,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            for rows in (output, whole[positions])
        )
        for one, other in zip(ours, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


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
