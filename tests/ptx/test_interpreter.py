"""The interpreter of compiled kernels does what the ISA says, and sees what a GPU may not do."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.ptx.arithmetic import fused, rounded, widened
from tests.ptx.driver import Kernel
from tests.ptx.memory import Descriptor, GlobalMemory
from tests.ptx.program import PtxError

BASE = 1 << 20
THREAD = """
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mad.lo.s32 %r3, %r2, 32, %r1;
    ld.param.b64 %rd1, [out];
    mad.wide.u32 %rd2, %r3, 4, %rd1;
"""
"""%r1: thread, %r2: block, %r3: place in the grid, %rd2: its word of ``out``."""


def run(
    body: str, *, blocks: int = 1, words: int = 64, threads: int = 32, fresh: bool = False
) -> np.ndarray:
    """``out`` after a kernel of this body, int32; one descriptor of 16×64 values at ``matrix``.

    ``fresh``: the launch before wrote ``out``, too.
    """
    out = np.full(words, -1, np.int32)
    source = np.arange(32 * 64, dtype=np.uint16)
    kernel = Kernel(
        f""".visible .entry kernel(.param .u64 out, .param .align 64 .b8 matrix[128])
.reqntid {threads}
{{
    .reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<40>; .reg .b64 %rd<9>;
    {THREAD}
    {body}
    ret;
}}"""
    )
    tensors = {BASE: out.view(np.uint8), 2 * BASE: source.view(np.uint8)}
    memory = GlobalMemory(tensors, frozenset([BASE] if fresh else []))
    matrix = Descriptor(
        base=2 * BASE, itemsize=2, shape=(32, 64), strides=(64, 1), box=(16, 64), swizzle=3
    )
    kernel.launch((blocks, 1, 1), [BASE], memory, descriptors={1: matrix}, shared_bytes=8192)
    return out


def test_threads_that_part_come_together_again():
    out = run(
        """
        setp.lt.s32 %p1, %r1, 5;
        @%p1 bra LOW;
        mov.b32 %r4, 100;
        bra.uni END;
    LOW:
        mov.b32 %r4, 0;
        mov.b32 %r5, 0;
    AGAIN:
        add.s32 %r4, %r4, %r1;
        add.s32 %r5, %r5, 1;
        setp.lt.s32 %p2, %r5, %r1;
        @%p2 bra AGAIN;
    END:
        redux.sync.max.s32 %r6, %r4, -1;
        add.s32 %r4, %r4, %r6;
        st.global.b32 [%rd2], {%r4};
        """
    )
    assert out[:32].tolist() == [100, 101, 104, 109, 116] + [200] * 27
    assert (out[32:] == -1).all()


def test_a_barrier_lets_every_warp_see_what_the_others_stored():
    out = run(
        """
        shl.b32 %r4, %r1, 2;
        st.shared.b32 [%r4], %r1;
        bar.sync 0;
        xor.b32 %r5, %r4, 252;
        ld.shared.b32 %r6, [%r5];
        st.global.b32 [%rd2], {%r6};
        """,
        threads=64,
    )
    assert out.tolist() == list(range(63, -1, -1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("st.global.b32 [%rd2+160], {%r1};", "outside the tensors"),
        ("st.global.b64 [%rd2], {%rd1};", "no multiple"),
        ("st.global.b32 [%rd1], {%r1};", "different values"),
        ("st.shared.b32 [%r1+8192], %r1;", "no multiple"),
        ("shl.b32 %r4, %r1, 10; st.shared.b32 [%r4], %r1;", "past the 8192"),
        ("setp.lt.s32 %p1, %r1, 5; @%p1 bra OUT; redux.sync.max.s32 %r4, %r1, -1; OUT:", "warp"),
        ("setp.lt.s32 %p1, %r1, 5; @%p1 bra OUT; bar.sync 0; OUT: bar.sync 0;", None),
        ("brev.b32 %r4, %r1;", "does not know"),
        ("mov.b16 %rs1, 0x4000; fma.rn.bf16 %rs2, %rs1, %rs1, %rs1;", "does not know"),
        ("mbarrier.init.shared::cta.b64 [%r1], 1; cp.async.commit_group;", "waited"),
    ],
)
def test_what_a_gpu_may_not_do_is_a_fault(text, message):
    if message is None:
        run(text)
    else:
        with pytest.raises(PtxError, match=message):
            run(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("st.global.b32 [%rd1], {%r0};", "two blocks .* write"),
        (
            "mul.wide.u32 %rd3, %r1, 4; add.s64 %rd3, %rd1, %rd3; ld.global.b32 {%r4}, [%rd3];"
            "st.global.b32 [%rd2], {%r1};",
            "read",
        ),
    ],
)
def test_blocks_that_depend_on_each_other_are_a_fault(text, message):
    with pytest.raises(PtxError, match=message):
        run(text, blocks=2)


@pytest.mark.parametrize("text", ["ld.global.b32 {%r4}, [%rd2];", "st.global.b32 [%rd2], {%r1};"])
def test_what_the_launch_before_wrote_is_left_alone_until_the_wait(text):
    with pytest.raises(PtxError, match="before the wait"):
        run(f"{text} griddepcontrol.wait;", fresh=True)
    run(f"griddepcontrol.wait; {text}", fresh=True)


def test_what_nobody_wrote_is_neither_zero_nor_the_last_value():
    assert (run("st.global.b32 [%rd2], {%r4};")[:32].view(np.uint32) == 0xDEADBEEF).all()
    out = run("mov.b32 %r4, 0; ld.shared.b32 %r5, [%r4]; st.global.b32 [%rd2], {%r5};")
    assert (out[:32].view(np.uint32) == 0xA5A5A5A5).all()


COPY_BOX = """
    setp.eq.s32 %p1, %r1, 0;
    mov.b32 %r4, matrix;
    cvt.u64.u32 %rd3, %r4;
    cvta.param.u64 %rd4, %rd3;
    mov.b32 %r5, {row};
    mov.b32 %r6, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r6+4096], 1;
    bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r6+4096], 2048;
    @%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes
        [%r6], [%rd4, {{%r6, %r5}}], [%r6+4096];
    bar.sync 0;
    {wait}
    shl.b32 %r7, %r1, 2;
    ld.shared.b32 %r8, [%r7+128];
    bar.sync 0;
    @%p1 mbarrier.inval.shared::cta.b64 [%r6+4096];
    st.global.b32 [%rd2], {{%r8}};
"""
WAIT = """{
    .reg .pred complete;
    waitLoop:
    mbarrier.try_wait.parity.shared::cta.b64 complete, [%r6+4096], 0;
    @!complete bra.uni waitLoop;
}"""


def test_the_copy_engine_swizzles_and_fills_up_with_zeros():
    out = run(COPY_BOX.format(row=2, wait=WAIT)).view(np.uint16)[:64]
    # The second row of the box: units of eight values, the lowest bit of their place flipped.
    assert out.tolist() == (np.arange(64).reshape(4, 2, 8)[:, ::-1] + 3 * 64).ravel().tolist()
    assert (run(COPY_BOX.format(row=31, wait=WAIT))[:32] == 0).all()


def test_a_copy_that_nobody_waits_for_is_not_there_yet():
    # The first block's copies arrive at once, the second's as late as they may.
    with pytest.raises(PtxError, match="under way"):
        run(COPY_BOX.format(row=2, wait=""), blocks=2)


def test_asynchronous_copies_of_threads_arrive_when_waited_for():
    body = """
        mov.u64 %rd5, 2097152;
        mad.wide.u32 %rd5, %r1, 4, %rd5;
        shl.b32 %r4, %r1, 2;
        and.b32 %r5, %r1, 1;
        shl.b32 %r5, %r5, 2;
        cp.async.ca.shared.global [%r4+0], [%rd5+0], 4, %r5;
        cp.async.commit_group;
        {wait}
        ld.shared.b32 %r6, [%r4];
        cp.async.wait_group 0;
        st.global.b32 [%rd2], {{%r6}};
    """
    source = np.arange(64, dtype=np.uint16).view(np.int32)
    expected = np.where(np.arange(32) % 2, source, 0)
    waited = run(body.format(wait="cp.async.wait_group 0;"), blocks=2)
    assert (waited.reshape(2, 32) == expected).all()
    early, late = run(body.format(wait="cp.async.wait_group 1;"), blocks=2).reshape(2, 32)
    assert (early == expected).all()
    assert (late != expected).all()


FLOAT = st.floats(
    width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**49), max_value=2.0**49
)


@given(FLOAT, FLOAT, FLOAT)
def test_a_fused_product_is_rounded_once(a, b, c):
    result = float(fused(*(np.float32(each) for each in (a, b, c))))
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    around = [np.nextafter(np.float32(result), np.float32(to)) for to in (-np.inf, np.inf)]
    error = abs(Fraction(result) - exact)
    assert all(error <= abs(Fraction(float(each)) - exact) for each in around)


@pytest.mark.parametrize("half", ["bf16", "f16"])
@given(bits=st.integers(0, 2**16 - 1))
def test_rounding_to_16_bits_keeps_what_has_16_bits(half, bits):
    value = widened(np.array([bits], np.uint16), half)
    again = rounded(value, half)
    assert again[0] == bits or np.isnan(value[0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mov.b32 %r4, -7; div.s32 %r5, %r4, 2;", -3),
        ("mov.b32 %r4, -7; rem.s32 %r5, %r4, 4;", -3),
        ("mov.b32 %r4, -7; shr.s32 %r5, %r4, 40;", -1),
        ("mov.b32 %r4, -7; shr.u32 %r5, %r4, 40;", 0),
        ("mov.b32 %r4, 0x81020304; prmt.b32 %r5, %r4, 0, 0x3B10;", -0x7E00FCFC),
        ("mov.b32 %r4, 0x00F00000; bfe.s32 %r5, %r4, 20, 4;", -1),
        ("mov.b32 %r4, 0x00F00000; bfe.u32 %r5, %r4, 20, 4;", 15),
        ("mov.b32 %r4, 0x7FFFFFFF; mul.hi.s32 %r5, %r4, 4;", 1),
        ("mov.b32 %r4, 0x40490FDB; cvt.rn.bf16x2.f32 %r5, %r4, %r4;", 0x40494049),
        ("mov.b32 %r4, 5; mov.b32 {%rs1, %rs2}, %r4; mov.b32 %r5, {%rs2, %rs1};", 5 << 16),
        ("mov.b32 %r4, 0xF0; popc.b32 %r5, %r4;", 4),
        ("shfl.sync.idx.b32 %r5, %r1, 9, 31, -1;", 9),
        # 1 and 2, times 1, plus 4 and -2
        (
            "mov.b32 %r4, 0x3F804000; mov.b32 %r6, 0x3F803F80; mov.b32 %r7, 0x4080C000;"
            "fma.rn.bf16x2 %r5, %r4, %r6, %r7;",
            0x40A00000,
        ),
    ],
)
def test_arithmetic(text, expected):
    assert (run(f"{text} st.global.b32 [%rd2], {{%r5}};")[:32] == expected).all()


def test_shuffles_stop_at_the_ends_of_a_warp():
    up = run("shfl.sync.up.b32 %r5, %r1, 4, 0, -1; st.global.b32 [%rd2], {%r5};")[:32]
    assert up.tolist() == [0, 1, 2, 3, *range(28)]
    down = run("shfl.sync.down.b32 %r5|%p1, %r1, 4, 31, -1; st.global.b32 [%rd2], {%r5};")[:32]
    assert down.tolist() == [*range(4, 32), 28, 29, 30, 31]
