"""Fixtures: a folder of pictures and captions, its shards, and Energon reading them in order."""

from __future__ import annotations

import gc
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
TOKENIZER = str(EXAMPLES / "tokenizer")
SAMPLES = 45
WORDS = ["a", "dog", "runs", "over", "green", "grass", "while", "children", "look", "on"]


@pytest.fixture(autouse=True)
def only_objects_of_the_test_are_walked() -> Iterator[None]:
    """Every loader and worker of Energon's collects garbage, and looks at all objects there are.

    Those of a test process are more than a million, and have nothing to do with it.
    """
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """45 captions of 1 to 60 words for 10 pictures: photographs, a PNG with alpha, a WebP."""
    root = tmp_path_factory.mktemp("folder")
    shutil.copytree(EXAMPLES / "flickr8k_mini" / "train", root / "train")
    Image.effect_noise((90, 40), 80).convert("RGBA").save(root / "train" / "noise.png")
    Image.effect_mandelbrot((400, 130), (-2, -1, 1, 1), 50).save(root / "train" / "fractal.webp")
    draw = random.Random(5)
    pictures = sorted(path.name for path in (root / "train").iterdir() if path.suffix != ".csv")
    rows = ["file_name,caption_0"]
    for number in range(SAMPLES):
        caption = " ".join(draw.choices(WORDS, k=draw.randint(1, 60)))
        rows.append(f"{pictures[number % len(pictures)]},{number} {caption}")
    (root / "train" / "metadata.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="session")
def shards(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from step37_inspect.cli import main

    out = tmp_path_factory.mktemp("shards")
    assert main(["shard", str(folder), str(out), "--samples-per-shard", "7", "--quiet"]) == 0
    return out


@pytest.fixture
def in_order() -> Callable[..., Any]:
    """Energon's training data set without any shuffling, one epoch unless told otherwise."""

    def build(path: Path, encoder: Any, **given: Any) -> Any:
        from megatron import energon

        gc.freeze()  # A loader without workers that has come to its end has taken it back.
        ranks = {
            name: given.pop(name, default)
            for name, default in (("rank", 0), ("world_size", 1), ("num_workers", 0))
        }
        handlers = {name: given.pop(name) for name in list(given) if name.endswith("_handler")}
        options = {
            "batch_size": 1,
            "packing_buffer_size": 16,
            "shuffle_buffer_size": None,
            "max_samples_per_sequence": None,
            "shuffle_over_epochs_multiplier": None,
            "parallel_shard_iters": 1,
            "repeat": False,
        }
        return energon.get_train_dataset(
            path,
            worker_config=energon.WorkerConfig(**ranks, **handlers),
            task_encoder=encoder,
            **(options | given),
        )

    return build
