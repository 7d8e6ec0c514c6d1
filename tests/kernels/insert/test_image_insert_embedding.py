"""The drop-in module: same values as the reference, same contract as the class it replaces."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import pickle
import threading
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from step37_kernels import (
    ImageForInsert,
    ImageInsertEmbedding,
    plan_insert,
    reference,
)
from step37_kernels.count_watch import CountWatch, count_watch
from step37_kernels.integration.options import InsertKeywords, InsertOptions
from step37_kernels.integration.parallel import SequenceLayout
from step37_kernels.runs import FlatRuns
from step37_kernels.testing import make_insert_case
from tests.kernels.checks import assert_gradients, assert_output
from tests.kernels.strategies import TOKENS, feature_groups, token_ids

IM_START, PATCH_START = TOKENS[0], TOKENS[1]


class WordEmbedding(nn.Module):
    """``[B, S]`` ids → ``[S, B, H]``, as megatron-core's; that one is used in tests/megatron."""

    def __init__(self, hidden: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.table = nn.Embedding(97, hidden, dtype=dtype)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        del position_ids
        embedded: Tensor = self.table(input_ids % 97)
        return embedded.transpose(0, 1).contiguous()


def make_module(device: str, hidden: int = 16, width: int = 24, **options: object):
    torch.manual_seed(0)
    words = WordEmbedding(hidden)
    return ImageInsertEmbedding(words, width, hidden, **options).to(device), words.to(device)


def images_of(groups: list[tuple[int, list[Tensor]]]) -> list[ImageForInsert]:
    return [
        ImageForInsert(insert_start_token=token, image_features=features)
        for token, features in groups
    ]


@pytest.mark.parametrize("text_only", [False, True])
def test_pytorch_looks_up_and_projects_a_dtype_that_no_kernel_takes(device, text_only):
    table = nn.Embedding(9, 16, dtype=torch.float64, device=device)
    module = ImageInsertEmbedding(table, 24, 16, impl="torch").to(device, torch.float64)
    ids = torch.tensor([[1, 7, 2, 3, 8]], device=device)
    features = torch.randn(1, 2, 24, dtype=torch.float64, device=device)
    output = module(ids, [] if text_only else images_of([(7, [features])]))
    wanted = table(ids.T)
    if not text_only:
        wanted[2:4, 0] = module.align_projector(features[0])
    torch.testing.assert_close(output, wanted)


@settings(max_examples=2 * settings.default.max_examples)
@given(
    input_ids=token_ids(max_batch=2, max_seq=24),
    groups=feature_groups(),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_triton_and_torch_and_the_reference_agree(device, input_ids, groups, bias, seed):
    case = make_insert_case(
        input_ids,
        groups,
        hidden=16,
        width=24,
        seed=seed,
        dtype=torch.float32,
        bias=bias,
        device=device,
    )
    for impl in ("triton", "torch"):
        module = ImageInsertEmbedding(
            lambda **_: case.embeddings * 1, 24, 16, projector_bias=bias, impl=impl
        )
        module.align_projector.weight = nn.Parameter(case.weight.detach())
        if case.bias is not None:
            module.align_projector.bias = nn.Parameter(case.bias.detach())
        own = dataclasses.replace(
            case, weight=module.align_projector.weight, bias=module.align_projector.bias
        )
        output = module(case.input_ids, images_of(case.groups))
        assert_output(own, output)
        assert_gradients(own, output, case.grad_output)


def test_the_state_dict_holds_the_projector_and_nothing_else(device):
    module, words = make_module(device)
    assert list(module.state_dict()) == ["align_projector.weight"]
    assert [name for name, _ in module.named_parameters()] == ["align_projector.weight"]
    assert module._language_embedding is words
    assert list(module.children()) == [module.align_projector]
    with_bias, _ = make_module(device, projector_bias=True)
    assert list(with_bias.state_dict()) == ["align_projector.weight", "align_projector.bias"]


def test_the_projector_starts_kaiming_normal_with_zero_bias(device):
    module, _ = make_module(device, hidden=256, width=512, projector_bias=True)
    weight = module.align_projector.weight
    assert weight.shape == (256, 512)
    assert weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.02)
    assert module.align_projector.bias.abs().max() == 0


@pytest.mark.parametrize("images", [None, []])
def test_without_images_the_word_embeddings_come_back(device, images):
    module, words = make_module(device)
    ids = torch.tensor([[1, 2, 3]], device=device)
    assert torch.equal(module(ids, images), words(input_ids=ids))
    assert torch.equal(module(input_ids=ids, images=images), words(input_ids=ids))


def test_position_ids_reach_the_embedding_and_other_keywords_are_ignored(device):
    seen: dict[str, object] = {}

    def words(**arguments: object) -> Tensor:
        seen.update(arguments)
        return torch.zeros(3, 1, 16, device=device)

    module = ImageInsertEmbedding(words, 24, 16).to(device)
    ids, positions = torch.zeros(1, 3, dtype=torch.long), torch.arange(3)[None]
    module(ids, position_ids=positions, attention_mask=None, labels=ids)
    assert seen == {"input_ids": ids, "position_ids": positions}


def test_features_are_required(device):
    module, _ = make_module(device)
    ids = torch.tensor([[IM_START, 2, 3]], device=device)
    with pytest.raises(ValueError, match=r"images\[0\]: image_features is None \(start token 128"):
        module(ids, [ImageForInsert(insert_start_token=IM_START)])


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(2, 24), r"images\[0\].image_features: expected \[N, L, C\], got \(2, 24\)"),
        ([torch.zeros(24)], r"image_features\[0\]: expected \[L, C\] or \[N, L, C\], got \(24,\)"),
        ([torch.zeros(1, 1, 2, 24)], r"image_features\[0\]: expected .*, got \(1, 1, 2, 24\)"),
        (
            torch.zeros(1, 2, 23),
            r"images\[0\].image_features: expected C = 24 \(the projector's\), got \(1, 2, 23\)",
        ),
        (torch.zeros(1, 2, 0), r"image_features: expected C = 24 .*, got \(1, 2, 0\)"),
    ],
)
def test_features_of_a_wrong_shape_are_refused(device, features, message):
    module, _ = make_module(device)
    ids = torch.tensor([[IM_START, 2, 3]], device=device)
    with pytest.raises(ValueError, match=message):
        module(ids, images_of([(IM_START, features)]))


def test_an_embedding_of_another_width_is_refused(device):
    module = ImageInsertEmbedding(WordEmbedding(12), 24, 16).to(device)
    module._language_embedding.to(device)
    ids = torch.tensor([[IM_START, 2, 3]], device=device)
    with pytest.raises(ValueError, match=r"result: expected \[S, B, H\] = \[3, 1, 16\], got"):
        module(ids, images_of([(IM_START, torch.zeros(1, 2, 24))]))


@pytest.mark.parametrize("empty", [(0, 169, 24), (0, 0, 0), (3, 0, 24)])
def test_an_empty_group_inserts_nothing_and_the_next_one_still_does(device, empty):
    module, words = make_module(device)
    ids = torch.tensor([[1, IM_START, 3, 4]], device=device)
    features = torch.randn(1, 2, 24, device=device)
    alone = module(ids, images_of([(IM_START, features)]))
    after = module(
        ids, images_of([(PATCH_START, torch.zeros(empty, device=device)), (IM_START, features)])
    )
    assert torch.equal(alone, after)
    only = module(ids, images_of([(PATCH_START, torch.zeros(empty, device=device))]))
    assert torch.equal(only, words(input_ids=ids))


def test_features_are_moved_to_the_weights_dtype(device):
    module, _ = make_module(device)
    module.to(torch.float16)
    ids = torch.tensor([[IM_START, 2, 3]], device=device)
    features = torch.randn(1, 2, 24)
    output = module(ids, images_of([(IM_START, features)]))
    assert torch.equal(output, module(ids, images_of([(IM_START, features.half().to(device))])))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@pytest.mark.parametrize(
    ("count", "text"), [(1, "2 in input_ids, 1 features"), (3, "2 in input_ids, 3 features")]
)
def test_a_count_mismatch_is_warned_about_with_both_counts(device, count, text, caplog):
    module, _ = make_module(device)
    ids = torch.tensor([[IM_START, 2, IM_START, 3]], device=device)
    fused = module(ids, images_of([(IM_START, torch.randn(count, 1, 24, device=device))]))
    if device == "cuda":
        torch.cuda.synchronize()
        assert not warnings_of(caplog)
        module(ids, None)
    (warning,) = warnings_of(caplog)
    assert text in warning
    assert "start token 128000" in warning
    assert fused.shape == (4, 1, 16)


@pytest.mark.parametrize(("ids", "level"), [([5, 5, 5], "ERROR"), ([5, 7, 5], "WARNING")])
def test_no_start_token_at_all_is_an_error_that_asks_for_the_tokenizers_id(ids, level, caplog):
    module = ImageInsertEmbedding(lambda **_: torch.zeros(3, 1, 4), 6, 4, impl="torch")
    images = [ImageForInsert(insert_start_token=7, image_features=torch.ones(2, 1, 6))]
    module(torch.tensor([ids]), images)
    (record,) = caplog.records
    assert record.levelname == level
    assert f"start token 7: {ids.count(7)} in input_ids, 2 features" in record.getMessage()
    for hint in ("is 7 the tokenizer's <im_start>?", "strict=True raises an error at once"):
        assert (hint in record.getMessage()) == (level == "ERROR")


def test_matching_counts_are_not_warned_about(device, caplog):
    module, _ = make_module(device)
    ids = torch.tensor([[IM_START, 2, IM_START, 3]], device=device)
    for _ in range(2):
        module(ids, images_of([(IM_START, torch.randn(2, 1, 24, device=device))]))
    assert not warnings_of(caplog)


@pytest.mark.parametrize(
    ("ids", "shape", "message"),
    [
        ([IM_START, 2, 3], (2, 1, 24), "1 in input_ids, 2 features"),
        ([1, IM_START, 3], (1, 2, 24), "cut off at the sequence length 3"),
        ([IM_START, IM_START, 3, 4], (2, 2, 24), "overlaps feature 0"),
    ],
)
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_strict_raises_at_once(device, impl, ids, shape, message):
    module, _ = make_module(device, impl=impl, strict=True)
    features = torch.randn(shape, device=device)
    with pytest.raises(ValueError, match=message):
        module(torch.tensor([ids], device=device), images_of([(IM_START, features)]))


def test_strict_lets_a_right_batch_pass(device):
    strict, _ = make_module(device, strict=True)
    lenient, _ = make_module(device)
    ids = torch.tensor([[IM_START, 2, 3, IM_START, 5, 6]], device=device)
    images = images_of([(IM_START, torch.randn(2, 2, 24, device=device))])
    assert torch.equal(strict(ids, images), lenient(ids, images))


def test_an_unknown_implementation_is_refused_when_built():
    with pytest.raises(ValueError, match=r"impl: expected one of auto, triton, torch, got 'fast'"):
        ImageInsertEmbedding(WordEmbedding(16), 24, 16, impl="fast")


def test_the_repr_names_the_options_that_are_set():
    words = WordEmbedding(16)
    module = ImageInsertEmbedding(words, 24, 16)
    assert module.extra_repr() == ""
    layout = SequenceLayout(cu_seqlens=torch.tensor([0, 8]))
    module.configure(strict=True, gradient_accumulation_fusion=True, layout=layout)
    assert module.extra_repr() == (
        "strict=True, layout=SequenceLayout(cu_seqlens), gradient_accumulation_fusion=True"
    )
    module.configure(layout=None)
    assert module.extra_repr() == "layout=None"


def test_an_option_set_on_a_built_module_holds_and_is_checked():
    module = ImageInsertEmbedding(WordEmbedding(16), 24, 16)
    module.strict = True
    assert module.options.strict
    module.layout = SequenceLayout(sequence_parallel_group=object())  # type: ignore[arg-type]
    assert module.align_projector.weight.sequence_parallel
    assert module.strict
    with pytest.raises(ValueError, match="impl: expected one of"):
        module.impl = "fast"
    with pytest.raises(ValueError, match="text_only_gradient: expected True, False or 'auto'"):
        module.text_only_gradient = None


def test_an_option_that_does_not_exist_is_a_type_error():
    with pytest.raises(TypeError, match="strikt"):
        ImageInsertEmbedding(WordEmbedding(16), 24, 16, strikt=True)


def test_the_keywords_of_the_options_are_their_fields():
    assert InsertKeywords.__annotations__.keys() == InsertOptions.__annotations__.keys()
    for name, annotation in InsertOptions.__annotations__.items():
        assert annotation in str(InsertKeywords.__annotations__[name])
        assert isinstance(getattr(ImageInsertEmbedding, name), property)


def plain_module(device: str) -> tuple[ImageInsertEmbedding, Tensor, list[ImageForInsert]]:
    """A module that reads table and weight itself, and what to call it with."""
    torch.manual_seed(0)
    module = ImageInsertEmbedding(nn.Embedding(97, 16), 24, 16, projector_bias=True, layout=None)
    module._language_embedding.to(device)
    ids = torch.tensor([[7, 2, 3]], device=device)
    features = torch.randn(1, 2, 24, device=device)
    return module.to(device), ids, images_of([(7, [features])])


def test_a_forward_reads_each_parameter_and_the_configuration_once(device, monkeypatch):
    # PyTorch looks them up in Python, half a microsecond each; twice as long for what is not there.
    module, ids, images = plain_module(device)
    module(ids, images)  # the first forward also says in the log which way it takes
    reads: Counter[tuple[nn.Module, str]] = Counter()
    stock = nn.Module.__getattr__

    def counted(owner: nn.Module, name: str) -> object:
        reads[owner, name] += 1
        return stock(owner, name)

    monkeypatch.setattr(nn.Module, "__getattr__", counted)
    module(ids, images)
    projector, words = module.align_projector, module._language_embedding
    wanted = [(words, "config"), (words, "weight"), (projector, "weight"), (projector, "bias")]
    assert [reads[each] for each in wanted] == [1, 1, 1, 1]


def test_a_weight_that_a_hook_of_megatron_puts_in_place_is_the_one_that_is_used(device):
    module, ids, images = plain_module(device)
    projector = module.align_projector
    before, other = projector.weight, nn.Parameter(torch.randn(16, 24, device=device))

    def gather(hooked: nn.Module, _: object) -> None:
        hooked.weight = other

    gather.__module__ = "megatron.core.distributed"
    projector.register_forward_pre_hook(gather)
    output = module(ids, images)
    output.sum().backward()
    assert isinstance(images[0].image_features, list)
    rows = F.linear(images[0].image_features[0][0], other, projector.bias)
    torch.testing.assert_close(output[1:, 0], rows)
    assert other.grad is not None
    assert before.grad is None


def test_modules_copy_and_pickle(device):
    module, _ = make_module(device)
    ids = torch.tensor([[IM_START, 2, 3]], device=device)
    images = images_of([(IM_START, torch.randn(2, 2, 24, device=device))])
    wanted = module(ids, images)
    assert torch.equal(copy.deepcopy(module)(ids, images), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(module))(ids, images), wanted)


class TestInsertFeatures:
    """The static method: features that are projected already."""

    def test_is_the_references_loop(self, device):
        generator = torch.Generator().manual_seed(1)
        ids = torch.tensor([[IM_START, 2, IM_START, 4, 5], [1, 2, 3, 4, IM_START]])
        embeddings = torch.randn(5, 2, 8, generator=generator)
        features = [torch.randn(2, 8, generator=generator), torch.randn(2, 3, 8)]
        wanted = reference.insert_features(embeddings, features, ids, IM_START)
        moved = embeddings.to(device)
        fused = ImageInsertEmbedding.insert_features(moved, features, ids.to(device), IM_START)
        assert torch.equal(fused.cpu(), wanted)
        assert torch.equal(moved.cpu(), embeddings)

    def test_casts_to_the_embeddings_dtype(self, device):
        ids = torch.tensor([[IM_START, 2]], device=device)
        features = torch.tensor([[[1 / 3]]])
        fused = ImageInsertEmbedding.insert_features(
            torch.zeros(2, 1, 1, dtype=torch.bfloat16, device=device), features, ids, IM_START
        )
        assert fused.flatten().tolist() == [0, features.bfloat16().item()]

    def test_returns_the_embeddings_where_there_is_nothing_to_insert(self, device):
        ids = torch.tensor([[IM_START, 2]], device=device)
        embeddings = torch.zeros(2, 1, 4, device=device)
        empty = torch.zeros(0, 169, 4, device=device)
        result = ImageInsertEmbedding.insert_features(embeddings, empty, ids, IM_START)
        assert result is embeddings

    def test_names_a_wrong_width(self, device):
        ids = torch.tensor([[IM_START, 2]], device=device)
        embeddings = torch.zeros(2, 1, 4, device=device)
        with pytest.raises(ValueError, match=r"image_features: expected C = 4 .*\(1, 1, 5\)"):
            ImageInsertEmbedding.insert_features(embeddings, torch.zeros(1, 1, 5), ids, IM_START)
        with pytest.raises(ValueError, match=r"image_features: expected C = 4 .*\(1, 1, 0\)"):
            ImageInsertEmbedding.insert_features(embeddings, torch.zeros(1, 1, 0), ids, IM_START)


class Arrived:
    """Stands for the event of a copy that has arrived; events need a GPU."""

    def __init__(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.meanwhile = meanwhile

    def query(self) -> bool:
        self.meanwhile()
        return True


class TestCountsThatArriveLater:
    @staticmethod
    def pending(event: Arrived) -> tuple[FlatRuns, Tensor, int, Arrived]:
        plan = plan_insert(torch.tensor([[IM_START, 2, 3]]), [(IM_START, [1, 1])])
        return FlatRuns.of(plan.runs), plan.counts, 0, event

    @pytest.fixture
    def watch(self, monkeypatch) -> CountWatch:
        # As on CUDA, but for the question that only CUDA can answer.
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        return count_watch

    def test_insert_features_warns_of_them_and_keeps_no_more_of_them(self, watch, caplog):
        watch._pending.append(self.pending(Arrived()))
        ids = torch.tensor([[IM_START, 2, 3]])
        ImageInsertEmbedding.insert_features(
            torch.zeros(3, 1, 4), torch.ones(1, 1, 4), ids, IM_START
        )
        assert not watch._pending
        assert "1 in input_ids, 2 features" in caplog.text

    def test_each_is_warned_about_once_when_two_threads_ask(self, watch, caplog):
        others: list[threading.Thread] = []

        def another_thread_asks() -> None:
            if not others:
                others.append(threading.Thread(target=watch.poll))
                others[0].start()
                others[0].join(timeout=0.2)

        watch._pending.append(self.pending(Arrived(another_thread_asks)))
        watch.poll()
        others[0].join()
        assert len(caplog.records) == 1


class TestOwnership:
    """The embedding's memory is never written into."""

    images = staticmethod(
        lambda device: images_of([(IM_START, torch.ones(1, 2, 24, device=device))])
    )

    def fuse(self, device: str, words: object) -> Tensor:
        module = ImageInsertEmbedding(words, 24, 16, impl="triton").to(device)
        ids = torch.tensor([[IM_START, 2, 3]], device=device)
        return module(ids, self.images(device))

    @pytest.mark.parametrize("requires_grad", [True, False])
    def test_a_parameter_is_copied(self, device, requires_grad):
        parameter = nn.Parameter(torch.zeros(3, 1, 16, device=device), requires_grad=requires_grad)
        fused = self.fuse(device, lambda **_: parameter)
        assert parameter.abs().max() == 0
        assert fused[1:].abs().max() > 0

    def test_a_cached_tensor_is_copied(self, device):
        cache = {"embeddings": torch.zeros(3, 1, 16, device=device)}
        self.fuse(device, lambda **_: cache["embeddings"])
        assert cache["embeddings"].abs().max() == 0

    @pytest.mark.parametrize(
        "view", [lambda t: t[:], lambda t: t.view(3, 1, 16), lambda t: t.detach(), lambda t: t.T.T]
    )
    @pytest.mark.filterwarnings("ignore:The use of `x.T`")
    def test_a_view_of_a_cached_tensor_is_copied(self, device, view):
        cached = torch.zeros(3, 1, 16, device=device)
        self.fuse(device, lambda **_: view(cached))
        assert cached.abs().max() == 0

    def test_a_view_of_a_view_of_a_cached_tensor_is_copied(self, device):
        cached = torch.zeros(6, 1, 16, device=device)
        self.fuse(device, lambda **_: cached[1:5][1:4])
        assert cached.abs().max() == 0

    def test_a_fresh_result_is_copied_and_its_gradient_passes(self, device):
        table = torch.zeros(97, 16, device=device, requires_grad=True)
        looked_up: list[Tensor] = []

        def words(input_ids: Tensor, **_: Tensor) -> Tensor:
            looked_up.append(nn.functional.embedding(input_ids % 97, table).transpose(0, 1))
            return looked_up[0]

        fused = self.fuse(device, words)
        assert fused.data_ptr() != looked_up[0].data_ptr()
        assert not fused._is_view()
        assert looked_up[0].abs().max() == 0
        fused.sum().backward()
        assert table.grad.sum() == 16

    def test_memory_whose_storage_somebody_keeps_is_copied(self, device):
        kept: list[torch.UntypedStorage] = []

        def words(**_: Tensor) -> Tensor:
            fresh = torch.zeros(3, 1, 16, device=device)
            kept.append(fresh.untyped_storage())
            return fresh

        assert self.fuse(device, words).abs().max() > 0
        assert not any(kept[0].tolist())

    def test_an_expanded_tensor_is_copied(self, device):
        fused = self.fuse(device, lambda **_: torch.zeros(1, 1, 16, device=device).expand(3, 1, 16))
        assert fused.is_contiguous()
        assert fused[0].abs().max() == 0
        assert fused[1:].abs().max() > 0

    def test_what_a_hook_keeps_is_copied(self, device):
        words = WordEmbedding(16).to(device)
        kept: list[Tensor] = []
        words.register_forward_hook(lambda _module, _arguments, output: kept.append(output))
        fused = self.fuse(device, words)
        assert not torch.equal(kept[0], fused)
        assert torch.equal(
            kept[0], words.table(torch.tensor([[IM_START, 2, 3]]).to(device) % 97)[0][:, None]
        )

    def test_a_result_that_autograd_saved_is_copied(self, device):
        leaf = torch.randn(3, 1, 16, device=device, requires_grad=True)
        module = ImageInsertEmbedding(lambda **_: leaf.sigmoid(), 24, 16, impl="triton").to(device)
        ids = torch.tensor([[IM_START, 2, 3]], device=device)
        module(ids, self.images(device)).sum().backward()
        exact = leaf.detach().sigmoid()
        exact = exact * (1 - exact)
        exact[1:] = 0
        torch.testing.assert_close(leaf.grad, exact)

    def test_a_second_forward_sees_nothing_of_the_first(self, device):
        module, _ = make_module(device, impl="triton")
        ids = torch.tensor([[IM_START, 2, 3]], device=device)
        one = module(ids, self.images(device))
        kept = one.clone()
        module(ids, images_of([(IM_START, torch.full((1, 2, 24), -5.0, device=device))]))
        assert torch.equal(one, kept)

    @pytest.mark.parametrize("memory", ["NumPy's", "DLPack's", "a file's"])
    def test_memory_that_is_not_pytorchs_own_is_left_alone(self, memory, tmp_path):
        array = np.random.default_rng(0).normal(size=(3, 1, 16)).astype(np.float32)
        array.tofile(tmp_path / "words")
        path = str(tmp_path / "words")
        fresh = {
            "NumPy's": lambda: torch.from_numpy(array),
            "DLPack's": lambda: torch.from_dlpack(array),
            "a file's": lambda: torch.from_file(path, shared=True, size=48).view(3, 1, 16),
        }[memory]
        kept = fresh().clone()
        if not torch.cuda.is_available():
            module = ImageInsertEmbedding(lambda **_: fresh(), 24, 16, impl="triton")
            fused = module(torch.tensor([[IM_START, 2, 3]]), self.images("cpu"))
            assert torch.equal(fresh(), kept)
            assert not torch.equal(fused, kept)

    def test_inference_mode_works(self, device):
        module, _ = make_module(device, impl="triton")
        ids = torch.tensor([[IM_START, 2, 3]], device=device)
        with torch.no_grad():
            wanted = module(ids, self.images(device))
        with torch.inference_mode():
            assert torch.equal(module(ids, self.images(device)), wanted)

    def test_an_inference_tensor_is_copied_and_the_projector_still_learns(self, device):
        with torch.inference_mode():
            words = torch.zeros(3, 1, 16, device=device)
        module = ImageInsertEmbedding(
            lambda **_: _fresh_inference_copy(words), 24, 16, impl="triton"
        ).to(device)
        ids = torch.tensor([[IM_START, 2, 3]], device=device)
        module(ids, self.images(device)).sum().backward()
        assert module.align_projector.weight.grad.abs().max() > 0

    def test_torch_func_differentiates_the_pytorch_implementation(self, device):
        table = torch.randn(97, 16, device=device)
        module = ImageInsertEmbedding(lambda **_: table[:3, None] * 1, 24, 16, impl="torch")
        module.to(device)
        ids = torch.tensor([[IM_START, 2, 3]], device=device)
        images = self.images(device)

        def total(table: Tensor) -> Tensor:
            module._language_embedding = lambda **_: table[:3, None] * 1
            return module(ids, images).sum()

        grad = torch.func.grad(total)(table)
        assert grad[0].eq(1).all()
        assert not grad[1:].any()
        module.configure(impl="triton")
        with pytest.raises(ValueError, match=r"torch\.func .* does not reach the Triton kernels"):
            torch.func.grad(total)(table)

    @pytest.mark.parametrize("kind", ["embedding", "called"])
    def test_torch_func_differentiates_text_only_batches_and_words_that_are_looked_up(
        self, device, kind
    ):
        table = nn.Embedding(IM_START + 1, 16, device=device)
        words = table if kind == "embedding" else lambda input_ids, **_: table(input_ids.t())
        module = ImageInsertEmbedding(words, 24, 16, impl="torch", text_only_gradient=True)
        module.to(device)
        ids = torch.tensor([[IM_START, 2, 3]], device=device)
        parameters = dict(module.named_parameters())

        for images in (None, self.images(device)):

            def total(parameters: dict[str, Tensor], images=images) -> Tensor:
                return torch.func.functional_call(module, parameters, (ids, images)).square().sum()

            (grad,) = torch.func.grad(total)(parameters).values()
            (wanted,) = torch.autograd.grad(total(parameters), [*parameters.values()])
            torch.testing.assert_close(grad, wanted)
            assert grad.any() == (images is not None)


def _fresh_inference_copy(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


def test_embeddings_of_another_shape_than_the_ids_are_refused(device):
    ids = torch.tensor([[IM_START, 2, 3], [4, IM_START, 5]], device=device)
    feature = torch.ones(2, 1, 16, device=device)
    for shape in ((2, 3, 16), (3, 3, 16), (4, 2, 16), (6, 16)):
        embeddings = torch.zeros(shape, device=device)
        with pytest.raises(
            ValueError, match=r"input_embeddings: expected \[S, B, H\] = \[3, 2, H\]"
        ):
            ImageInsertEmbedding.insert_features(embeddings, feature, ids, IM_START)
    # What a projector with a hook gives is inserted by PyTorch.
    module = ImageInsertEmbedding(lambda **_: torch.zeros(2, 3, 16, device=device), 24, 16)
    module.to(device).align_projector.register_forward_hook(lambda *_: None)
    images = images_of([(IM_START, torch.ones(2, 1, 24, device=device))])
    with pytest.raises(ValueError, match=r"language_embedding's result: .*, got \(2, 3, 16\)"):
        module(ids, images)


def test_what_is_no_list_or_no_integer_is_refused(device):
    module, _ = make_module(device)
    ids = torch.tensor([[IM_START, 2, 3]], device=device)
    (image,) = images_of([(IM_START, torch.ones(1, 2, 24, device=device))])
    with pytest.raises(TypeError, match="images: expected a list of ImageForInsert, got ImageFor"):
        module(ids, image)
    token = torch.tensor(IM_START, device=device)
    image = ImageForInsert(insert_start_token=token, image_features=image.image_features)
    with pytest.raises(
        TypeError, match=r"images\[0\].insert_start_token: expected an int, got a te"
    ):
        module(ids, [image])
    features = np.ones((1, 2, 24), dtype=np.float32)
    for image, message in (
        ({"image_features": features}, r"images\[0\]: expected an ImageForInsert, got .*dict"),
        (
            ImageForInsert(IM_START, image_features=features),
            r"image_features: expected a tensor or .*ndarray",
        ),
        (
            ImageForInsert(IM_START, image_features=[features]),
            r"image_features\[0\]: expected a tensor, .*nda",
        ),
        (
            ImageForInsert(1.5, image_features=torch.ones(1, 2, 24)),
            r"insert_start_token: expected an int, .*1.5",
        ),
    ):
        with pytest.raises(TypeError, match=message):
            module(ids, [image])
    words = torch.zeros(3, 1, 16, device=device)
    with pytest.raises(TypeError, match=r"flag: expected an int, got 1\.0"):
        module.insert_features(words, torch.ones(1, 2, 16), ids, 1.0)
    with pytest.raises(TypeError, match="image_features: expected a tensor or a list of them"):
        module.insert_features(words, np.ones((1, 2, 16)), ids, IM_START)


@pytest.mark.parametrize("kind", ["embedding", "called"])
@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([[1, 2, 3]], TypeError, r"input_ids: expected a tensor \[B, S\], got list"),
        (np.ones((1, 3), np.int64), TypeError, r"input_ids: expected a tensor .*, got ndarray"),
        (None, TypeError, r"input_ids: expected a tensor \[B, S\], got NoneType"),
        (torch.tensor([1, 2, 3]), ValueError, r"input_ids: expected \[B, S\], got \(3,\)"),
        (torch.ones(1, 1, 3, dtype=torch.int64), ValueError, r"expected \[B, S\], got \(1, 1, 3\)"),
    ],
)
def test_ids_that_are_no_tensor_of_two_dimensions_are_refused(kind, images, ids, error, message):
    words = nn.Embedding(9, 16) if kind == "embedding" else lambda **_: torch.zeros(3, 1, 16)
    module = ImageInsertEmbedding(words, 24, 16)
    groups = images_of([(IM_START, torch.ones(1, 2, 24))]) if images else None
    with pytest.raises(error, match=message):
        module(ids, groups)
    with pytest.raises(error, match=message):
        module.insert_features(torch.zeros(3, 1, 16), torch.ones(1, 2, 16), ids, IM_START)


def test_a_start_token_may_be_numpys(device):
    module, _ = make_module(device)
    ids = torch.tensor([[IM_START, 2, 3]], device=device)
    feature = torch.ones(1, 2, 24, device=device)
    wanted = module(ids, images_of([(IM_START, feature)]))
    assert torch.equal(module(ids, images_of([(np.int64(IM_START), feature)])), wanted)


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_shapes_without_values_pass_through(kind):
    with FakeTensorMode() if kind == "fake" else contextlib.nullcontext():
        device = "cpu" if kind == "fake" else "meta"
        words = torch.zeros(3, 1, 16, device=device)
        module = ImageInsertEmbedding(lambda **_: words, 24, 16, impl="torch")
        if kind == "meta":
            module.to(device)
        ids = torch.zeros(1, 3, dtype=torch.int64, device=device)
        fused = module(ids, images_of([(IM_START, torch.ones(1, 2, 24, device=device))]))
        assert fused.shape == (3, 1, 16)
