"""What a launch costs the host and hands to the GPU, seen by a driver that launches nothing."""

from __future__ import annotations

import json

import pytest
import torch

from tests.kernels.checks import run_compiling

SETUP = """
import json
import torch
from bench.no_gpu import NoDriver, compiled

launched = []
NoDriver("sm_90", lambda *arguments: launched.append(arguments)).install()

from step37_kernels import ImageForInsert, ImageInsertEmbedding, insert
from step37_kernels.ops import gemm, plan, project, project_backward, tiles

insert.use_triton = lambda *_: True
tiles._capability = lambda _: 90
H, C = 128, 256


def module():
    words = torch.nn.Embedding(16, H, dtype=torch.bfloat16)
    lookup = lambda input_ids, position_ids: words(input_ids).transpose(0, 1)
    return ImageInsertEmbedding(lookup, C, H, projector_bias=True).bfloat16()


def step(fused, rows, seq_len, images=1):
    input_ids = torch.zeros(1, seq_len, dtype=torch.int64)
    features = torch.zeros(images, rows, C, dtype=torch.bfloat16, requires_grad=True)
    group = ImageForInsert(insert_start_token=7, image_features=features)
    return fused(input_ids, [group])
"""


def run(script: str) -> object:
    done = run_compiling("-c", SETUP + script)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_new_number_of_rows_images_or_tokens_compiles_nothing():
    script = """
kernels = [
    plan.plan_kernel, plan.locate_kernel, plan.assign_kernel, project.project_scatter_kernel,
    gemm.sum_splits_kernel, project_backward.embedding_grad_kernel,
    project_backward.gather_grad_kernel, project_backward.grad_features_kernel,
    project_backward.grad_weight_kernel,
]
fused = module()
for rows in (1, 65, 129, 257, 513, 2049):  # each bucket of the tile table
    step(fused, rows, 64).sum().backward()
step(fused, 81, plan.MAX_POSITIONS + 1)
before = [len(compiled(kernel)) for kernel in kernels]
for rows, seq_len, images in ((16, 17, 1), (100, 1, 1), (81, 2048, 3), (169, 100, 9), (32, 16, 80),
                              (81, 20000, 2)):
    step(fused, rows, seq_len, images).sum().backward()
print(json.dumps([before, [len(compiled(kernel)) for kernel in kernels]]))
"""
    before, after = run(script)
    assert before == after
    assert before[:3] == [1, 1, 1]


def test_gradients_of_any_length_and_whatever_is_wanted_share_three_binaries():
    script = """
from itertools import product
from step37_kernels.ops import gradient

for positions, rows in ((1, 1), (16, 3), (169, 2048), (5000, 5001)):
    grad = torch.zeros(positions, 1, H, dtype=torch.bfloat16)
    row_at = torch.zeros(positions, dtype=torch.int32)
    destinations = torch.zeros(rows, dtype=torch.int32)
    for embeddings, of_rows, bias in product((False, True), repeat=3):
        gradient.gradient_rows(
            grad, row_at, destinations, torch.bfloat16,
            embeddings=embeddings, rows=of_rows, bias=bias,
        )
print(json.dumps([len(launched), len(compiled(gradient.gradient_rows_kernel))]))
"""
    assert run(script) == [4 * 7, 3]


def test_a_forward_pass_is_two_launches_and_three_where_the_sequence_is_long():
    script = """
fused = module()
numbers = []
for seq_len in (2048, plan.MAX_POSITIONS, plan.MAX_POSITIONS + 1):
    step(fused, 169, seq_len)
    launched.clear()
    step(fused, 169, seq_len)
    numbers.append(len(launched))
print(json.dumps(numbers))
"""
    assert run(script) == [2, 2, 3]  # the plan, or locate and assign; project and scatter


def test_launches_of_one_binary_differ_in_what_a_batch_brings():
    script = """
memory = torch.zeros(40 * C + 1, dtype=torch.bfloat16)
aligned, shifted = memory[:-1].view(40, C), memory[1:].view(40, C)
weight = torch.zeros(H, C, dtype=torch.bfloat16)
out = torch.zeros(40, 1, H, dtype=torch.bfloat16)
destinations = torch.zeros(40, dtype=torch.int32)


def launch(x, rows):
    launched.clear()
    project.project_scatter(x[:rows], weight, None, destinations[:rows], None, out)
    (arguments,) = launched
    return arguments


def plain(arguments):
    # grid, stream, function, metadata; the hooks; then the kernel's arguments
    first, hooks, rest = arguments[:6], arguments[6:9], arguments[9:]
    values = [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in rest]
    return [*map(str, first), *map(repr, values)], [hook is not None for hook in hooks]


pointers = tiles.Tile(64, 64, 64, 8, 4, 3)
tiles.pick = lambda *_: pointers
first, second = plain(launch(aligned, 40)), plain(launch(aligned, 40))
fewer = plain(launch(aligned, 16))
other = plain(launch(shifted, 40)), plain(launch(shifted, 40))
print(json.dumps([first, second, fewer, other, launch(aligned, 1)[9 + 9]]))
"""
    first, second, fewer, other, one_row = run(script)
    assert first == second
    assert [a for a, b in zip(first[0], fewer[0], strict=True) if a != b][-1:] == ["40"]
    function = 4
    assert fewer[0][function] == first[0][function]
    # Memory that is not aligned is another binary.
    assert other[0] == other[1]
    assert other[0][0][function] != first[0][function]
    assert one_row == 1  # a single row is passed as such


def test_numbers_beyond_32_bits_on_either_side_are_not_cut_off():
    # Triton 3.9 takes the low half of a number that does not fit, and says nothing.
    script = """
ids = torch.zeros(1, 64, dtype=torch.int64)
functions = []
for token in (-(2**31), 2**31 - 1, -(2**31) - 1, 2**31, -(2**40)):
    launched.clear()
    plan.plan_rows(ids, [(token, 1)], [(1, 4)], None)
    functions.append(launched[0][4])
print(json.dumps(functions))
"""
    lowest, highest, *beyond = run(script)
    assert lowest == highest
    assert set(beyond) == {beyond[0]}
    assert beyond[0] != lowest


def test_hooks_of_a_profiler_see_every_launch():
    script = """
import triton
seen = []
fused = module()
step(fused, 169, 64)
triton.knobs.runtime.launch_enter_hook.add(lambda metadata: seen.append(metadata.get()["name"]))
hooks = []
for _ in range(2):
    launched.clear()
    step(fused, 169, 64)
    for arguments in launched:  # what the real launcher does with its hook
        arguments[7](arguments[6])
print(json.dumps(seen))
"""
    assert run(script) == ["plan_kernel", "project_scatter_kernel"] * 2


CAPTURE = """
torch.cuda.is_initialized = lambda: True
capturing = [False]
torch.cuda.is_current_stream_capturing = lambda: capturing[0]  # no GPU here, so no capture


def plan_of(dtype):
    launched.clear()
    try:
        plan.plan_rows(torch.zeros(1, 64, dtype=dtype), [(7, 1)], [(1, 4)], None)
    except RuntimeError as error:
        return [str(error), len(launched)]
    return len(launched)
"""


def test_a_first_launch_inside_a_graph_capture_says_what_to_call_before():
    script = """
loaded = []
NoDriver.utils.load_binary = lambda *_: loaded.append(0) or (0, len(loaded), 0, 0, 1024)
capturing[0] = True
refused = plan_of(torch.int64)
refused.append(len(loaded))
capturing[0] = False
outside = plan_of(torch.int64)
capturing[0] = True
print(json.dumps([refused, outside, plan_of(torch.int64), plan_of(torch.int32)]))
"""
    (message, launches, loads), outside, captured, of_another_type = run(CAPTURE + script)
    assert message == (
        "plan_kernel would be launched for the first time inside a CUDA graph capture, where no "
        "kernel can be loaded; run one forward and backward with the same shapes before the capture"
    )
    assert (launches, loads) == (0, 0)
    assert outside == captured > 0
    assert of_another_type == [message, 0]  # which is another binary


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
def test_a_first_launch_inside_a_real_capture_is_refused_and_a_second_one_is_not():
    script = """
import json
import torch
from step37_kernels.ops import plan

ids = torch.full((1, 64), 7, device="cuda")


def capture():
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        planned = plan.plan_rows(ids, [(7, 1)], [(1, 4)], None)
    graph.replay()
    torch.cuda.synchronize()
    return planned


message = None
try:
    capture()
except RuntimeError as error:
    message = str(error)
plan.plan_rows(ids, [(7, 1)], [(1, 4)], None)
print(json.dumps([message, capture()[0].tolist()]))
"""
    done = run_compiling("-c", script)
    assert done.returncode == 0, done.stderr
    message, destinations = json.loads(done.stdout)
    assert "for the first time inside a CUDA graph capture" in message
    assert destinations == [1, 2, 3, 4]
