"""Which pipeline stage loads images: two gloo processes with Megatron's own parallel state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from step37_data.preprocess import preprocess_packed_batch
from tests.megatron.processes import run

PHOTO = Path(__file__).parents[3] / "examples" / "flickr8k_mini" / "train" / "coffee.jpg"
WHOLE, WITHOUT_SECOND = [1.0] * 6, [1.0] * 3 + [0.0] * 3
Stage = dict[tuple[bool, str], list[Any]]


def load(rank: int, missing: str) -> Stage:
    """Load a batch on this rank's stage, with every ``only_pp_first_stage`` and ``on_broken``.

    Returns:
        the number of images and the loss mask, by these two.
    """
    del rank
    tokens = torch.tensor([7, 1, 1, 7, 1, 1])
    batch = {
        "tokens": tokens,
        "labels": tokens,
        "loss_masks": torch.ones(6),
        "cu_seqlens": torch.tensor([0, 3, 6], dtype=torch.int32),
        "position_id": torch.tensor([0, 1, 2, 0, 1, 2]),
        "image_paths": [(str(PHOTO), 0), (missing, 0)],
    }
    result: Stage = {}
    for only_first in (True, False):
        for on_broken in ("zero", "skip-loss"):
            out = preprocess_packed_batch(
                batch,
                img_start_token_id=7,
                patch_start_token_id=8,
                image_size=28,
                patch_image_size=14,
                encoder_patch_size=14,
                only_pp_first_stage=only_first,
                device="cpu",
                on_broken=on_broken,
            )
            images = sum(len(group.images) for group in out["images"])
            result[only_first, on_broken] = [images, out["loss_masks"][0].tolist()]
    return result


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> list[Stage]:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    missing = str(tmp_path_factory.mktemp("stages") / "missing.jpg")
    return run(load, missing, pipeline_model_parallel_size=2)


def test_only_the_first_stage_loads_images(stages):
    assert [stage[True, "zero"] for stage in stages] == [[2, WHOLE], [0, WHOLE]]


def test_every_stage_loads_them_if_asked_to(stages):
    assert [stage[False, "zero"] for stage in stages] == [[2, WHOLE], [2, WHOLE]]


def test_every_stage_knows_whose_loss_to_skip(stages):
    assert [stage[True, "skip-loss"] for stage in stages] == [
        [2, WITHOUT_SECOND],
        [0, WITHOUT_SECOND],
    ]
