"""Media chunks: every microbatch has the rows of its own samples, or there is an error."""

from __future__ import annotations

from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch

from step37_data.pp_media import chunk_step3_media, chunk_vlm_media


def case(rng: np.random.Generator, folder: Path) -> None:
    del folder
    batch_size = int(rng.integers(0, 7))
    microbatches = int(rng.integers(1, 6))
    counts = rng.integers(0, 4, batch_size).tolist()
    (_step3 if rng.random() < 0.5 else _vlm)(rng, batch_size, microbatches, counts)


def _marked(owners: list[int], *shape: int) -> torch.Tensor:
    """Rows that say whose they are."""
    rows = torch.tensor(owners, dtype=torch.float32)
    return rows.view(-1, *[1] * len(shape)).expand(-1, *shape)


def _owners(counts: list[int]) -> list[int]:
    return [sample for sample, count in enumerate(counts) for _ in range(count)]


def _check(name: str, chunks: list[torch.Tensor], counts: list[int]) -> None:
    """Samples are cut as ``torch.tensor_split`` cuts ``input_ids``."""
    samples = torch.arange(len(counts)).tensor_split(len(chunks))
    for chunk, own in zip(chunks, samples, strict=True):
        wanted = [sample for sample in own.tolist() for _ in range(counts[sample])]
        got = chunk.reshape(len(chunk), -1)[:, 0].tolist() if len(chunk) else []
        assert got == wanted, f"{name}: {got} for samples {own.tolist()}, which have {wanted}"


def _other(rng: np.random.Generator, counts: list[int]) -> list[int]:
    """Counts that may be wrong."""
    changed = list(counts)
    for _ in range(int(rng.integers(0, 3))):
        if changed and rng.random() < 0.7:
            changed[int(rng.integers(len(changed)))] = int(rng.integers(0, 4))
        else:
            changed = changed[:-1] if rng.random() < 0.5 else [*changed, 1]
    return changed


def _step3(rng: np.random.Generator, batch_size: int, microbatches: int, crops: list[int]) -> None:
    images = rng.integers(0, 3, batch_size).tolist() if rng.random() < 0.3 else [1] * batch_size
    flat = rng.random() < 0.3
    given = _owners(_other(rng, crops if flat else images))
    pixels = _marked(given, 3, 2, 2)
    rows = None if flat else _marked(_owners(crops), 3, 1, 1)
    mask = _marked(_owners(crops)) if rng.random() < 0.5 else None
    told = None if images == [1] * batch_size and rng.random() < 0.7 else images
    try:
        chunks = chunk_step3_media(
            pixels,
            batch_size=batch_size,
            n_microbatches=microbatches,
            num_patches=crops,
            patch_pixel_values=rows,
            patch_newline_mask=mask,
            n_images_per_sample=told,
        )
    except ValueError:
        ambiguous = told is not None and len(told) == sum(told) != 0 and told != [1] * batch_size
        right = given == _owners(crops if flat else images)
        assert not right or ambiguous or flat, "right media were refused"
        return
    for name, own in (("patch_pixel_values", crops), ("patch_newline_mask", crops)):
        if name in chunks:
            _check(name, chunks[name], own)
    assert [int(chunk.sum()) for chunk in chunks["num_patches"]] == [
        sum(crops[sample] for sample in own.tolist())
        for own in torch.arange(batch_size).tensor_split(microbatches)
    ]
    counts = crops if flat and sum(crops) else images
    # Counts of the right sum cannot be told from the right counts.
    if given == _owners(counts):
        _check("pixel_values", chunks["pixel_values"], counts)
    else:
        assert len(given) == sum(counts) or not given


def _vlm(rng: np.random.Generator, batch_size: int, microbatches: int, counts: list[int]) -> None:
    owners = _owners(counts)
    grid = torch.tensor(rng.integers(1, 4, (len(owners), 2)))
    patches = grid.prod(1).tolist()
    as_patches = rng.random() < 0.5
    if as_patches:
        rows = [owner for owner, n in zip(owners, patches, strict=True) for _ in range(n)]
        pixels = _marked(rows, 5)
    else:
        pixels = _marked(owners, 3, 2, 2)
    wrong = rng.random() < 0.3
    if wrong:
        pixels = pixels[: int(rng.integers(len(pixels) + 1))]
    told = _other(rng, counts) if rng.random() < 0.3 else counts
    try:
        chunks, grids = chunk_vlm_media(
            pixels, grid, batch_size, microbatches, n_images_per_sample=told
        )
    except ValueError:
        assert wrong or told != counts, "right media were refused"
        return
    assert sum(told) == len(owners)
    assert len(told) == batch_size
    assert grids is not None
    assert torch.equal(torch.cat(grids), grid)
    assert torch.equal(torch.cat(list(chunks)), pixels)
    if told == counts:
        images = list(accumulate(counts, initial=0))
        by_sample = [sum(patches[a:b]) for a, b in pairwise(images)]
        _check("pixel_values", list(chunks), by_sample if as_patches else counts)
        limits = torch.arange(batch_size).tensor_split(microbatches)
        assert [len(part) for part in grids] == [sum(counts[s] for s in own) for own in limits]
