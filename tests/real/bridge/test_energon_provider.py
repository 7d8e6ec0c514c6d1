"""Shards under Bridge's own builders of data, its checkpoints of the data, and its model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.bridge.data.loaders import setup_data_iterators
from megatron.bridge.data.utils import get_dataset_provider
from megatron.bridge.training.checkpointing import (
    maybe_load_dataloader_state,
    maybe_save_dataloader_state,
)
from megatron.bridge.training.config import TrainingConfig, ValidationConfig
from megatron.bridge.training.setup import _bind_dataset_provider_context
from megatron.bridge.training.state import TrainState
from megatron.bridge.utils.instantiate_utils import instantiate
from megatron.core.process_groups_config import ProcessGroupCollection

from step37_data.forward_step import ForwardStep
from step37_energon.provider import EnergonPacks, Step37EnergonSFTDataProvider
from step37_kernels import ImageInsertEmbedding
from step37_kernels.megatron import patch_step37
from tests.energon.conftest import TOKENIZER, folder, shards  # noqa: F401
from tests.megatron.processes import CudaMeansCpu, run
from tests.real.bridge import bridge_model
from tests.real.bridge.bridge_model import VISION, build
from tests.real.bridge.test_forward_step import State

SIDE = 13 * 4 * VISION["patch_size"]  # 169 rows, as the template says: the tower halves twice


def provider_of(path: Path, num_workers: int = 0) -> Step37EnergonSFTDataProvider:
    return Step37EnergonSFTDataProvider(
        path=str(path),
        tokenizer_path=TOKENIZER,
        max_packing_seqlen=400,
        packing="best_fit",
        packing_buffer_size=10,
        num_workers=num_workers,
    )


def set_up(dataset: Step37EnergonSFTDataProvider) -> tuple[Any, ProcessGroupCollection]:
    """The training iterator that Bridge's ``setup`` makes, and the groups."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    cfg = SimpleNamespace(
        dataset=dataset,
        model=None,
        train=TrainingConfig(train_iters=10, global_batch_size=2, micro_batch_size=1),
        validation=ValidationConfig(eval_iters=0),
    )
    make = _bind_dataset_provider_context(
        get_dataset_provider(dataset), tokenizer=None, pg_collection=groups
    )
    train_state = TrainState()
    with CudaMeansCpu():
        train, valid, test = setup_data_iterators(cfg, train_state, 1, make, groups.dp)
    assert train_state.do_train
    assert isinstance(train.iterable, EnergonPacks)
    assert valid is None
    assert test is None
    return train, groups


def around_a_restart(_rank: int, path: str, saved: str) -> list[list[torch.Tensor]]:
    """Losses of three steps before a state is saved, of three behind it, and of three resumed.

    The patched class of Bridge's, of a few channels, for pictures of the size they have.
    """
    bridge_model.VOCABULARY = bridge_model.TEXT["vocab_size"] = 770
    patch_step37(impl="torch")
    model = build(vision={"image_size": SIDE}).eval()
    assert isinstance(model.image_insert_embedding, ImageInsertEmbedding)

    def losses(step: ForwardStep, iterator: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            return [step(state, iterator, model)[0] for _ in range(3)]

    dataset = provider_of(Path(path), num_workers=2)
    iterator, groups = set_up(dataset)
    state = State(dataset)
    step = ForwardStep(device="cpu", dtype=torch.float32, prefetch_depth=2)
    before = losses(step, iterator)
    maybe_save_dataloader_state([model], iterator, 3, saved, pg_collection=groups)
    wanted = losses(step, iterator)
    step.close()

    resumed, groups = set_up(provider_of(Path(path), num_workers=2))
    maybe_load_dataloader_state(resumed, 3, saved, pg_collection=groups)
    step = ForwardStep(device="cpu", dtype=torch.float32, prefetch_depth=2)
    found = losses(step, resumed)
    step.close()
    return [before, wanted, found]


def test_what_bridge_trains_on_after_a_restart_is_what_it_would_have_trained_on(
    shards: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    # In a process of its own: what other tests compiled may hold their process groups. A forked
    # worker whose collector meets one joins the group's thread, which it has not, and dies.
    saved = str(tmp_path / "checkpoints")
    ((before, wanted, found),) = run(around_a_restart, str(shards), saved, world=1)
    for one, other in zip(wanted, found, strict=True):
        assert torch.equal(one, other)
    assert not any(torch.equal(one, other) for one in before for other in found)
    assert all(torch.isfinite(loss).all() for loss in before + found)


def of_a_rank(_rank: int, path: str, saved: str) -> list[list[str]]:
    """The keys of eight packs, and of the five that are drawn after a restart behind the third."""
    iterator, groups = set_up(provider_of(Path(path)))
    keys = [next(iterator)["__key__"] for _ in range(3)]
    maybe_save_dataloader_state([], iterator, 3, saved, pg_collection=groups)
    keys += [next(iterator)["__key__"] for _ in range(5)]
    resumed, groups = set_up(provider_of(Path(path)))
    maybe_load_dataloader_state(resumed, 3, saved, pg_collection=groups)
    assert [next(resumed)["__key__"] for _ in range(5)] == keys[3:]
    return keys


def test_every_data_parallel_rank_draws_its_own_and_has_a_file_of_its_own(
    shards: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    first, second = run(of_a_rank, str(shards), str(tmp_path))
    assert first[0] != second[0]
    files = sorted(path.name for path in tmp_path.rglob("*.pt"))
    assert files == ["train_dataloader_dprank000.pt", "train_dataloader_dprank001.pt"]


def test_bridge_reads_the_provider_back_from_its_configuration() -> None:
    kind = Step37EnergonSFTDataProvider
    target = f"{kind.__module__}.{kind.__qualname__}"
    built = instantiate({"_target_": target, "path": "shards", "tokenizer_path": "folder"})
    assert type(built) is kind
    assert (built.path, built.dataloader_type) == ("shards", "external")
