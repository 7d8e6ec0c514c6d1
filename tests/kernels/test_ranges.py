"""The ranges of a profiler: there while one records, and nothing at all otherwise."""

from __future__ import annotations

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import profiler
from torch.profiler import ProfilerActivity, profile

from step37_kernels import ImageForInsert, ImageInsertEmbedding, automodel, ranges
from step37_kernels.integration.main_grad import MainGrad
from tests.kernels.checks import run_compiling

HIDDEN, WIDTH, VOCABULARY, IM_START = 16, 24, 32, 7
DOCS = Path(__file__).parents[2] / "docs"


def make(device: str, impl: str = "triton", **options: object) -> ImageInsertEmbedding:
    torch.manual_seed(0)
    words = nn.Embedding(VOCABULARY, HIDDEN).to(device)
    return ImageInsertEmbedding(words, WIDTH, HIDDEN, impl=impl, **options).to(device)


def batch(device: str) -> tuple[Tensor, list[ImageForInsert]]:
    ids = torch.arange(40, device=device).view(2, 20) % 6
    ids[:, 4] = IM_START
    features = torch.randn(2, 3, WIDTH, device=device, requires_grad=True)
    return ids, [ImageForInsert(insert_start_token=IM_START, image_features=features)]


def recorded(prof: profile) -> Counter[str]:
    return Counter(e.name for e in prof.events() if e.name.startswith("step37/"))


def test_torch_profiler_shows_plan_and_insertion_in_forward_and_the_gradient_in_backward(device):
    module = make(device)
    ids, images = batch(device)
    with profile(activities=[ProfilerActivity.CPU]) as forward:
        output = module(ids, images)
    with profile(activities=[ProfilerActivity.CPU]) as backward:
        output.sum().backward()
    assert recorded(forward) == {"step37/plan": 1, "step37/insert": 1}
    assert recorded(backward) == {"step37/gradient": 1}


@pytest.mark.parametrize("lookup", ["auto", "call"])
def test_a_batch_without_pictures_has_the_ranges_of_what_it_does(device, lookup):
    module = make(device, lookup=lookup)
    ids, _ = batch(device)
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        module(ids).sum().backward()
    looked_up = {"step37/plan": 1, "step37/insert": 1, "step37/gradient": 1}
    assert recorded(prof) == (looked_up if lookup == "auto" else {})


def test_a_called_projector_has_the_ranges_and_the_table_that_of_its_gradient(device):
    module = make(device, impl="torch")
    module.align_projector.register_forward_hook(lambda *_: None)
    ids, images = batch(device)
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        module(ids, images).sum().backward()
    assert recorded(prof) == {"step37/plan": 1, "step37/insert": 1, "step37/gradient": 1}


def test_the_gradient_that_pytorch_adds_to_main_grad_has_a_range(device):
    weight = nn.Parameter(torch.ones(2, 2, device=device))
    weight.main_grad = torch.zeros(2, 2, device=device)  # type: ignore[attr-defined]
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        MainGrad.apply(weight, (weight,)).sum().backward()
    assert recorded(prof) == {"step37/gradient": 1}


def test_a_range_ends_where_the_part_fails(device):
    module = make(device)
    ids, images = batch(device)
    ids[0, 0] = VOCABULARY if device == "cpu" else ids[0, 0]
    with profile(activities=[ProfilerActivity.CPU]) as prof, contextlib.suppress(IndexError):
        module(ids, images)
    with profile(activities=[ProfilerActivity.CPU]) as after:
        make(device)(*batch(device))
    assert recorded(prof)["step37/plan"] == recorded(after)["step37/plan"] == 1
    events = [e for e in after.events() if e.name.startswith("step37/")]
    assert all(e.cpu_parent is None for e in events)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is called of PyTorch's profilers."""
    calls: list[str] = []

    @contextlib.contextmanager
    def noted(name: str) -> Iterator[None]:
        calls.append(f"{threading.get_ident()} push {name}")
        yield
        calls.append(f"{threading.get_ident()} pop")

    monkeypatch.setattr(profiler, "record_function", noted)
    monkeypatch.setattr(torch.profiler, "record_function", noted)
    monkeypatch.setattr(torch.cuda.nvtx, "range", noted)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: calls.append(name))
    return calls


def test_without_a_profiler_and_the_switch_nothing_of_either_is_called(device, counted):
    module = make(device)
    ids, images = batch(device)
    module(ids, images).sum().backward()
    module(ids).sum().backward()
    assert counted == []
    assert ranges.profiled("plan") is ranges.profiled("gradient")  # nothing is made, either


def test_with_the_switch_each_part_is_a_range_of_nvtx(device, counted, monkeypatch):
    monkeypatch.setattr(ranges, "_nvtx", True)
    module = make(device)
    ids, images = batch(device)
    module(ids, images).sum().backward()
    pushed = [call.split()[-1] for call in counted if "push" in call]
    assert pushed == ["step37/plan", "step37/insert", "step37/gradient"]
    assert [call.split()[1] for call in counted] == ["push", "pop"] * 3


def python(value: str, script: str) -> tuple[int, str, str]:
    done = run_compiling(
        "-c", f"import os; os.environ['STEP37_NVTX'] = {value!r}\nimport torch\n{script}"
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.no_launch
def test_the_switch_is_read_once_from_the_environment():
    script = (
        "torch.cuda.nvtx.mark = print\n"
        "from step37_kernels import ranges\n"
        "os.environ['STEP37_NVTX'] = '1'\n"
        "print(ranges._nvtx)"
    )
    assert python("1", script)[1].split("\n")[-2] == "True"
    assert python("0", script)[1] == python("", script)[1] == "False\n"


@pytest.mark.no_launch
def test_another_value_of_the_switch_and_a_pytorch_without_nvtx_are_refused():
    _, _, error = python("yes", "import step37_kernels.ranges")
    assert "ValueError: STEP37_NVTX: expected 0 or 1, got 'yes'" in error
    if torch.version.cuda is None:
        _, _, error = python("1", "import step37_kernels.ranges")
        assert "RuntimeError: STEP37_NVTX=1 needs NVTX" in error


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("switch", [False, True])
def test_a_compiled_module_stays_one_graph_under_a_profiler(device, impl, switch, monkeypatch):
    monkeypatch.setattr(ranges, "_nvtx", switch)
    module = make(device, impl=impl)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    ids, images = batch(device)
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        traced = compiled(ids, images)
        traced.sum().backward()
    assert torch.equal(traced, compiled(ids, images))
    monkeypatch.setattr(ranges, "_nvtx", False)
    assert torch.equal(traced, module(ids, images))
    assert recorded(prof) == {}
    names = {event.name for event in prof.events()}
    assert "step37::plan" in names
    assert impl == "torch" or {"step37::project_insert", "step37::gradient_rows"} <= names


class Merge(automodel.FusedMerge, nn.Module):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.language_model = nn.Module()
        self.language_model.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.vit_large_projector = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.config = type("Config", (), {"image_token_id": IM_START})
        self.step37_options = automodel._Options(impl="triton")
        self.step37_told = []


@pytest.mark.parametrize("given", ["features", "features of a called projector", "rows"])
def test_the_merge_of_automodel_has_the_same_ranges(device, given):
    merge = Merge().to(device)
    if "called" in given:
        merge.vit_large_projector.register_forward_hook(lambda *_: None)
        merge.step37_options = automodel._Options(impl="torch")
    ids = torch.arange(12, device=device).view(1, 12)
    images: object = torch.randn(1, HIDDEN, device=device)
    if given != "rows":
        features = torch.randn(1, 1, WIDTH, device=device)
        images = automodel._Features(projector=merge.vit_large_projector, tensors=[features])
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        merge.prepare_inputs_embeds(ids, images).sum().backward()
    assert recorded(prof) - Counter(["step37/gradient"]) == {"step37/plan": 1, "step37/insert": 1}
    assert ("step37/gradient" in recorded(prof)) == (given == "features")


def test_the_pages_name_the_ranges_and_kernels_that_there_are():
    bridge = (DOCS / "megatron-bridge.md").read_text(encoding="utf-8")
    automodel_page = (DOCS / "nemo-automodel.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `step37/(\w+)` \|", bridge, re.MULTILINE)
    assert listed == list(get_args(ranges.Part))
    ops = Path(ranges.__file__).parent / "ops"
    kernels = {
        name
        for file in ops.glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", file.read_text("utf-8"), re.MULTILINE)
    }
    operators = Path(ranges.__file__).parent / "operators.py"
    registered = re.findall(r"^def (\w+)\(", operators.read_text("utf-8"), re.MULTILINE)
    for page in (bridge, automodel_page):
        assert set(re.findall(r"`(\w+_kernel)`", page)) <= kernels
        assert set(re.findall(r"`step37/(\w+)`", page)) <= set(listed)
        assert set(re.findall(r"`step37::(\w+)`", page)) <= set(registered)
