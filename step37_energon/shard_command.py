"""The command ``step37-data shard``; what it needs is imported when it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path


def add_to(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add it to the commands, by what makes the parser of one."""
    parser = command(
        "shard",
        help="write a cache folder as WebDataset shards for Megatron-Energon",
        description="Every split of FOLDER as shards in OUT, pictures as they are, with Energon's "
        "metadata. An interrupted run goes on where it stopped.",
    )
    parser.set_defaults(run=_run)
    add = parser.add_argument
    add("folder", type=Path, help="folder in the layout of the data set")
    add("out", type=Path, help="folder for the shards")
    add("--samples-per-shard", type=int, default=1000, metavar="N")


def _run(options: argparse.Namespace) -> Iterator[str]:
    from step37_energon.shards import write_shards
    from step37_energon.task_encoder import prepare_shards

    shards = write_shards(
        options.folder,
        options.out,
        caption_key=options.caption_key,
        sample_count=options.sample_count,
        samples_per_shard=options.samples_per_shard,
        progress=not options.quiet,
    )
    prepare_shards(options.out, shards)
    for split, paths in shards.items():
        yield f"{split:<9} {len(paths)} shards in {options.out / split}"
