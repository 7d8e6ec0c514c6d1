"""Concatenates the samples of a pack into one dictionary of tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from step37_data.common.checks import checked_int

_INT32_MAX = 2**31 - 1


def get_position_id_from_cu_seqlens(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Return positions that count from 0 in every sub-sequence.

    Args:
        cu_seqlens: ``[n + 1]`` integers, 0 first, rising to the total length T.

    Returns:
        int64 ``[T]`` on the same device; ``[0, 3, 5]`` gives ``[0, 1, 2, 0, 1]``. They are computed
        on the host. If the bounds are on a CUDA device, the host waits for them.

    Raises:
        ValueError: the bounds have another shape, do not start at 0, or decrease.
    """
    bounds = cu_seqlens.numpy(force=True).astype(np.int64)
    if bounds.ndim != 1 or len(bounds) == 0 or bounds[0] != 0 or (np.diff(bounds) < 0).any():
        raise ValueError(f"cu_seqlens: expected [n + 1] bounds that rise from 0, got {bounds}")
    return torch.from_numpy(_positions(bounds)).to(cu_seqlens.device)


def _positions(bounds: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.arange(bounds[-1]) - np.repeat(bounds[:-1], np.diff(bounds))


def pack_samples(
    pieces: Sequence[Mapping[str, Any]],
    *,
    seqlen_divisible_by: int = 64,
    pad_token_id: int = 0,
    start_token_ids: Collection[int] | Mapping[int, int] = (),
) -> dict[str, Any]:
    """Pack samples into one next-token-prediction batch.

    A sample of n tokens gives n − 1 positions: inputs ``tokens[:-1]``, labels ``tokens[1:]``, loss
    mask ``loss_mask[1:]``. If the total is no multiple of ``seqlen_divisible_by``, a sub-sequence
    of padding without loss is added. ``pieces`` is not changed.

    Args:
        pieces: samples with ``tokens`` ``[n]``, ``loss_mask`` ``[n]``, ``image_paths`` (a list
            of ``(path, item type)``; absent means none) and ``as_viewed`` (how the pictures are
            read; absent means False).
        seqlen_divisible_by: the packed length T is a multiple of this.
        pad_token_id: token of the padding.
        start_token_ids: tokens that mark an image or crop. They are refused as padding, which would
            be taken for images. A mapping also holds the number of positions that the image or crop
            fills after its token, ``{image start: 169, crop start: 81}``. With a mapping, samples
            that were cut are refused: if cut inside an image, its rows would go into the next
            sample; if before an image, its file would be used for the next sample.

    Returns:
        ``tokens``, ``labels`` int64 ``[T]``; ``loss_masks`` float32 ``[T]``; ``cu_seqlens`` int32
        ``[sub-sequences + 1]``; ``max_seq_len`` int64 scalar tensor; ``position_id`` int64
        ``[T]``; ``image_paths`` of all samples in order; and ``as_viewed``, True, if the samples
        have it.

    Raises:
        ValueError: no pieces, tokens that are no integers, a loss mask of another length than its
            tokens, ``image_paths`` that are no list, samples with ``as_viewed`` and samples without
            it, a pad token that marks an image, more tokens
            than int32 ``cu_seqlens`` can hold; with a mapping, an image cut off by the end of its
            sample, or start tokens and ``image_paths`` that differ in number.
    """
    if len(pieces) == 0:
        raise ValueError("pieces: expected at least one sample, got none")
    checked_int("seqlen_divisible_by", seqlen_divisible_by)
    checked = [_checked(f"pieces[{number}]", piece) for number, piece in enumerate(pieces)]
    all_tokens, all_masks, all_paths = map(list, zip(*checked, strict=True))
    as_viewed = [bool(piece.get("as_viewed", False)) for piece in pieces]
    if any(as_viewed) and not all(as_viewed):
        told = f"pieces[{as_viewed.index(True)}] with and pieces[{as_viewed.index(False)}] without"
        raise ValueError(f"as_viewed: the samples of a pack must agree, got {told}")
    if isinstance(start_token_ids, Mapping):
        for number, (tokens, _, paths) in enumerate(checked):
            _check_images(f"pieces[{number}]", tokens, start_token_ids, len(paths))
    padding = -sum(max(0, len(tokens) - 1) for tokens in all_tokens) % seqlen_divisible_by
    if padding:
        if pad_token_id in start_token_ids:
            others = f"choose a token outside {sorted(start_token_ids)}"
            raise ValueError(f"pad_token_id: {pad_token_id} marks an image or crop; {others}")
        all_tokens.append(np.full(padding + 1, pad_token_id, dtype=np.int64))
        all_masks.append(np.zeros(padding + 1, dtype=np.float32))
    sizes = [max(0, len(tokens) - 1) for tokens in all_tokens]
    bounds = np.cumsum([0, *sizes], dtype=np.int64)
    if bounds[-1] > _INT32_MAX:
        raise ValueError(f"pieces: {bounds[-1]} tokens do not fit the int32 cu_seqlens")
    packed = {
        "tokens": torch.from_numpy(np.concatenate([tokens[:-1] for tokens in all_tokens])),
        "labels": torch.from_numpy(np.concatenate([tokens[1:] for tokens in all_tokens])),
        "loss_masks": torch.from_numpy(np.concatenate([mask[1:] for mask in all_masks])),
        "cu_seqlens": torch.from_numpy(bounds.astype(np.int32)),
        "max_seq_len": torch.tensor(max(sizes)),
        "position_id": torch.from_numpy(_positions(bounds)),
        "image_paths": [entry for paths in all_paths for entry in paths],
    }
    if all(as_viewed):
        packed["as_viewed"] = True
    return packed


def _checked(
    where: str, piece: Mapping[str, Any]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], Sequence[Any]]:
    """Check one sample; returns its tokens, loss mask and paths.

    They are NumPy arrays, because torch would start threads for a few thousand elements, in every
    worker.
    """
    tokens, mask = torch.as_tensor(piece["tokens"]), torch.as_tensor(piece["loss_mask"])
    paths = piece.get("image_paths", ())
    # torch makes a float tensor of an empty list.
    if tokens.numel() and (tokens.is_floating_point() or tokens.is_complex()):
        raise ValueError(f"{where}: expected integer tokens, got {tokens.dtype}")
    if tokens.ndim != 1 or tokens.shape != mask.shape:
        got = f"got shapes {list(tokens.shape)} and {list(mask.shape)}"
        raise ValueError(f"{where}: expected tokens and loss_mask of one length, {got}")
    if not isinstance(paths, (list, tuple)):
        raise ValueError(f"{where}: expected image_paths to be a list, got {paths!r}")
    return tokens.long().numpy(force=True), mask.float().numpy(force=True), paths


def _check_images(
    where: str, tokens: npt.NDArray[np.int64], spans: Mapping[int, int], files: int
) -> None:
    last = len(tokens) - 2  # index of the last input; inputs are tokens[:-1]
    count = 0
    for token, rows in spans.items():
        starts = np.flatnonzero(tokens == token)
        count += len(starts)
        cut = starts[starts + rows > last]
        if len(cut):
            raise ValueError(
                f"{where}: token {token} at position {cut[0]} marks an image of {rows} rows, and "
                f"{max(0, last - cut[0])} are left for it: the sample was cut"
            )
    if count != files:
        marks = f"{count} of the start tokens {sorted(spans)}"
        raise ValueError(f"{where}: {files} image_paths for {marks}, expected as many")
