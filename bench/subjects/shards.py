"""Subject ``shards``: measures time and memory of reading shards, compared with a plain encoder.

It writes ``--samples`` samples (one of 16 small pictures, a caption of 1 to 40 words each) and
reads them all, shuffled, with ``--workers`` worker processes: once through ``Step37TaskEncoder``,
and once through an encoder like the example in Energon's documentation. That one lets Energon
decode the pictures, tokenises captions, sorts samples by length and concatenates them. It has no
chat template, no loss mask and no checks.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import re
import tarfile
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from megatron import energon
from PIL import Image

from bench.harness import Settings, where
from bench.report import Column, Table
from step37_data.common.image_entry import IMAGE_TOKEN_COUNT
from step37_data.text.tokens import load_tokenizer
from step37_energon.task_encoder import Step37TaskEncoder, prepare_shards

TOKENIZER = str(Path(__file__).resolve().parents[2] / "examples" / "tokenizer")
WORDS = ["a", "dog", "runs", "over", "green", "grass", "while", "children", "look", "on"]
SHARD, PICTURES, BUFFER, LENGTH, REPORTS = 10_000, 16, 256, 2048, 10


def write(folder: Path, samples: int) -> None:
    """Write so many samples into a folder, as WebDataset shards with Energon's index."""
    draw = random.Random(0)
    pictures = []
    for _ in range(PICTURES):
        pictures.append(io.BytesIO())
        Image.effect_noise((24, 16), 60).convert("RGB").save(pictures[-1], "JPEG", quality=60)
    (folder / "train").mkdir()
    names = []
    for first in range(0, samples, SHARD):
        names.append(f"train/{first // SHARD:06d}.tar")
        with tarfile.open(folder / names[-1], "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(first, min(samples, first + SHARD)):
                words = draw.choices(WORDS, k=draw.randint(1, 40))
                picture = pictures[number % PICTURES].getvalue()
                for part, content in (("jpg", picture), ("txt", " ".join(words).encode())):
                    member = tarfile.TarInfo(f"{number:09d}.{part}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    prepare_shards(folder, {"train": names})


@energon.stateless
def cook(sample: dict[str, Any]) -> dict[str, Any]:
    """Name the parts of a raw sample."""
    return {**energon.basic_sample_keys(sample), "image": sample["jpg"], "text": sample["txt"]}


class ExampleEncoder(energon.TaskEncoder[Any, Any, Any, Any]):
    """Packs like the example in Energon's documentation, with our length of packs."""

    cookers = (energon.Cooker(cook),)
    decoder = energon.SampleDecoder(image_decode="torchrgb")

    def __init__(self) -> None:
        self.tokenizer = load_tokenizer(TOKENIZER)

    @energon.stateless
    def encode_sample(self, sample: dict[str, Any]) -> dict[str, Any]:
        return {**sample, "tokens": torch.tensor(self.tokenizer(sample["text"])["input_ids"])}

    def select_samples_to_pack(self, samples: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        packs: list[list[dict[str, Any]]] = []
        room = 0
        for sample in sorted(samples, key=lambda sample: len(sample["tokens"])):
            length = len(sample["tokens"]) + IMAGE_TOKEN_COUNT
            if length > room:
                packs.append([])
                room = LENGTH
            packs[-1].append(sample)
            room -= length
        return packs

    @energon.stateless
    def pack_selected_samples(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "__key__": [sample["__key__"] for sample in samples],
            "__restore_key__": (),
            "tokens": torch.cat([sample["tokens"] for sample in samples]),
            "images": torch.stack([sample["image"] for sample in samples]),
        }

    @energon.stateless
    def batch(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        return samples[0]


def of_workers() -> tuple[list[int], float]:
    """Return the MiB of memory of each worker, and the CPU seconds of all workers."""
    memory, ticks = [], 0
    for pid in sorted(child.pid or 0 for child in multiprocessing.active_children()):
        status = Path(f"/proc/{pid}/status").read_text()
        memory.append(int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) // 1024)
        ticks += sum(
            map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])
        )
    return memory, ticks / os.sysconf("SC_CLK_TCK")


def draw(folder: Path, encoder: Any, samples: int, workers: int) -> Iterator[tuple[Any, ...]]:
    """Read the samples, and report ten times meanwhile.

    Yields samples, packs, samples a second, packs a second, µs of CPU a sample, and the MiB of each
    worker.
    """
    ranks = energon.WorkerConfig(rank=0, world_size=1, num_workers=workers)
    sizes = {"batch_size": 1, "packing_buffer_size": BUFFER, "shuffle_buffer_size": 100}
    dataset = energon.get_train_dataset(
        folder, worker_config=ranks, task_encoder=encoder, max_samples_per_sequence=100, **sizes
    )
    loader = iter(energon.get_savable_loader(dataset))
    next(loader)  # the workers have started
    _, cpu_before = of_workers()
    start = time.perf_counter()
    drawn = packs = 0
    for part in range(1, REPORTS + 1):
        while drawn < samples * part // REPORTS:
            drawn += len(next(loader)["__key__"])
            packs += 1
        seconds, (memory, cpu) = time.perf_counter() - start, of_workers()
        cost = (cpu - cpu_before) / drawn * 1e6
        yield drawn, packs, drawn / seconds, packs / seconds, cost, memory
    loader.close()  # ends the workers


def run(settings: Settings) -> Iterator[Table]:
    """Yield one table: ten lines for each encoder, with a rising number of samples read."""
    samples, workers = settings.options["samples"], settings.options["workers"]
    figures = ("samples", "packs", "samples/s", "packs/s", "µs of CPU a sample")
    columns = (Column("encoder"), *(Column(name, "{:.0f}") for name in figures), Column("MiB"))
    text = where(
        torch.device("cpu"),
        **{"megatron-energon": version("megatron-energon"), "cores": str(os.cpu_count())},
    )
    ours = Step37TaskEncoder(TOKENIZER, max_packing_seqlen=LENGTH, packing="best_fit")
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), samples)

        def lines() -> Iterator[tuple[Any, ...]]:
            for name, encoder in (("Step37TaskEncoder", ours), ("example", ExampleEncoder())):
                for *row, memory in draw(Path(folder), encoder, samples, workers):
                    yield name, *row, ", ".join(map(str, memory))

        text += f"\n\n{samples} samples, {workers} workers; MiB of each worker."
        yield Table(text=text, columns=columns, lines=lines())
