"""The emulation that runs the CUDA kernels' source on the CPU (tests/simt) finds every kind of bug planted for it."""

import re

import pytest
import torch
from simt.build import KernelError, build, guarded

# Bug of planted.cpp, in its order, and what the message says.
BUGS = {
    "none": None,
    "no barrier": r"block 0, thread 0: reads unwritten shared memory at planted\.cpp:\d+",
    "early write": r"thread 64: race: writes shared memory at planted\.cpp:\d+, read by thread 0 at planted\.cpp",
    "unwritten": r"reads unwritten shared memory",
    "read past end": r"block 2, thread 127: out of bounds: reads 4 bytes .*, reaching 4 bytes past the end of arg",
    "read before": r"block 0, thread 0: out of bounds: reads 4 bytes .* 4 bytes before argument 2",
    "write past end": r"block 2, thread 0: out of bounds: writes 4 bytes .* 4 bytes past the end of argument 3",
    "write input": r"writes 4 bytes .* in argument 2, which is only for reading",
    "null pointer": r"out of bounds: reads 16 bytes .* far from every buffer",
    "shared index": r"out of bounds: planted\.cpp:\d+ takes index 8 of 'float \[8\]'",
    "local index": r"block 0, thread 5: out of bounds: planted\.cpp:\d+ takes index 4 of 'float \[4\]'",
    "misaligned": r"block 0, thread 3: misaligned: planted\.cpp:\d+ takes .*Four' from 4 bytes past a multiple of 16",
    "branch barrier": r"block 0: divergent barrier: thread 0 is in __syncthreads .* while thread 64 has returned",
    "two barriers": r"divergent barrier: thread 0 is in __syncthreads at (\S+) while thread 64 is in .* at (?!\1)",
    "barrier in shuffle": r"divergent barrier: thread 0 is in __syncthreads .* while thread 32 is in a shuffle",
    "lane gone": r"shuffle with a missing lane: thread 32 is in a shuffle .* for thread 40, which has returned",
    "two shuffles": r"divergent shuffle: it is at planted\.cpp:\d+ while thread 0 is in a shuffle",
    "masks disagree": r"block 0: deadlock: thread 0 is in a shuffle .* thread 1 is in a shuffle .* with another mask",
    "foreign lane": r"thread 16: shuffles from a lane that is not in the mask, at planted\.cpp",
    "blocks collide": r"block 1, thread 0: race: writes argument 3 at \S+, written by another block at",
    "unwritten output": r"no kernel writes output 0 at element 2",
    "divide by zero": r"block 0, thread 7: crash: .* at planted\.cpp:\d+",
    "stack overflow": r"block 0, thread 0: crash: .*stack overflow",
}
BLOCKS = 3


def row_sums(bug):
    x, sums = torch.randn(BLOCKS, 512), torch.empty(BLOCKS)
    build("planted").run("row_sums", list(BUGS).index(bug), BLOCKS, x, sums, outputs=[sums])
    torch.testing.assert_close(sums, x.sum(1))


def error(name, *arguments, outputs, **options):
    with pytest.raises(KernelError) as caught:
        build("planted").run(name, *arguments, outputs=outputs, **options)
    return str(caught.value)


@pytest.mark.parametrize("bug", [bug for bug in BUGS if bug != "none"])
def test_planted_bug_is_reported(bug):
    with pytest.raises(KernelError) as caught:
        row_sums(bug)
    assert re.search(BUGS[bug], str(caught.value)), caught.value
    row_sums("none")  # and nothing is left of it


def test_missing_warp_barrier():
    out = torch.empty(64, dtype=torch.int32)
    build("planted").run("shifted", True, out, outputs=[out])
    assert out[:3].tolist() == [0, 0, 1] and out[32:35].tolist() == [32, 32, 33]
    # The right values, by luck of the order, are no excuse.
    assert "race: reads shared memory" in error("shifted", False, out, outputs=[out], orders=[0])
    assert "reads unwritten shared memory" in error("shifted", False, out, outputs=[out], orders=[1])


def test_shared_memory_written_again_after_many_have_read():
    out = torch.empty(64, dtype=torch.int32)
    absent, of_warp, of_block = range(3)
    for barrier, own in ((of_warp, True), (of_block, True), (of_block, False)):
        build("planted").run("reused", barrier, own, out, outputs=[out])
        assert out.tolist() == [0] * 32 + [int(own)] * 32
    assert "read by several threads of warp 0 at" in error("reused", absent, True, out, outputs=[out])
    assert "read by several threads at" in error("reused", of_warp, False, out, outputs=[out])


def test_scratch_is_unwritten_at_first():
    x, out = torch.randn(32, dtype=torch.float64), torch.empty(32, dtype=torch.float64)
    build("planted").run("through_scratch", True, x, out, outputs=[out])
    assert torch.equal(out, x)
    assert "reads unwritten scratch" in error("through_scratch", False, x, out, outputs=[out])


def test_orders_of_threads_differ():
    """A race that the checks of single accesses cannot see still changes the result."""
    last = torch.empty(1, dtype=torch.int32)
    assert "the order of threads changes output 0 (order 1)" in error("last_thread", last, outputs=[last])
    build("planted").run("last_thread", last, outputs=[last], orders=[0])
    assert last.item() == 63


def test_impossible_launch():
    x, sums = torch.randn(1, 512), torch.empty(1)
    assert "at least one block" in error("row_sums", 0, 0, x, sums, outputs=[sums])


def test_crash_of_the_driver_is_an_error():
    out = torch.empty(1)
    assert "crash: Segmentation fault in the driver" in error("crash_outside_kernels", out, outputs=[out])
    row_sums("none")


def test_inputs_keep_strides_and_alignment_and_have_nan_between_rows():
    x = torch.randn(2, 24, 3, 4).contiguous(memory_format=torch.channels_last)[:, 5:18]
    copy = guarded(x)
    assert torch.equal(copy, x) and copy.stride() == x.stride()
    assert copy.data_ptr() % 64 == x.data_ptr() % 64
    assert copy.as_strided((24,), (1,))[13:].isnan().all()


def test_expanded_inputs_are_copied_once():
    x = torch.randn(1, 3, 2, 4).expand(5, 3, 2, 4)
    copy = guarded(x)
    assert torch.equal(copy, x) and copy.stride() == x.stride()
