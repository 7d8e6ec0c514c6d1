"""``ImageInsertEmbedding``: the drop-in for the class of that name in ``Step37Model``."""

from __future__ import annotations

import dataclasses
import functools
import logging
import operator
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from step37_kernels.dispatch import Impl, use_triton
from step37_kernels.insert import (
    InsertPlan,
    check_embeddings,
    insert_rows,
    pick_rows,
    plan_runs,
    project_and_insert,
)
from step37_kernels.parallel import LayoutRule, SequenceLayout

logger = logging.getLogger(__name__)


@dataclass
class ImageForInsert:
    """One insertion group on its way from the data to the model.

    Mutable, with these names, because ``Step37Model`` fills in ``image_features``.
    """

    insert_start_token: int
    """Token id after which the features go: ``<im_start>``, or ``<patch_start>`` for crops."""
    images: Tensor | None = None
    """``[N, 3, H, W]`` pixels for the vision tower."""
    image_features: Tensor | list[Tensor] | None = None
    """``[N, L, C]``, or a list mixing ``[L, C]`` and ``[N, L, C]``, not yet projected."""
    rope_cu_seqlens: Tensor | None = None
    """``[N + 1]`` int32: cumulative vision patches, for the tower's rotary embedding."""
    rope_max_seq_len: int | None = None
    """Most vision patches in one image."""


def _feature_tensors(features: Tensor | Sequence[Tensor], name: str) -> list[Tensor]:
    """The group's non-empty tensors as ``[N, L, C]``.

    Raises:
        ValueError: a tensor of another rank.
    """
    if isinstance(features, Tensor):
        if features.ndim != 3:
            raise ValueError(f"{name}: expected [N, L, C], got {tuple(features.shape)}")
        return [features]
    tensors = []
    for i, item in enumerate(features):
        if item.ndim not in (2, 3):
            raise ValueError(f"{name}[{i}]: expected [L, C] or [N, L, C], got {tuple(item.shape)}")
        tensors.append(item if item.ndim == 3 else item.unsqueeze(0))
    return tensors


def _run(
    token: int, name: str, tensors: Sequence[Tensor]
) -> tuple[int, tuple[tuple[int, int], ...]]:
    if isinstance(token, Tensor):
        raise TypeError(
            f"{name}: expected an int, got a tensor on {token.device}, whose value a forward would "
            "wait for"
        )
    return operator.index(token), tuple((tensor.shape[0], tensor.shape[1]) for tensor in tensors)


def _holders(tensor: Tensor) -> tuple[int, ...] | None:
    """Who refers to this tensor and its memory: Python references, its base's, the storage's."""
    count_storage: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)
    if count_storage is None:
        return None
    base = tensor._base
    return (
        sys.getrefcount(tensor),
        0 if base is None else sys.getrefcount(base),
        count_storage(tensor.untyped_storage()._cdata),
    )


def _holders_of_argument(tensor: Tensor) -> tuple[int, ...] | None:
    """:func:`_holders` of a variable of the caller, one call further down.

    Whether that call counts as a reference of its own depends on the version of Python.
    """
    return _holders(tensor)


def _is_memory_of_others(tensor: Tensor) -> bool:
    """Whether PyTorch has not allocated this memory, or shares it with other processes."""
    storage = tensor.untyped_storage()
    # What PyTorch has allocated can be resized. All CUDA memory counts as shared.
    return not storage.resizable() or (tensor.device.type == "cpu" and storage.is_shared())


def _is_unshared(embeddings: Tensor) -> bool:
    """Whether the caller's variable is the only way to this memory, so that it may be overwritten.

    True of what an embedding has just computed, also where that is the one view of a temporary
    (Megatron's transpose at B = 1). False of a parameter, a tensor that somebody keeps (a cache, a
    hook, autograd), a view of one, an expanded tensor, memory that is not PyTorch's own (NumPy's, a
    file's, DLPack's, another process's), and wherever it cannot be told. Compared with tensors made
    on the spot, because what counts as one reference varies between releases.
    """
    if torch.compiler.is_compiling() or not embeddings.is_contiguous():
        return False
    if embeddings.is_leaf and embeddings.requires_grad:
        return False
    if embeddings.is_inference() and not torch.is_inference_mode_enabled():
        # Nothing that shares its memory can take part in autograd.
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(embeddings):
        # It has no memory of its own.
        return False
    if _is_memory_of_others(embeddings):
        return False
    probe = torch.empty(1, device="cpu")
    if embeddings._base is not None:
        probe = probe.view(1)
    holders, alone = _holders(embeddings), _holders_of_argument(probe)
    return holders is not None and holders == alone


class _CountWatch:
    """Warns when start tokens and features differ in number, without waiting for the device."""

    def __init__(self) -> None:
        self._pending: deque[tuple[InsertPlan, Tensor, torch.cuda.Event]] = deque()
        # Between looking at the oldest and taking it, another thread's forward may have taken it.
        self._polling = threading.Lock()

    def watch(self, plan: InsertPlan) -> None:
        """Warn now (CPU), or queue a copy of the counts that a later :meth:`poll` reads (CUDA)."""
        if plan.found.is_meta or isinstance(plan.found, FakeTensor):
            # Shapes without values: there is nothing to count.
            return
        if not plan.found.is_cuda:
            self._warn(plan, plan.found)
        elif not torch.cuda.is_current_stream_capturing():
            host = torch.empty(plan.found.shape, dtype=torch.int32, device="cpu", pin_memory=True)
            host.copy_(plan.found, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(plan.found.device))
            self._pending.append((plan, host, copied))

    def poll(self) -> None:
        """Warn about the plans whose counts have arrived."""
        if torch.compiler.is_compiling():
            return
        if self._pending and torch.cuda.is_current_stream_capturing():
            return
        arrived = []
        with self._polling:
            while self._pending and self._pending[0][2].query():
                arrived.append(self._pending.popleft())
        for plan, host, _ in arrived:
            self._warn(plan, host)

    @staticmethod
    def _warn(plan: InsertPlan, found: Tensor) -> None:
        for mismatch in plan.count_mismatches(found.tolist()):
            logger.warning("image features and start tokens differ in number: %s", mismatch)


_count_watch = _CountWatch()
# Of the process, not of a module: a module with events in it could not be copied or pickled.


@torch.library.custom_op(
    "step37::watch_counts",
    mutates_args=(),
    schema="(Tensor found, int[] tokens, SymInt[] features) -> Tensor",
)
def _watch_in_graph(found: Tensor, tokens: list[int], features: list[int]) -> Tensor:
    """:class:`_CountWatch` from within a compiled graph, which would drop what nobody needs.

    Returns:
        ``[1]`` int32, a zero that no compiler knows to be one: for what is needed to depend on.
    """
    nothing = found.new_empty(0)
    runs = tuple((token, ((count, 0),)) for token, count in zip(tokens, features, strict=True))
    _count_watch.poll()
    # Only its counts are looked at.
    _count_watch.watch(
        InsertPlan(destinations=nothing, row_at=nothing, starts=nothing, found=found, runs=runs)
    )
    return found.new_zeros(1)


@_watch_in_graph.register_fake
def _(found: Tensor, tokens: list[int], features: list[int]) -> Tensor:
    del tokens, features
    return found.new_empty(1)


def _watch(plan: InsertPlan) -> InsertPlan:
    """See to it that differing counts are warned about; the plan to go on with."""
    if not torch.compiler.is_compiling():
        _count_watch.watch(plan)
        return plan
    tokens = [token for token, _ in plan.runs]
    features = [sum(count for count, _ in group) for _, group in plan.runs]
    zero = _watch_in_graph(plan.found, tokens, features)
    return dataclasses.replace(
        plan, destinations=plan.destinations + zero, row_at=plan.row_at + zero
    )


class _ZeroGradient(torch.autograd.Function):
    """The embeddings as they are, and in backward zeros for everything else that comes in."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = [(p.shape, p.dtype, p.device) for p in parameters]
        # Not the tensor itself: autograd would make that a view, which no later layer may change.
        return embeddings.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        zeros = [
            torch.zeros(shape, dtype=dtype, device=device) if needed else None
            for (shape, dtype, device), needed in zip(
                ctx.parameters, ctx.needs_input_grad[1:], strict=True
            )
        ]
        return grad_output, *zeros


def _run_forward_pre_hooks(module: nn.Module) -> None:
    """What calling ``module`` would do first.

    Megatron's wrappers see to a module's own parameters there: DDP with ``overlap_param_gather``
    waits for those still on their way, Megatron-FSDP gathers them.
    """
    for key, hook in tuple(module._forward_pre_hooks.items()):
        if key in module._forward_pre_hooks_with_kwargs:
            hook(module, (), {})
        else:
            hook(module, ())


def _is_plain(projector: nn.Module) -> bool:
    """Whether calling the projector means its weight and bias and nothing else."""
    return type(projector) is nn.Linear and not (
        projector._forward_hooks or projector._backward_hooks or projector._backward_pre_hooks
    )


@functools.cache
def _warn_unfused(kind: str) -> None:
    logger.warning(
        "align_projector (%s) is more than a weight and a bias (an adapter, a hook, a shard): it "
        "is called, and its rows are inserted by PyTorch",
        kind,
    )


def _layout_name(layout: SequenceLayout | LayoutRule) -> str:
    """For a reader: what is divided, without the groups' addresses and the values of a tensor."""
    if not isinstance(layout, SequenceLayout):
        return getattr(layout, "__name__", repr(layout))
    given = [f.name for f in dataclasses.fields(layout) if getattr(layout, f.name) is not None]
    return f"SequenceLayout({', '.join(given)})"


class ImageInsertEmbedding(nn.Module):
    """Word embedding with projected image features in the rows after each start token.

    Takes the place of Megatron-Bridge's class: same constructor, same calls, same state dict
    (``align_projector.weight`` and, with a bias, ``.bias``), same values; the features of all
    groups are projected and inserted by one pass of :func:`step37_kernels.project_and_insert`.

    Args:
        language_embedding: Megatron-Core's ``LanguageModelEmbedding`` or anything called as
            ``(input_ids=[B, S], position_ids=…)`` that returns ``[S, B, H]``. Borrowed: reachable
            as ``_language_embedding``, not registered, not in the state dict.
        encoder_output_dim: C, width of the features.
        hidden_size: H.
        projector_bias: give ``align_projector`` a bias.
        impl: ``"auto"`` (Triton for CUDA tensors, PyTorch otherwise), ``"triton"`` or ``"torch"``.
        strict: raise ``ValueError`` at once where start tokens and features differ in number, a
            span is cut off at the end of its sequence, or spans overlap. Waits for the device in
            every forward, so ``torch.compile`` breaks its graph there, and refuses to under
            ``fullgraph=True``. Off, differing numbers are paired up to the smaller one and logged
            as a warning (on CUDA by a later forward, once the counts have arrived), and cut or
            overlapping spans are taken as they are.
        layout: which rows of the sequence this rank holds, under sequence or context parallelism;
            None for all. ``forward`` takes the whole ``input_ids`` all the same. A function is
            called with the language embedding in each forward and returns one of the two:
            :func:`step37_kernels.megatron.auto_layout` reads Megatron's state then.
        gradient_accumulation_fusion: add the projector weight's gradient to its ``main_grad`` in
            fp32, by Megatron-Core's conventions, instead of handing it to autograd.
        text_only_gradient: give the projector a gradient of zeros where a forward has no image
            rows. Without it such a microbatch gives no gradient at all, and data-parallel
            reduction that overlaps with backward waits for it in vain. Costs one write of the
            weight's size in backward; a frozen projector costs nothing. A vision tower that is
            trained has the same need, which this class cannot meet.

    A projector that is more than a weight and a bias (an adapter around it, a forward hook, a
    shard of FSDP's) is called as a module, and only the insertion is ours: slower, and said so in
    the log once.
    """

    def __init__(
        self,
        language_embedding: Callable[..., Tensor],
        encoder_output_dim: int,
        hidden_size: int,
        projector_bias: bool = False,
        *,
        impl: Impl = "auto",
        strict: bool = False,
        layout: SequenceLayout | LayoutRule | None = None,
        gradient_accumulation_fusion: bool = False,
        text_only_gradient: bool = False,
    ) -> None:
        super().__init__()
        # Around nn.Module's own __setattr__, which would register a module, and with it count the
        # embedding's parameters twice.
        self._language_embedding: Callable[..., Tensor]
        object.__setattr__(self, "_language_embedding", language_embedding)
        self.align_projector = nn.Linear(encoder_output_dim, hidden_size, bias=projector_bias)
        nn.init.kaiming_normal_(self.align_projector.weight, mode="fan_in", nonlinearity="relu")
        if projector_bias:
            nn.init.zeros_(self.align_projector.bias)
        self.configure(
            impl=impl,
            strict=strict,
            layout=layout,
            gradient_accumulation_fusion=gradient_accumulation_fusion,
            text_only_gradient=text_only_gradient,
        )

    def configure(
        self,
        *,
        impl: Impl = "auto",
        strict: bool = False,
        layout: SequenceLayout | LayoutRule | None = None,
        gradient_accumulation_fusion: bool = False,
        text_only_gradient: bool = False,
    ) -> None:
        """Set all options, which are those of the constructor."""
        if impl not in ("auto", "triton", "torch"):
            raise ValueError(f"impl: expected one of auto, triton, torch, got {impl!r}")
        if not (layout is None or isinstance(layout, SequenceLayout) or callable(layout)):
            raise ValueError(
                "layout: expected a SequenceLayout, a function that returns one (such as "
                f"step37_kernels.megatron.auto_layout) or None, got {layout!r}"
            )
        self.impl = impl
        self.strict = strict
        self.layout = layout
        self.gradient_accumulation_fusion = gradient_accumulation_fusion
        self.text_only_gradient = text_only_gradient
        self._mark_projector(layout if isinstance(layout, SequenceLayout) else None)

    def extra_repr(self) -> str:
        parts = [
            f"impl={self.impl!r}",
            f"strict={self.strict}",
            f"text_only_gradient={self.text_only_gradient}",
        ]
        if self.gradient_accumulation_fusion:
            parts.append("gradient_accumulation_fusion=True")
        if self.layout is not None:
            parts.append(f"layout={_layout_name(self.layout)}")
        return ", ".join(parts)

    @staticmethod
    def insert_features(
        input_embeddings: Tensor,
        image_features: Tensor | list[Tensor],
        input_ids: Tensor,
        flag: int,
    ) -> Tensor:
        """Insert features of one group that are already projected.

        Args:
            input_embeddings: ``[S, B, H]``, left as it is.
            image_features: ``[N, L, H]``, or a list mixing ``[L, H]`` and ``[N, L, H]``; moved to
                the embeddings' device and dtype.
            input_ids: ``[B, S]``.
            flag: the group's start token.

        Returns:
            ``[S, B, H]``: ``input_embeddings`` itself where there is nothing to insert.

        Raises:
            ValueError: a shape that does not fit.
            TypeError: the start token is no integer.
        """
        _count_watch.poll()
        tensors = _feature_tensors(image_features, "image_features")
        plan = plan_runs(input_ids, (_run(flag, "flag", tensors),))
        check_embeddings(input_embeddings, plan, "input_embeddings")
        plan = _watch(plan)
        hidden = input_embeddings.shape[-1]
        rows = []
        for tensor in tensors:
            if tensor.shape[:2].numel():
                if tensor.shape[-1] != hidden:
                    raise ValueError(
                        f"image_features: expected width {hidden} (the embeddings'), got "
                        f"{tuple(tensor.shape)}"
                    )
                rows.append(tensor.to(input_embeddings).flatten(0, 1))
        if not rows:
            return input_embeddings
        return insert_rows(input_embeddings, torch.cat(rows), plan)

    def forward(
        self,
        input_ids: Tensor,
        images: list[ImageForInsert] | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> Tensor:
        """Look up the word embeddings and put the projected image features in place.

        Args:
            input_ids: ``[B, S]`` int32 or int64.
            images: insertion groups in order, each with ``image_features``; None or empty returns
                the word embeddings.
            position_ids: handed to the language embedding.
            **kwargs: accepted and ignored, as the replaced class does.

        Returns:
            ``[S, B, H]`` in the language embedding's dtype.

        Raises:
            ValueError: a group without features or with features of the wrong rank or width; the
                language embedding gives another shape; with ``strict``, a batch whose tokens and
                features do not fit.
            TypeError: ``images`` is no list, or a start token no integer.
        """
        _count_watch.poll()
        layout = self._layout_now()
        if layout is None:
            embeddings = self._language_embedding(input_ids=input_ids, position_ids=position_ids)
            positions = None
        else:
            embeddings, positions = self._look_up_shard(layout, input_ids, position_ids)
        if not images:
            return self._without_image_rows(embeddings)
        if not isinstance(images, Sequence):
            raise TypeError(
                f"images: expected a list of ImageForInsert, got {type(images).__name__}"
            )
        unshared = _is_unshared(embeddings)
        plain = self._is_projector_plain()
        if plain:
            _run_forward_pre_hooks(self.align_projector)
        weight = next(self.align_projector.parameters())
        width = weight.shape[1] if plain else None
        runs: list[tuple[int, tuple[tuple[int, int], ...]]] = []
        features: list[Tensor] = []
        for i, image in enumerate(images):
            if image.image_features is None:
                raise ValueError(
                    f"images[{i}]: image_features is None (start token {image.insert_start_token});"
                    " run the vision tower first"
                )
            tensors = _feature_tensors(image.image_features, f"images[{i}].image_features")
            runs.append(_run(image.insert_start_token, f"images[{i}].insert_start_token", tensors))
            for tensor in tensors:
                if tensor.shape[:2].numel() and width not in (None, tensor.shape[2]):
                    raise ValueError(
                        f"images[{i}].image_features: expected C = {width} (the projector's), got "
                        f"{tuple(tensor.shape)}"
                    )
            features += [
                tensor.to(device=weight.device, dtype=weight.dtype)
                for tensor in tensors
                if tensor.shape[:2].numel()
            ]
        plan = plan_runs(input_ids, tuple(runs), impl=self.impl)
        if self.strict:
            if torch.compiler.is_compiling():
                torch._dynamo.graph_break(
                    msg="strict=True of ImageInsertEmbedding waits for the device, which no graph "
                    "can hold: compile without fullgraph=True, or pass strict=False"
                )
            plan.check()
        else:
            plan = _watch(plan)
        if not features:
            return self._without_image_rows(embeddings)
        if layout is not None and positions is not None:
            plan = plan.shard(positions)
            features = [layout.complete_gradient(tensor) for tensor in features]
        if not plain:
            check_embeddings(embeddings, plan, "language_embedding's result")
            flat = torch.cat([tensor.flatten(0, 1) for tensor in features])
            flat = pick_rows(flat, plan.local_rows)
            return insert_rows(embeddings, self.align_projector(flat).to(embeddings.dtype), plan)
        return project_and_insert(
            embeddings,
            features,
            self.align_projector.weight,
            self.align_projector.bias,
            plan,
            inplace=unshared,
            gradient_accumulation_fusion=self.gradient_accumulation_fusion,
            impl=self.impl,
        )

    def _layout_now(self) -> SequenceLayout | None:
        if self.layout is None or isinstance(self.layout, SequenceLayout):
            return self.layout
        layout = self.layout(self._language_embedding)
        self._mark_projector(layout)
        return layout

    def _mark_projector(self, layout: SequenceLayout | None) -> None:
        """Under sequence parallelism each rank's gradient is that of its own rows; Megatron sums
        the gradients of parameters so marked."""
        parted = layout is not None and layout.sequence_parallel_group is not None
        for parameter in self.align_projector.parameters():
            marked = getattr(parameter, "sequence_parallel", False)
            if parted and not marked:
                parameter.sequence_parallel = True  # type: ignore[attr-defined]
            elif marked and not parted:
                del parameter.sequence_parallel  # type: ignore[attr-defined]

    def _look_up_shard(
        self, layout: SequenceLayout, input_ids: Tensor, position_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """This rank's word embeddings, and their positions in the whole sequence."""
        seq_len = input_ids.shape[1]
        looked_up = layout.positions_looked_up(seq_len, input_ids.device)
        if looked_up is not None:
            input_ids = input_ids.index_select(1, looked_up)
            if position_ids is not None:
                position_ids = position_ids.index_select(1, looked_up)
        embeddings = self._language_embedding(input_ids=input_ids, position_ids=position_ids)
        return layout.shard(embeddings, seq_len, looked_up)

    def _is_projector_plain(self) -> bool:
        """Whether its weight and bias may stand for the projector.

        Raises:
            ValueError: they may not, and ``impl="triton"`` asks for a kernel that knows no other.
        """
        plain = _is_plain(self.align_projector)
        if not plain:
            kind = type(self.align_projector).__name__
            if self.impl == "triton":
                raise ValueError(
                    f"impl='triton': align_projector ({kind}) is more than a weight and a bias; "
                    "pass impl='auto' or 'torch' to have it called"
                )
            if not torch.compiler.is_compiling():
                _warn_unfused(kind)
        return plain

    def _without_image_rows(self, embeddings: Tensor) -> Tensor:
        trained = any(parameter.requires_grad for parameter in self.align_projector.parameters())
        if not (self.text_only_gradient and trained and torch.is_grad_enabled()):
            return embeddings
        result: Tensor
        if not self._is_projector_plain():
            like = next(self.align_projector.parameters())
            no_rows = torch.empty(
                0, self.align_projector.in_features, device=like.device, dtype=like.dtype
            )
            result = _ZeroGradient.apply(embeddings, self.align_projector(no_rows))
            return result
        _run_forward_pre_hooks(self.align_projector)
        weight, bias = self.align_projector.weight, self.align_projector.bias
        parameters: tuple[Tensor, ...] = (weight,) if bias is None else (weight, bias)
        # The gradients must come in the order in which a forward with images gives them: ranks
        # reduce bucket after bucket as they come, and all ranks have to agree on the buckets.
        if not use_triton(self.impl, weight.device):
            parameters = (F.linear(weight.new_empty(0, weight.shape[1]), weight, bias),)
        result = _ZeroGradient.apply(embeddings, *parameters)
        return result
