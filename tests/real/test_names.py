"""What we need of the frameworks is there; what the replaced modules offer is here, by name."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.bridge.models.stepfun.data.flickr8k import preprocess as stock_preprocess
from megatron.bridge.models.stepfun.data.flickr8k.provider import (
    Step37Flickr8kSFTDataProvider as StockProvider,
)
from megatron.bridge.utils.instantiate_utils import instantiate
from megatron.core.models.gpt.gpt_model import GPTModel
from nemo_automodel.components.datasets.vlm import pp_media as stock_pp_media
from PIL import Image

from step37_data import preprocess, provider
from step37_data.flickr8k_loader import read_flickr8k_metadata
from step37_data.packed_dataloader import MixedPackedDataloader
from step37_data.pp_media import VLM_PP_MEDIA_KEY, prepare_vlm_media_for_pp
from tests.real.bridge.bridge_model import MODEL, PACKAGE, build

STEPFUN = "megatron.bridge.models.stepfun"
NEEDED = [
    (MODEL, "Step37Model"),
    (MODEL, "ImageInsertEmbedding"),
    (f"{PACKAGE}.image_insert_embedding", "ImageInsertEmbedding"),
    (f"{PACKAGE}.image_insert_embedding", "ImageForInsert"),
    (f"{STEPFUN}.step37_flickr8k_step", "forward_step"),
    ("megatron.bridge.data.base", "DatasetProvider"),
    ("megatron.bridge.training.losses", "create_masked_next_token_loss_function"),
    ("megatron.bridge.training.train", "_should_skip_and_handle_iteration"),
    ("megatron.bridge.utils.instantiate_utils", "register_allowed_target_prefix"),
    ("megatron.core.rerun_state_machine", "RerunDataIterator"),
    ("megatron.core.packed_seq_params", "PackedSeqParams"),
    ("megatron.core.parallel_state", "get_tensor_model_parallel_group"),
    ("nemo_automodel.components.models.step3p7.model", "Step3p7Model"),
    ("nemo_automodel.components.models.step3p7.model", "Step3p7ForConditionalGeneration"),
    ("nemo_automodel.components.datasets.vlm.pp_media", "prepare_vlm_media_for_pp"),
    ("nemo_automodel.components.datasets.vlm.pp_media", "stage_vlm_media_for_pp"),
]


@pytest.mark.parametrize(("module", "name"), NEEDED)
def test_the_frameworks_have_what_is_replaced_or_called(module, name):
    assert hasattr(importlib.import_module(module), name), f"{module} has no {name} any more"


MODULES = {
    f"{STEPFUN}.data.flickr8k.{name}": f"step37_data.{name}"
    for name in (
        "flickr8k_loader",
        "multimodal_utils",
        "pack_transform",
        "packed_dataloader",
        "packing",
        "preprocess",
        "provider",
        "samplers",
        "template",
    )
}
MODULES["nemo_automodel.components.datasets.vlm.pp_media"] = "step37_data.pp_media"
MODULES[f"{STEPFUN}.step37_flickr8k_step"] = "step37_data.forward_step"
MODULES[f"{PACKAGE}.image_insert_embedding"] = "step37_kernels.image_insert_embedding"
# Implementation details that no documentation of the replaced modules lists.
UNLISTED = {
    "_stack_images",
    "_expand_step37_image_placeholders",
    "_identity_path",
    "_load_hf_tokenizer",
    "_build_packed_seq_params",
    "_will_run_forward_metadata_inference",
}


def own(module: Any) -> dict[str, Any]:
    """The functions, classes and constants that a module defines."""
    source = inspect.getsource(module)
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("__")
        and not inspect.ismodule(value)
        and getattr(value, "__module__", module.__name__) == module.__name__
        and (hasattr(value, "__module__") or f"\n{name} = " in source)
        and type(value).__module__ not in ("typing", "logging")
    }


@pytest.mark.parametrize(("theirs", "ours"), MODULES.items(), ids=MODULES.values())
def test_every_name_of_a_replaced_module_is_in_ours_with_its_parameters(theirs, ours):
    stock, module = own(importlib.import_module(theirs)), importlib.import_module(ours)
    missing = stock.keys() - UNLISTED - set(dir(module))
    assert not missing
    for name in stock.keys() - UNLISTED:
        if inspect.isfunction(stock[name]):
            given = set(inspect.signature(stock[name]).parameters)
            assert given <= set(inspect.signature(getattr(module, name)).parameters), name


def test_the_private_names_mean_what_they_meant(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    path = tmp_path / "picture.png"
    Image.effect_noise((90, 60), 80).convert("RGB").save(path)
    for name in (path, tmp_path / "missing.png"):
        theirs, mine = (m._load_image(str(name)) for m in (stock_preprocess, preprocess))
        assert (mine.size, mine.mode) == (theirs.size, theirs.mode)
        assert mine.tobytes() == theirs.tobytes()
        assert torch.equal(
            preprocess._image_to_tensor(mine, 56), stock_preprocess._image_to_tensor(theirs, 56)
        )
    assert preprocess._CLIP_MEAN == stock_preprocess._CLIP_MEAN
    assert preprocess._CLIP_STD == stock_preprocess._CLIP_STD
    images = [(torch.rand(3, 28, 28), 0), (torch.rand(3, 28, 28), 1)]
    options: dict[str, Any] = {"patch_start_id": 8, "image_start_id": 7, "to_cuda": False}
    pairs = zip(
        preprocess.build_image_for_insert(images, **options),
        stock_preprocess.build_image_for_insert(images, **options),
        strict=True,
    )
    for mine, theirs in pairs:
        assert mine.insert_start_token == theirs.insert_start_token
        assert torch.equal(mine.images, theirs.images)
    args = [
        m.compute_rope_args([images[0][0]], 14, to_cuda=False)
        for m in (preprocess, stock_preprocess)
    ]
    assert torch.equal(args[0][0], args[1][0])
    assert args[0][1] == args[1][1]


class Sample(dict):
    def __len__(self) -> int:
        return 4


def test_the_dataloader_shows_its_order_as_stock_does():
    from megatron.bridge.models.stepfun.data.flickr8k.packed_dataloader import (
        MixedPackedDataloader as Stock,
    )

    arguments: dict[str, Any] = {
        "datasets": [[Sample()] * 5, [Sample()] * 3],
        "epochs": [1.0, 2.0],
        "max_length": 9,
        "dataset_sampling": ["random", "sequential"],
    }
    ours, stock = MixedPackedDataloader(**arguments), Stock(**arguments)
    for name in ("piece_order", "ds_epochs", "dataset_sampling"):
        assert getattr(ours, name) == getattr(stock, name), name


def test_the_provider_survives_bridges_configuration_round_trip():
    kind = provider.Step37Flickr8kSFTDataProvider
    target = f"{kind.__module__}.{kind.__qualname__}"
    built = instantiate({"_target_": target, "tokenizer_path": "folder", "sample_count": 3})
    assert type(built) is kind
    assert (built.tokenizer_path, built.sample_count) == ("folder", 3)
    assert set(StockProvider.__dataclass_fields__) <= set(kind.__dataclass_fields__)


def test_rows_that_all_end_in_a_comma_are_read_and_text_in_surplus_cells_is_not_lost(
    tmp_path: Path,
):
    metadata = tmp_path / "metadata.csv"
    metadata.write_text("file_name,caption_0\na.jpg,a dog,\nb.jpg,a cat,,\n")
    captions = [s.caption for s in read_flickr8k_metadata(metadata, "caption_0", None)]
    assert captions == ["a dog", "a cat"]
    metadata.write_text("file_name,caption_0\na.jpg,a dog, running\n")
    with pytest.raises(ValueError, match=r"line 2: expected the 2 cells of the header, got \["):
        read_flickr8k_metadata(metadata, "caption_0", None)


def test_flat_patches_counted_by_sample_are_cut_as_automodels_collate_means_them():
    """5-D patches: its collate counts the image tokens of each sample, and the images besides."""

    def batch() -> dict[str, Any]:
        return {
            "input_ids": torch.zeros(2, 10, dtype=torch.int64),
            "pixel_values": torch.arange(8.0).view(8, 1, 1, 1, 1).expand(8, 2, 2, 2, 3),
            "num_patches": torch.tensor([8, 0]),
            "n_images_per_sample": torch.tensor([2, 0]),
        }

    ours = prepare_vlm_media_for_pp(batch(), 2, 2)[VLM_PP_MEDIA_KEY]
    stock = stock_pp_media.prepare_vlm_media_for_pp(batch(), batch_size=2, n_microbatches=2)
    for name, chunks in stock[stock_pp_media.VLM_PP_MEDIA_KEY].items():
        for mine, theirs in zip(ours[name], chunks, strict=True):
            assert torch.equal(mine, theirs), name
    assert [len(chunk) for chunk in ours["pixel_values"]] == [8, 0]


@pytest.mark.usefixtures("megatron")
def test_the_model_is_built_from_a_configuration_that_has_logit_dtype(monkeypatch):
    """Bridge's main branch reads it where 0.6.2 does not."""
    read = []
    init = GPTModel.__init__

    def newer(self: Any, config: Any, *arguments: Any, **options: Any) -> None:
        read.append(config.logit_dtype)
        init(self, config, *arguments, **options)

    monkeypatch.setattr(GPTModel, "__init__", newer)
    build()
    assert read == [None]
