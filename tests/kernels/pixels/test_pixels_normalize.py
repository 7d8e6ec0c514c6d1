"""clip_normalize against the expression it stands for, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch._subclasses import FakeTensorMode

from step37_kernels.pixels import normalize as pixels_module
from step37_kernels.pixels import reference as reference_pixels
from step37_kernels.pixels.normalize import CLIP_MEAN, CLIP_STD, DTYPES, clip_normalize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMPLS = ("triton", "torch")


def random_pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(DEVICE)


def every_level() -> torch.Tensor:
    """``[1, 1, 256, 3]`` with every value in every channel."""
    return torch.arange(256, dtype=torch.uint8).view(1, 1, 256, 1).repeat(1, 1, 1, 3)


def test_the_reference_is_what_numpy_computes_in_fp32():
    levels = np.arange(256, dtype=np.float32)
    got = reference_pixels.clip_normalize(every_level(), dtype=torch.float32)
    for channel in range(3):
        expected = (levels / np.float32(255) - np.float32(CLIP_MEAN[channel])) / np.float32(
            CLIP_STD[channel]
        )
        assert expected.dtype == np.float32
        np.testing.assert_array_equal(got[0, channel, 0].numpy(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_every_level_of_every_channel_is_bit_exact(impl, dtype):
    expected = reference_pixels.clip_normalize(every_level(), dtype=dtype)
    got = clip_normalize(every_level().to(DEVICE), dtype=dtype, impl=impl)
    assert got.dtype == dtype
    assert torch.equal(got.cpu(), expected)


def test_one_product_and_sum_serve_where_they_give_every_result_and_nowhere_else():
    for dtype in (torch.bfloat16, torch.float16):
        assert pixels_module.multiply_add_constants(CLIP_MEAN, CLIP_STD, dtype) is not None
    assert pixels_module.multiply_add_constants(CLIP_MEAN, CLIP_STD, torch.float32) is None


@given(
    mean=st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3),
    std=st.lists(st.floats(2**-10, 1, width=32), min_size=3, max_size=3),
    dtype=st.sampled_from(DTYPES),
)
def test_any_constants_are_bit_exact_by_product_and_sum_or_by_division(mean, std, dtype):
    pixels = every_level()
    got = clip_normalize(pixels.to(DEVICE), mean=mean, std=std, dtype=dtype, impl="triton")
    wanted = reference_pixels.clip_normalize(pixels, mean=mean, std=std, dtype=dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(got.cpu().view(bits), wanted.view(bits))


@pytest.mark.parametrize("dtype", DTYPES)
def test_division_is_exact_where_product_and_sum_would_be_too(monkeypatch, dtype):
    monkeypatch.setattr(pixels_module, "multiply_add_constants", lambda *_: None)
    pixels = random_pixels(2, 9, 16, 3)
    got = clip_normalize(pixels, dtype=dtype, impl="triton")
    assert torch.equal(got.cpu(), reference_pixels.clip_normalize(pixels.cpu(), dtype=dtype))


@pytest.mark.parametrize("impl", IMPLS)
@given(
    n=st.integers(0, 3),
    height=st.integers(0, 40),
    width=st.integers(0, 60),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_any_shape_is_bit_exact(impl, n, height, width, dtype, seed):
    pixels = random_pixels(n, height, width, 3, seed=seed)
    got = clip_normalize(pixels, dtype=dtype, impl=impl)
    assert got.is_contiguous()
    assert torch.equal(got, reference_pixels.clip_normalize(pixels, dtype=dtype))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda p: p[:, ::2, 1:-1], id="every other row, cropped"),
        pytest.param(lambda p: p.transpose(1, 2), id="height and width swapped"),
        pytest.param(lambda p: p.flip(-1), id="channels reversed and copied"),
        pytest.param(lambda p: p[1:, 3:, 5:], id="offset start"),
        pytest.param(lambda p: p[:1].expand(4, -1, -1, -1), id="one image four times"),
        pytest.param(lambda p: p[:, :, :1].expand(-1, -1, 9, -1), id="one column nine times"),
        pytest.param(
            lambda p: p.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), id="channels first"
        ),
        pytest.param(lambda p: torch.cat([p, p], dim=-1)[..., 1:4], id="three of six channels"),
    ],
)
def test_any_strides_are_bit_exact(impl, view):
    pixels = view(random_pixels(3, 18, 27, 3))
    assert torch.equal(clip_normalize(pixels, impl=impl), reference_pixels.clip_normalize(pixels))


@pytest.mark.parametrize("impl", IMPLS)
def test_more_than_one_block_a_row(impl):
    pixels = random_pixels(2, 3, 1400, 3)[:, :, :1399]
    assert torch.equal(clip_normalize(pixels, impl=impl), reference_pixels.clip_normalize(pixels))


@pytest.mark.parametrize("impl", IMPLS)
def test_other_constants_give_other_values(impl):
    pixels = random_pixels(1, 4, 5, 3)
    mean, std = (0.1, 0.2, 0.3), (0.5, -0.25, 3.0)
    got = clip_normalize(pixels, mean=mean, std=std, dtype=torch.float32, impl=impl)
    expected = reference_pixels.clip_normalize(pixels, mean=mean, std=std, dtype=torch.float32)
    assert torch.equal(got, expected)
    assert not torch.equal(got, clip_normalize(pixels, dtype=torch.float32, impl=impl))


def test_lists_serve_as_constants():
    pixels = random_pixels(1, 2, 2, 3)
    got = clip_normalize(pixels, mean=list(CLIP_MEAN), std=list(CLIP_STD))
    assert torch.equal(got, clip_normalize(pixels))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: clip_normalize(p.float()), TypeError, r"pixels: expected torch.uint8, got"),
        (
            lambda p: clip_normalize(p.cpu().numpy()),
            TypeError,
            r"pixels: expected a tensor of torch\.uint8, got a NumPy array of uint8: pass "
            r"torch\.from_numpy\(array\)",
        ),
        (
            lambda p: clip_normalize(Image.fromarray(p[0].cpu().numpy())),
            TypeError,
            r"pixels: .*, got Pillow's Image: pass torch\.from_numpy\(np\.array\(image\.convert",
        ),
        (lambda p: clip_normalize([p]), TypeError, r"pixels: expected a tensor .*, got list"),
        (lambda p: clip_normalize(p[0]), ValueError, r"pixels: expected \[N, H, W, 3\], got \[4,"),
        (lambda p: clip_normalize(p[..., :2]), ValueError, r"pixels: expected .* got \[1, 4, 4, 2"),
        (lambda p: clip_normalize(p, dtype=torch.float64), TypeError, r"dtype: expected one of"),
        (lambda p: clip_normalize(p, mean=(1, 2)), ValueError, r"mean: expected three finite"),
        (
            lambda p: clip_normalize(p, mean=(1e300, 0, 0)),
            ValueError,
            r"mean: expected three finite",
        ),
        (
            lambda p: clip_normalize(p, mean=0.5),
            TypeError,
            r"mean: expected three numbers, got 0.5",
        ),
        (lambda p: clip_normalize(p, std=(1, 2, float("nan"))), ValueError, r"std: expected three"),
        (lambda p: clip_normalize(p, std=(1, 0, 1)), ValueError, r"std: .* other than zero"),
        (lambda p: clip_normalize(p, std=(1, 1e-60, 1)), ValueError, r"std: .* other than zero"),
        (lambda p: clip_normalize(p, impl="fast"), ValueError, r"impl: expected one of"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(random_pixels(1, 4, 4, 3))


def test_constants_first_seen_under_fake_tensors_are_real_ones():
    pixels = random_pixels(1, 4, 4, 3).cpu()
    mean = (0.1, 0.2, 0.3)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        clip_normalize(mode.from_tensor(pixels), mean=mean, impl="torch")
    wanted = reference_pixels.clip_normalize(pixels, mean=mean)
    assert torch.equal(clip_normalize(pixels, mean=mean, impl="torch"), wanted)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device: streams and capture")
@pytest.mark.parametrize("impl", IMPLS)
def test_no_synchronisation_and_captured_in_a_graph(impl):
    pixels = random_pixels(2, 33, 47, 3)
    expected = reference_pixels.clip_normalize(pixels)
    clip_normalize(pixels, impl=impl)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            clip_normalize(pixels, mean=(0.3, 0.2, 0.1), dtype=torch.float32, impl=impl)
        clip_normalize(pixels, mean=(0.3, 0.2, 0.1), dtype=torch.float32, impl=impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = clip_normalize(pixels, impl=impl)
    captured.fill_(float("nan"))
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device: allocates 9 GiB there")
def test_more_than_two_to_the_31_values():
    pixels = torch.randint(0, 256, (1, 27000, 27000, 3), dtype=torch.uint8, device=DEVICE)
    got = clip_normalize(pixels, impl="triton")
    assert torch.equal(got[:, :, -5:], reference_pixels.clip_normalize(pixels[:, -5:]))


@pytest.mark.parametrize(("mean", "std"), [(0.4177, 0.3211), (0.5139, 0.5069)])
def test_product_and_sum_that_are_exact_only_fused_or_only_apart_are_not_used(mean, std):
    # In bf16 the first pair is exact fused, the second in two roundings.
    constants = {"mean": (mean,) * 3, "std": (std,) * 3}
    assert pixels_module.multiply_add_constants((mean,) * 3, (std,) * 3, torch.bfloat16) is None
    pixels = random_pixels(1, 16, 16, 3)
    wanted = reference_pixels.clip_normalize(pixels, **constants)
    assert torch.equal(clip_normalize(pixels, **constants), wanted)
