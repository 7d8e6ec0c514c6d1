"""Where every feature row lands (:func:`plan_insert`), and putting it there
(:func:`project_and_insert`).

Shape letters: ``S`` sequence, ``B`` batch, ``H`` hidden size, ``C`` encoder output width, ``R``
feature rows of all groups together, ``L`` rows of one feature, ``G`` groups, ``N`` features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from step37_kernels import operators as library
from step37_kernels.dispatch import Impl, use_triton
from step37_kernels.plan_tensors import Runs, num_rows, to_runs

TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class InsertPlan:
    """A row map: where each feature row goes, and what each position receives.

    Feature rows of all groups are numbered 0 … R−1 in the order in which they are written: groups
    in list order, features in group order, rows from first to last. Positions are numbered as the
    output lies in memory: ``s * B + b`` of ``[S, B, H]``, and of ``[B, S, H]`` (``batch_first``)
    ``b * S + s``.

    Example, B = 1, S = 8, one group with start token 7 and features of 3, 2 and 4 rows::

        position     0   1   2   3   4   5   6   7
        input_ids    5   7   5   7   5   5   7   5      starts: 2, 4, 7
        feature 0            0   1   2                  rows 0-2 → positions 2, 3, 4
        feature 1                    3   4              rows 3-4 → positions 4, 5; row 2 loses 4
        feature 2                                5      rows 5-8 → position 7; rows 6-8 cut off
        row_at      −1  −1   0   1   3   4  −1   5

        destinations = [2, 3, −1, 4, 5, 7, −1, −1, −1]

    A row is dropped (−1) where it would lie beyond the end of its sequence, where a later row
    claims its position, and where its feature has no start token left.
    """

    destinations: Tensor
    """``[R]`` int32: position of each feature row, or −1. No position occurs twice."""
    row_at: Tensor
    """``[S, B]`` int32 (``[B, S]`` if ``batch_first``): the feature row that a position receives,
    or −1 for a text row."""
    starts: Tensor
    """``[N]`` int32: ``s * B + b`` of each feature's first row (``s`` may be S: nothing fits), −1
    for a feature without a start token. So numbered whatever ``batch_first`` is."""
    found: Tensor
    """``[G]`` int32: start tokens of each group in ``input_ids``."""
    runs: Runs
    """``(start_token, ((features, rows of each), …))`` of each group; known on the host."""
    local_rows: Tensor | None = None
    """Of a plan cut by :meth:`shard`: ``[M]`` int32, the feature row that each entry of
    ``destinations`` (then ``[M]``) is about, −1 past the last; None where it is every row."""
    live_rows: Tensor | None = None
    """Of a shard: ``[1]`` int32, how many entries of ``local_rows`` are in use. The kernels stop
    there, so a rank computes its own rows, not M."""
    batch_first: bool = False
    """Whether the plan is for ``[B, S, H]``."""

    @property
    def num_rows(self) -> int:
        """R, the rows of all features of all groups."""
        return num_rows(self.runs)

    @property
    def row_counts(self) -> tuple[tuple[int, ...], ...]:
        """Rows of each feature, by group."""
        return tuple(
            tuple(rows for features, rows in group for _ in range(features))
            for _, group in self.runs
        )

    @property
    def seq_len(self) -> int:
        """S."""
        return self.row_at.shape[self.batch_first]

    @property
    def batch_size(self) -> int:
        """B."""
        return self.row_at.shape[not self.batch_first]

    def count_mismatches(self, found: Sequence[int]) -> list[str]:
        """A sentence for each group whose start tokens and features differ in number.

        Args:
            found: :attr:`found` on the host. Reading it waits for the device; hence an argument.
        """
        return [
            f"start token {token}: {count} in input_ids, {len(rows)} features; "
            f"inserting {min(count, len(rows))}"
            for (token, _), rows, count in zip(self.runs, self.row_counts, found, strict=True)
            if count != len(rows)
        ]

    def shard(self, positions: Tensor) -> InsertPlan:
        """The plan of a rank that holds only some rows of the sequence.

        No more rows than positions can land there, so there is room for M = min(R, S_local · B) of
        them, whatever their number turns out to be: nothing waits for the device.

        Args:
            positions: ``[S_local]`` integers, the position in the whole sequence of each local row;
                no position twice.

        Returns:
            A plan for ``[S_local, B, H]``: ``row_at``, ``destinations`` and ``local_rows`` are this
            rank's; ``starts`` and ``found`` stay those of the whole.

        Raises:
            ValueError: ``positions`` is not one-dimensional, or this plan is a shard already.
        """
        if positions.ndim != 1:
            raise ValueError(f"positions: expected [S_local], got {tuple(positions.shape)}")
        if self.local_rows is not None:
            raise ValueError("plan: already the plan of a shard")
        row_at = self.row_at.index_select(int(self.batch_first), positions)
        capacity = min(self.num_rows, row_at.numel())
        flat = row_at.flatten().long()
        # Rows in order: number those that land here, and let one slot past the end take the rest.
        lands = torch.zeros(self.num_rows + 1, dtype=torch.bool, device=flat.device)
        lands = lands.index_fill(0, torch.where(flat < 0, self.num_rows, flat), True)[:-1]
        slot_of_row = torch.where(lands, lands.cumsum(0) - 1, capacity)
        everyone = torch.arange(self.num_rows, dtype=torch.int32, device=flat.device)
        local_rows = everyone.new_full((capacity + 1,), -1).scatter(0, slot_of_row, everyone)[:-1]
        slot_of_row = torch.cat([slot_of_row, slot_of_row.new_full((1,), capacity)])
        slots = slot_of_row[flat]
        here = torch.arange(flat.numel(), dtype=torch.int32, device=flat.device)
        destinations = here.new_full((capacity + 1,), -1).scatter(0, slots, here)[:-1]
        return dataclasses.replace(
            self,
            row_at=row_at,
            destinations=destinations,
            local_rows=local_rows,
            live_rows=lands.sum(dtype=torch.int32).view(1),
        )

    def check(self) -> None:
        """Raise on what a correct batch never has. Waits for the device.

        Raises:
            ValueError: start tokens and features differ in number; a span is cut off at the end of
                its sequence; two spans overlap. The message names group, feature and position.
        """
        problems = self.count_mismatches(self.found.tolist())
        if self.local_rows is not None:
            raise ValueError("plan: check the plan of the whole sequence, not that of a shard")
        starts = iter(self.starts.tolist())
        spans: dict[int, list[tuple[int, int, str]]] = {}
        for (token, _), rows in zip(self.runs, self.row_counts, strict=True):
            for k, count in enumerate(rows):
                position = next(starts)
                if position < 0:
                    continue
                start, batch = divmod(position, self.batch_size)
                end = start + count
                where = f"feature {k} of start token {token} (batch row {batch}, "
                where += f"positions {start} to {end - 1})"
                if end > self.seq_len:
                    problems.append(f"{where} is cut off at the sequence length {self.seq_len}")
                if count:
                    spans.setdefault(batch, []).append((start, end, where))
        for column in spans.values():
            column.sort()
            furthest = column[0]
            for span in column[1:]:
                if span[0] < furthest[1]:
                    problems.append(f"{span[2]} overlaps {furthest[2]}")
                furthest = max(furthest, span, key=lambda item: item[1])
        if problems:
            raise ValueError("input_ids and image features do not fit: " + "; ".join(problems))


def plan_insert(
    input_ids: Tensor,
    groups: Sequence[tuple[int, Sequence[int]]],
    *,
    batch_first: bool = False,
    impl: Impl = "auto",
) -> InsertPlan:
    """Find where every feature row lands, for all insertion groups at once.

    The locations of a group are the positions right after its start token, in row-major (batch,
    then sequence) order; the k-th feature goes to the k-th location, up to the smaller of both
    counts. A span is cut at the end of its sequence, and where spans overlap the later one in
    (group, feature) order wins, row by row. See :class:`InsertPlan` for a worked example.

    Nothing waits for the device. The row counts are host integers, since tensor shapes are; what
    depends on the ids stays on the device.

    Args:
        input_ids: ``[B, S]`` int32 or int64 token ids, any strides.
        groups: ``(start_token, row_counts)`` of each insertion group, in insertion order;
            ``row_counts`` holds the number of rows of each of its features.
        batch_first: plan for ``[B, S, H]`` in place of ``[S, B, H]``.
        impl: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        The plan, on the device of ``input_ids``.

    Raises:
        ValueError: ``input_ids`` is not ``[B, S]``, a row count is negative, a start token is no
            value of the ids' dtype, B·S or R exceeds int32, or ``impl`` cannot run there.
        TypeError: ``input_ids`` is neither int32 nor int64, or a start token or row count is no
            integer.
    """
    try:
        runs = to_runs(groups)
    except TypeError as error:
        raise TypeError(f"groups: expected (int, sequence of int) of each: {error}") from error
    smallest = min((rows for _, group in runs for _, rows in group), default=0)
    if smallest < 0:
        raise ValueError(f"groups: row counts must not be negative, got {smallest}")
    plan = plan_runs(input_ids, runs, impl=impl)
    return _batch_first(plan) if batch_first else plan


def plan_placeholders(
    input_ids: Tensor, token: int, num_rows: int, *, batch_first: bool = False
) -> InsertPlan:
    """Send the k-th feature row to the k-th position that holds ``token``, row-major.

    That is how NeMo Automodel and many models of ``transformers`` merge
    (``embeddings[input_ids == token] = rows``, ``masked_scatter``): every row has a placeholder of
    its own. Of too many rows the last are dropped; placeholders without a row keep their word
    embedding. In the plan every row is a feature, and ``token`` the one group's start token::

        position     0   1   2   3   4   5
        input_ids    5   9   9   5   9   9      token 9, 3 rows
        row_at      −1   0   1  −1   2  −1
        destinations = [1, 2, 4]

    A handful of PyTorch operations on every device; nothing waits for it.

    Args:
        input_ids: ``[B, S]`` int32 or int64 token ids, any strides.
        token: the placeholder's id.
        num_rows: R.
        batch_first: plan for ``[B, S, H]`` in place of ``[S, B, H]``.

    Returns:
        The plan, on the device of ``input_ids``.

    Raises:
        ValueError: ``input_ids`` is not ``[B, S]``, ``num_rows`` is negative, ``token`` is no value
            of the ids' dtype, or B·S or R exceeds int32.
        TypeError: ``input_ids`` is neither int32 nor int64.
    """
    if num_rows < 0:
        raise ValueError(f"num_rows: expected at least 0, got {num_rows}")
    runs: Runs = ((token, ((num_rows, 1),)),)
    _check_ids(input_ids, runs)
    batch_size, seq_len = input_ids.shape
    match = (input_ids == token).flatten()
    rank = match.cumsum(0) - 1
    row_at = torch.where(match & (rank < num_rows), rank, -1).to(torch.int32)
    index = torch.arange(row_at.numel(), dtype=torch.int32, device=row_at.device)
    # One slot past the end takes the positions that receive no row.
    slots = torch.where(row_at < 0, num_rows, row_at).long()
    batch_first_at = index.new_full((num_rows + 1,), -1).scatter(0, slots, index)[:-1]
    starts = _renumbered(batch_first_at, seq_len, batch_size)
    row_at = row_at.view(batch_size, seq_len)
    return InsertPlan(
        destinations=batch_first_at if batch_first else starts,
        row_at=row_at if batch_first else row_at.t().contiguous(),
        starts=starts,
        found=match.sum(dtype=torch.int32).view(1),
        runs=runs,
        batch_first=batch_first,
    )


def _renumbered(positions: Tensor, inner: int, outer: int) -> Tensor:
    """Positions ``i * inner + j`` as ``j * outer + i``; −1 stays."""
    inner = max(inner, 1)
    j, i = positions % inner, positions.div(inner, rounding_mode="floor")
    return torch.where(positions < 0, positions, j * outer + i)


def _batch_first(plan: InsertPlan) -> InsertPlan:
    """The plan of ``[S, B, H]`` for ``[B, S, H]``."""
    return dataclasses.replace(
        plan,
        destinations=_renumbered(plan.destinations, plan.batch_size, plan.seq_len),
        row_at=plan.row_at.t().contiguous(),
        batch_first=True,
    )


def plan_runs(input_ids: Tensor, runs: Runs, *, impl: Impl = "auto") -> InsertPlan:
    """:func:`plan_insert` for features that come as tensors ``[N, L, C]``.

    Args:
        input_ids: ``[B, S]``.
        runs: ``(start_token, ((N, L), …))`` of each group: the shapes of its tensors.
        impl: as there.
    """
    triton = use_triton(impl, input_ids.device)
    _check_ids(input_ids, runs)
    flat = [run for _, group in runs for run in group]
    destinations, row_at, starts, found = library.plan(
        input_ids,
        [token for token, _ in runs],
        [len(group) for _, group in runs],
        [features for features, _ in flat],
        [rows for _, rows in flat],
        triton,
    )
    return InsertPlan(
        destinations=destinations, row_at=row_at, starts=starts, found=found, runs=runs
    )


def _check_ids(input_ids: Tensor, runs: Runs) -> None:
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids: expected [B, S], got {tuple(input_ids.shape)}")
    if input_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"input_ids: expected int32 or int64, got {input_ids.dtype}")
    limits = torch.iinfo(input_ids.dtype)
    for token, _ in runs:
        if not limits.min <= token <= limits.max:
            raise ValueError(f"start token: expected a value of {input_ids.dtype}, got {token}")
    batch_size, seq_len = input_ids.shape
    if max(num_rows(runs), (seq_len + 1) * batch_size) > _INT32_MAX:
        raise ValueError(
            f"input_ids, groups: at most {_INT32_MAX} positions and feature rows, "
            f"got {tuple(input_ids.shape)} ids and {num_rows(runs)} rows"
        )


def pick_rows(rows: Tensor, local_rows: Tensor | None) -> Tensor:
    """The rows that a shard's plan is about: ``[R, …]`` → ``[M, …]``, zeros in unused entries.

    Zeros, so that nothing of row 0 gets into the weight's gradient. All rows for a whole plan.
    """
    if local_rows is None:
        return rows
    picked = rows.index_select(0, local_rows.clamp_min(0))
    return picked.masked_fill_((local_rows < 0)[:, None], 0)


def check_embeddings(
    embeddings: Tensor, plan: InsertPlan, name: str, hidden: int | None = None
) -> None:
    """Raise ``ValueError`` unless they are ``[S, B, H]`` (``[B, S, H]`` if it is batch-first) of
    the plan, and of this H if given."""
    shape, planned = tuple(embeddings.shape), tuple(plan.row_at.shape)
    if len(shape) != 3 or shape[:2] != planned or hidden not in (None, shape[2]):
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
    num_positions = embeddings.shape[:2].numel()
    # One row past the end takes the rows that have no destination. Only that row is written more
    # than once, and it is cut off: so the result and the gradients are deterministic.
    flat = torch.cat([embeddings.reshape(num_positions, hidden), embeddings.new_zeros(1, hidden)])
    slots = torch.where(plan.destinations < 0, num_positions, plan.destinations).long()
    return flat.index_copy(0, slots, rows)[:-1].view(embeddings.shape)


class _ProjectAndInsert(torch.autograd.Function):
    """``out[destinations[r]] = features[r] @ weightᵀ + bias``; all other rows are the embeddings'.

    Saved for backward: the rows ``[R, C]`` (if the weight needs a gradient), the weight (if a
    feature does), and the plan. Each gradient is computed only where it is asked for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        destinations: Tensor,
        row_at: Tensor,
        local_rows: Tensor | None,
        live_rows: Tensor | None,
        inplace: bool,
        fused_into: tuple[Tensor] | None,
        *features: Tensor,
    ) -> Tensor:
        if inplace:
            # Another tensor on the same memory. Whoever saved the old values for a backward pass
            # against our assurance is told so by autograd.
            out = embeddings.detach()
            if not embeddings.is_inference():
                torch.autograd.graph.increment_version(embeddings)
        else:
            out = embeddings.detach().clone(memory_format=torch.contiguous_format)
        if len(features) == 1 and features[0].is_contiguous():
            x = features[0].flatten(0, 1)
        else:
            x = library.pack_rows(list(features))
        x = pick_rows(x, local_rows)
        library.project_scatter(x, weight, bias, destinations, live_rows, out)

        need_embeddings, need_weight, need_bias, *_ = ctx.needs_input_grad
        need_features = ctx.needs_input_grad[-len(features) :]
        ctx.need_rows = need_weight or need_bias or any(need_features)
        ctx.save_for_backward(
            row_at if need_embeddings else None,
            destinations if ctx.need_rows else None,
            local_rows if any(need_features) else None,
            live_rows if need_weight or any(need_features) else None,
            x if need_weight else None,
            weight if any(need_features) else None,
        )
        # In a tuple: the parameter itself, not an input that a gradient is returned for.
        ctx.fused_into = fused_into
        ctx.dtype = weight.dtype
        ctx.shapes = [tuple(feature.shape) for feature in features]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        need_embeddings, need_weight, need_bias, *_ = ctx.needs_input_grad
        need_features = ctx.needs_input_grad[-len(ctx.shapes) :]
        row_at, destinations, local_rows, live_rows, x, weight = ctx.saved_tensors
        grad_embeddings = library.embedding_grad(grad_output, row_at) if need_embeddings else None
        grad_weight = grad_bias = None
        grad_features: list[Tensor | None] = [None] * len(need_features)
        if ctx.need_rows:
            rows, row_sum = library.gather_grad(grad_output, destinations, ctx.dtype, need_bias)
            grad_bias = row_sum if need_bias else None
            if need_weight and ctx.fused_into is not None:

                def put(main_grad: Tensor, add: bool) -> None:
                    shape = (rows.shape[1], x.shape[1])
                    if tuple(main_grad.shape) != shape or not main_grad.is_contiguous():
                        raise ValueError(
                            f"weight.main_grad: expected {shape}, contiguous, got "
                            f"{tuple(main_grad.shape)} with strides {main_grad.stride()}"
                        )
                    library.grad_weight_into(rows, x, live_rows, main_grad, add)

                grad_weight = _into_main_grad(ctx.fused_into[0], put)
            elif need_weight:
                grad_weight = library.grad_weight(rows, x, live_rows)
            if any(need_features):
                grad_features = _grad_features(
                    rows, weight, local_rows, live_rows, ctx.shapes, need_features
                )
        unused = (None,) * 6
        return (grad_embeddings, grad_weight, grad_bias, *unused, *grad_features)


class _MainGrad(torch.autograd.Function):
    """Identity on a weight whose gradient goes to its ``main_grad``; for the PyTorch path."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, fused_into: tuple[Tensor]) -> Tensor:
        ctx.fused_into = fused_into
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        def put(main_grad: Tensor, add: bool) -> None:
            if add:
                main_grad.add_(gradient)
            else:
                main_grad.copy_(gradient)

        return _into_main_grad(ctx.fused_into[0], put), None


def _into_main_grad(weight: Tensor, put: Callable[[Tensor, bool], None]) -> Tensor | None:
    """Megatron's fused weight gradient (``gradient_accumulation_fusion``), by its conventions.

    ``put`` gets ``main_grad`` and whether to add to it: not under Megatron-FSDP, which hands out a
    new buffer, and not for a weight marked ``overwrite_main_grad``. Where the weight has
    ``grad_added_to_main_grad``, that becomes True and a gradient without meaning is returned, so
    that the hooks of data parallelism run; zeros if the weight is marked ``zero_out_wgrad``.
    """
    owner: Any = weight
    fsdp = hasattr(owner, "__fsdp_param__")
    if fsdp:
        owner.main_grad = owner.get_main_grad()
    put(owner.main_grad, not (fsdp or getattr(owner, "overwrite_main_grad", False)))
    if not hasattr(owner, "grad_added_to_main_grad"):
        return None
    owner.grad_added_to_main_grad = True
    if getattr(owner, "zero_out_wgrad", False):
        return torch.zeros_like(weight)
    return torch.empty_like(weight)


def _grad_features(
    rows: Tensor,
    weight: Tensor,
    local_rows: Tensor | None,
    live_rows: Tensor | None,
    shapes: Sequence[tuple[int, ...]],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of the feature tensors, from one product over the rows between the first and the
    last that needs one."""
    ends = []
    end = 0
    for shape in shapes:
        end += shape[0] * shape[1]
        ends.append(end)
    begins = [0, *ends[:-1]]
    positions = [i for i, need in enumerate(needed) if need]
    first, last = begins[positions[0]], ends[positions[-1]]
    if local_rows is None:
        grads = library.grad_features(rows[first:last], weight, None)
    else:
        local = library.grad_features(rows, weight, live_rows)
        slots = torch.where(local_rows < 0, end, local_rows).long()
        # The row past the end takes the unused entries.
        grads = local.new_zeros(end + 1, local.shape[1]).index_copy_(0, slots, local)[first:last]
    return [
        grads[begin - first : end - first].view(shape) if need else None
        for begin, end, shape, need in zip(begins, ends, shapes, needed, strict=True)
    ]


def _validate(
    embeddings: Tensor,
    features: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    plan: InsertPlan,
) -> None:
    def fail(name: str, expected: str, got: object) -> None:
        raise ValueError(f"{name}: expected {expected}, got {got}")

    if weight.ndim != 2:
        fail("weight", "[H, C]", tuple(weight.shape))
    hidden, width = weight.shape
    check_embeddings(embeddings, plan, "embeddings", hidden)
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
    num_rows = sum(feature.shape[:-1].numel() for feature in features)
    if num_rows != plan.num_rows:
        fail("features", f"R = {plan.num_rows} rows (the plan's)", f"{num_rows} rows")
    tensors = {"embeddings": embeddings, "weight": weight, "bias": bias}
    tensors.update({f"features[{i}]": feature for i, feature in enumerate(features)})
    tensors["plan.destinations"] = plan.destinations
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != weight.device:
            fail(name, f"the weight's device {weight.device}", tensor.device)
        if name != "plan.destinations" and not tensor.dtype.is_floating_point:
            fail(name, "a floating-point dtype", tensor.dtype)


def project_and_insert(
    embeddings: Tensor,
    features: Tensor | Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    plan: InsertPlan,
    *,
    inplace: bool = False,
    gradient_accumulation_fusion: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Project feature rows and put each at its destination, all groups in one pass.

    ``out[s, b] = round(features[r] @ weightᵀ + bias)`` where ``plan.row_at[s, b]`` is a row ``r``,
    and ``embeddings[s, b]`` elsewhere. Products are accumulated in fp32, rounded to the weight's
    dtype, then to the embeddings'. The projected rows never exist in memory other than in the
    output, nothing waits for the device, and two runs are bit-equal, forward and backward.

    Gradients: of the embeddings, ``grad_output`` with the overwritten rows zeroed; of features,
    weight and bias, those of the rows that survived. What needs no gradient costs nothing. The
    gradients are not differentiable themselves with ``impl="triton"``.

    Args:
        embeddings: ``[S, B, H]``, or ``[B, S, H]`` of a batch-first plan; any strides.
        features: rows of all groups in the plan's order, R together: ``[N, L, C]`` or ``[L, C]``,
            or a sequence of such (ragged). One contiguous tensor is read in place. Several, and
            other layouts, such as the channels-first view of a vision tower, are packed first, by
            one pass a tensor. Cast to the weight's dtype.
        weight: ``[H, C]`` projector weight.
        bias: ``[H]``, or None.
        plan: from :func:`plan_insert` or :func:`plan_placeholders`.
        inplace: write into the memory of ``embeddings``, which must be contiguous; the caller
            vouches that nobody reads that tensor afterwards. Ignored where the PyTorch
            implementation runs.
        gradient_accumulation_fusion: add the weight's gradient to ``weight.main_grad`` instead of
            returning it, as Megatron-Core does under that name; in fp32 within the matrix product
            (the PyTorch implementation rounds it to the weight's dtype first).
        impl: ``"auto"``, ``"triton"`` (bf16, fp16 or fp32) or ``"torch"``.

    Returns:
        The embeddings' shape and dtype, contiguous; ``embeddings`` themselves where there
        is no row.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together or the plan, or ``impl`` cannot
            run there.
    """
    tensors = [features] if isinstance(features, Tensor) else list(features)
    _validate(embeddings, tensors, weight, bias, plan)
    triton = use_triton(impl, weight.device)
    fused_into = None
    if gradient_accumulation_fusion and weight.requires_grad:
        if not (hasattr(weight, "main_grad") or hasattr(weight, "__fsdp_param__")):
            raise ValueError(
                "weight: gradient_accumulation_fusion=True needs weight.main_grad, which "
                "Megatron's DistributedDataParallel sets; it has none"
            )
        fused_into = (weight,)
    rows = [
        (tensor if tensor.ndim == 3 else tensor.unsqueeze(0)).to(weight.dtype)
        for tensor in tensors
        if tensor.shape[:-1].numel()
    ]
    if not rows or embeddings.numel() == 0:
        return embeddings
    if not triton:
        flat = pick_rows(torch.cat([tensor.flatten(0, 1) for tensor in rows]), plan.local_rows)
        if fused_into is not None:
            weight = _MainGrad.apply(weight, fused_into)
        return insert_rows(embeddings, F.linear(flat, weight, bias).to(embeddings.dtype), plan)
    for name, tensor in (("embeddings", embeddings), ("weight", weight)):
        if tensor.dtype not in TRITON_DTYPES:
            raise ValueError(
                f"{name}: the Triton kernels take bfloat16, float16 and float32, got "
                f"{tensor.dtype}; pass impl='torch'"
            )
    if inplace and not embeddings.is_contiguous():
        raise ValueError(
            f"embeddings: inplace=True needs a contiguous tensor, got strides {embeddings.stride()}"
        )
    if inplace and embeddings.is_inference() and not torch.is_inference_mode_enabled():
        # Autograd would leave the output without any gradient, and not say so.
        raise ValueError("embeddings: inplace=True needs a normal tensor, got an inference tensor")
    return _ProjectAndInsert.apply(
        embeddings,
        weight.contiguous(),
        bias if bias is None else bias.contiguous(),
        plan.destinations,
        plan.row_at,
        plan.local_rows,
        plan.live_rows,
        inplace,
        fused_into,
        *rows,
    )
