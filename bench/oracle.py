"""Checks results of the insert against float64 values, within bounds of rounding errors.

The bounds are those of the tests (:func:`step37_kernels.testing.product_bound`). The reference
would take minutes at the sizes of the benchmarks. So the same values are computed here on the
device, and of large products only some rows: one in every 64, so that every tile is checked, and
the first and last row of each feature, where a wrong plan would show. Text rows and the gradient of
the embeddings are compared completely and exactly, and NaN, with which memory was filled before, is
searched for everywhere. ``tests/bench`` compares this oracle with the reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from bench.shapes import Batch
from step37_kernels.testing import InsertCase, deviation, product_bound, rounding_unit

SAMPLE_EVERY = 64
EXACT_BELOW = 2**30  # smaller products, by number of multiplications, are compared completely


class Sampled(NamedTuple):
    """Some rows of a product, and the bounds for fp32 sums and for sums of rounded parts."""

    rows: Tensor
    exact: Tensor
    bound: Tensor
    loose_bound: Tensor


class Oracle:
    """Computes the results of all operations on one case, and checks an implementation's.

    Names: ``output`` [S, B, H]; ``projected`` [R, H] (a bare product); ``grad_embeddings``
    [S, B, H]; ``grad_features`` [R, C] or one tensor a group; ``grad_weight`` [H, C].
    """

    def __init__(self, case: InsertCase, batch: Batch) -> None:
        self._hidden, width = case.weight.shape
        self._destinations = batch.destinations
        positions = case.embeddings.shape[:2].numel()
        self._is_text = torch.ones(positions, dtype=torch.bool, device=batch.destinations.device)
        self._is_text[batch.destinations] = False
        self._text = case.embeddings.reshape(-1, self._hidden)[self._is_text]
        grad = case.grad_output.reshape(-1, self._hidden)
        self._grad_embeddings = grad * self._is_text.unsqueeze(-1)

        dtype = case.weight.dtype
        x = torch.cat([features.reshape(-1, width) for features in case.features])
        g = grad[batch.destinations]
        rows = self._sample(batch, x.shape[0] * x.shape[1] * self._hidden)
        every = SAMPLE_EVERY if rows.shape[0] < x.shape[0] else 1
        units = torch.arange(0, self._hidden, every, device=x.device)
        weight = case.weight
        self._products = {
            "projected": _sampled(rows, x[rows], weight.T, dtype),
            "grad_features": _sampled(rows, g[rows], weight, dtype),
            "grad_weight": _sampled(units, g[:, units].T, x, dtype),
        }

    @staticmethod
    def _sample(batch: Batch, multiplications: int) -> Tensor:
        """Pick the numbers of the rows to compare."""
        num_rows = batch.destinations.shape[0]
        if multiplications < EXACT_BELOW:
            return torch.arange(num_rows, device=batch.destinations.device)
        picked = set(range(0, num_rows, SAMPLE_EVERY)) | {num_rows - 1}
        first = 0
        for _, n, rows in batch.groups:
            for _ in range(n):
                picked |= {first, first + rows - 1}
                first += rows
        return torch.tensor(sorted(picked), device=batch.destinations.device)

    def check(
        self, results: Mapping[str, Tensor | list[Tensor]], *, narrow_partial_sums: bool
    ) -> str | None:
        """Check results of one implementation, by name; returns what is wrong, or None.

        ``narrow_partial_sums`` allows sums of parts that were rounded to the narrow type: PyTorch
        allows that to cuBLAS (``allow_bf16_reduced_precision_reduction``), and adding up a weight
        gradient for each group does it. Our kernels must accumulate in fp32.
        """
        for name, result in results.items():
            tensors = [result] if isinstance(result, Tensor) else result
            flat = torch.cat([tensor.detach().reshape(-1, tensor.shape[-1]) for tensor in tensors])
            problem = self._check_one(name, flat, narrow_partial_sums)
            if problem is not None:
                return f"{name}: {problem}"
        return None

    def _check_one(self, name: str, flat: Tensor, narrow_partial_sums: bool) -> str | None:
        if not torch.isfinite(flat).all():
            return "holds NaN or infinity"
        if name == "grad_embeddings":
            equal = torch.equal(flat, self._grad_embeddings)
            return None if equal else "differs from grad_output with the inserted rows zeroed"
        if name == "output":
            if not torch.equal(flat[self._is_text], self._text):
                return "a text row differs from its embedding"
            flat = flat[self._destinations]
            name = "projected"
        wanted = self._products[name]
        bound = wanted.loose_bound if narrow_partial_sums else wanted.bound
        worst, share = deviation(flat[wanted.rows], wanted.exact, bound)
        if share > 1:
            return f"off by {worst:.3g}, {share:.3g} of what rounding allows"
        return None


def _sampled(rows: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> Sampled:
    a, b = a.detach().double(), b.detach().double()
    bound = product_bound(a, b, [dtype])
    loose_bound = product_bound(a, b, [dtype], input_error=rounding_unit(dtype))
    return Sampled(rows, (a @ b).cpu(), bound.cpu(), loose_bound.cpu())
