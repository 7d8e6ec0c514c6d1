"""Projects feature rows and writes each to its position among the text rows.

:func:`project_and_insert` takes word embeddings; :func:`embed_project_and_insert` takes token ids
and looks the words up in the same launch.

Shape letters: ``S`` sequence, ``B`` batch, ``H`` hidden size, ``C`` encoder output width, ``R``
feature rows of all groups together, ``L`` rows of one feature, ``N`` features.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from step37_kernels import operators
from step37_kernels.dispatch import Impl, check_kernel_dtype, use_triton
from step37_kernels.integration.main_grad import MainGrad, into_main_grad
from step37_kernels.lookup import TextRows, check_ids, fusion_target, table_gradient
from step37_kernels.plan import InsertPlan
from step37_kernels.ranges import profiled

MAX_SOURCES = 4  # as in ops.copy_rows, which cannot be imported without Triton
"""The most contiguous tensors that one launch reads in place."""


def pick_rows(rows: Tensor, local_rows: Tensor | None) -> Tensor:
    """Pick the rows of this rank's shard: ``[R, …]`` → ``[M, …]``; a whole plan keeps all rows.

    Unused entries are zeros, so that they add nothing to the gradient of the weight.
    """
    if local_rows is None:
        return rows
    picked = rows.index_select(0, local_rows.clamp_min(0))
    return picked.masked_fill_((local_rows < 0)[:, None], 0)


def check_embeddings(
    embeddings: Tensor, plan: InsertPlan, name: str, hidden: int | None = None
) -> None:
    """Raise ``ValueError`` unless the embeddings have the plan's shape, and this H if given.

    The shape is ``[S, B, H]``, or ``[B, S, H]`` of a batch-first plan.
    """
    shape, planned = tuple(embeddings.shape), tuple(plan.row_at.shape)
    fits = len(shape) == 3 and shape[:2] == planned
    # Two comparisons: torch.compile cannot trace `in` for a symbolic size.
    if not fits or (hidden is not None and hidden != shape[2]):
        letters = "B, S" if plan.batch_first else "S, B"
        raise ValueError(
            f"{name}: expected [{letters}, H] = [{planned[0]}, {planned[1]}, {hidden or 'H'}], "
            f"got {shape}"
        )


def insert_rows(embeddings: Tensor, rows: Tensor, plan: InsertPlan) -> Tensor:
    """Put rows that are already projected at their destinations, by PyTorch operations.

    Args:
        embeddings: ``[S, B, H]``, or ``[B, S, H]`` of a batch-first plan; left as it is.
        rows: ``[R, H]`` (of a shard: ``[M, H]``, see :func:`pick_rows`) in the embeddings' dtype.
        plan: from :func:`plan_insert`.

    Returns:
        The embeddings' shape; differentiable in both. Never waits for the device.
    """
    hidden = embeddings.shape[2]
    num_positions = math.prod(embeddings.shape[:2])
    slots = plan.destinations
    if slots.is_cpu and type(slots) is Tensor and not torch.compiler.is_compiling():
        # On the CPU the values can be read, and rows without a destination left out.
        flat = embeddings.reshape(num_positions, hidden)
        kept = slots >= 0
        if not kept.all():
            slots, rows = slots[kept], rows[kept]
        return flat.index_copy(0, slots.long(), rows).view(embeddings.shape)
    # Rows without a destination go to one row past the end, which is cut off. No other row is
    # written more than once, so the result and the gradients are deterministic.
    flat = torch.cat([embeddings.reshape(num_positions, hidden), embeddings.new_zeros(1, hidden)])
    slots = torch.where(slots < 0, num_positions, slots).long()
    return flat.index_copy(0, slots, rows)[:-1].view(embeddings.shape)


def join_rows(features: Sequence[Tensor]) -> Tensor:
    """Join one or more ``[N, L, C]`` tensors into one ``[R, C]``."""
    parts = [feature.flatten(0, 1) for feature in features]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def contiguous_rows(features: Sequence[Tensor]) -> list[Tensor]:
    """The rows of ``[N, L, C]`` tensors as contiguous ``[R_i, C]``, at most :data:`MAX_SOURCES`,
    apart from autograd.

    Contiguous tensors are not copied. Tensors of other layouts, such as the channels-first view of
    a vision tower, are copied by one launch. If there are too many tensors, all of them are.
    """
    features = [feature.detach() for feature in features]
    if len(features) > MAX_SOURCES:
        return [operators.copy_rows(features)]
    strided = [feature for feature in features if not feature.is_contiguous()]
    if not strided:
        return [feature.flatten(0, 1) for feature in features]
    counts = [feature.shape[0] * feature.shape[1] for feature in strided]
    parts = iter(operators.copy_rows(strided).split(counts))
    return [f.flatten(0, 1) if f.is_contiguous() else next(parts) for f in features]


_FIRST_SOURCE = 12
"""How many arguments of ``_ProjectAndInsert.forward`` come before the first source."""


class _ProjectAndInsert(torch.autograd.Function):
    """``out[destinations[r]] = features[r] @ weightᵀ + bias``; all other rows are text rows.

    ``text`` holds the embeddings, or with ``input_ids`` the table in which they are looked up.
    ``counted_tensors`` are ``(n, *n sources, *features)``. The kernels read the sources, which hold
    the rows of the features; the features are arguments so that they get gradients.

    Saved for backward: the sources (if the weight needs a gradient), the weight (if a feature
    does), the ids (if the table does), and the plan. Backward computes only the gradients that are
    needed: one launch separates the rows of ``grad_output`` and puts looked-up ids in order, two
    more sum the gradient of the table, and the library multiplies.
    """

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 - autograd takes no keywords
        ctx: Any,
        text: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        input_ids: Tensor | None,
        destinations: Tensor,
        row_at: Tensor,
        local_rows: Tensor | None,
        live_rows: Tensor | None,
        text_fused_into: tuple[Tensor] | None,
        fused_into: tuple[Tensor] | None,
        after_plan: bool,
        *counted_tensors: Any,
    ) -> Tensor:
        # num_sources travels in *args: without gradients Dynamo decides by the number of arguments
        # whether forward takes ctx, and would decide wrongly with two tensors.
        num_sources, *tensors = counted_tensors
        sources, features = tensors[:num_sources], tensors[num_sources:]
        if local_rows is not None:
            sources = [pick_rows(torch.cat(sources), local_rows)]
        out = operators.project_insert(
            text, sources, weight, bias, destinations, row_at, live_rows, input_ids, after_plan
        )
        need_text, need_weight = ctx.needs_input_grad[:2]
        need_features = ctx.needs_input_grad[_FIRST_SOURCE + num_sources :]
        ctx.need_rows = need_weight or any(need_features)
        ctx.save_for_backward(
            row_at,
            destinations,
            input_ids if need_text else None,
            local_rows if any(need_features) else None,
            weight if any(need_features) else None,
            *(sources if need_weight else ()),
        )
        ctx.fused_into = fused_into
        ctx.text_fused_into = text_fused_into
        ctx.text = text.shape, text.dtype
        ctx.dtype = weight.dtype
        ctx.num_sources = num_sources
        ctx.shapes = [tuple(feature.shape) for feature in features]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        with profiled("gradient"):
            return _ProjectAndInsert._gradients(ctx, grad_output)

    @staticmethod
    def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        need_text, need_weight, need_bias, *_ = ctx.needs_input_grad
        need_features = ctx.needs_input_grad[_FIRST_SOURCE + ctx.num_sources :]
        row_at, destinations, input_ids, local_rows, weight, *sources = ctx.saved_tensors
        (text_rows, *_), _ = ctx.text  # of the table, if the words were looked up
        grad_text: Tensor | None
        grad_text, rows, grad_bias, ids, order = operators.gradient_rows(
            grad_output,
            row_at,
            destinations,
            ctx.dtype,
            need_text and input_ids is None,
            ctx.need_rows,
            need_bias,
            input_ids,
            text_rows,
        )
        if input_ids is not None:
            grad_text = table_gradient(
                grad_output,
                (ids, order),
                table=ctx.text,
                fused_into=ctx.text_fused_into,
                triton=True,
            )
        grad_weight = None
        if need_weight:
            # One product over all sources: adding up several would round the sums in between.
            x = sources[0] if len(sources) == 1 else torch.cat(sources)
            if ctx.fused_into is None:
                grad_weight = rows.T @ x
            else:

                def put(main_grad: Tensor, add: bool) -> None:
                    operators.add_weight_gradient(rows, x, main_grad, add)

                grad_weight = into_main_grad(ctx.fused_into[0], put)
        grad_features: list[Tensor | None] = [None] * len(need_features)
        if any(need_features):
            grad_features = _grad_features(
                rows, weight, local_rows=local_rows, shapes=ctx.shapes, needed=need_features
            )
        return (
            grad_text if need_text else None,
            grad_weight,
            grad_bias if need_bias else None,
            *(None,) * (_FIRST_SOURCE - 3 + ctx.num_sources),
            *grad_features,
        )


def _grad_features(
    rows: Tensor,
    weight: Tensor,
    *,
    local_rows: Tensor | None,
    shapes: Sequence[tuple[int, ...]],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of the feature tensors, computed by one matrix product.

    The product covers the rows from the first to the last tensor that needs a gradient.
    """
    bounds = [0, *itertools.accumulate(shape[0] * shape[1] for shape in shapes)]
    positions = [i for i, need in enumerate(needed) if need]
    first, last = bounds[positions[0]], bounds[positions[-1] + 1]
    if local_rows is None:
        grads = rows[first:last] @ weight
    else:
        local = rows @ weight
        slots = torch.where(local_rows < 0, bounds[-1], local_rows).long()
        # Unused entries of a shard are added to one row past the end, which is cut off.
        grads = local.new_zeros(bounds[-1] + 1, local.shape[1])
        grads = grads.index_copy_(0, slots, local)[first:last]
    return [
        grads[begin - first : end - first].view(shape) if need else None
        for (begin, end), shape, need in zip(
            itertools.pairwise(bounds), shapes, needed, strict=True
        )
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Projector:
    """The weight and bias that project the features."""

    weight: Tensor
    """``[H, C]``"""
    bias: Tensor | None = None
    """``[H]``"""
    fused: bool = False
    """Whether the gradient of the weight is added to its ``main_grad``."""


@dataclass(frozen=True, slots=True)
class FeatureRows:
    """Feature tensors ready to be projected."""

    tensors: list[Tensor]
    """``[N, L, C]`` each, in the weight's dtype, none empty."""
    sources: list[Tensor] | None
    """The same rows as the kernels read them, from :func:`contiguous_rows`; None for PyTorch."""

    @classmethod
    def of(cls, features: Sequence[Tensor], dtype: torch.dtype, triton: bool) -> FeatureRows:
        """Prepare ``[N, L, C]`` or ``[L, C]`` tensors for projection.

        With ``triton``, tensors that the kernels cannot read in place are copied.
        """
        tensors = [
            (tensor if tensor.ndim == 3 else tensor.unsqueeze(0)).to(dtype)
            for tensor in features
            if math.prod(tensor.shape[:-1])
        ]
        return cls(tensors, contiguous_rows(tensors) if triton else None)


def _validate(
    text: TextRows, features: Sequence[Tensor], projector: Projector, plan: InsertPlan
) -> None:
    weight, bias = projector.weight, projector.bias

    def fail(name: str, expected: str, got: object) -> None:
        raise ValueError(f"{name}: expected {expected}, got {got}")

    if weight.ndim != 2:
        fail("weight", "[H, C]", tuple(weight.shape))
    hidden, width = weight.shape
    if text.input_ids is None:
        check_embeddings(text.rows, plan, "embeddings", hidden)
        tensors = {"embeddings": text.rows}
    else:
        if text.rows.ndim != 2 or text.rows.shape[1] != hidden:
            fail("table", f"[V, H] = [V, {hidden}]", tuple(text.rows.shape))
        if text.input_ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"input_ids: expected int32 or int64, got {text.input_ids.dtype}")
        tensors = {"table": text.rows}
    if bias is not None and tuple(bias.shape) != (hidden,):
        fail("bias", f"[H] = [{hidden}]", tuple(bias.shape))
    if bias is not None and bias.dtype != weight.dtype:
        fail("bias", f"the weight's dtype {weight.dtype}", bias.dtype)
    for i, feature in enumerate(features):
        name = f"features[{i}]" if len(features) > 1 else "features"
        if feature.ndim not in (2, 3):
            fail(name, "[L, C] or [N, L, C]", tuple(feature.shape))
        if feature.shape[-1] != width:
            fail(name, f"C = {width} (the weight's)", tuple(feature.shape))
    num_rows = sum(math.prod(feature.shape[:-1]) for feature in features)
    if num_rows != plan.num_rows:
        fail("features", f"R = {plan.num_rows} rows (the plan's)", f"{num_rows} rows")
    tensors |= {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    tensors.update({f"features[{i}]": feature for i, feature in enumerate(features)})
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point:
            fail(name, "a floating-point dtype", tensor.dtype)
    tensors["plan.destinations"] = plan.destinations
    if text.input_ids is not None:
        tensors["input_ids"] = text.input_ids
    for name, tensor in tensors.items():
        if tensor.device != weight.device:
            fail(name, f"the weight's device {weight.device}", tensor.device)


def project_and_insert(  # noqa: PLR0917 - the public signature
    embeddings: Tensor,
    features: Tensor | Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    plan: InsertPlan,
    *,
    gradient_accumulation_fusion: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Project feature rows and put each at its destination, all groups in one pass.

    ``out[s, b] = round(features[r] @ weightᵀ + bias)`` where ``plan.row_at[s, b]`` is a row ``r``,
    and ``embeddings[s, b]`` elsewhere. Products are accumulated in fp32, rounded to the weight's
    dtype, then to the embeddings'. The projected rows are written to the output only, the host
    does not wait for the device, and two runs are bit-equal, forward and backward.

    Gradients: of the embeddings, ``grad_output`` with the overwritten rows zeroed; of features,
    weight and bias, those of the rows that are in the output. A gradient that is not needed is not
    computed. With ``impl="triton"`` the gradients cannot be differentiated again.

    Args:
        embeddings: ``[S, B, H]``, or ``[B, S, H]`` of a batch-first plan; any strides.
        features: rows of all groups in the plan's order, R together: ``[N, L, C]`` or ``[L, C]``,
            or a sequence of such (ragged). Up to four contiguous tensors are read in place. More,
            and other layouts, such as the channels-first view of a vision tower, are copied first,
            in one pass. Cast to the weight's dtype.
        weight: ``[H, C]`` projector weight.
        bias: ``[H]``, or None.
        plan: from :func:`plan_insert` or :func:`plan_placeholders`.
        gradient_accumulation_fusion: add the weight's gradient to ``weight.main_grad`` instead of
            returning it, as Megatron-Core does under that name; in fp32 within the matrix product
            (the PyTorch implementation rounds it to the weight's dtype first).
        impl: ``"auto"``, ``"triton"`` (bf16, fp16 or fp32) or ``"torch"``.

    Returns:
        A new contiguous tensor of the embeddings' shape and dtype; ``embeddings`` themselves if
        there are no feature rows.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together or the plan, or ``impl`` cannot
            run there.
    """
    projector = Projector(weight=weight, bias=bias, fused=gradient_accumulation_fusion)
    return _check_and_insert(TextRows(rows=embeddings), features, projector, plan, impl=impl)


def embed_project_and_insert(  # noqa: PLR0913, PLR0917 - the public signature
    input_ids: Tensor,
    table: Tensor,
    features: Tensor | Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    plan: InsertPlan,
    *,
    gradient_accumulation_fusion: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Look up the words, project the feature rows, and write both to the output, in one pass.

    The result is that of :func:`project_and_insert` with ``table[input_ids]`` as embeddings. The
    launch that writes the output copies the text rows out of the table, bit for bit, so there is
    no ``[S, B, H]`` of word embeddings besides it. Ids at positions of feature rows may be
    anything.

    The gradient of the table is computed row by row: the gradients at all positions of an id are
    summed in fp32, in a fixed order. Rows of other ids are not touched. Nothing is computed for a
    frozen table.

    Args:
        input_ids: ``[B, S]`` int32 or int64, any strides. For a shard's plan the ids of the
            positions that this rank holds.
        table: ``[V, H]``, the word embedding's weight.
        features, weight, bias: as :func:`project_and_insert` takes them.
        plan: from :func:`plan_insert` or :func:`plan_placeholders`, of these ids.
        gradient_accumulation_fusion: add the gradients of the table and of the weight to their
            ``main_grad`` in fp32, by Megatron-Core's conventions, instead of returning them. For
            the table, only the rows of ``main_grad`` whose ids were looked up are read and
            written, and nothing of the table's size is allocated. Otherwise the gradient of the
            table is a dense ``[V, H]`` in its dtype.
        impl: ``"auto"``, ``"triton"`` (bf16, fp16 or fp32) or ``"torch"``.

    Returns:
        ``[S, B, H]`` (``[B, S, H]`` of a batch-first plan) in the table's dtype, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together or the plan, a ``main_grad`` is
            missing, or ``impl`` cannot run there.
        TypeError: ``input_ids`` is neither int32 nor int64.
        IndexError: on the CPU, an id at a text position is no row of the table. On CUDA the host
            does not read the ids: that text row becomes NaN.
    """
    planned = (plan.batch_size, plan.seq_len)
    if tuple(input_ids.shape) != planned:
        raise ValueError(
            f"input_ids: expected [B, S] = {list(planned)} (the plan's), "
            f"got {tuple(input_ids.shape)}"
        )
    ids = input_ids if plan.batch_first else input_ids.t()
    text = TextRows(rows=table, input_ids=ids, fused=gradient_accumulation_fusion)
    projector = Projector(weight=weight, bias=bias, fused=gradient_accumulation_fusion)
    return _check_and_insert(text, features, projector, plan, impl=impl)


def _check_and_insert(
    text: TextRows,
    features: Tensor | Sequence[Tensor],
    projector: Projector,
    plan: InsertPlan,
    *,
    impl: Impl,
) -> Tensor:
    tensors = [features] if isinstance(features, Tensor) else list(features)
    _validate(text, tensors, projector, plan)
    if text.input_ids is not None:
        check_ids(text.input_ids, plan, text.rows.shape[0])
    triton = use_triton(impl, projector.weight.device)
    with profiled("insert"):
        rows = FeatureRows.of(tensors, projector.weight.dtype, triton)
        return insert_projected(text, rows, projector, plan)


def insert_projected(
    text: TextRows,
    rows: FeatureRows,
    projector: Projector,
    plan: InsertPlan,
    *,
    after_plan: bool = False,
) -> Tensor:
    """Project and insert rows that were checked and prepared before: see :class:`FeatureRows`.

    ``after_plan`` says that the plan's kernel is the last one that was launched: the product may
    then begin before that kernel has ended.
    """
    weight, bias = projector.weight, projector.bias
    fused_into = fusion_target(weight, "weight", projector.fused)
    triton, empty = rows.sources is not None, math.prod(text.shape) == 0
    if not rows.tensors or empty:
        return text.embeddings(plan.row_at, triton=triton and not empty)
    if rows.sources is None:
        embeddings = text.embeddings(plan.row_at)
        flat = join_rows(rows.tensors)
        if fused_into is not None:
            weight = MainGrad.apply(weight, fused_into)
        projected = F.linear(pick_rows(flat, plan.local_rows), weight, bias)
        return insert_rows(embeddings, projected.to(embeddings.dtype), plan)
    text_name = "embeddings" if text.input_ids is None else "table"
    check_kernel_dtype(text.rows, text_name)
    check_kernel_dtype(weight, "weight")
    # Only if no copy is launched between plan and product.
    after_plan &= weight.is_contiguous() and (bias is None or bias.is_contiguous())
    return _ProjectAndInsert.apply(
        text.rows if text.input_ids is None else text.rows.contiguous(),
        weight.contiguous(),
        bias if bias is None else bias.contiguous(),
        text.input_ids,
        plan.destinations,
        plan.row_at,
        plan.local_rows,
        plan.live_rows,
        fusion_target(text.rows, "table", text.fused),
        fused_into,
        after_plan,
        len(rows.sources),
        *rows.sources,
        *rows.tensors,
    )
