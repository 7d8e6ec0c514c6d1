"""Data side: measuring lengths, starting again, scheduling, collating; against the plain loop.

The peers are the straightforward implementations: every prefix of a conversation rendered and
tokenised, a Python loop over a heap and a list of tuples, positions filled sub-sequence by
sub-sequence. Each row first checks that both give the same result.

Run ``python -m bench data`` (about half a minute; ``--quick`` stops at 10⁵ samples).
"""

from __future__ import annotations

import argparse
import csv
import functools
import heapq
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.harness import environment
from step37_data.caches.lengths import probe_lengths
from step37_data.flickr8k_loader import Flickr8kSample, Step37Flickr8kDataset
from step37_data.pack_transform import pack_samples
from step37_data.packed_dataloader import MixedPackedDataloader, draw_schedule
from step37_data.packing import pack, pack_best_fit
from step37_data.template import Step37MultimodalTemplate

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PROMPT = "Describe this image in one sentence."
FLICKR8K = 6000
MAX_LENGTH = 2048


def seconds(work: Callable[[], Any], repeats: int = 3) -> float:
    """Least wall time of ``repeats`` runs."""
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begin)
    return best


def make_dataset(count: int) -> Step37Flickr8kDataset:
    """``count`` different captions in the style of the data set."""
    with (EXAMPLES / "flickr8k_mini/train/metadata.csv").open(newline="") as file:
        words = [w for row in csv.DictReader(file) for k, v in row.items() if k != "file_name"
                 for w in v.split()]  # fmt: skip
    pick = np.random.default_rng(0)
    samples = [
        Flickr8kSample(f"{i}.jpg", " ".join(pick.choice(words, pick.integers(5, 25))) + f" {i}")
        for i in range(count)
    ]
    template = Step37MultimodalTemplate(tokenizer_path=str(EXAMPLES / "tokenizer"))
    return Step37Flickr8kDataset(samples, template, PROMPT)


def plain_tokenise(tokenizer: Any, dialog: dict[str, Any]) -> tuple[list[int], list[float]]:
    """All placeholders written out, every prefix rendered and tokenised."""
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
    """The loop over a heap of domains, then over the samples, with lists of tuples."""
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
    """Concatenate, then fill the positions sub-sequence by sub-sequence."""
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


def bench_probing(rows: list[dict[str, Any]]) -> None:
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
    rows.append(
        {"subject": "measure lengths, one process", "size": 2000, "unit": "samples/s",
         "ours": 2000 / ours, "loop": 2000 / plain, "times": plain / ours}
    )  # fmt: skip


def bench_second_start(rows: list[dict[str, Any]]) -> None:
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
    rows.append(
        {"subject": "second start from the length cache", "size": FLICKR8K, "unit": "s",
         "ours": second, "loop": first, "times": first / second}
    )  # fmt: skip


def schedule(count: int) -> dict[str, float]:
    """Seconds, and peak memory of the process, of scheduling ``count`` samples on their own."""
    run = subprocess.run(
        [sys.executable, "-m", "bench.subjects.data", "--schedule", str(count)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    result: dict[str, float] = json.loads(run.stdout)
    return result


def schedule_here(count: int) -> dict[str, float]:
    def peak() -> float:
        # Not ru_maxrss, which counts the parent of a forked process too.
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024

    lengths = np.random.default_rng(0).integers(190, 260, count)
    # Whatever is loaded or started once.
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


def bench_schedule(rows: list[dict[str, Any]], largest: int) -> None:
    for power in range(4, largest + 1):
        figures = schedule(10**power)
        rows.append(
            {"subject": "schedule", "size": 10**power, "unit": "s", "ours": figures["seconds"],
             "loop": figures["loop seconds"], "times": figures["loop seconds"] / figures["seconds"],
             "MB": figures["megabytes"], "loop MB": figures["loop megabytes"]}
        )  # fmt: skip


def bench_collate(rows: list[dict[str, Any]]) -> None:
    dataset = make_dataset(9 * 20)
    packs = [[dataset[9 * p + i] for i in range(9)] for p in range(20)]
    for pieces in packs:
        ours, plain = pack_samples(pieces), plain_pack(pieces)
        assert all(torch.equal(ours[key], plain[key]) for key in plain)
    fast = seconds(lambda: [pack_samples(pieces) for pieces in packs], 10) / 20
    slow = seconds(lambda: [plain_pack(pieces) for pieces in packs], 10) / 20
    rows.append(
        {"subject": "collate 9 samples to a pack", "size": 9, "unit": "packs/s",
         "ours": 1 / fast, "loop": 1 / slow, "times": slow / fast}
    )  # fmt: skip


def bench_fill(rows: list[dict[str, Any]]) -> None:
    draw = np.random.default_rng(0)
    long_tailed = draw.lognormal(6.6, 0.8, 65536).clip(180, 4096).astype(int)
    for name, sizes, capacity in (
        ("Flickr8k-like", draw.integers(190, 235, 65536), 2048),
        ("log-normal 180–4096", long_tailed, 4096),
    ):
        greedy = pack(sizes, capacity, "drop").num_packed_samples
        begin = time.perf_counter()
        best = pack_best_fit(sizes, capacity, "drop")[1].num_packed_samples
        took = time.perf_counter() - begin
        total = int(sizes.sum())
        rows.append(
            {"subject": f"fill, {name} at {capacity}: best_fit", "size": len(sizes), "unit": "%",
             "ours": 100 * total / best / capacity, "loop": 100 * total / greedy / capacity,
             "times": greedy / best, "seconds": took}
        )  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    commit = environment(torch.device("cpu"))["commit"]
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, "
        f"commit {commit or 'unknown'}\n"
    )
    print("| subject | size | ours | plain loop | unit | × | process memory, ours / loop |")
    print("|---|---|---|---|---|---|---|")

    def figure(row: dict[str, Any], key: str) -> str:
        return f"{row[key]:.4g}" if key in row else ""

    for row in rows:
        memory = ""
        if "MB" in row:
            memory = f"{row['MB']:.0f} / {row['loop MB']:.0f} MB"
        print(
            f"| {row['subject']} | {row['size']:,} | {figure(row, 'ours')} | {figure(row, 'loop')} "
            f"| {row['unit']} | {figure(row, 'times')} | {memory} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="schedule 10⁵ samples at most")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--schedule", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.schedule:
        print(json.dumps(schedule_here(options.schedule)))
        return
    rows: list[dict[str, Any]] = []
    bench_probing(rows)
    bench_second_start(rows)
    bench_schedule(rows, 5 if options.quick else 7)
    bench_collate(rows)
    bench_fill(rows)
    show(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
