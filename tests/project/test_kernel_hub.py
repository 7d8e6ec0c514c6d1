"""The folder for the ``kernels`` package is loaded and mapped by that package itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import step37_kernels
from step37_kernels import ImageForInsert
from step37_kernels import reference as ref
from tools.kernel_hub import relative, write_hub

kernels = pytest.importorskip("kernels", reason="the kernels package is not installed")

IDS = torch.tensor([[5, 128000, 9, 9, 128001, 7, 128000, 9, 9, 1]])
FEATURES = torch.arange(24, dtype=torch.float32).view(2, 2, 6) / 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "made"
    write_hub(out)
    return out


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    return kernels.get_local_kernel(folder, backend="cpu")


class WordEmbedding(nn.Embedding):
    def forward(self, input_ids: Tensor, position_ids: Any) -> Tensor:
        assert position_ids is None
        return super().forward(input_ids % 16).transpose(0, 1)


class Stock(nn.Module):
    """A class of the shape of Megatron-Bridge's; its own forward must not run."""

    def __init__(self, words: nn.Module) -> None:
        super().__init__()
        self._words = (words,)
        self.align_projector = nn.Linear(6, 4, bias=False)

    @property
    def _language_embedding(self) -> nn.Module:
        return self._words[0]

    def forward(
        self, input_ids: Tensor, images: Any = None, position_ids: Any = None, **kwargs: Any
    ) -> Tensor:
        raise AssertionError(f"this ran: {input_ids}, {images}, {position_ids}, {kwargs}")


class Normalize(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        raise AssertionError(f"this ran: {pixels}")


def test_the_folder_loads_and_offers_what_the_package_offers(loaded: Any) -> None:
    assert loaded.__name__.startswith("_step37_cpu_")
    assert set(step37_kernels.__all__) <= set(dir(loaded))
    plan = loaded.plan_insert(IDS, [(128000, [2, 2])])
    assert plan.row_at[:, 0].tolist() == [-1, -1, 0, 1, -1, -1, -1, 2, 3, -1]
    pixels = torch.arange(48, dtype=torch.uint8).view(1, 4, 4, 3)
    assert torch.equal(loaded.clip_normalize(pixels), ref.clip_normalize(pixels))


def test_it_is_a_copy_that_shares_nothing_with_the_installed_package(loaded: Any) -> None:
    assert loaded.InsertPlan is not step37_kernels.InsertPlan
    outside = [
        f"{module.__name__}.{name}"
        for key, module in list(sys.modules.items())
        if key.split(".")[0] == loaded.__name__
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) and value.__module__.startswith("step37_kernels")
    ]
    assert outside == []


def test_a_layer_takes_the_place_of_a_modules_forward_and_trains_its_projector(
    folder: Path,
) -> None:
    torch.manual_seed(0)
    words = WordEmbedding(16, 4)
    mapped = type("Mapped", (Stock,), {})
    kernels.replace_kernel_forward_from_hub(mapped, "ImageInsertEmbedding")
    model = nn.Sequential(mapped(words))
    names = list(model.state_dict())
    layer = kernels.LocalLayerRepository(repo_path=folder, layer_name="ImageInsertEmbedding")
    with kernels.use_kernel_mapping({"ImageInsertEmbedding": {"cpu": layer}}):
        model = kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu")
    group = ImageForInsert(insert_start_token=128000, image_features=FEATURES)
    output = model[0](IDS, [group])
    weight = model[0].align_projector.weight
    wanted = words(IDS, None).clone()
    for k, start in enumerate((2, 7)):
        wanted[start : start + 2, 0] = FEATURES[k] @ weight.T
    torch.testing.assert_close(output, wanted, rtol=1e-6, atol=1e-6)
    output.square().sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0
    assert list(model.state_dict()) == names
    # Another projector in its place is the one that counts.
    with torch.no_grad():
        model[0].align_projector = nn.Linear(6, 4, bias=False).requires_grad_(False)
        model[0].align_projector.weight.zero_()
        assert not model[0](IDS, [group])[2].any()


def test_a_layer_without_backward_serves_inference(folder: Path) -> None:
    mapped = type("MappedNormalize", (Normalize,), {})
    kernels.replace_kernel_forward_from_hub(mapped, "ClipNormalize")
    layer = kernels.LocalLayerRepository(repo_path=folder, layer_name="ClipNormalize")
    with kernels.use_kernel_mapping({"ClipNormalize": {"cpu": layer}}):
        module = kernels.kernelize(mapped(), mode=kernels.Mode.INFERENCE, device="cpu")
    pixels = torch.arange(48, dtype=torch.uint8).view(1, 4, 4, 3)
    assert torch.equal(module(pixels), ref.clip_normalize(pixels))


def test_every_backend_has_a_variant_of_its_own_id(folder: Path) -> None:
    variants = sorted(path.name for path in (folder / "build").iterdir())
    assert variants == ["torch-cpu", "torch-cuda", "torch-rocm"]
    texts = {path: (path / "metadata.json").read_text() for path in (folder / "build").iterdir()}
    assert len(set(texts.values())) == 3
    for path in folder.rglob("*.py"):
        assert '"step37::' not in path.read_text(encoding="utf-8"), path


def test_what_cannot_be_made_relative_or_would_be_overwritten_is_an_error(tmp_path: Path) -> None:
    assert relative("ops/plan_rows.py", "from step37_kernels.ops.common import x\n") == (
        "from ..ops.common import x\n"
    )
    with pytest.raises(ValueError, match=r"ops/plan_rows.py, line 2: an import that cannot"):
        relative("ops/plan_rows.py", "\nimport step37_kernels.ops.common\n")
    (tmp_path / "mine.txt").write_text("do not delete")
    with pytest.raises(FileExistsError, match="was not written by this command"):
        write_hub(tmp_path)


def test_one_command_writes_it(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tools.kernel_hub", "--out", str(tmp_path / "out")]
    for _ in range(2):  # a second run writes it anew
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        assert "variants torch-cpu, torch-cuda, torch-rocm" in done.stdout
    assert "-m tools.kernel_hub" in (root / "Makefile").read_text()
