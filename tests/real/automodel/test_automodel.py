"""NeMo Automodel's own Step-3.7, stock against ours over several steps."""

from __future__ import annotations

import copy
import io
import itertools
import logging
import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nemo_automodel.components.models.step3p7 import model as step3p7
from torch import Tensor

from step37_kernels.automodel import FusedMerge, patch_step3p7, replace_in, unpatch_step3p7
from step37_kernels.testing import FP32_UNIT
from tests.real.automodel.automodel_model import IMAGE, LENGTH, ROWS, WIDTH, batch, build, loss_of

STEPS = 3
SCENARIOS: dict[str, list[list[int] | None]] = {
    "with crops": [[2, 0, 1], [1, 3, 0], [0, 0, 4]],
    "without crops": [[0, 0], [0, 0, 0], [0]],
    "text only": [None, None, None],
    "mixed": [[3, 1], None, [0, 0]],
}
Step = dict[str, Tensor]


@pytest.fixture(autouse=True)
def automodel() -> Iterator[None]:
    yield
    unpatch_step3p7()


def make(how: str, impl: str = "torch", **options: Any) -> Any:
    if how == "patched":
        patch_step3p7(impl=impl, strict=True)
    model = build(**options)
    if how == "patched":
        unpatch_step3p7()
    elif how == "replaced":
        assert replace_in(model, impl=impl, strict=True) == ("model",)
    assert isinstance(model.model, FusedMerge) == (how != "stock")
    return model


def train(model: Any, scenario: str, dtype: torch.dtype = torch.float32) -> list[Step]:
    """Loss and all gradients of some steps of SGD with momentum."""
    model.to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    steps = []
    for number, crops in enumerate(SCENARIOS[scenario]):
        optimizer.zero_grad()
        inputs = batch(number, crops)
        logits = model(**inputs)
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten()
        )
        loss.backward()
        optimizer.step()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        steps.append({**gradients, "loss": loss.detach()})
    return steps


def assert_within_stocks_rounding(
    ours: list[Step], stock: list[Step], exact: list[Step], target: list[Step] | None = None
) -> None:
    """As near to fp64 as stock is, up to another order of the sums: so each may be off as much.

    Or as near to ``target``, the same class run in another way: that leaves out what two classes
    round differently, which is a draw of chance for either and no bound for the other.
    """
    steps = zip(ours, stock, exact, target or exact, strict=True)
    for number, (mine, theirs, true, wanted) in enumerate(steps):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            largest = true[name].abs().max()
            bound = 2 * (theirs[name] - true[name]).abs().max() + 8 * FP32_UNIT * largest
            error = (value - wanted[name]).abs().max()
            assert error <= bound, f"step {number}, {name}: off by {error:.3g}, not {bound:.3g}"


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("bias", [False, True])
def test_several_steps_give_stocks_losses_and_gradients(scenario, bias):
    stock = train(make("stock", projector_bias=bias), scenario)
    exact = train(make("stock", projector_bias=bias), scenario, torch.float64)
    for how, impl in itertools.product(("patched", "replaced"), ("torch", "triton")):
        ours = train(make(how, impl, projector_bias=bias), scenario)
        assert_within_stocks_rounding(ours, stock, exact)
    if scenario != "text only":
        assert stock[0]["model.vit_large_projector.weight"].abs().sum() > 0
        assert stock[0]["model.vision_model.conv1.weight"].abs().sum() > 0


@pytest.mark.parametrize("how", ["patched", "replaced"])
def test_state_dicts_go_both_ways_and_the_model_can_be_copied(how):
    stock, ours = make("stock", seed=1), make(how, seed=2)
    saved, own = (copy.deepcopy(m.state_dict()) for m in (stock, ours))
    assert own.keys() == saved.keys()
    ours.load_state_dict(saved, strict=True)
    stock.load_state_dict(own, strict=True)
    copied = copy.deepcopy(ours)
    assert isinstance(copied.model, FusedMerge)
    inputs = batch(0, [1, 2])
    assert torch.equal(copied(**inputs), ours(**inputs))


def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    del options
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


@pytest.mark.parametrize("how", ["patched", "replaced"])
@pytest.mark.parametrize("saved_while_patched", [False, True])
@pytest.mark.parametrize("loaded_while_patched", [False, True])
def test_a_model_is_saved_and_pickled_as_what_it_is(how, saved_while_patched, loaded_while_patched):
    ours = make(how)
    for layer in ours.model.language_model.layers.values():
        layer.self_attn.attn_func = attend  # Its own is local to a function, which pickle refuses.
    inputs = batch(0, [1, 2])
    wanted = ours(**inputs)

    def patched_if(asked: bool) -> None:
        patch_step3p7(impl="torch") if asked else unpatch_step3p7()

    patched_if(saved_while_patched)
    file = io.BytesIO()
    torch.save(ours, file)
    pickled = pickle.dumps(ours)
    patched_if(loaded_while_patched)
    file.seek(0)
    for loaded in (torch.load(file, weights_only=False), pickle.loads(pickled)):
        assert type(loaded.model) is type(ours.model)
        assert loaded.model.step37_options == ours.model.step37_options
        assert torch.equal(loaded(**inputs), wanted)


@pytest.mark.parametrize("how", ["stock", "patched"])
def test_features_that_are_projected_already_go_in_as_they_are(how):
    model = make(how).model
    inputs = batch(0, [0, 0])
    rows = torch.randn(2, ROWS, 32)
    given = model.get_multimodal_embeddings(image_embeds=rows)
    for embeddings in (given, list(rows)):
        out = model.prepare_inputs_embeds(inputs["input_ids"], embeddings)
        mask = inputs["input_ids"] == IMAGE
        assert torch.equal(out[mask], rows.flatten(0, 1))
        assert torch.equal(out[~mask], model.embed_tokens(inputs["input_ids"])[~mask])


def test_other_numbers_of_rows_than_placeholders_are_told(caplog):
    inputs = batch(0, [0, 0])
    inputs["input_ids"][0, 0] = IMAGE
    with pytest.raises(ValueError, match=r"image token mismatch: got 8 .* for 9 placeholders"):
        make("stock")(**inputs)
    strict = make("replaced")
    with pytest.raises(ValueError, match=r"9 placeholders \(token 9\) for 8 rows"):
        strict(**inputs)
    replace_in(strict)
    with caplog.at_level(logging.WARNING):
        strict(**inputs)
    assert "token 9: 9 in input_ids, 8 features; inserting 8" in caplog.text


def test_crops_that_do_not_fit_the_images_are_told():
    model = make("patched")
    inputs = batch(0, [1, 2])
    with pytest.raises(
        ValueError, match="num_patches: expected one of each of the 2 images, got 1"
    ):
        model(**inputs | {"num_patches": [1]})
    with pytest.raises(ValueError, match="asks for 3 crops, but patch_pixel_values is missing"):
        model(**inputs | {"patch_pixel_values": None})


@pytest.mark.parametrize("counts", [[1, 0], [0, 0], [3, 2], [0, 3]])
def test_crops_that_no_image_has_and_crops_too_few_are_as_in_stock(counts):
    """Stock drops the crops left over, and takes as many as there are."""
    inputs = batch(0, [1, 2]) | {"num_patches": torch.tensor(counts)}
    inputs["input_ids"][inputs["input_ids"] == IMAGE] = 10
    used = min(sum(counts), 3)
    inputs["input_ids"].view(-1)[3 : 3 + used + 2 * ROWS] = IMAGE
    stock, ours = make("stock"), make("patched")
    replace_in(ours)
    torch.testing.assert_close(ours(**inputs), stock(**inputs))


class Decoder(torch.nn.Module):
    """In place of its language model, whose attention to packed sequences needs a GPU."""

    def __init__(self, embed_tokens: torch.nn.Module) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens

    def forward(self, inputs_embeds: Tensor, **options: Any) -> Tensor:
        del options
        return inputs_embeds


@pytest.mark.parametrize("how", ["patched", "replaced"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_packed_sequences_come_with_a_batch_axis_and_without(how, impl, dimensions):
    """Automodel takes the axis off for ``qkv_format="thd"``, off ``[1]`` numbers of crops too."""
    inputs = batch(0, [3])
    ids = inputs.pop("input_ids").squeeze(0)
    if dimensions == 2:
        ids = ids.unflatten(0, (2, LENGTH // 2))
    inputs["num_patches"] = inputs["num_patches"].squeeze(0)
    results = []
    for model in (make("stock"), make(how, impl)):
        model.model.language_model = Decoder(model.model.embed_tokens)
        merged = model.model(ids, **inputs)
        assert merged.shape == (*ids.shape, 32)
        merged.square().sum().backward()
        gradients = [model.model.embed_tokens.weight, model.model.vit_large_projector.weight]
        results.append((merged, *(parameter.grad for parameter in gradients)))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_whole_model_takes_packed_sequences():
    inputs = batch(0, [2])
    inputs |= {"qkv_format": "thd", "position_ids": torch.arange(LENGTH)[None]}
    logits = []
    for how in ("stock", "patched"):
        model = make(how)
        model.model.language_model = Decoder(model.model.embed_tokens)
        logits.append(model(**dict(inputs)))
    torch.testing.assert_close(*logits)


@pytest.mark.parametrize("crops", [None, [1, 2], [0, 0], [1, 0], [0, 3], [3, 2], [0, 5]])
def test_multimodal_embeddings_can_be_indexed_and_iterated_over_as_stocks(crops):
    inputs = batch(0, [1, 2])
    media = {
        "pixel_values": inputs["pixel_values"],
        "patch_pixel_values": inputs["patch_pixel_values"],
        "num_patches": crops if crops is None else torch.tensor(crops),
    }
    called = []
    stock, ours = (make(how) for how in ("stock", "patched"))
    ours.model.vit_large_projector.register_forward_pre_hook(lambda *_: called.append(1))
    theirs, mine = (model.model.get_multimodal_embeddings(**media) for model in (stock, ours))
    assert not called
    assert len(mine) == len(theirs) == 2
    for rows, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(rows, wanted)
    assert torch.equal(mine[-1], mine[1])
    assert torch.equal(torch.cat(mine[:2]), torch.cat(list(mine)))
    with pytest.raises(IndexError):
        mine[2]
    assert len(called) == 1
    gradients = []
    for model, embeddings in ((stock, theirs), (ours, mine)):
        embeddings[0].square().sum().backward()
        gradients.append(model.model.vit_large_projector.weight.grad)
    torch.testing.assert_close(*gradients)


def test_multimodal_embeddings_that_were_indexed_are_still_merged():
    inputs = batch(0, [1, 2])
    ids = inputs.pop("input_ids")
    model = make("patched").model
    embeddings = model.get_multimodal_embeddings(**inputs)
    rows = torch.cat(list(embeddings))
    merged = model.prepare_inputs_embeds(ids, embeddings)
    torch.testing.assert_close(merged[ids == IMAGE], rows)
    assert torch.equal(model.prepare_inputs_embeds(ids, list(embeddings))[ids == IMAGE], rows)


def test_a_projector_with_a_hook_is_called(caplog):
    inputs = batch(0, [1, 2])
    outputs = []
    for how in ("stock", "patched"):
        model = make(how)
        replace_in(model) if how != "stock" else None
        model.model.vit_large_projector.register_forward_hook(lambda _m, _a, output: 2 * output)
        outputs.append(model(**inputs))
    torch.testing.assert_close(*outputs)
    assert "vit_large_projector (Linear) is more than a weight and a bias" in caplog.text
    replace_in(model, impl="triton")
    with pytest.raises(ValueError, match=r"impl='triton': vit_large_projector \(Linear\) is more"):
        model(**inputs)


def test_patching_and_back(caplog):
    stock = step3p7.Step3p7Model
    before = build()
    with caplog.at_level(logging.WARNING):
        names = patch_step3p7(impl="torch")
    assert names == ("nemo_automodel.components.models.step3p7.model.Step3p7Model",)
    assert "stock Step3p7Model had been built" in caplog.text
    assert issubclass(step3p7.Step3p7Model, stock)
    assert not isinstance(before.model, FusedMerge)
    model = build()
    assert model.model.step37_options.impl == "torch"
    assert patch_step3p7() == names
    assert model.model.step37_options.impl == "torch"
    assert build().model.step37_options.impl == "auto"
    assert unpatch_step3p7() == names
    assert step3p7.Step3p7Model is stock
    assert unpatch_step3p7() == ()
    assert replace_in([torch.nn.Linear(1, 1), before]) == ("1.model",)


def test_a_missing_name_is_an_import_error_that_names_it(monkeypatch):
    monkeypatch.delattr(step3p7, "Step3p7Model")
    message = (
        r"step3p7\.model\.Step3p7Model: no such name.*NeMo Automodel 0\.7\.0; installed: nemo-a"
    )
    with pytest.raises(ImportError, match=message):
        patch_step3p7()


class NewStep3p7Model(step3p7.Step3p7Model):
    """Its vision features as Automodel's pull request 3570 divides them."""

    def _downsample_image_features(self, patches: Tensor) -> Tensor:
        tower = SimpleNamespace(vision_model=self.vision_model, vit_large_projector=torch.clone)
        return super()._process_image_features.__func__(tower, patches)

    def _process_image_features(self, patches: Tensor) -> Tensor:
        return self.vit_large_projector(self._downsample_image_features(patches))


@pytest.mark.parametrize("how", ["patched", "replaced"])
def test_vision_features_divided_into_two_methods_are_taken_before_the_projector(how, monkeypatch):
    monkeypatch.setattr(step3p7, "Step3p7Model", NewStep3p7Model)
    inputs = batch(0, [1, 2])
    stock, ours = make("stock"), make(how)
    assert isinstance(ours.model, NewStep3p7Model)
    torch.testing.assert_close(ours(**inputs), stock(**inputs))


def test_a_class_without_either_way_to_vision_features_is_not_replaced(monkeypatch):
    model = build()
    monkeypatch.delattr(step3p7.Step3p7Model, "_process_image_features")
    missing = "no method _downsample_image_features or _process_image_features"
    with pytest.raises(ImportError, match=rf"cannot replace .*Step3p7Model: it has {missing}\. "):
        patch_step3p7()
    with pytest.raises(ValueError, match=rf"^model: .*\.Step3p7Model has {missing}, which ours"):
        replace_in(model)
    assert not isinstance(model.model, FusedMerge)
    assert not issubclass(step3p7.Step3p7Model, FusedMerge)


@pytest.mark.parametrize("crops", [[1, 2], [0, 0]])
def test_the_projector_is_called_once_whether_there_are_crops_or_not(crops):
    """So that ranks of FSDP, with crops and without, gather its weight equally often."""
    calls = {}
    for how in ("stock", "patched"):
        model, calls[how] = make(how), []
        model.model.vit_large_projector.register_forward_pre_hook(
            lambda module, _, seen=calls[how]: seen.append(module)
        )
        model(**batch(0, crops))
    assert len(calls["patched"]) == 1
    assert len(calls["stock"]) == 1 + any(crops)


def test_the_vision_tower_hands_its_rows_over_channels_first():
    """So the rows are packed: what the benchmark counts."""
    (features,) = (
        make("patched")
        .model.get_multimodal_embeddings(pixel_values=batch(0, [0])["pixel_values"])
        .tensors
    )
    assert features.shape == (1, ROWS, WIDTH)
    assert features.stride()[1:] == (1, ROWS)
    assert LENGTH > ROWS
    assert loss_of(torch.zeros(1, 3, 5), torch.zeros(1, 3, dtype=torch.int64)) > 0
