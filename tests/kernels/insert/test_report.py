"""``report(model)``: what it says is what a forward does, and it changes nothing."""

from __future__ import annotations

import copy
import logging
import pickle
import re
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import step37_kernels
from step37_kernels import (
    ImageForInsert,
    ImageInsertEmbedding,
    Report,
    automodel,
    image_insert_embedding,
    megatron,
    report,
)
from step37_kernels.integration.ways import Ways
from step37_kernels.ops.common import INTERPRETED
from tests.kernels.checks import run_compiling

# Compiled, fp32 has no tile of ours; in the interpreter every dtype has a small one.
OURS = (
    "Triton (tile 48×32×32 for 6 rows)"
    if INTERPRETED
    else "library (no tile of ours for this GPU, dtype or alignment)"
)

HIDDEN, WIDTH, VOCABULARY, IM_START = 16, 24, 32, 7


class Words(nn.Embedding):
    """Called as Megatron's: more than a lookup, for all that anybody knows."""

    def __init__(self) -> None:
        super().__init__(VOCABULARY, HIDDEN)
        self.config = SimpleNamespace(gradient_accumulation_fusion=True)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        del position_ids
        return super().forward(input_ids).transpose(0, 1)


class Adapted(nn.Module):
    """A projector in the way of LoRA."""

    def __init__(self, projector: nn.Linear) -> None:
        super().__init__()
        self.projector = projector.requires_grad_(False)
        self.low = nn.Linear(WIDTH, 2, bias=False)
        self.high = nn.Linear(2, HIDDEN, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        result: Tensor = self.projector(rows) + self.high(self.low(rows))
        return result


class Model(nn.Module):
    def __init__(self, words: nn.Module | None = None, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = words or nn.Embedding(VOCABULARY, HIDDEN)
        self.embed = ImageInsertEmbedding(self.words, WIDTH, HIDDEN, **options)

    def forward(self, ids: Tensor, images: list[ImageForInsert] | None = None) -> Tensor:
        result: Tensor = self.embed(ids, images)
        return result


def batch(device: str = "cpu") -> tuple[Tensor, list[ImageForInsert]]:
    ids = torch.arange(40, device=device).view(2, 20) % 6
    ids[:, 4] = IM_START
    features = torch.randn(2, 3, WIDTH, device=device)
    return ids, [ImageForInsert(insert_start_token=IM_START, image_features=features)]


def ways_in(model: nn.Module, rows: int = 6) -> Ways:
    (module,) = report(model, rows=rows).modules
    assert module.ways is not None
    return module.ways


def with_main_grad(model: Model) -> Model:
    for parameter in model.parameters():
        parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
    return model


def adapted(model: Model) -> Model:
    model.embed.align_projector = Adapted(model.embed.align_projector)  # type: ignore[assignment]
    return model


def hooked(model: Model) -> Model:
    model.embed.align_projector.register_forward_hook(lambda *_: None)
    return model


def frozen(model: Model) -> Model:
    model.requires_grad_(False)
    return model


MODELS: dict[str, Callable[[], Model]] = {
    "plain, PyTorch": lambda: Model(impl="torch"),
    "plain, Triton": lambda: Model(impl="triton"),
    "called words, PyTorch": lambda: Model(Words(), impl="torch"),
    "called words, Triton": lambda: Model(Words(), impl="triton"),
    "called by the option": lambda: Model(lookup="call", impl="triton"),
    "an adapter": lambda: adapted(Model(impl="torch")),
    "a hook": lambda: hooked(Model(impl="torch")),
    "frozen": lambda: frozen(Model(impl="triton")),
    "main_grad": lambda: with_main_grad(Model(impl="triton", gradient_accumulation_fusion=True)),
    "main_grad by PyTorch": lambda: with_main_grad(
        Model(impl="torch", gradient_accumulation_fusion=True)
    ),
    "main_grad by the configuration": lambda: with_main_grad(Model(Words(), impl="triton")),
    "the configuration, and no main_grad": lambda: Model(Words(), impl="triton"),
    "main_grad, not wanted": lambda: with_main_grad(
        Model(Words(), impl="triton", gradient_accumulation_fusion=False)
    ),
    "zeros": lambda: Model(impl="triton", text_only_gradient=True),
    "zeros, frozen": lambda: frozen(Model(impl="triton", text_only_gradient=True)),
    "zeros, an adapter": lambda: adapted(Model(impl="torch", text_only_gradient=True)),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_report_says_what_a_forward_and_a_backward_do(device, make, monkeypatch):
    model = make().to(device)
    for parameter in model.parameters():
        if hasattr(parameter, "main_grad"):
            parameter.main_grad = torch.zeros_like(parameter)
    ways = ways_in(model)
    seen: Counter[str] = Counter()

    def counting(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            seen[name] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)

    from step37_kernels import operators
    from step37_kernels.ops import plan_rows

    counting(image_insert_embedding, "call_embedding")
    counting(image_insert_embedding, "insert_projected")
    counting(operators, "project_insert")
    counting(plan_rows, "plan_rows")
    ids, images = batch(device)
    output = model(ids, images)
    if output.requires_grad:
        output.sum().backward()

    assert ways.words.how == ("called" if seen["call_embedding"] else "looked up")
    assert ways.plan.how == ("Triton" if seen["plan_rows"] else "PyTorch")
    how = "called" if not seen["insert_projected"] else "PyTorch"
    assert ways.projection.how == (OURS.split()[0] if seen["project_insert"] else how)
    table, projector = model.words.weight, model.embed.align_projector
    if seen["insert_projected"] or not isinstance(projector, nn.Linear):
        assert (ways.projector_gradient.how == "its own") == (not seen["insert_projected"])
    if seen["insert_projected"]:
        assert ways.projector_gradient.how == how_of_gradient(projector.weight)
    assert ways.words_gradient.how == how_of_gradient(table)

    model.zero_grad()
    text = model(ids)
    trained = [p for p in projector.parameters() if p.requires_grad]
    if text.requires_grad:
        text.sum().backward()
    given = [p.grad for p in trained if p.grad is not None]
    assert ways.text_only_gradient.how == ("zeros" if given else "none")
    assert all(gradient.eq(0).all() for gradient in given)


def how_of_gradient(parameter: Tensor) -> str:
    main_grad = getattr(parameter, "main_grad", None)
    if main_grad is not None and main_grad.any():
        return "main_grad"
    return "none" if parameter.grad is None else "autograd"


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_line_in_the_log_says_the_same_and_comes_once(make, caplog):
    model = make()
    ways = ways_in(model)
    ids, images = batch()
    with caplog.at_level(logging.INFO, logger="step37_kernels.image_insert_embedding"):
        model(ids, images)
        model(ids, images)
        model(ids)
    lines = [r.message for r in caplog.records if r.levelno == logging.INFO]
    assert lines == [f"ImageInsertEmbedding: {ways}"]
    assert "\n" not in lines[0]


REASONS: dict[str, tuple[Callable[[], Model], str, str]] = {
    "a class that nobody knows": (
        lambda: Model(Words()),
        "words",
        "called (Words is not known to be nothing but a lookup)",
    ),
    "an option": (lambda: Model(lookup="call"), "words", "called (lookup='call')"),
    "an adapter": (lambda: adapted(Model()), "projection", "called (it is a Adapted)"),
    "a hook": (lambda: hooked(Model()), "projection", "called (it has hooks)"),
    "no Triton by choice": (
        lambda: Model(impl="torch"),
        "plan",
        "PyTorch (impl='torch', on cpu)",
    ),
    "no GPU": (lambda: Model(), "projection", "PyTorch (impl='auto', on cpu)"),
    "a tile": (lambda: Model(impl="triton"), "projection", OURS),
    "frozen": (lambda: frozen(Model()), "projector_gradient", "none (it is frozen)"),
    "no fusion by choice": (
        lambda: Model(gradient_accumulation_fusion=False),
        "words_gradient",
        "autograd (gradient_accumulation_fusion=False)",
    ),
    "no fusion in the model": (
        Model,
        "projector_gradient",
        "autograd (the configuration has no gradient_accumulation_fusion)",
    ),
    "no main_grad": (
        lambda: Model(Words()),
        "projector_gradient",
        "autograd (no main_grad: Megatron's DDP sets it)",
    ),
    "an adapter's gradient": (
        lambda: adapted(Model()),
        "projector_gradient",
        "its own (it is called)",
    ),
    "rows of main_grad": (
        lambda: with_main_grad(Model(gradient_accumulation_fusion=True)),
        "words_gradient",
        "main_grad (only the rows of the words that were there)",
    ),
    "one process": (
        Model,
        "text_only_gradient",
        "none (torch.distributed is not initialised)",
    ),
    "zeros by choice": (
        lambda: Model(text_only_gradient=True),
        "text_only_gradient",
        "zeros (for the projector)",
    ),
    "the whole sequence": (Model, "layout", "whole"),
    "bf16": (lambda: Model().bfloat16(), "projector_place", "cpu, bfloat16"),
    "a callable that is no module": (
        lambda: without_words(Model(lookup="auto")),
        "words_place",
        "unknown: no parameters",
    ),
    "on the meta device": (
        lambda: Model().to("meta"),
        "projection",
        "PyTorch (impl='auto', on meta)",
    ),
    "the projector elsewhere": (
        lambda: elsewhere(Model()),
        "projection",
        "called (it is on meta, the word embeddings are on cpu)",
    ),
}


def without_words(model: Model) -> Model:
    object.__setattr__(model.embed, "_language_embedding", lambda **_: torch.zeros(20, 2, HIDDEN))
    return model


def elsewhere(model: Model) -> Model:
    model.embed.align_projector.to("meta")
    return model


@pytest.mark.skipif(torch.cuda.is_available(), reason="the words are those of a CPU")
@pytest.mark.parametrize(("make", "part", "text"), REASONS.values(), ids=REASONS)
def test_each_way_is_told_with_its_reason(make, part, text):
    assert str(getattr(ways_in(make()), part)) == text


ERRORS: dict[str, tuple[Callable[[], Model], str, str]] = {
    "a kernel for an adapter": (
        lambda: adapted(Model(impl="triton")),
        "projection",
        "impl='triton': align_projector (Adapted) is more than a weight and a bias",
    ),
    "no main_grad": (
        lambda: Model(gradient_accumulation_fusion=True),
        "projector_gradient",
        "weight: gradient_accumulation_fusion=True needs weight.main_grad",
    ),
    "a dtype": (
        lambda: Model(impl="triton").double(),
        "words",
        "table: the Triton kernels take bfloat16, float16 and float32, got torch.float64",
    ),
}


@pytest.mark.parametrize(("make", "part", "message"), ERRORS.values(), ids=ERRORS)
def test_what_a_forward_would_refuse_is_told_with_its_message(make, part, message):
    model = make()
    way = getattr(ways_in(model), part)
    assert way.how == "error"
    assert way.why.startswith(message)
    ids, images = batch()
    with pytest.raises(ValueError, match=re.escape(way.why)):
        model(ids, images)


@pytest.mark.no_launch
def test_without_the_interpreter_triton_on_a_cpu_is_told_as_what_it_is():
    done = run_compiling(
        "-c",
        "import torch, step37_kernels as k\n"
        "m = k.ImageInsertEmbedding(torch.nn.Embedding(4, 8), 8, 8, impl='triton')\n"
        "print(k.report(m))",
    )
    assert "error (impl='triton': Triton kernels need CUDA tensors, got cpu" in done.stdout


def test_the_layout_rule_that_fails_in_a_forward_is_an_error_of_the_words_too():
    def rule(_: Any) -> None:
        raise ValueError("layout: of another day")

    ways = ways_in(Model(layout=rule))
    assert str(ways.layout) == "error (layout: of another day)"
    assert ways.words == ways.words_gradient == ways.layout
    assert ways.projection.how == "PyTorch"


def test_a_layout_rule_is_asked_once_in_a_forward_whoever_reads_the_log(caplog):
    asked: list[Any] = []
    model = Model(layout=asked.append)
    with caplog.at_level(logging.INFO, logger="step37_kernels.image_insert_embedding"):
        model(batch()[0])
    assert asked == [model.words]
    report(model)
    assert asked == [model.words] * 2


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens: nn.Module | None = nn.Embedding(VOCABULARY, HIDDEN)


class Step3p7Model(nn.Module):
    """Stands for Automodel's."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_token_id=IM_START)
        self.language_model = Language()
        self.vision_model = None
        self.vit_large_projector = nn.Linear(WIDTH, HIDDEN)

    def get_multimodal_embeddings(self, **_: Any) -> None: ...
    def prepare_inputs_embeds(self, *_: Any) -> None: ...
    def _vision_dtype_device(self) -> None: ...
    def _downsample_image_features(self) -> None: ...


def merge(impl: Any = "torch") -> Any:
    model = Step3p7Model()
    automodel.replace_in(model, impl=impl)
    return model


def merged(model: Any) -> Tensor:
    rows = torch.randn(1, 3, WIDTH)
    features = automodel._Features(projector=model.vit_large_projector, tensors=[rows])
    ids = torch.arange(IM_START - 9, IM_START + 1).clamp_min(0).repeat(1, 3)
    result: Tensor = model.prepare_inputs_embeds(ids, features)
    return result


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_the_merge_of_automodel_is_reported_alike(impl, caplog):
    model = merge(impl)
    found = report(model, rows=3)
    (module,) = found.modules
    assert (module.state, module.stock) == ("ours", "Step3p7Model")
    assert module.cls == "step37_kernels.automodel.FusedMerge"
    ways = module.ways
    assert ways is not None
    ours = ("Triton", OURS.split()[0])
    found_ways = (ways.plan.how, ways.projection.how)
    assert found_ways == (ours if impl == "triton" else ("PyTorch", "PyTorch"))
    assert str(ways.words) == "called (the merge takes what embed_tokens gives)"
    assert ways.projector_gradient.how == ways.words_gradient.how == "autograd"
    assert found.active
    with caplog.at_level(logging.INFO, logger="step37_kernels.automodel"):
        merged(model)
        merged(model)
    assert [r.message for r in caplog.records] == [f"Step3p7Model: {ways}"]


def test_a_projector_of_the_merge_that_is_called_and_one_that_is_frozen():
    model = merge()
    model.vit_large_projector.register_forward_hook(lambda *_: None)
    assert str(ways_in(model).projection) == "called (it has hooks)"
    model.requires_grad_(False)
    assert str(ways_in(model).projector_gradient) == "none (it is frozen)"
    assert str(ways_in(model).words_gradient) == "none (it is frozen)"
    automodel.replace_in(model, impl="triton")
    way = ways_in(model).projection
    assert way.how == "error"
    with pytest.raises(ValueError, match=re.escape(way.why)):
        merged(model)


def test_a_later_stage_of_automodels_pipeline_embeds_nothing():
    model = merge()
    model.language_model.embed_tokens = None
    (module,) = report(model).modules
    assert module.ways is None
    assert module.why == "no language_model.embed_tokens: it embeds no pictures here"
    model.vit_large_projector = None
    assert "no language_model.embed_tokens and no vit_large_projector" in str(report(model))


class Stock(nn.Module):
    """Stands for Megatron-Bridge's."""

    def __init__(self) -> None:
        super().__init__()
        self.align_projector = nn.Linear(WIDTH, HIDDEN)
        object.__setattr__(self, "_language_embedding", nn.Embedding(VOCABULARY, HIDDEN))


Stock.__name__ = Stock.__qualname__ = "ImageInsertEmbedding"


def test_what_is_not_replaced_is_told_with_what_replaces_it():
    model = nn.ModuleDict({"a": Stock(), "b": Step3p7Model()})
    found = report(model)
    assert [(m.name, m.state, m.ways) for m in found.modules] == [
        ("a", "stock", None),
        ("b", "stock", None),
    ]
    assert not found.active
    assert "a: NOT ours: ImageInsertEmbedding\n" in str(found)
    assert "step37_kernels.megatron: replace_in(model), or patch_step37()" in str(found)
    assert "step37_kernels.automodel: replace_in(model), or patch_step3p7()" in str(found)
    megatron.replace_in(model)
    automodel.replace_in(model)
    assert report(model).active


def test_one_that_is_replaced_beside_one_that_is_not_is_not_active():
    model = nn.ModuleList([Stock(), Stock()])
    megatron.replace_in(model[0])
    assert [m.state for m in report(model).modules] == ["ours", "stock"]
    assert not report(model).active


def test_a_stock_module_that_replace_in_would_refuse_or_leave_says_why():
    model = Stock()
    model.forward = print  # type: ignore[assignment]
    assert "the instance has a forward of its own, put there by builtins.print" in str(
        report(model)
    )
    shapeless = Stock()
    del shapeless.align_projector
    assert "not of the shape of what is replaced: the model itself" in str(report(shapeless))


def test_an_instance_with_a_method_of_its_own_is_told_whoever_put_it_there():
    def replaced(*_: Any) -> None: ...

    model = Model()
    model.embed.forward = replaced  # type: ignore[assignment]
    (module,) = report(model).modules
    assert module.state == "own forward"
    assert "the instance has a forward of its own, tests.kernels.insert.test_report" in module.why
    assert module.ways is not None
    assert not report(model).active
    other = merge()
    other.prepare_inputs_embeds = replaced
    (module,) = report(other).modules
    assert (module.state, "prepare_inputs_embeds of its own" in module.why) == ("own forward", True)


class Derived(ImageInsertEmbedding):
    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        return super().forward(*arguments, **options) * 2


class DerivedInName(ImageInsertEmbedding):
    """Changes nothing."""


def test_a_class_derived_from_ours_that_runs_something_else_is_told():
    words = nn.Embedding(VOCABULARY, HIDDEN)
    found = report([kind(words, WIDTH, HIDDEN) for kind in (Derived, DerivedInName)])
    assert [m.state for m in found.modules] == ["own forward", "ours"]
    assert "a class derived from ours has a forward of its own" in found.modules[0].why
    assert not found.active


def test_tensors_without_memory_on_a_device_that_is_not_there_are_reported_too():
    model = Model()
    with FakeTensorMode():
        for module in (model.words, model.embed.align_projector):
            module.weight = nn.Parameter(torch.empty(module.weight.shape, device="cuda:0"))
        assert ways_in(model).projection.how == ways_in(model).plan.how == "Triton"
        assert str(ways_in(model).projector_place) == "cuda:0, float32"


def test_a_module_without_projector_says_so():
    model = Model()
    model.embed.align_projector = None  # type: ignore[assignment]
    (module,) = report(model).modules
    assert (module.ways, module.why) == (None, "no align_projector: it embeds no pictures here")


@pytest.mark.no_launch
def test_chunks_and_wrappers_show_in_the_names():
    chunks = [nn.ModuleDict({"inner": Model()}), nn.Linear(1, 1), torch.compile(Model())]
    found = report(chunks)
    assert [m.name for m in found.modules] == ["0.inner.embed", "2._orig_mod.embed"]
    assert found.active


def test_a_model_with_nothing_of_it_says_why():
    assert str(report(nn.Linear(1, 1))) == "nothing that step37 replaces in Linear"
    assert str(report([])) == "nothing that step37 replaces in an empty list"
    assert not report([]).active
    stage = nn.Linear(1, 1)
    stage.pre_process = False  # type: ignore[assignment]
    assert str(report([stage])).endswith(": not the first pipeline stage")


def test_the_tower_is_told_by_whether_it_is_channels_last():
    class Step37VisionModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit_downsampler2 = nn.Conv2d(1, 1, 1)

    model = nn.ModuleDict({"tower": Step37VisionModel(), "embed": Model().embed})
    states = [m.state for m in report(model).modules]
    assert states == ["stock", "ours"]
    assert report(model).active  # the tower is replaced by choice alone
    megatron.replace_in(model, channels_last=True)
    assert [m.state for m in report(model).modules] == ["ours", "ours"]
    del model["tower"].vit_downsampler2
    assert report(model).modules[0].state == "stock"


def test_a_report_changes_nothing_and_calls_nothing(monkeypatch):
    for kind in (nn.Linear, nn.Embedding):
        monkeypatch.setattr(kind, "__call__", lambda *_: pytest.fail("called"))
    model = Model(gradient_accumulation_fusion=True)
    before = copy.deepcopy(vars(model.embed)), list(vars(model.embed.align_projector.weight))
    report(model)
    after = copy.deepcopy(vars(model.embed)), list(vars(model.embed.align_projector.weight))
    assert before[0].keys() == after[0].keys()
    assert before[1] == after[1]
    assert before[0]["_told"] == after[0]["_told"] == []


def test_another_argument_is_refused_by_name():
    for given in (None, "model", [nn.Linear(1, 1), None]):
        with pytest.raises(TypeError, match="model: expected a module or a list of modules"):
            report(given)  # type: ignore[arg-type]
        for replace_in in (megatron.replace_in, automodel.replace_in):
            with pytest.raises(TypeError, match="model: expected a module or a list of modules"):
                replace_in(given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rows: expected at least 1, got 0"):
        report(Model(), rows=0)


def test_the_package_offers_it():
    assert step37_kernels.report is report
    assert isinstance(report(Model()), Report)


def test_the_line_comes_again_after_other_options_and_not_from_copies_that_have_told(caplog):
    model = Model()
    ids, images = batch()
    with caplog.at_level(logging.INFO, logger="step37_kernels.image_insert_embedding"):
        model(ids, images)
        copy.deepcopy(model)(ids, images)
        pickle.loads(pickle.dumps(model.embed))(ids, images)
        assert len(caplog.records) == 1
        megatron.replace_in(model, lookup="call")
        model(ids, images)
    assert len(caplog.records) == 2


def test_replicas_that_are_made_anew_in_each_forward_tell_once(caplog):
    model = Model()
    ids, images = batch()
    with caplog.at_level(logging.INFO, logger="step37_kernels.image_insert_embedding"):
        for _ in range(3):
            replica = model.embed._replicate_for_data_parallel()
            replica.align_projector = model.embed.align_projector
            replica(ids, images)
    assert len(caplog.records) == 1


@pytest.mark.no_launch
def test_the_line_breaks_no_graph_and_is_no_reason_to_trace_again(caplog):
    model = Model(impl="torch")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    ids, images = batch()
    with caplog.at_level(logging.INFO, logger="step37_kernels.image_insert_embedding"):
        compiled(ids, images)
        assert not [r for r in caplog.records if r.name.startswith("step37")]
        model(ids, images)
        compiled(ids, images)
    assert counter.frame_count == 1
    assert len([r for r in caplog.records if r.name.startswith("step37")]) == 1
