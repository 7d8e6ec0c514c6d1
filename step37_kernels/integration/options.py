"""The options of the insertion, declared once for the class, the patch and ``replace_in``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch.distributed as dist
from torch import Tensor

from step37_kernels.dispatch import Impl, check_impl
from step37_kernels.integration.main_grad import has_main_grad
from step37_kernels.integration.parallel import Layout, check_layout

Lookup = Literal["auto", "call"]


class InsertKeywords(TypedDict, total=False):
    """The keywords of :class:`InsertOptions` again, for type checkers, which cannot derive them."""

    impl: Impl
    strict: bool
    layout: Layout
    lookup: Lookup
    gradient_accumulation_fusion: bool | Literal["auto"]
    text_only_gradient: bool | Literal["auto"]


@dataclass(frozen=True, slots=True, kw_only=True)
class InsertOptions:
    """How word embeddings and image features are put together.

    Each field is a keyword of :class:`step37_kernels.ImageInsertEmbedding`, of
    :func:`step37_kernels.megatron.patch_step37` and of :func:`step37_kernels.megatron.replace_in`,
    with the same default everywhere.

    Raises:
        ValueError: a field is none of the values that it may be.
    """

    impl: Impl = "auto"
    """``"auto"`` (Triton for CUDA tensors, PyTorch otherwise), ``"triton"`` or ``"torch"``."""
    strict: bool = False
    """Raise ``ValueError`` at once where start tokens and features differ in number, a span is cut
    off at the end of its sequence, or spans overlap. It waits for the device in every forward, so
    ``torch.compile`` breaks its graph there, and raises under ``fullgraph=True``. If False,
    tokens and features are paired up to the smaller number and a warning is logged (on CUDA by a
    later forward, once the counts have arrived); cut and overlapping spans are not reported."""
    layout: Layout = "auto"
    """Which rows of the sequence this rank holds; ``forward`` always takes the whole ``input_ids``.
    ``"auto"`` follows Megatron's sequence parallelism and is evaluated in each forward
    (:func:`.auto_layout`). Under context parallelism ``"auto"`` is an error, because each packed
    sequence is cut by itself: pass the batch's :func:`.sequence_layout`. A function is called with
    the language embedding and returns a layout or None. None: every rank holds the whole
    sequence."""
    lookup: Lookup = "auto"
    """How words are looked up. ``"auto"``: in the launch that writes the output, if the language
    embedding only looks up: an ``nn.Embedding``, or Megatron's ``LanguageModelEmbedding`` on one
    tensor-parallel rank. The gradient of its table is then summed by rows; with
    ``gradient_accumulation_fusion`` only the rows of the words that were there are touched. The
    embedding is called, and the log (INFO) says once why, if it has position or token-type
    embeddings, dropout that is in effect, an fp32 residual connection, a muP factor, or hooks that
    are not Megatron's (its own, or for all modules), or if it is of any other class. ``"call"``
    always calls."""
    gradient_accumulation_fusion: bool | Literal["auto"] = "auto"
    """Add the gradient of the projector's weight, and of the table that words are looked up in, to
    its ``main_grad`` in fp32, by Megatron-Core's conventions, instead of handing it to autograd. Of
    the table only the rows of words in the batch are read and written. ``"auto"`` does so
    where the configuration of the language embedding says ``gradient_accumulation_fusion``, as the
    other linear layers of that model do, and the parameter has a ``main_grad``. True is an error
    where it has none."""
    text_only_gradient: bool | Literal["auto"] = "auto"
    """Give the projector a gradient of zeros if a forward has no image rows. Without it such a
    microbatch makes no gradient for the projector, and data-parallel reduction that overlaps with
    backward hangs. ``"auto"`` does so if ``torch.distributed`` is initialised. It costs one write
    of the weight's size in backward, and nothing if the projector is frozen. A vision tower that is
    trained has the same problem, which this option does not solve."""

    def __post_init__(self) -> None:
        check_impl(self.impl)
        check_layout(self.layout)
        if self.lookup not in ("auto", "call"):
            raise ValueError(f"lookup: expected 'auto' or 'call', got {self.lookup!r}")
        for name in ("gradient_accumulation_fusion", "text_only_gradient"):
            value = getattr(self, name)
            if not (isinstance(value, bool) or value == "auto"):
                raise ValueError(f"{name}: expected True, False or 'auto', got {value!r}")

    def fuses_gradients(self, config: Any) -> bool:
        """Whether gradients are added to ``main_grad`` in a model with this configuration."""
        if self.gradient_accumulation_fusion != "auto":
            return self.gradient_accumulation_fusion
        return bool(getattr(config, "gradient_accumulation_fusion", False))

    def why_not_fused(self, weight: Tensor, config: Any) -> str | None:
        """Why the gradient of ``weight`` goes to autograd in a model with this configuration; None:
        to its ``main_grad``."""
        if not self.fuses_gradients(config):
            if self.gradient_accumulation_fusion == "auto":
                return "the configuration has no gradient_accumulation_fusion"
            return "gradient_accumulation_fusion=False"
        if self.gradient_accumulation_fusion == "auto" and not has_main_grad(weight):
            return "no main_grad: Megatron's DDP sets it"
        return None

    def wants_text_only_gradient(self) -> bool:
        """Whether a forward without image rows gives the projector a gradient of zeros."""
        if self.text_only_gradient != "auto":
            return self.text_only_gradient
        return dist.is_available() and dist.is_initialized()
