"""Subject ``embedding``: times the whole embedding of a training step, into ``main_grad``.

The inputs are token ids and features. Forward looks words up, and projects and inserts features.
Backward adds the gradients of the table and of the projector to their fp32 ``main_grad``; a dense
gradient is added as Megatron's data-parallel hook does it. On a CPU the table has all its 128,896
rows but few columns, so that ratios can be measured without a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import peers
from bench.harness import Implementation, Key, Kind, Row, Settings, Work, dtype_name, measure
from bench.shapes import Batch, Shape, make_batch, make_case, shapes_named
from step37_kernels import ImageForInsert, ImageInsertEmbedding
from step37_kernels.testing import gamma

VOCABULARY = 128_896
CPU_HIDDEN, CPU_WIDTH = 256, 64

Embed = Callable[[], Tensor]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """The inputs of one shape and dtype; all implementations share them."""

    batch: Batch
    table: nn.Parameter
    """``[V, H]`` with a fp32 ``main_grad``."""
    weight: nn.Parameter
    """``[H, C]`` with a fp32 ``main_grad``."""
    groups: list[tuple[int, Tensor]]
    """``(start_token, features [N, L, C])``; the features take a gradient."""
    grad_output: Tensor

    def prepare(self, _: int) -> None:
        """Clear the gradients of the last call; not timed."""
        for parameter in (self.table, self.weight):
            parameter.main_grad.zero_()  # type: ignore[attr-defined]
            parameter.grad = None
        for _, features in self.groups:
            features.grad = None

    def step(self, embed: Embed) -> dict[str, Tensor]:
        """Run forward and backward, then add autograd's gradients as Megatron's hook does."""
        output = embed()
        output.backward(self.grad_output)
        for parameter in (self.table, self.weight):
            main_grad: Tensor = parameter.main_grad  # type: ignore[attr-defined]
            if parameter.grad is not None:
                main_grad.add_(parameter.grad)
            parameter.grad = None
        return {
            "output": output.detach(),
            "table": self.table.main_grad,  # type: ignore[attr-defined]
            "weight": self.weight.main_grad,  # type: ignore[attr-defined]
        }


def make_problem(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Draw table, weight and features of a shape."""
    batch = make_batch(shape, device)
    case = make_case(batch, dtype=dtype, layout="contiguous", seed=0)
    table = nn.Parameter(torch.randn(VOCABULARY, shape.hidden, device=device, dtype=dtype))
    weight = nn.Parameter(case.weight)
    for parameter in (table, weight):
        parameter.main_grad = torch.zeros(parameter.shape, device=device)  # type: ignore[attr-defined]
    return Problem(
        batch=batch,
        table=table,
        weight=weight,
        groups=[(token, tensors[0].requires_grad_()) for token, tensors in case.groups],
        grad_output=case.grad_output,
    )


def called(problem: Problem, forward: peers.Forward) -> Embed:
    """Look words up as Megatron does on one tensor-parallel rank, then insert by ``forward``."""

    def embed() -> Tensor:
        words = F.embedding(problem.batch.input_ids, problem.table).transpose(0, 1).contiguous()
        return forward(words, problem.batch.input_ids, problem.groups, problem.weight)

    return embed


def module(problem: Problem, settings: Settings, **options: Any) -> Embed:
    """Look up and insert by :class:`ImageInsertEmbedding`."""
    words = nn.Embedding(1, 1, device="meta")
    words.weight = problem.table
    shape = problem.batch.shape
    with torch.device("meta"):
        fused = ImageInsertEmbedding(
            words,
            shape.width,
            shape.hidden,
            impl=settings.impl,
            gradient_accumulation_fusion=True,
            **options,
        )
    fused.align_projector.weight = problem.weight
    images = [
        ImageForInsert(insert_start_token=token, image_features=features)
        for token, features in problem.groups
    ]
    return lambda: fused(problem.batch.input_ids, images)


def implementations(problem: Problem, settings: Settings) -> list[Implementation]:
    """List the implementations, ours first."""

    def one(name: str, kind: Kind, embed: Embed) -> Implementation:
        return Implementation(
            name=name, kind=kind, prepare=problem.prepare, run=lambda _: problem.step(embed)
        )

    found = [
        one("step37", "ours", module(problem, settings)),
        one('step37, lookup="call"', "ours", module(problem, settings, lookup="call")),
        one("stock", "stock", called(problem, peers.stock)),
    ]
    if settings.compile_backend:
        compiled = torch.compile(
            called(problem, peers.index_copy), dynamic=False, backend=settings.compile_backend
        )
        found.append(one("torch.compile index_copy", "peer", compiled))
    return found


def check_against(
    problem: Problem, wanted: dict[str, Tensor]
) -> Callable[[Implementation, Any], str | None]:
    """Make the check: text rows equal the table's bit for bit, all else is near stock's."""
    text = torch.ones(problem.batch.shape.seq_len, dtype=torch.bool)
    text[problem.batch.destinations.cpu()] = False
    terms = max(problem.batch.shape.num_rows, problem.batch.shape.width, 1)
    unit = torch.finfo(problem.table.dtype).eps
    touched = problem.batch.input_ids.unique()

    def check(_: Implementation, result: dict[str, Tensor]) -> str | None:
        if not torch.equal(result["output"][text], wanted["output"][text]):
            return "text rows are not the table's"
        found = {**result, "table": result["table"][touched]}
        for name, value in wanted.items():
            scale = value.abs().amax().item()
            # Sums in any order in fp32, and up to three roundings to the table's dtype.
            bound = (gamma(terms) * terms**0.5 + 3 * unit) * scale
            error = (found[name].float() - value.float()).abs().amax().item()
            if not error <= bound:
                return f"{name} differs from stock by {error:.3g}, {bound:.3g} is allowed"
        if result["table"].count_nonzero() > wanted["table"].numel():
            return "rows of the table's main_grad that nobody looked up were written"
        return None

    return check


def run(settings: Settings) -> Iterator[list[Row]]:
    """Yield one group for each shape and dtype."""
    for shape in shapes_named(settings.shapes):
        if settings.device.type != "cuda":
            shape = dataclasses.replace(shape, hidden=CPU_HIDDEN, width=CPU_WIDTH)
        for dtype in settings.dtypes if settings.device.type == "cuda" else (torch.float32,):
            torch.compiler.reset()
            problem = make_problem(shape, dtype, settings.device)
            touched = problem.batch.input_ids.unique()
            compared = implementations(problem, settings)
            stock = next(one for one in compared if one.kind == "stock")
            problem.prepare(0)
            wanted = {
                name: value.clone() for name, value in stock.run(None).items() if name != "table"
            }
            wanted["table"] = problem.table.main_grad[touched]  # type: ignore[attr-defined]
            key = Key(
                subject="embedding", operation="forward+backward", shape=shape.name,
                dtype=dtype_name(dtype),
            )  # fmt: skip
            yield measure(
                key,
                work_of(shape, dtype.itemsize, len(touched)),
                compared,
                check=check_against(problem, wanted),
                settings=settings,
            )


def work_of(shape: Shape, itemsize: int, words: int) -> Work:
    """Count the least work.

    Rows of the table that occur are read, and their rows of ``main_grad`` are read and written.
    """
    rows, hidden, width = shape.num_rows, shape.hidden, shape.width
    text = shape.seq_len - rows
    forward = rows * width + hidden * width + text * hidden + shape.seq_len * hidden
    backward = shape.seq_len * hidden + 2 * rows * width + 2 * hidden * width
    main_grad = 2 * 4 * (words * hidden + hidden * width)
    return Work(
        flops=3 * 2 * rows * hidden * width,
        bytes=itemsize * (forward + backward) + main_grad,
        rows=rows,
    )
