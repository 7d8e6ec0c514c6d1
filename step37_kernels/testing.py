"""Inputs and error bounds shared by the tests and the benchmarks.

A bound is derived, not tuned: a product summed over ``n`` terms in fp32, in any order, is off by at
most ``γ(n) · Σ |a·b|`` with ``γ(n) = n·u / (1 − n·u)`` (Higham, *Accuracy and Stability of
Numerical Algorithms*, §3.1), and rounding the result to a narrower type adds one half of its last
place. Matrix units may truncate where fp32 arithmetic rounds, hence ``u = 2⁻²³``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from step37_kernels import reference

FP32_UNIT = 2.0**-23
FeatureLayout = Literal["contiguous", "channels-first", "ragged"]


def rounding_unit(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to ``dtype``."""
    return torch.finfo(dtype).eps / 2


def gamma(terms: int) -> float:
    """Relative error of an fp32 sum of ``terms`` products, against the sum of their magnitudes."""
    return terms * FP32_UNIT / (1 - terms * FP32_UNIT)


def product_bound(
    a: Tensor,
    b: Tensor,
    dtypes: Sequence[torch.dtype],
    *,
    plus: Tensor | None = None,
    input_error: float = 0.0,
) -> Tensor:
    """Elementwise bound of ``|a @ b + plus|`` computed in fp32 and rounded to ``dtypes`` in turn.

    Args:
        a: ``[M, K]`` float64.
        b: ``[K, N]`` float64.
        dtypes: the types that the result passes through.
        plus: ``[N]`` or ``[M, N]`` float64, or None.
        input_error: relative error that ``a`` carries already.
    """
    magnitude = a.abs() @ b.abs()
    if plus is not None:
        magnitude = magnitude + plus.abs()
    bound = (gamma(a.shape[1] + 1) + input_error) * magnitude
    value = (a @ b if plus is None else a @ b + plus).abs()
    for dtype in dtypes:
        # Relative for normal numbers; half the spacing of subnormals below those.
        smallest = torch.finfo(dtype).smallest_normal * rounding_unit(dtype)
        bound = bound + rounding_unit(dtype) * (value + bound) + smallest
    return bound


@dataclass(frozen=True, slots=True, kw_only=True)
class InsertCase:
    """The inputs of one insertion; its tensors take gradients."""

    input_ids: Tensor
    """``[B, S]``"""
    embeddings: Tensor
    """``[S, B, H]``"""
    groups: list[tuple[int, list[Tensor]]]
    """``(start_token, tensors [N, L, C])``; views where the layout says so."""
    leaves: list[Tensor] = field(default_factory=list)
    """The tensors behind those views."""
    weight: Tensor
    """``[H, C]``"""
    bias: Tensor | None
    grad_output: Tensor
    """``[S, B, H]``"""

    @property
    def features(self) -> list[Tensor]:
        return [tensor for _, tensors in self.groups for tensor in tensors]

    @property
    def plan_groups(self) -> list[tuple[int, list[int]]]:
        """What :func:`step37_kernels.plan_insert` takes."""
        return [
            (token, [t.shape[1] for t in tensors for _ in range(t.shape[0])])
            for token, tensors in self.groups
        ]


def random_normal(
    *shape: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Normal values drawn on the CPU (the same on every device), then rounded and moved."""
    return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)


def make_insert_case(  # noqa: PLR0913 - every number that a test varies
    input_ids: Tensor,
    groups: Sequence[tuple[int, Sequence[tuple[int, int]]]],
    *,
    hidden: int,
    width: int,
    seed: int,
    dtype: torch.dtype,
    embedding_dtype: torch.dtype | None = None,
    layout: FeatureLayout = "contiguous",
    bias: bool = False,
    device: torch.device | str = "cpu",
) -> InsertCase:
    """Make random embeddings, features and weights for given token ids.

    Args:
        input_ids: ``[B, S]``.
        groups: ``(start_token, [(N, L), …])``: the feature tensors of each group.
        hidden: H.
        width: C.
        seed: of every random value.
        dtype: of weight, bias and features.
        embedding_dtype: of embeddings and grad_output; ``dtype`` if None.
        layout: of the features; ``channels-first`` is the view that the vision tower returns.
        bias: whether the projector has one.
        device: of everything.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return random_normal(*shape, generator=generator, dtype=kind, device=device)

    batch_size, seq_len = input_ids.shape
    embedding_dtype = embedding_dtype or dtype
    leaves: list[Tensor] = []
    built: list[tuple[int, list[Tensor]]] = []
    for token, shapes in groups:
        tensors = []
        for n, rows in shapes:
            if layout == "channels-first":
                leaf = normal(n, width, rows).requires_grad_()
                tensors.append(leaf.transpose(1, 2))
            else:
                leaf = normal(n, rows, width).requires_grad_()
                tensors.append(leaf)
            leaves.append(leaf)
        built.append((token, tensors))
    return InsertCase(
        input_ids=input_ids.to(device),
        embeddings=normal(seq_len, batch_size, hidden, kind=embedding_dtype).requires_grad_(),
        groups=built,
        leaves=leaves,
        weight=(normal(hidden, width) / max(width, 1) ** 0.5).requires_grad_(),
        bias=normal(hidden).requires_grad_() if bias else None,
        grad_output=normal(seq_len, batch_size, hidden, kind=embedding_dtype),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """Expected values in float64, and how far a correct implementation may be from them."""

    output: Tensor
    output_bound: Tensor
    grad_embeddings: Tensor
    """Exact: a gradient row passes unchanged, or is zero."""
    grad_features: list[Tensor]
    grad_features_bound: list[Tensor]
    grad_weight: Tensor
    grad_weight_bound: Tensor
    grad_bias: Tensor | None
    grad_bias_bound: Tensor | None


def expected(case: InsertCase) -> Expected:
    """Run the reference in float64 on the CPU, and derive each result's error bound."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().double().cpu().requires_grad_()

    embeddings, weight = leaf(case.embeddings), leaf(case.weight)
    bias = None if case.bias is None else leaf(case.bias)
    groups = [(token, [leaf(tensor) for tensor in tensors]) for token, tensors in case.groups]
    features = [tensor for _, tensors in groups for tensor in tensors]
    input_ids = case.input_ids.cpu()
    output = reference.image_insert_embedding(embeddings, input_ids, groups, weight, bias)
    grad_output = case.grad_output.detach().double().cpu()
    wanted = [embeddings, weight, *features] + ([] if bias is None else [bias])
    grads = dict(
        zip(
            map(id, wanted),
            torch.autograd.grad(
                output, wanted, grad_output, allow_unused=True, materialize_grads=True
            )
            if output.requires_grad
            else [torch.zeros_like(tensor) for tensor in wanted],
            strict=True,
        )
    )

    hidden, width = weight.shape
    destinations = reference.plan_insert(input_ids, case.plan_groups).destinations.long()
    kept = destinations >= 0
    rows = torch.cat([f.detach().flatten(0, 1) for f in features] or [torch.empty(0, width)])
    rows = rows.double()
    gradient_rows = grad_output.reshape(-1, hidden)[destinations.clamp_min(0)]
    gradient_rows = gradient_rows * kept[:, None]

    dtype, embedding_dtype = case.weight.dtype, case.embeddings.dtype
    # Where the dtypes differ, the gradient is cast to the weight's before it is multiplied.
    cast = rounding_unit(dtype) if embedding_dtype != dtype else 0.0
    output_bound = torch.zeros_like(output).reshape(-1, hidden)
    output_bound[destinations[kept]] = product_bound(
        rows[kept],
        weight.detach().T,
        [dtype, embedding_dtype] if embedding_dtype != dtype else [dtype],
        plus=None if bias is None else bias.detach(),
    )
    features_bound = product_bound(gradient_rows, weight.detach(), [dtype], input_error=cast)
    ones = torch.ones(rows.shape[0], 1, dtype=torch.float64)
    splits = features_bound.split([f.shape[0] * f.shape[1] for f in features])
    return Expected(
        output=output.detach(),
        output_bound=output_bound.view_as(output),
        grad_embeddings=grads[id(embeddings)],
        grad_features=[grads[id(f)] for f in features],
        grad_features_bound=[s.view(f.shape) for s, f in zip(splits, features, strict=True)],
        grad_weight=grads[id(weight)],
        grad_weight_bound=product_bound(gradient_rows.T, rows, [dtype], input_error=cast),
        grad_bias=None if bias is None else grads[id(bias)],
        grad_bias_bound=None
        if bias is None
        else product_bound(gradient_rows.T, ones, [dtype], input_error=cast)[:, 0],
    )


def deviation(actual: Tensor, exact: Tensor, bound: Tensor) -> tuple[float, float]:
    """Largest ``|actual − exact|``, and the largest share of its bound that any element uses.

    NaN or infinity anywhere gives infinity. A share of at most 1 is within the bound.
    """
    error = (actual.detach().double().cpu() - exact).abs()
    if error.numel() == 0:
        return 0.0, 0.0
    if not torch.isfinite(error).all():
        return float("inf"), float("inf")
    share = torch.where(error == 0, 0.0, error / bound)
    return error.max().item(), share.max().item()
