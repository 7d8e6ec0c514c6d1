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

from step37_kernels import ImageForInsert, ImageInsertEmbedding, dispatch
from step37_kernels import plan_insert, plan_placeholders
from step37_kernels.ops import gradient, plan_rows as plan, project, tiles
from step37_kernels.runs import FlatRuns

dispatch.kernels_run_on_cpu = lambda: True
tiles._capability = lambda _: 90
H, C = 128, 256


def one_run(token):
    return FlatRuns(tokens=(token,), group_sizes=(1,), features=(1,), rows=(4,))


def many_groups(number, seq_len):
    ids = torch.zeros(1, seq_len, dtype=torch.int64)
    plan_insert(ids, [(token, [1]) for token in range(number)], impl="triton")


def module():
    words = torch.nn.Embedding(16, H, dtype=torch.bfloat16)
    lookup = lambda input_ids, position_ids: words(input_ids).transpose(0, 1)
    return ImageInsertEmbedding(lookup, C, H, projector_bias=True, impl="triton").bfloat16()


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
    plan.plan_kernel, project.project_insert_kernel,
    project.sum_parts_kernel, gradient.gradient_rows_kernel,
]
fused = module()
for rows, _ in tiles._HOPPER[:-1]:
    step(fused, rows, 64).sum().backward()
many_groups(5, 8)
before = [len(compiled(kernel)) for kernel in kernels]
for rows, seq_len, images in ((16, 17, 1), (100, 1, 1), (81, 2048, 3), (169, 100, 9), (32, 16, 80),
                              (81, 20000, 2)):
    step(fused, rows, seq_len, images).sum().backward()
many_groups(7, 5000)
ids = torch.zeros(3, 40, dtype=torch.int64)
for first, rows in ((True, 7), (False, 500)):
    plan_placeholders(ids, 7, rows, batch_first=first, impl="triton")
print(json.dumps([before, [len(compiled(kernel)) for kernel in kernels]]))
"""
    before, after = run(script)
    assert before == after
    assert before[0] == 2  # without a table, and with one of up to eight groups
    assert all(before)


def test_gradients_of_any_length_and_whatever_is_wanted_share_three_binaries():
    script = """
from itertools import product

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


def test_forward_and_backward_are_three_launches_of_ours_and_more_where_work_is_split():
    # As many multiprocessors as nine pictures have tiles: a whole wave, where one picture's tile is
    # split. The library's products in backward, which run on this CPU, stay small.
    script = """
project.processors = lambda _: 8
fused = module()
step(fused, 169, 64)
names = []
for images, seq_len in ((9, 2048), (9, 40000), (1, 2048)):
    out = step(fused, 169, seq_len, images)
    launched.clear()
    step(fused, 169, seq_len, images)
    forward = len(launched)
    out.backward(torch.zeros_like(out))
    names.append([forward, len(launched) - forward])
print(json.dumps(names))
"""
    split_product = 1
    assert run(script) == [[2, 1], [2, 1], [2 + split_product, 1]]


def test_the_whole_embedding_is_two_launches_forward_and_three_backward():
    # The matrix products are the library's. One launch gathers the gradients of the features' rows
    # and puts the positions in order by id; two sum the gradients of each id.
    script = """
from torch.utils._python_dispatch import TorchDispatchMode
from step37_kernels.ops import table

class Library(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        called.add(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


def backward_of(out):
    launched.clear()
    with torch.autograd.set_multithreading_enabled(False), Library():
        out.backward(torch.zeros_like(out))
    return len(launched)


called = set()
project.processors = lambda _: 8
words = torch.nn.Embedding(16, H, dtype=torch.bfloat16)
fused = ImageInsertEmbedding(words, C, H, impl="triton").bfloat16()
step(fused, 169, 2048, 9).sum().backward()
out = step(fused, 169, 2048, 9)
launched.clear()
step(fused, 169, 2048, 9)
forward = len(launched)
backward = backward_of(out)
kernels = [plan.plan_kernel, gradient.gradient_rows_kernel]
kernels += [table.sum_segments_kernel, table.join_segments_kernel]
before = [len(compiled(kernel)) for kernel in kernels]
for rows, seq_len, images in ((169, 100, 1), (81, 2049, 3), (16, 17, 1)):
    step(fused, rows, seq_len, images).sum().backward()
after = [len(compiled(kernel)) for kernel in kernels]
launched.clear()
step(fused, 1, 64, 0)  # text alone: the ids are counted, the rows looked up
text_alone = len(launched)
frozen = fused.requires_grad_(False)
words.requires_grad_(True)
features = torch.zeros(9, 169, C, dtype=torch.bfloat16)
ids = torch.zeros(1, 2048, dtype=torch.int64)
group = ImageForInsert(insert_start_token=7, image_features=features)
words_alone = backward_of(frozen(ids, [group]))
print(json.dumps([forward, backward, text_alone, words_alone, before, after, sorted(called)]))
"""
    forward, backward, text_alone, words_alone, before, after, called = run(script)
    assert (forward, backward, text_alone, words_alone) == (2, 3, 2, 3)
    assert before == after
    assert "mm" in called
    assert not {"where", "sort", "clone", "copy_"} & set(called)


def test_an_order_of_ids_is_another_binary_for_each_dtype_alone():
    script = """
from itertools import product

for positions, rows in ((1, 1), (16, 3), (169, 2048), (5000, 5001), (8192, 3)):
    grad = torch.zeros(positions, 1, H, dtype=torch.bfloat16)
    row_at = torch.zeros(positions, 1, dtype=torch.int32)
    destinations = torch.zeros(rows, dtype=torch.int32)
    for dtype, vocabulary in product((torch.int32, torch.int64), (1, 16, 1009)):
        gradient.gradient_rows(
            grad, row_at, destinations, torch.bfloat16, embeddings=False, rows=True, bias=False,
            input_ids=torch.zeros(positions, 1, dtype=dtype), vocabulary=vocabulary,
        )
print(json.dumps([len(launched), len(compiled(gradient.gradient_rows_kernel))]))
"""
    assert run(script) == [5 * 6, 2]


def test_launches_of_one_binary_differ_in_what_a_batch_brings():
    script = """
memory = torch.zeros(40 * H + 1, dtype=torch.bfloat16)
aligned, shifted = memory[:-1].view(40, 1, H), memory[1:].view(40, 1, H)
places = torch.zeros(40, dtype=torch.int32)


def launch(grad, rows):
    launched.clear()
    gradient.gradient_rows(
        grad, places, places[:rows], torch.bfloat16, embeddings=False, rows=True, bias=False
    )
    (arguments,) = launched
    # grid, stream, function; metadata and the hooks; then the kernel's arguments
    numbers = [value for value in arguments[9:] if isinstance(value, int)]
    return [arguments[:3], arguments[4], numbers]


print(json.dumps([
    launch(aligned, 40), launch(aligned, 40), launch(aligned, 16), launch(aligned, 1),
    launch(shifted, 40), launch(shifted, 40),
]))
"""
    first, second, fewer, one_row, shifted, shifted_again = run(script)
    assert first == second
    (grid, function, numbers), other = first, one_row[2]
    assert (grid, fewer[0], one_row[0]) == ([2, 1, 1], [1, 1, 1], [1, 1, 1])
    assert fewer[1] == one_row[1] == function
    assert [pair for pair in zip(numbers, other, strict=True) if len({*pair}) > 1] == [(40, 1)]
    # Memory that is not aligned is another binary.
    assert shifted == shifted_again
    assert shifted[1] != function


def test_numbers_beyond_32_bits_on_either_side_are_not_cut_off():
    # Triton 3.9 takes the low half of a number that does not fit, and says nothing.
    script = """
ids = torch.zeros(1, 64, dtype=torch.int64)
functions = []
for token in (-(2**31), 2**31 - 1, -(2**31) - 1, 2**31, -(2**40)):
    launched.clear()
    plan.plan_rows(ids, one_run(token), None)
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
    assert run(script) == ["plan_kernel", "project_insert_kernel", "sum_parts_kernel"] * 2


CAPTURE = """
torch.cuda.is_initialized = lambda: True
capturing = [False]
torch.cuda.is_current_stream_capturing = lambda: capturing[0]  # no GPU here, so no capture


def plan_of(dtype):
    launched.clear()
    try:
        plan.plan_rows(torch.zeros(1, 64, dtype=dtype), one_run(7), None)
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
from step37_kernels.ops import plan_rows as plan
from step37_kernels.runs import FlatRuns

ids = torch.full((1, 64), 7, device="cuda")
runs = FlatRuns(tokens=(7,), group_sizes=(1,), features=(1,), rows=(4,))


def capture():
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        planned = plan.plan_rows(ids, runs, None)
    graph.replay()
    torch.cuda.synchronize()
    return planned


message = None
try:
    capture()
except RuntimeError as error:
    message = str(error)
plan.plan_rows(ids, runs, None)
print(json.dumps([message, capture()[0].tolist()]))
"""
    done = run_compiling("-c", script)
    assert done.returncode == 0, done.stderr
    message, destinations = json.loads(done.stdout)
    assert "for the first time inside a CUDA graph capture" in message
    assert destinations == [1, 2, 3, 4]
