"""Parts of the module that are on different devices, and parts without values.

Without a GPU there is one device with values. Where tensors end up is shown with fake ones, which
know a device and have no values; the values and the gradients with a projector that is only said
to be elsewhere. Copies between two GPUs and their streams are for a machine that has two.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from step37_kernels import ImageForInsert, ImageInsertEmbedding, image_insert_embedding
from step37_kernels.integration import projector
from step37_kernels.integration.parallel import SequenceLayout
from step37_kernels.integration.projector import warn_elsewhere

HIDDEN, WIDTH, VOCABULARY = 8, 6, 20
IDS = [[7, 1, 2, 3, 7, 4, 5, 6]]
ELSEWHERE = torch.device("cuda:1")


def groups(features: Tensor | list[Tensor]) -> list[ImageForInsert]:
    return [ImageForInsert(insert_start_token=7, image_features=features)]


def fake_module(projector: str, called: bool, **options: object) -> ImageInsertEmbedding:
    """The words are on the CPU, the projector's parameters on ``projector``."""
    table = nn.Embedding(VOCABULARY, HIDDEN)
    words = table
    if called:

        def words(input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
            del position_ids
            return table(input_ids.cpu()).transpose(0, 1)

    module = ImageInsertEmbedding(words, WIDTH, HIDDEN, **options)
    for name, shape in (("weight", (HIDDEN, WIDTH)), ("bias", (HIDDEN,))):
        # nn.Linear(device=...) would fill them, which no fake tensor of an absent device allows.
        parameter = nn.Parameter(torch.empty(shape, device=projector))
        setattr(module.align_projector, name, parameter)
    return module


@dataclass(frozen=True, slots=True, kw_only=True)
class LaterHalf(SequenceLayout):
    """The layout of a rank that looks up the later positions, without other ranks."""

    def positions_looked_up(self, seq_len: int, device: torch.device) -> Tensor:
        return torch.arange(seq_len // 2, seq_len, device=device)


def picked(rows: Tensor, local_rows: Tensor | None) -> Tensor:
    """Slices, which ``pick_rows`` takes, are more than fake tensors of an absent device allow."""
    if local_rows is None:
        return rows
    return rows.index_select(0, local_rows.clamp_min(0))


@pytest.fixture
def fake() -> Iterator[None]:
    # Autograd asks PyTorch for the streams of a device, which it must then be built for.
    with FakeTensorMode(), torch.no_grad():
        yield


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("features", ["cpu", "cuda:0", "cuda:1"])
@pytest.mark.parametrize(
    ("called", "ids", "layout"),
    [
        (False, "cpu", None),
        (True, "cpu", None),
        (True, "cuda:0", None),
        (True, "cuda:0", LaterHalf()),
    ],
    ids=["looked up", "called", "called, ids elsewhere", "a shard, ids elsewhere"],
)
def test_rows_are_projected_where_the_projector_is_and_moved_to_the_words(
    features, called, ids, layout, monkeypatch
):
    monkeypatch.setattr(image_insert_embedding, "pick_rows", picked)
    module = fake_module("cuda:0", called, impl="torch", layout=layout)
    projected = []
    forward = module.align_projector.forward

    def spy(x: Tensor) -> Tensor:
        projected.append(x.device)
        return forward(x)

    module.align_projector.forward = spy  # A projector that is called for another reason, too.
    for _ in range(2):
        output = module(
            torch.empty(1, 8, dtype=torch.int64, device=ids),
            groups(torch.empty(2, 3, WIDTH, device=features)),
        )
        assert output.device == torch.device("cpu")
        assert output.shape == (8 if layout is None else 4, 1, HIDDEN)
        vars(module.align_projector).pop("forward", None)
    assert projected == [torch.device("cuda:0")]


@pytest.mark.usefixtures("fake")
def test_a_bias_that_is_elsewhere_than_its_weight_reaches_no_kernel():
    module = fake_module("cpu", called=False, impl="triton")
    module.align_projector.bias = nn.Parameter(torch.empty(HIDDEN, device="cuda:0"))
    ids = torch.empty(1, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match="align_projector is on cpu and cuda:0, the word"):
        module(ids, groups(torch.empty(2, 3, WIDTH)))


@pytest.mark.usefixtures("fake")
def test_no_kernel_is_asked_for_parts_on_different_devices():
    module = fake_module("cuda:0", called=False, impl="triton")
    with pytest.raises(
        ValueError,
        match="impl='triton': align_projector is on cuda:0, the word embeddings are on cpu; put "
        "both on one device, or pass impl='auto' or 'torch' to have the projector called",
    ):
        module(torch.empty(1, 8, dtype=torch.int64), groups(torch.empty(2, 3, WIDTH)))


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("impl", ["auto", "triton", "torch"])
@pytest.mark.parametrize("images", [True, False])
def test_ids_that_are_elsewhere_than_the_table_are_refused(impl, images):
    module = fake_module("cpu", called=False, impl=impl)
    ids = torch.empty(1, 8, dtype=torch.int64, device="cuda:0")
    with pytest.raises(
        ValueError, match="input_ids: expected the device of the table of words, cpu, got cuda:0"
    ):
        module(ids, groups(torch.empty(2, 3, WIDTH)) if images else None)


@pytest.mark.usefixtures("fake")
def test_insert_features_moves_features_and_ids_to_the_embeddings():
    output = ImageInsertEmbedding.insert_features(
        torch.empty(8, 1, HIDDEN),
        torch.empty(2, 3, HIDDEN, device="cuda:1"),
        torch.empty(1, 8, dtype=torch.int64, device="cuda:0"),
        7,
    )
    assert output.device == torch.device("cpu")


@pytest.fixture
def said_to_be_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projector, "devices_of_plain", lambda _: {ELSEWHERE})


@pytest.mark.parametrize("kind", [nn.Embedding, "called"])
def test_a_projector_that_is_elsewhere_gives_the_same_values_and_gradients(kind, request, caplog):
    torch.manual_seed(0)
    table = nn.Embedding(VOCABULARY, HIDDEN)
    words = table if kind is nn.Embedding else lambda input_ids, **_: table(input_ids.t())
    module = ImageInsertEmbedding(words, WIDTH, HIDDEN, projector_bias=True, impl="torch")
    ids, features = torch.tensor(IDS), torch.randn(2, 3, WIDTH, requires_grad=True)
    leaves = [table.weight, *module.parameters(), features]
    results = []
    warn_elsewhere.cache_clear()
    for _ in range(2):
        output = module(ids, groups(features))
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
        if len(results) == 1:
            assert not caplog.records
            request.getfixturevalue("said_to_be_elsewhere")
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    module(ids, groups(features))
    (record,) = (r for r in caplog.records if r.levelno >= logging.WARNING)
    assert "it is called there, and its rows are copied" in record.getMessage()


@pytest.mark.usefixtures("said_to_be_elsewhere")
def test_a_projector_that_is_elsewhere_takes_part_in_text_only_steps():
    table = nn.Embedding(VOCABULARY, HIDDEN)
    module = ImageInsertEmbedding(table, WIDTH, HIDDEN, impl="torch", text_only_gradient=True)
    module(torch.tensor(IDS)).sum().backward()
    assert module.align_projector.weight.grad.eq(0).all()


def offloaded(projector: nn.Linear) -> nn.Linear:
    """As accelerate's ``cpu_offload`` leaves it: no values, and a forward that fetches them."""
    values = {n: p.detach().clone() for n, p in projector.named_parameters()}
    projector.to("meta")
    projector.forward = lambda x: torch.func.functional_call(nn.Linear(WIDTH, HIDDEN), values, x)
    return projector


@pytest.mark.parametrize("hooked", [True, False])
def test_a_projector_without_values_is_named_with_what_to_do(hooked):
    table = nn.Embedding(VOCABULARY, HIDDEN)
    module = ImageInsertEmbedding(table, WIDTH, HIDDEN, projector_bias=True)
    offloaded(module.align_projector)
    if not hooked:
        del module.align_projector.forward
    ids = torch.tensor(IDS)
    message = (
        r"align_projector\.weight: expected values, got a parameter on the meta device.*"
        r"cpu_offload .*remove_hook_from_module\(align_projector, recurse=True\)"
    )
    with pytest.raises(ValueError, match=message):
        module(ids, groups(torch.ones(2, 3, WIDTH)))
    module.configure(text_only_gradient=True)
    with pytest.raises(ValueError, match=message):
        module(ids)
    # Nothing is asked of it here.
    with torch.no_grad():
        assert torch.equal(module(ids), table(ids).transpose(0, 1))


def test_features_without_values_are_named():
    table = nn.Embedding(VOCABULARY, HIDDEN)
    module = ImageInsertEmbedding(table, WIDTH, HIDDEN)
    ids, features = torch.tensor(IDS), torch.ones(2, 3, WIDTH, device="meta")
    message = r"expected values, got a tensor on the meta device, \(2, 3, 6\); is the vision tower"
    with pytest.raises(ValueError, match=r"images\[0\]\.image_features: " + message):
        module(ids, groups(features))
    words = torch.ones(8, 1, WIDTH)
    with pytest.raises(ValueError, match="image_features: " + message):
        module.insert_features(words, features, ids, 7)
    with pytest.raises(ValueError, match="image_features: " + message):
        module._normalize_feature_list(features, device=words.device, dtype=words.dtype)
