"""``lookup=``: whose table stands for calling the language embedding, and what that changes."""

from __future__ import annotations

import copy
import functools
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from step37_kernels import (
    ImageForInsert,
    ImageInsertEmbedding,
    embed_project_and_insert,
    plan_insert,
)
from step37_kernels import lookup as lookup_module
from step37_kernels.count_watch import count_watch
from step37_kernels.integration.options import InsertOptions
from step37_kernels.integration.table import PlainTable, plain_table
from step37_kernels.plan import plan_runs

HIDDEN, WIDTH, VOCABULARY, IM_START = 16, 24, 32, 7
IMPLS = ["triton", "torch"]


def make(
    device: str, words: nn.Module | None = None, **options: Any
) -> tuple[ImageInsertEmbedding, Any]:
    torch.manual_seed(0)
    words = (words or nn.Embedding(VOCABULARY, HIDDEN)).to(device)
    return ImageInsertEmbedding(words, WIDTH, HIDDEN, **options).to(device), words


def batch(device: str) -> tuple[Tensor, list[ImageForInsert]]:
    ids = torch.arange(40, device=device).view(2, 20) % 6
    ids[:, 4] = IM_START
    features = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1)).to(device)
    return ids, [ImageForInsert(insert_start_token=IM_START, image_features=features)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("text_only", [False, True])
def test_looking_up_in_the_insertion_changes_no_bit_and_no_gradient(device, impl, text_only):
    ids, images = batch(device)
    results = []
    for lookup in ("auto", "call"):
        module, words = make(device, impl=impl, lookup=lookup)
        output = module(ids, [] if text_only else images)
        output.square().sum().backward()
        gradients = [p.grad for p in (words.weight, module.align_projector.weight)]
        results.append([output, *gradients])
    for fused, called in zip(*results, strict=True):
        if called is None:
            assert fused is None
        else:
            torch.testing.assert_close(fused, called)
    assert torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("impl", IMPLS)
def test_the_embedding_is_not_called(device, impl, monkeypatch):
    module, _ = make(device, impl=impl)
    called: list[int] = []
    monkeypatch.setattr(
        "step37_kernels.image_insert_embedding.call_embedding", lambda *_: called.append(1)
    )
    ids, images = batch(device)
    assert module(ids, images).shape == module(ids).shape == (20, 2, HIDDEN)
    assert not called


class Words(nn.Embedding):
    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        del position_ids
        return 2 * super().forward(input_ids).transpose(0, 1)


def hooked() -> nn.Module:
    words = nn.Embedding(VOCABULARY, HIDDEN)
    words.register_forward_hook(lambda _, __, rows: 2 * rows)
    return words


def with_its_own_forward() -> nn.Module:
    words = nn.Embedding(VOCABULARY, HIDDEN)
    words.forward = lambda ids: 2 * nn.Embedding.forward(words, ids)  # type: ignore[method-assign]
    return words


CALLED = {
    "a class of its own": (Words(VOCABULARY, HIDDEN), "Words is not known to be nothing but"),
    "a largest norm": (nn.Embedding(VOCABULARY, HIDDEN, max_norm=0.5), "max_norm"),
    "a padding row": (nn.Embedding(VOCABULARY, HIDDEN, padding_idx=0), "padding_idx"),
    "a sparse gradient": (nn.Embedding(VOCABULARY, HIDDEN, sparse=True), "sparse"),
    "a scaled gradient": (
        nn.Embedding(VOCABULARY, HIDDEN, scale_grad_by_freq=True),
        "scaled by frequency",
    ),
    "a hook": (hooked(), "has hooks"),
    "a forward of its own": (with_its_own_forward(), "forward of its own"),
}


@pytest.mark.parametrize("words", CALLED)
def test_what_is_more_than_a_lookup_is_called_and_the_log_says_once_why(words, caplog):
    embedding, reason = CALLED[words]
    assert reason in str(plain_table(embedding))
    module, _ = make("cpu", embedding)
    ids, images = batch("cpu")
    # Of a copy: max_norm scales the rows of the table itself, and rounds, at every call.
    text = copy.deepcopy(embedding)(ids)
    if isinstance(embedding, Words):
        text = text.transpose(0, 1)
    with caplog.at_level(logging.INFO, logger="step37_kernels"):
        output = module(ids, images)
        module(ids, images)
    (record,) = [r for r in caplog.records if "ImageInsertEmbedding: words: called" in r.message]
    assert reason in record.message
    assert torch.equal(output[:4], text.transpose(0, 1)[:4])


def test_lookup_call_calls_and_the_log_says_that_the_option_does_it(caplog):
    module, words = make("cpu", lookup="call")
    called: list[int] = []
    words.register_forward_hook(lambda *_: called.append(1))
    ids, images = batch("cpu")
    with caplog.at_level(logging.INFO, logger="step37_kernels"):
        module(ids, images)
    assert called == [1]
    (record,) = caplog.records
    assert "words: called (lookup='call')" in record.message


def test_another_word_for_lookup_is_refused():
    with pytest.raises(ValueError, match="lookup: expected 'auto' or 'call', got 'fused'"):
        InsertOptions(lookup="fused")  # type: ignore[arg-type]


def test_a_frozen_table_gets_no_gradient_and_a_frozen_module_no_graph(device):
    module, words = make(device, impl="triton")
    words.weight.requires_grad_(False)
    ids, images = batch(device)
    output = module(ids, images)
    output.sum().backward()
    assert words.weight.grad is None
    assert module.align_projector.weight.grad is not None
    module.align_projector.requires_grad_(False)
    assert not module(ids, images).requires_grad
    assert not module(ids).requires_grad


def test_a_table_of_another_width_is_refused(device):
    module, _ = make(device, nn.Embedding(VOCABULARY, HIDDEN + 8))
    ids, images = batch(device)
    with pytest.raises(ValueError, match=r"table: expected \[V, H\] = \[V, 16\], got \(32, 24\)"):
        module(ids, images)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("text_only", [False, True])
def test_an_unknown_id_at_a_text_position_is_an_error_on_the_cpu(device, impl, text_only):
    if device == "cuda":
        pytest.skip("on CUDA nothing waits for the ids")
    module, _ = make(device, impl=impl)
    ids, images = batch(device)
    ids[1, 2] = VOCABULARY
    with pytest.raises(
        IndexError, match=r"expected 0 to 31 at text positions.* got 32 at \(1, 2\) of \(2, 20\)"
    ):
        module(ids, [] if text_only else images)
    ids[1, 2], ids[1, 5] = 0, -8  # under a feature row
    module(ids, images)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_plan_counts_unknown_ids_at_text_positions(device, impl, caplog):
    ids, _ = batch(device)
    ids[0, 0], ids[1, 2], ids[1, 5] = VOCABULARY, -1, -8
    runs = ((IM_START, ((2, 3),)),)
    plan = plan_runs(ids, runs, vocabulary=VOCABULARY, impl=impl)
    assert plan.counts.tolist() == [2, 2]
    with pytest.raises(ValueError, match="2 ids at text positions are outside the table of 32"):
        plan.check()
    assert plan_runs(ids, runs, impl=impl).counts.tolist() == [2, 0]
    assert plan_runs(ids, (), vocabulary=VOCABULARY, impl=impl).counts.tolist() == [3]
    assert plan_insert(ids, [(IM_START, [3, 3])], impl=impl).unknown_ids.tolist() == [0]
    plan_runs(ids, runs, vocabulary=VOCABULARY, impl=impl, watch=True)
    count_watch.poll()
    if device == "cpu":
        assert "2 ids at text positions are outside the table of 32 rows" in caplog.text


def test_the_state_dict_has_the_projector_alone():
    module, _ = make("cpu")
    assert list(module.state_dict()) == ["align_projector.weight"]
    assert isinstance(plain_table(module._language_embedding), PlainTable)


def test_a_forward_that_was_replaced_in_the_class_is_called(device, monkeypatch):
    stock = nn.Embedding.forward
    ids, _ = batch(device)
    module, words = make(device)
    plain = module(ids)

    def doubled(module: nn.Embedding, ids: Tensor) -> Tensor:
        return 2 * stock(module, ids)

    for replacement in (doubled, functools.wraps(stock)(doubled)):
        monkeypatch.setattr(nn.Embedding, "forward", replacement)
        assert plain_table(words) == "the forward of Embedding was replaced"
        assert torch.equal(module(ids), 2 * plain)


def test_hooks_for_all_modules_see_the_embedding_called(device):
    from torch.nn.modules.module import register_module_forward_hook

    module, words = make(device)
    ids, images = batch(device)
    plain = module(ids, images)
    handle = register_module_forward_hook(
        lambda called, _, rows: 2 * rows if called is words else None
    )
    try:
        assert plain_table(words) == "there are hooks for the calls of all modules"
        assert torch.equal(module(ids, images)[:4], 2 * plain[:4])
    finally:
        handle.remove()
    assert torch.equal(module(ids, images), plain)


@pytest.mark.parametrize("text_only", [False, True])
def test_unknown_ids_that_the_plan_has_looked_for_are_not_looked_for_again(
    device, text_only, monkeypatch
):
    looked: list[int] = []

    def is_outside(ids: Tensor, num_rows: int) -> Tensor:
        looked.append(num_rows)
        return stock(ids, num_rows)

    stock = lookup_module.is_outside
    monkeypatch.setattr(lookup_module, "is_outside", is_outside)
    module, _ = make(device, impl="triton")
    ids, images = batch(device)
    module(ids, [] if text_only else images)
    assert not looked
    if device == "cpu":
        ids[1, 2] = VOCABULARY
        with pytest.raises(IndexError, match=r"got 32 at \(1, 2\)"):
            module(ids, images)
        assert looked


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_place_of_the_first_unknown_id_is_that_in_the_callers_ids(batch_first):
    ids, _ = batch("cpu")
    ids[1, 2] = -3
    ids[1, 3] = VOCABULARY
    plan = plan_insert(ids, [(IM_START, [3, 3])], batch_first=batch_first, impl="torch")
    with pytest.raises(IndexError, match=r"got -3 at \(1, 2\) of \(2, 20\), and 1 more"):
        embed_project_and_insert(
            ids,
            torch.randn(VOCABULARY, HIDDEN),
            torch.randn(2, 3, WIDTH),
            torch.randn(HIDDEN, WIDTH),
            None,
            plan,
            impl="torch",
        )


def test_megatrons_own_marks_for_nvtx_are_no_reason_to_call_and_anybody_elses_wrapper_is(
    device, monkeypatch
):
    stock = nn.Embedding.forward
    # As megatron-core 0.19 decorates the forward of LanguageModelEmbedding.
    utils: dict[str, Any] = {"__name__": "megatron.core.utils", "functools": functools}
    exec(
        "def nvtx_decorator(function):\n"
        "    @functools.wraps(function)\n"
        "    def wrapper(*args, **kwargs):\n"
        "        return function(*args, **kwargs)\n"
        "    return wrapper\n",
        utils,
    )
    mark = utils["nvtx_decorator"]

    @functools.wraps(stock)
    def doubled(module: nn.Embedding, ids: Tensor) -> Tensor:
        return 2 * stock(module, ids)

    @functools.wraps(stock)
    def around_the_mark(module: nn.Embedding, ids: Tensor) -> Tensor:
        rows: Tensor = 2 * mark(stock)(module, ids)
        return rows

    module, words = make(device)
    ids, images = batch(device)
    monkeypatch.setattr(nn.Embedding, "forward", mark(stock))
    assert isinstance(plain_table(words), PlainTable)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids, images), module(ids, images))
    for replacement in (mark(doubled), around_the_mark, mark(mark(stock))):
        monkeypatch.setattr(nn.Embedding, "forward", replacement)
        assert plain_table(words) == "the forward of Embedding was replaced"


@pytest.mark.parametrize("option", [True, False, "auto"])
@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize("present", [True, False])
def test_a_gradient_is_fused_where_option_configuration_and_main_grad_say_so(
    option, configured, present
):
    weight = torch.zeros(2, 2)
    if present:
        weight.main_grad = torch.zeros(2, 2)  # type: ignore[attr-defined]
    config = SimpleNamespace(gradient_accumulation_fusion=configured)
    options = InsertOptions(gradient_accumulation_fusion=option)
    fused = options.why_not_fused(weight, config) is None
    assert fused == (configured and present if option == "auto" else option)
