"""``ImageInsertEmbedding``: looks words up and inserts projected image features among them.

It replaces the class of that name in Megatron-Bridge's ``Step37Model``.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step37_kernels.count_watch import count_watch
from step37_kernels.dispatch import check_kernel_dtype, use_triton
from step37_kernels.insert import (
    FeatureRows,
    Projector,
    check_embeddings,
    contiguous_rows,
    insert_projected,
    insert_rows,
    join_rows,
    pick_rows,
)
from step37_kernels.integration.options import InsertOptions
from step37_kernels.integration.parallel import Layout, SequenceLayout, auto_layout
from step37_kernels.integration.projector import (
    PlainProjector,
    ZeroGradient,
    allow_called,
    check_has_values,
    input_like,
    input_width,
    plain_beside,
    refuse_called,
    tensors_of,
)
from step37_kernels.integration.table import PlainTable, call_embedding, plain_table
from step37_kernels.integration.vocab_parallel import RowGradient, why_dense
from step37_kernels.integration.ways import (
    ROWS,
    Place,
    Way,
    Ways,
    way_of,
    way_of_gradient,
    way_of_launch,
    way_of_product,
)
from step37_kernels.lookup import TextRows, check_ids
from step37_kernels.plan import InsertPlan, plan_runs
from step37_kernels.ranges import profiled
from step37_kernels.runs import Runs

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from step37_kernels.integration.options import InsertKeywords

logger = logging.getLogger(__name__)


@dataclass
class ImageForInsert:
    """One insertion group: a start token, and the pictures or features that go after it.

    The data side fills in ``images``; ``Step37Model`` then sets ``image_features`` by that name.
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


def _check_input_ids(input_ids: Tensor) -> None:
    """Raise unless ``input_ids`` is a tensor ``[B, S]``; the plan checks its dtype."""
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids: expected a tensor [B, S], got {type(input_ids).__name__}")
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids: expected [B, S], got {tuple(input_ids.shape)}")


def _feature_tensors(features: Tensor | Sequence[Tensor], name: str) -> list[Tensor]:
    """Return the features of one group as a list of tensors ``[N, L, C]``.

    Raises:
        ValueError: a tensor of another rank.
        TypeError: neither a tensor nor a list of tensors.
    """
    if isinstance(features, Tensor):
        if features.ndim != 3:
            raise ValueError(f"{name}: expected [N, L, C], got {tuple(features.shape)}")
        return [features]
    if not isinstance(features, Sequence):
        raise TypeError(f"{name}: expected a tensor or a list of them, got {type(features)}")
    tensors = []
    for i, item in enumerate(features):
        if not isinstance(item, Tensor):
            raise TypeError(f"{name}[{i}]: expected a tensor, got {type(item)}")
        if item.ndim not in (2, 3):
            raise ValueError(f"{name}[{i}]: expected [L, C] or [N, L, C], got {tuple(item.shape)}")
        tensors.append(item if item.ndim == 3 else item.unsqueeze(0))
    return tensors


def _costs_graphs(features: Any) -> bool:
    """Whether ``torch.compile`` would make a graph for each number of feature tensors.

    An export makes one graph, for the number of tensors that it is given.
    """
    return (
        torch.compiler.is_dynamo_compiling()
        # What is_exporting() reads: Dynamo of torch 2.11 takes that function for True in any graph.
        and not torch.compiler._is_exporting_flag
        and isinstance(features, (list, tuple))
        and (len(features) > 1 or any(getattr(item, "ndim", 3) == 2 for item in features))
    )


def _with_rows(
    tensors: Sequence[Tensor], name: str, width: int | None = None, whose: str = ""
) -> list[Tensor]:
    """Return the tensors that have rows.

    Args:
        tensors: ``[N, L, C]`` each.
        name: of these features, for the error.
        width: the C that those with rows must have; None if it may be any.
        whose: what has that width, for the error.

    Raises:
        ValueError: one of them has rows of another width.
    """
    found = []
    for tensor in tensors:
        count, rows_each, columns = tensor.shape
        if count * rows_each == 0:
            continue
        if width is not None and columns != width:
            raise ValueError(f"{name}: expected C = {width} ({whose}), got {tuple(tensor.shape)}")
        found.append(tensor)
    return found


def _moved(tensor: Tensor, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Raise ``ValueError`` where the move would ask for values that are nowhere."""
    if tensor.is_meta and device.type != "meta":
        raise ValueError(
            f"{name}: expected values, got a tensor on the meta device, {tuple(tensor.shape)}; "
            "is the vision tower on it?"
        )
    return tensor.to(device, dtype)


def _run(
    token: int, name: str, tensors: Sequence[Tensor]
) -> tuple[int, tuple[tuple[int, int], ...]]:
    if isinstance(token, Tensor):
        raise TypeError(
            f"{name}: expected an int, got a tensor on {token.device}, whose value a forward would "
            "wait for"
        )
    try:
        number = operator.index(token)
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {token!r}") from None
    return number, tuple([(tensor.shape[0], tensor.shape[1]) for tensor in tensors])


def _layout_name(layout: Layout) -> str:
    """Describe a layout for the log: what is divided, without process groups and tensor values."""
    if not isinstance(layout, SequenceLayout):
        return getattr(layout, "__name__", repr(layout))
    given = [f.name for f in dataclasses.fields(layout) if getattr(layout, f.name) is not None]
    return f"SequenceLayout({', '.join(given)})"


def _option(name: str) -> Any:
    """A property of the module that reads and sets one of its :class:`.InsertOptions`.

    It is set as all are set together, so that what else an option changes follows.
    """

    def set_option(module: ImageInsertEmbedding, value: Any) -> None:
        fields = dataclasses.fields(module.options)
        options: Any = {field.name: getattr(module.options, field.name) for field in fields}
        module.configure(**options | {name: value})

    return property(lambda module: getattr(module.options, name), set_option)


_BY_ROWS = "only the rows of the words that were there"


class ImageInsertEmbedding(nn.Module):
    """A word embedding that writes projected image features over the rows after each start token.

    It replaces Megatron-Bridge's class: same constructor, same calls, same state dict
    (``align_projector.weight`` and, with a bias, ``.bias``), same values. But the features of all
    groups are projected and inserted in one pass.

    Args:
        language_embedding: Megatron-Core's ``LanguageModelEmbedding``, an ``nn.Embedding``, or
            anything called as ``(input_ids=[B, S], position_ids=…)`` that returns ``[S, B, H]``.
            It is kept as ``_language_embedding``, but not registered as a submodule, and so not in
            the state dict.
        encoder_output_dim: C, width of the features.
        hidden_size: H.
        projector_bias: give ``align_projector`` a bias.
        **options: the fields of :class:`.InsertOptions`.

    If the projector is more than a weight and a bias (an adapter around it, a forward hook, an FSDP
    shard), or is on another device than the word embeddings, it is called as a module and only the
    insertion is fused. That is slower; the log says so once.
    """

    # Each of these attributes reads and sets a field of ``options``.
    impl = _option("impl")
    strict = _option("strict")
    layout = _option("layout")
    lookup = _option("lookup")
    gradient_accumulation_fusion = _option("gradient_accumulation_fusion")
    text_only_gradient = _option("text_only_gradient")

    _width = 0

    def __init__(
        self,
        language_embedding: Callable[..., Tensor],
        encoder_output_dim: int,
        hidden_size: int,
        projector_bias: bool = False,
        **options: Unpack[InsertKeywords],
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
        self.configure(**options)

    def configure(self, **options: Unpack[InsertKeywords]) -> None:
        """Set all options, which are the fields of :class:`.InsertOptions`."""
        self.options = InsertOptions(**options)
        # A module that replaces the projector may have no in_features; the last known width is
        # kept.
        self._width = input_width(self.align_projector) or self._width
        # A list, which replicas of DataParallel share: they are made anew for each forward.
        self._told: list[bool] = []
        self._mark_projector(self.layout if isinstance(self.layout, SequenceLayout) else None)

    def extra_repr(self) -> str:
        changed = []
        for field in dataclasses.fields(self.options):
            value = getattr(self.options, field.name)
            if value != field.default:
                shown = _layout_name(value) if field.name == "layout" else repr(value)
                changed.append(f"{field.name}={shown}")
        return ", ".join(changed)

    @staticmethod
    def _normalize_feature_list(
        image_features: Tensor | list[Tensor], *, device: torch.device, dtype: torch.dtype
    ) -> list[Tensor]:
        """Split features into one ``[L, C]`` each.

        We do not call it. Models built before the patch do: the stock class looks this method up
        by the class's name, which leads here.
        """
        tensors = _feature_tensors(image_features, "image_features")
        moved = [_moved(tensor, "image_features", device, dtype) for tensor in tensors]
        return [feature for tensor in moved for feature in tensor.unbind(0)]

    @staticmethod
    def insert_features(
        input_embeddings: Tensor,
        image_features: Tensor | list[Tensor],
        input_ids: Tensor,
        flag: int,
    ) -> Tensor:
        """Insert the features of one group, which are projected already.

        Args:
            input_embeddings: ``[S, B, H]``, left as it is.
            image_features: ``[N, L, H]``, or a list mixing ``[L, H]`` and ``[N, L, H]``; moved to
                the embeddings' device and dtype.
            input_ids: ``[B, S]``, copied to the embeddings' device where they are on another.
            flag: the group's start token.

        Returns:
            ``[S, B, H]``; ``input_embeddings`` itself if there is nothing to insert.

        Raises:
            ValueError: a shape that does not fit.
            TypeError: the start token is no integer.
        """
        if _costs_graphs(image_features):
            return _insert_features_untraced(input_embeddings, image_features, input_ids, flag)
        _check_input_ids(input_ids)
        count_watch.poll()
        tensors = _feature_tensors(image_features, "image_features")
        runs = (_run(flag, "flag", tensors),)
        device, dtype = input_embeddings.device, input_embeddings.dtype
        plan = plan_runs(input_ids.to(device), runs, watch=True)
        check_embeddings(input_embeddings, plan, "input_embeddings")
        hidden = input_embeddings.shape[-1]
        tensors = _with_rows(tensors, "image_features", hidden, "the embeddings'")
        rows = [_moved(tensor, "image_features", device, dtype) for tensor in tensors]
        return insert_rows(input_embeddings, join_rows(rows), plan) if rows else input_embeddings

    def forward(
        self,
        input_ids: Tensor,
        images: list[ImageForInsert] | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> Tensor:
        """Look up the word embeddings and insert the projected image features.

        Args:
            input_ids: ``[B, S]`` int32 or int64.
            images: insertion groups in order, each with ``image_features``; None or empty returns
                the word embeddings.
            position_ids: passed to the language embedding.
            **kwargs: accepted and ignored, as the replaced class does.

        Returns:
            ``[S, B, H]`` in the language embedding's dtype.

        Under ``torch.compile`` a group whose features are a list of several tensors breaks the
        graph, and this forward runs uncompiled: otherwise each number of tensors would compile a
        graph of its own. With ``fullgraph=True`` that is an error. A tensor ``[N, L, C]`` does not
        break the graph.

        Raises:
            ValueError: ``input_ids`` are not ``[B, S]``; a group without features or with features
                of the wrong rank or width; the language embedding gives another shape;
                ``input_ids`` are on another device than the table of words; the projector or the
                features are on the meta device and the word embeddings are not; with ``strict``, a
                batch whose tokens and features do not fit.
            TypeError: ``input_ids`` are no tensor, ``images`` is no list of groups, features are no
                tensors, or a start token is no integer.
        """
        if (
            torch.compiler.is_dynamo_compiling()
            and isinstance(images, (list, tuple))
            and any(_costs_graphs(getattr(image, "image_features", None)) for image in images)
        ):
            return _forward_untraced(self, input_ids, images, position_ids)
        _check_input_ids(input_ids)
        count_watch.poll()
        layout = self._layout_now()
        config = self._config()
        text, positions = self._look_up(input_ids, position_ids, layout=layout, config=config)
        if not images and text.input_ids is None:
            self._tell_ways(text, (), layout)
            return self._without_image_rows(text.rows)
        plain = self._plain_projector(text.rows.device)
        runs, features = self._take_features(images or (), plain, text.rows)
        self._tell_ways(text, features, layout)
        if layout is not None and positions is not None:
            features = [layout.complete_gradient(tensor) for tensor in features]
        return self._insert(
            text,
            input_ids,
            runs=runs,
            features=features,
            positions=positions,
            plain=plain,
            config=config,
        )

    def _config(self) -> Any:
        """The configuration of the language embedding; None if it has none.

        A forward asks once, because PyTorch takes a microsecond to find that a module has none.
        """
        return getattr(self._language_embedding, "config", None)

    def _look_up(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        *,
        layout: SequenceLayout | None,
        config: Any,
    ) -> tuple[TextRows, Tensor | None]:
        """Return this rank's text rows, and their positions in the whole sequence (None: all)."""
        seq_len = input_ids.shape[1]
        looked_up = None
        if layout is not None:
            looked_up = layout.positions_looked_up(seq_len, input_ids.device)
            if looked_up is not None:
                input_ids = input_ids.index_select(1, looked_up)
                if position_ids is not None:
                    position_ids = position_ids.index_select(1, looked_up)
        table = self._table(layout)
        if isinstance(table, PlainTable):
            weight = table.weight
            if input_ids.device != weight.device:
                raise ValueError(
                    f"input_ids: expected the device of the table of words, {weight.device}, "
                    f"got {input_ids.device}"
                )
            fused = self.options.why_not_fused(weight, config) is None
            table.run_hooks()
            return TextRows(rows=weight, input_ids=input_ids.t(), fused=fused), looked_up
        embeddings = call_embedding(self._language_embedding, input_ids, position_ids)
        if layout is None:
            return TextRows(rows=embeddings), None
        embeddings, positions = layout.shard(embeddings, seq_len, looked_up)
        return TextRows(rows=embeddings), positions

    def _table(self, layout: SequenceLayout | None) -> PlainTable | str:
        """The table that words are looked up in; or why the language embedding is called."""
        if layout is not None and layout.divides_rows():
            return "sequence-parallel ranks share the rows"
        if self.options.lookup == "call":
            return "lookup='call'"
        return plain_table(self._language_embedding)

    def _take_features(
        self, images: Sequence[ImageForInsert], plain: PlainProjector | None, embeddings: Tensor
    ) -> tuple[Runs, list[Tensor]]:
        """Return the runs of all groups, and their non-empty tensors, moved to the projector."""
        if not isinstance(images, Sequence):
            raise TypeError(
                f"images: expected a list of ImageForInsert, got {type(images).__name__}"
            )
        width = None
        if plain is not None:
            width = plain.module.in_features
            device, dtype = embeddings.device, plain.weight.dtype
        else:
            device, dtype = input_like(self.align_projector, embeddings)
            if images and embeddings.device.type != "meta":
                check_has_values(self.align_projector, "align_projector")
        runs: list[tuple[int, tuple[tuple[int, int], ...]]] = []
        features: list[Tensor] = []
        for i, image in enumerate(images):
            name = f"images[{i}].image_features"
            if not hasattr(image, "image_features"):
                raise TypeError(f"images[{i}]: expected an ImageForInsert, got {type(image)}")
            if image.image_features is None:
                raise ValueError(
                    f"images[{i}]: image_features is None (start token {image.insert_start_token});"
                    " run the vision tower first"
                )
            tensors = _feature_tensors(image.image_features, name)
            runs.append(_run(image.insert_start_token, f"images[{i}].insert_start_token", tensors))
            for tensor in _with_rows(tensors, name, width, "the projector's"):
                features.append(_moved(tensor, name, device, dtype))
        return tuple(runs), features

    def _insert(
        self,
        text: TextRows,
        input_ids: Tensor,
        *,
        runs: Runs,
        features: list[Tensor],
        positions: Tensor | None,
        plain: PlainProjector | None,
        config: Any,
    ) -> Tensor:
        """Plan, project and insert.

        Nothing is launched between the plan and the product, so that the product may start before
        the plan has ended. Copies are made before both, and the counts go to the host after both.
        """
        options, device = self.options, text.rows.device
        sources = None
        if plain is not None and features:
            plain = plain.after_hooks()
            if use_triton(options.impl, device):
                sources = contiguous_rows(features)
        # Under torch.compile the counts are checked inside the plan's operator; a separate copy
        # would be removed as dead code.
        compiling = torch.compiler.is_compiling()
        plan = whole = plan_runs(
            input_ids.to(device),
            runs,
            vocabulary=0 if text.input_ids is None else text.rows.shape[0],
            impl=options.impl,
            watch=compiling and not options.strict,
        )
        if options.strict:
            if compiling:
                torch._dynamo.graph_break(
                    msg="strict=True of ImageInsertEmbedding waits for the device, which no graph "
                    "can hold: compile without fullgraph=True, or pass strict=False"
                )
            plan.check()
        if positions is not None:
            plan = plan.shard(positions.to(device))
        self._check_text(text, plan, None if plain is None else plain.module.out_features)
        with profiled("insert"):
            if plain is not None and features:
                fused = options.why_not_fused(plain.weight, config) is None
                result = insert_projected(
                    text,
                    FeatureRows(features, sources),
                    Projector(weight=plain.weight, bias=plain.bias, fused=fused),
                    plan,
                    after_plan=plan is whole and not (options.strict or compiling),
                )
            else:
                triton = not features and use_triton(options.impl, device)
                embeddings = text.embeddings(plan.row_at, triton=triton)
                if features:
                    local_rows = plan.local_rows
                    if local_rows is not None:
                        local_rows = local_rows.to(features[0].device)
                    projected = self.align_projector(pick_rows(join_rows(features), local_rows))
                    result = insert_rows(embeddings, projected.to(embeddings), plan)
                else:
                    result = self._without_image_rows(embeddings)
        if not (options.strict or compiling):
            count_watch.watch(whole.flat_runs, whole.counts, whole.vocabulary)
        return result

    @staticmethod
    def _check_text(text: TextRows, plan: InsertPlan, hidden: int | None) -> None:
        """Raise ``ValueError`` unless the text rows have the plan's shape and H columns.

        On the CPU raise ``IndexError`` if an id at a text position is outside the table.
        """
        if text.input_ids is None:
            check_embeddings(text.rows, plan, "language_embedding's result", hidden)
            return
        num_rows, width = text.rows.shape
        if hidden not in (None, width):
            raise ValueError(
                f"language_embedding's table: expected [V, H] = [V, {hidden}], "
                f"got {tuple(text.rows.shape)}"
            )
        check_ids(text.input_ids, plan, num_rows)

    def _layout_now(self) -> SequenceLayout | None:
        """Return the layout of this forward, and mark the projector's parameters for it.

        They are marked every time: the layout may have been set, and parameters replaced (by
        ``to_empty``, ``load_state_dict(assign=True)`` or by hand), since the last forward.
        """
        layout = self._layout_in_force()
        self._mark_projector(layout)
        return layout

    def _layout_in_force(self) -> SequenceLayout | None:
        layout = self.options.layout
        if layout is None or isinstance(layout, SequenceLayout):
            return layout
        rule = auto_layout if layout == "auto" else layout
        return rule(self._language_embedding)

    def _mark_projector(self, layout: SequenceLayout | None) -> None:
        """Mark the projector's parameters so that Megatron sums their gradients over ranks.

        Under sequence parallelism each rank computes the gradient of its own rows only.
        """
        parted = layout is not None and layout.sequence_parallel_group is not None
        projector = self.align_projector
        # Of a module without others in it, without the search, which takes a while in each forward.
        own = projector._parameters.values() if not projector._modules else projector.parameters()
        for parameter in own:
            if parameter is None:
                continue
            marked = getattr(parameter, "sequence_parallel", False)
            if parted and not marked:
                parameter.sequence_parallel = True  # type: ignore[attr-defined]
            elif marked and not parted:
                del parameter.sequence_parallel  # type: ignore[attr-defined]

    def _plain_projector(self, device: torch.device) -> PlainProjector | None:
        """Return the projector's weight and bias if these are used, None if it is called.

        Raises:
            ValueError: it has to be called, and ``impl="triton"`` requires its weight.
        """
        projector = self.align_projector
        plain = plain_beside(projector, device)
        if not isinstance(plain, str):
            return plain
        allow_called(projector, "align_projector", self.options.impl, device)
        return None

    def _why_no_zeros(self) -> str | None:
        """Why the projector gets no gradient in a forward without image rows; None: it gets
        zeros."""
        if not self.options.wants_text_only_gradient():
            if self.text_only_gradient == "auto":
                return "torch.distributed is not initialised"
            return "text_only_gradient=False"
        trained = any(tensor.requires_grad for tensor in tensors_of(self.align_projector))
        return None if trained else "the projector is frozen"

    def _tell_ways(
        self, text: TextRows, features: Sequence[Tensor], layout: SequenceLayout | None
    ) -> None:
        """Log at the first forward, in one line, which way each part takes."""
        # In this order: torch.compile looks no further, and so does not trace again for the list.
        if torch.compiler.is_compiling() or self._told:
            return
        self._told.append(True)
        if logger.isEnabledFor(logging.INFO):
            rows = sum(feature.shape[0] * feature.shape[1] for feature in features)
            ways = self._step37_ways(
                device=text.rows.device, rows=rows or ROWS, ask_layout=lambda: layout
            )
            logger.info("%s: %s", type(self).__name__, ways)

    def _step37_ways(
        self,
        *,
        device: torch.device | None = None,
        rows: int = ROWS,
        ask_layout: Callable[[], SequenceLayout | None] | None = None,
    ) -> Ways:
        """Which way each part of a forward takes, asked of what decides in the forward itself.

        Args:
            device: of the word embeddings; None is that of the language embedding's tensors, or if
                it has none the projector's.
            rows: feature rows of the forward, on which the tile depends.
            ask_layout: gives the layout of the forward; None asks the option's rule.
        """
        ask_layout = ask_layout or functools.cache(self._layout_in_force)
        projector, words = self.align_projector, self._language_embedding
        words_place = Place.of(words)
        projector_place = Place.of(projector)
        at = device or words_place.device or projector_place.device or torch.device("cpu")
        return Ways(
            words=way_of(lambda: self._way_of_words(ask_layout())),
            plan=way_of(lambda: way_of_launch(self.options.impl, at)),
            projection=way_of(lambda: self._way_of_projection(at, rows)),
            projector_gradient=way_of(lambda: self._way_of_projector_gradient(at)),
            words_gradient=way_of(lambda: self._way_of_words_gradient(ask_layout())),
            layout=way_of(lambda: self._way_of_layout(ask_layout())),
            text_only_gradient=way_of(self._way_of_zeros),
            words_place=words_place,
            projector_place=projector_place,
        )

    def _way_of_words(self, layout: SequenceLayout | None) -> Way:
        table = self._table(layout)
        if not isinstance(table, PlainTable):
            return Way("called", table)
        if use_triton(self.options.impl, table.weight.device):
            check_kernel_dtype(table.weight, "table")
        return Way("looked up", "in the insertion")

    def _way_of_projection(self, device: torch.device, rows: int) -> Way:
        projector, impl = self.align_projector, self.options.impl
        plain = plain_beside(projector, device)
        if not isinstance(plain, str):
            return way_of_product(plain.weight, impl, rows)
        refuse_called(projector, "align_projector", impl, device)
        return Way("called", plain)

    def _way_of_projector_gradient(self, device: torch.device) -> Way:
        projector = self.align_projector
        if not any(tensor.requires_grad for tensor in tensors_of(projector)):
            return Way("none", "it is frozen")
        plain = plain_beside(projector, device)
        if isinstance(plain, str):
            return Way("its own", "it is called")
        reason = self.options.why_not_fused(plain.weight, self._config())
        return way_of_gradient(plain.weight, "weight", reason)

    def _way_of_words_gradient(self, layout: SequenceLayout | None) -> Way:
        words = self._language_embedding
        table = self._table(layout)
        if isinstance(table, PlainTable):
            reason = self.options.why_not_fused(table.weight, self._config())
            way = way_of_gradient(table.weight, "table", reason)
            return Way(way.how, _BY_ROWS) if way.how == "main_grad" else way
        if not isinstance(words, nn.Module):
            return Way("autograd", "the language embedding is called")
        if not any(parameter.requires_grad for parameter in words.parameters()):
            return Way("none", "it is frozen")
        by_rows = [module for module in words.modules() if isinstance(module, RowGradient)]
        if not by_rows:
            return Way("autograd", "the language embedding is called")
        dense = why_dense(by_rows[0].weight)
        return Way("main_grad", _BY_ROWS) if dense is None else Way("autograd", dense)

    @staticmethod
    def _way_of_layout(layout: SequenceLayout | None) -> Way:
        return Way("whole") if layout is None else Way("shared", layout.description())

    def _way_of_zeros(self) -> Way:
        reason = self._why_no_zeros()
        return Way("zeros", "for the projector") if reason is None else Way("none", reason)

    def _without_image_rows(self, embeddings: Tensor) -> Tensor:
        if self._why_no_zeros() is not None or not torch.is_grad_enabled():
            return embeddings
        result: Tensor
        plain = self._plain_projector(embeddings.device)
        if plain is None:
            if embeddings.device.type != "meta":
                check_has_values(self.align_projector, "align_projector")
            device, dtype = input_like(self.align_projector, embeddings)
            width = input_width(self.align_projector) or self._width
            if width:
                no_rows = torch.empty(0, width, device=device, dtype=dtype)
                trained_through = [self.align_projector(no_rows)]
            else:
                # Its input width is not known, so it cannot be called without features.
                tensors = tensors_of(self.align_projector)
                trained_through = [tensor for tensor in tensors if tensor.requires_grad]
            result = ZeroGradient.apply(embeddings, *trained_through)
            return result
        _, weight, bias = plain.after_hooks()
        parameters: tuple[Tensor, ...] = (weight,) if bias is None else (weight, bias)
        # The gradients must come in the order of a forward with images: ranks reduce buckets in the
        # order in which gradients come, and must all reduce the same buckets together.
        if not use_triton(self.options.impl, weight.device):
            parameters = (F.linear(weight.new_empty(0, weight.shape[1]), weight, bias),)
        result = ZeroGradient.apply(embeddings, *parameters)
        return result


_UNTRACED = (
    "image_features is a list of tensors, of which torch.compile would make a graph for each "
    "number: pass one tensor [N, L, C] to have ImageInsertEmbedding in the graph (torch.stack of "
    "features of one length), or compile without fullgraph=True to have it run outside"
)


@functools.cache
def _warn_untraced() -> None:
    logger.warning(
        "image_features is a list of tensors: ImageInsertEmbedding runs outside of the graph of "
        "torch.compile; pass one tensor [N, L, C] to have it inside"
    )


@torch.compiler.disable(reason=_UNTRACED)
def _forward_untraced(module: ImageInsertEmbedding, *arguments: Any) -> Tensor:
    _warn_untraced()
    return ImageInsertEmbedding.forward(module, *arguments)


@torch.compiler.disable(reason=_UNTRACED)
def _insert_features_untraced(*arguments: Any) -> Tensor:
    _warn_untraced()
    return ImageInsertEmbedding.insert_features(*arguments)
