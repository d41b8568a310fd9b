"""Memory: how much a call needs at its peak, and the states that a process is measured in.

On the CPU these are the two states that the C library's allocator can be in.

A large CPU tensor that is newly mapped costs a page fault for every 4 KB when it is first written, often more than
the computation. Whether that happens depends on the allocator's history; here it is decided by its settings, which a
process has from its start on:

* fresh: each block from 64 KB up is mapped by the operating system at its allocation, and given back when freed.
* warm: nothing is mapped apart or given back, so a block reuses pages that an earlier call has touched. There is one
  heap alone: after a block that it had no room for, the C library would go on in another, which maps large ones apart.

On a GPU, whose memory PyTorch keeps, a state is a way to call:

* graphs: CUDA graphs, timed between two events: the device's own time.
* eager: every launch from Python, timed by the wall clock until the device has finished: the host's time counts.
"""

import gc
import platform
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

STATES = {
    "fresh": {"MALLOC_MMAP_THRESHOLD_": str(64 << 10), "MALLOC_TRIM_THRESHOLD_": str(64 << 10)},
    "warm": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 60), "MALLOC_ARENA_MAX": "1"},
    "default": {},  # the allocator as it comes
    "graphs": {},
    "eager": {},
}
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def states_of(device: str, asked: Iterable[str] = ("fresh", "warm"), capturable: bool = True) -> list[str]:
    """The states to measure in: those ``asked`` for on a CPU, unless its C library has other settings."""
    if device == "cuda":
        return ["graphs", "eager"] if capturable else ["eager"]
    return list(asked) if platform.libc_ver()[0] == "glibc" else ["default"]


def peak_extra_bytes(function: Callable[[], object], device: str) -> int | None:
    """Most memory that a call has in use beyond what is in use before it; None where it cannot be read.

    Call the function once before, so that loaded code and caches do not count. On the CPU meaningful in the fresh
    state only. There the resident set's high-water mark is set back before the call.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    try:
        _RESET.write_text("5")
    except OSError:
        return None
    before = _kilobytes(_STATUS, "VmRSS")
    function()
    return (_kilobytes(_STATUS, "VmHWM") - before) * 1024


def peak_bytes() -> int:
    """Most memory that this process ever had in use. What the process that started it had does not count."""
    return _kilobytes(_STATUS, "VmHWM") * 1024


def page_faults(function: Callable[[], object]) -> int:
    """Pages that the operating system has to supply during a call."""
    import resource  # not on every system

    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    function()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def settle(function: Callable[[], object], calls: int = 8) -> int:
    """Call until no new page is needed: in the warm state a heap grows over a few calls before it serves them all.

    Returns the page faults of the last call.
    """
    for _ in range(calls):
        faults = page_faults(function)
        if faults == 0:
            break
    return faults


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable") * 1024


def limit_to_available() -> None:
    """Let allocations fail that the machine has no memory for, instead of having a process killed."""
    if not _STATUS.exists():
        return
    import resource

    limit = _kilobytes(_STATUS, "VmData") * 1024 + available_bytes()
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard < 0 else min(limit, hard), hard))


def _kilobytes(path: Path, field: str) -> int:
    return int(re.search(rf"^{field}:\s+(\d+) kB", path.read_text(), re.MULTILINE).group(1))
