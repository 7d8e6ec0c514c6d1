"""Subject ``data``: times listing, lengths, second start, schedule and collation beside a loop.

The loops are the straightforward ways: Python's CSV reader alone, and with the state of every file;
every prefix of a conversation rendered and tokenised; a Python loop over a heap and a list of
tuples; positions filled sub-sequence by sub-sequence. Each line of the table first checks that both
ways give the same result. All lines take about a minute; in a quick run the schedule ends at 10⁵
samples and the folder has 10⁴ pictures.
"""

from __future__ import annotations

import csv
import functools
import heapq
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.harness import Settings, where
from bench.report import Column, Table
from step37_data.caches.lengths import probe_lengths
from step37_data.flickr8k_loader import (
    Flickr8kSample,
    Step37Flickr8kDataset,
    prepare_flickr8k_samples,
    read_flickr8k_metadata,
)
from step37_data.pack_transform import pack_samples
from step37_data.packed_dataloader import MixedPackedDataloader, draw_schedule
from step37_data.packing import pack, pack_best_fit
from step37_data.template import Step37MultimodalTemplate

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PROMPT = "Describe this image in one sentence."
FLICKR8K = 6000
MAX_LENGTH = 2048
Line = tuple[Any, ...]
"""The cells of a line, one for each of :data:`COLUMNS`."""
COLUMNS = (
    Column("what"), Column("size", "{:,}"), Column("ours", "{:.4g}"),
    Column("plain loop", "{:.4g}"), Column("unit"), Column("×", "{:.4g}"),
    Column("process memory, ours / loop", "{:.0f} / {:.0f} MB"),
)  # fmt: skip


def seconds(work: Callable[[], Any], repeats: int = 3) -> float:
    """Measure the least wall time of ``repeats`` runs."""
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begin)
    return best


def caption_words() -> list[str]:
    """List the words of Flickr8k's captions, as often as they occur."""
    with (EXAMPLES / "flickr8k_mini/train/metadata.csv").open(newline="") as file:
        return [
            word
            for row in csv.DictReader(file)
            for column, text in row.items()
            if column != "file_name"
            for word in text.split()
        ]


def make_folder(root: Path, count: int) -> Path:
    """Make a split of ``count`` pictures with five captions each; return its ``metadata.csv``.

    The pictures hold one byte: nobody decodes them.
    """
    words, pick = caption_words(), np.random.default_rng(0)
    metadata = root / "train/metadata.csv"
    metadata.parent.mkdir(parents=True)
    with metadata.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", *(f"caption_{number}" for number in range(5))])
        for number in range(count):
            drawn = pick.choice(words, 55)
            captions = [" ".join(drawn[start : start + 11]) for start in range(0, 55, 11)]
            rows.writerow([f"{number:08}.jpg", *captions])
            (metadata.parent / f"{number:08}.jpg").write_bytes(b"x")
    return metadata


def plain_rows(metadata: Path) -> int:
    """Read all rows with Python's CSV reader, and say how many there are."""
    with metadata.open(encoding="utf-8-sig", newline="") as file:
        return sum(1 for _ in csv.reader(file, strict=True)) - 1


def plain_sizes(metadata: Path) -> list[int]:
    """Read all rows, and ask for the size of every picture."""
    folder = str(metadata.parent)
    with metadata.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        next(rows)
        return [os.stat(f"{folder}/{cells[0]}").st_size for cells in rows]


def listing(count: int) -> Iterator[Line]:
    """Read the metadata of a folder of ``count`` pictures, and prepare the samples of the folder.

    Prepared is what a run does before anything else: reading the metadata, and looking whether
    every picture is there and not empty.
    """
    with tempfile.TemporaryDirectory() as folder:
        metadata = make_folder(Path(folder), count)
        read = functools.partial(read_flickr8k_metadata, metadata)
        prepare = functools.partial(
            prepare_flickr8k_samples, cache_dir=folder, sample_count=None, progress=False
        )
        assert len(read()) == plain_rows(metadata) == count
        assert len(prepare()) == len(plain_sizes(metadata))
        for what, ours, plain in (
            ("read metadata.csv", read, plain_rows),
            ("list the pictures of a folder", prepare, plain_sizes),
        ):
            times = seconds(ours), seconds(functools.partial(plain, metadata))
            yield what, count, *times, "s", times[1] / times[0], None


def make_dataset(count: int) -> Step37Flickr8kDataset:
    """Make a data set of ``count`` different captions, of Flickr8k's words."""
    words, pick = caption_words(), np.random.default_rng(0)
    samples = [
        Flickr8kSample(f"{i}.jpg", " ".join(pick.choice(words, pick.integers(5, 25))) + f" {i}")
        for i in range(count)
    ]
    template = Step37MultimodalTemplate(tokenizer_path=str(EXAMPLES / "tokenizer"))
    return Step37Flickr8kDataset(samples, template, PROMPT)


def plain_tokenise(tokenizer: Any, dialog: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Tokenise with all placeholders written out, and every prefix rendered by itself."""
    image = "<im_start>" + "<im_patch>" * 169 + "<im_end>"
    messages = [
        {**message, "content": message["content"].replace("<image>", image)}
        for message in dialog["conversations"]
    ]

    def tokens(count: int, prompt: bool) -> list[int]:
        ids: list[int] = tokenizer.apply_chat_template(
            messages[:count], tokenize=True, return_dict=False, add_generation_prompt=prompt
        )
        return ids

    everything = tokens(2, False)
    start, end = len(tokens(1, True)), len(tokens(2, False))
    return everything, [float(start <= i < end) for i in range(len(everything))]


def plain_schedule(lengths: list[int], max_length: int) -> tuple[list[Any], list[Any]]:
    """Schedule by a loop over a heap of domains, then over the samples, with lists of tuples."""
    size = len(lengths)
    heap = [(0.0, 0)]
    step = float(np.float32(1) / np.float32(size))
    order = torch.randperm(size, generator=torch.Generator().manual_seed(1234)).tolist()
    draws: list[tuple[int, int]] = []
    for number in range(size):
        score, domain = heapq.heappop(heap)
        heapq.heappush(heap, (score + step, domain))
        draws.append((domain, order[number]))
    ranges: list[tuple[int, int]] = []
    members: list[int] = []
    held = 0
    for number, (_, index) in enumerate(draws):
        if held + lengths[index] > max_length:
            ranges.append((members[0], len(members)))
            members, held = [], 0
        members.append(number)
        held += lengths[index]
        if held == max_length:
            ranges.append((members[0], len(members)))
            members, held = [], 0
    if members:
        ranges.append((members[0], len(members)))
    return draws, ranges


def plain_pack(pieces: list[Any]) -> dict[str, Any]:
    """Concatenate a pack, then fill its positions sub-sequence by sub-sequence."""
    padding = -sum(len(piece) for piece in pieces) % 64
    parts = [(p["tokens"], p["loss_mask"]) for p in pieces]
    if padding:
        parts.append((torch.zeros(padding + 1, dtype=torch.long), torch.zeros(padding + 1)))
    sizes = torch.tensor([len(tokens) - 1 for tokens, _ in parts])
    bounds = torch.cat([torch.zeros(1), torch.cumsum(sizes, 0)]).int()
    position = torch.zeros(int(bounds[-1]), dtype=torch.long)
    for i in range(len(bounds) - 1):
        start, end = int(bounds[i].item()), int(bounds[i + 1].item())
        position[start:end] = torch.arange(end - start)
    return {
        "tokens": torch.cat([tokens[:-1] for tokens, _ in parts]),
        "labels": torch.cat([tokens[1:] for tokens, _ in parts]),
        "loss_masks": torch.cat([mask[1:] for _, mask in parts]),
        "cu_seqlens": bounds,
        "position_id": position,
    }


def probing() -> Iterator[Line]:
    """Measure the lengths of 2000 samples, with one process."""
    dataset = make_dataset(2000)
    template, tokenizer = dataset.template, dataset.template.tokenizer
    dialogs = [dataset._to_dialog(sample, PROMPT) for sample in dataset.samples]
    for dialog in dialogs[:50]:
        tokens, mask = plain_tokenise(tokenizer, dialog)
        sample = template(dialog)
        assert sample["tokens"].tolist() == tokens
        assert sample["loss_mask"].tolist() == mask
    ours = seconds(lambda: probe_lengths(dataset, workers=0, progress=False))
    plain = seconds(lambda: [plain_tokenise(tokenizer, d) for d in dialogs[:500]], 2) * 4
    rates = (2000 / ours, 2000 / plain)
    yield "measure lengths, one process", 2000, *rates, "samples/s", plain / ours, None


def second_start() -> Iterator[Line]:
    """Start a data loader for the first time, and again from its cache of lengths."""
    dataset = make_dataset(FLICKR8K)
    with tempfile.TemporaryDirectory() as cache:
        start = functools.partial(
            MixedPackedDataloader, [dataset], [1.0], MAX_LENGTH, "drop", lengths_cache_dir=cache,
            progress=False,
        )  # fmt: skip
        made: list[MixedPackedDataloader] = []
        first = seconds(lambda: made.append(start()), 1)
        second = seconds(lambda: made.append(start()))
    assert len({loader.schedule_fingerprint() for loader in made}) == 1
    times = first / second
    yield "second start from the length cache", FLICKR8K, second, first, "s", times, None


def schedule_here(count: int) -> dict[str, float]:
    """Schedule ``count`` samples: seconds, and the peak memory of this process in MB.

    The peak is that of the process so far, so each count needs a process of its own.
    """

    def peak() -> float:
        # Not ru_maxrss, which includes the parent of a forked process.
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024

    lengths = np.random.default_rng(0).integers(190, 260, count)
    # Everything that is loaded or started only once.
    few = lengths[:20_000]
    pack(draw_schedule([few], [float(len(few))], ["random"])[2], MAX_LENGTH, "drop")
    plain_schedule(few.tolist(), MAX_LENGTH)
    begin = time.perf_counter()
    _, indices, sizes = draw_schedule([lengths], [float(count)], ["random"])
    result = pack(sizes, MAX_LENGTH, "drop")
    figures = {"seconds": time.perf_counter() - begin, "megabytes": peak()}
    begin = time.perf_counter()
    draws, ranges = plain_schedule(lengths.tolist(), MAX_LENGTH)
    figures["loop seconds"] = time.perf_counter() - begin
    figures["loop megabytes"] = peak()
    assert [index for _, index in draws] == indices.tolist()
    assert result.packed_sample_ranges == ranges
    return figures


def schedule(largest: int) -> Iterator[Line]:
    """Schedule 10⁴ samples, and ten times as many up to 10 to the power of ``largest``."""
    for power in range(4, largest + 1):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            figures = fresh.submit(schedule_here, 10**power).result()
        times = (figures["seconds"], figures["loop seconds"])
        memory = (figures["megabytes"], figures["loop megabytes"])
        yield "schedule", 10**power, *times, "s", times[1] / times[0], memory


def collate() -> Iterator[Line]:
    """Collate nine samples to a pack."""
    dataset = make_dataset(9 * 20)
    packs = [[dataset[9 * p + i] for i in range(9)] for p in range(20)]
    for pieces in packs:
        ours, plain = pack_samples(pieces), plain_pack(pieces)
        assert all(torch.equal(ours[key], plain[key]) for key in plain)
    fast = seconds(lambda: [pack_samples(pieces) for pieces in packs], 10) / 20
    slow = seconds(lambda: [plain_pack(pieces) for pieces in packs], 10) / 20
    yield "collate 9 samples to a pack", 9, 1 / fast, 1 / slow, "packs/s", slow / fast, None


def fill() -> Iterator[Line]:
    """Fill packs with ``best_fit`` and with the loop's next fit: % of their capacity in use."""
    draw = np.random.default_rng(0)
    long_tailed = draw.lognormal(6.6, 0.8, 65536).clip(180, 4096).astype(int)
    for name, sizes, capacity in (
        ("Flickr8k-like", draw.integers(190, 235, 65536), 2048),
        ("log-normal 180–4096", long_tailed, 4096),
    ):
        greedy = pack(sizes, capacity, "drop").num_packed_samples
        best = pack_best_fit(sizes, capacity, "drop")[1].num_packed_samples
        used = 100 * int(sizes.sum()) / capacity
        what = f"fill, {name} at {capacity}: best_fit"
        yield what, len(sizes), used / best, used / greedy, "%", greedy / best, None


def lines(largest: int) -> Iterator[Line]:
    """Measure the lines of the table, one after the other."""
    yield from listing(10 ** min(5, largest - 1))
    yield from probing()
    yield from second_start()
    yield from schedule(largest)
    yield from collate()
    yield from fill()


def run(settings: Settings) -> Iterator[Table]:
    """Yield the one table of this subject."""
    more = {"cores": str(os.cpu_count()), "numpy": np.__version__}
    yield Table(
        text=where(torch.device("cpu"), **more),
        columns=COLUMNS,
        lines=lines(settings.options["largest"]),
    )
