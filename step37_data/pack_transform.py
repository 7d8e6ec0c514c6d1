"""From the samples of a pack to one packed dictionary of tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_INT32_MAX = 2**31 - 1


def get_position_id_from_cu_seqlens(cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Positions that count from 0 in every sub-sequence.

    Args:
        cu_seqlens: ``[n + 1]`` integers, 0 first, rising to the total length T.

    Returns:
        int64 ``[T]`` on the same device; ``[0, 3, 5]`` gives ``[0, 1, 2, 0, 1]``. They are counted
        on the host: bounds on a CUDA device are fetched, which waits for the device.
    """
    positions = torch.from_numpy(_positions(cu_seqlens.numpy(force=True).astype(np.int64)))
    return positions.to(cu_seqlens.device)


def _positions(bounds: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.arange(bounds[-1]) - np.repeat(bounds[:-1], np.diff(bounds))


def pack_samples(
    pieces: Sequence[Mapping[str, Any]],
    *,
    seqlen_divisible_by: int = 64,
    pad_token_id: int = 0,
    start_token_ids: Collection[int] = (),
) -> dict[str, Any]:
    """Pack samples into one next-token-prediction batch.

    A sample of n tokens gives n − 1 positions: inputs ``tokens[:-1]``, labels ``tokens[1:]``, loss
    mask ``loss_mask[1:]``. Where the total is no multiple of ``seqlen_divisible_by``, a padding
    sub-sequence without loss fills it up. ``pieces`` is left as it is.

    Args:
        pieces: samples with ``tokens`` ``[n]``, ``loss_mask`` ``[n]`` and ``image_paths`` (a list
            of ``(path, item type)``; absent means none).
        seqlen_divisible_by: the packed length T is a multiple of this.
        pad_token_id: token of the padding.
        start_token_ids: tokens that mark an image or crop. Padding with one of them would be taken
            for images, so it is refused.

    Returns:
        ``tokens``, ``labels`` int64 ``[T]``; ``loss_masks`` float32 ``[T]``; ``cu_seqlens`` int32
        ``[sub-sequences + 1]``; ``max_seq_len`` int64 scalar tensor; ``position_id`` int64
        ``[T]``; ``image_paths`` of all samples in order.

    Raises:
        ValueError: no pieces, a loss mask of another length than its tokens, a pad token that
            marks an image, or more tokens than int32 ``cu_seqlens`` can hold.
    """
    if len(pieces) == 0:
        raise ValueError("pieces: expected at least one sample, got none")
    if seqlen_divisible_by < 1:
        raise ValueError(f"seqlen_divisible_by: expected at least 1, got {seqlen_divisible_by}")
    # NumPy throughout: torch would start threads for a few thousand elements, in every worker.
    all_tokens = [_as_numpy(piece["tokens"], np.int64) for piece in pieces]
    all_masks = [_as_numpy(piece["loss_mask"], np.float32) for piece in pieces]
    for number, (tokens, mask) in enumerate(zip(all_tokens, all_masks, strict=True)):
        if tokens.ndim != 1 or tokens.shape != mask.shape:
            raise ValueError(
                f"pieces[{number}]: expected tokens and loss_mask of one length, "
                f"got shapes {tokens.shape} and {mask.shape}"
            )
    padding = -sum(max(0, len(tokens) - 1) for tokens in all_tokens) % seqlen_divisible_by
    if padding:
        if pad_token_id in start_token_ids:
            raise ValueError(
                f"pad_token_id: {pad_token_id} marks an image or crop, so padding would be taken "
                f"for images; choose a token outside {sorted(start_token_ids)}"
            )
        all_tokens.append(np.full(padding + 1, pad_token_id, dtype=np.int64))
        all_masks.append(np.zeros(padding + 1, dtype=np.float32))
    sizes = [max(0, len(tokens) - 1) for tokens in all_tokens]
    bounds = np.cumsum([0, *sizes], dtype=np.int64)
    if bounds[-1] > _INT32_MAX:
        raise ValueError(f"pieces: {bounds[-1]} tokens do not fit the int32 cu_seqlens")
    return {
        "tokens": torch.from_numpy(np.concatenate([tokens[:-1] for tokens in all_tokens])),
        "labels": torch.from_numpy(np.concatenate([tokens[1:] for tokens in all_tokens])),
        "loss_masks": torch.from_numpy(np.concatenate([mask[1:] for mask in all_masks])),
        "cu_seqlens": torch.from_numpy(bounds.astype(np.int32)),
        "max_seq_len": torch.tensor(max(sizes)),
        "position_id": torch.from_numpy(_positions(bounds)),
        "image_paths": [image for piece in pieces for image in piece.get("image_paths", ())],
    }


def _as_numpy(values: Any, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    return torch.as_tensor(values).numpy().astype(dtype, copy=False)
