"""Memory of devices and of the host: how much there is, and what is said where it is too small."""

import ctypes
import os
import platform
import re
from contextlib import suppress
from pathlib import Path

import jax

# Bytes of a unit, as XLA writes them; for TPUs without the last two letters.
UNITS = {"B": 1, "bytes": 1} | {
    f"{prefix}{rest}": 1024**power for power, prefix in enumerate("KMGT", 1) for rest in ("", "iB")
}
# Of glibc's <malloc.h>, with values: nothing is mapped by itself, and nothing is given back.
KEEP_FREED = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1)}
CONTAINER = Path("/sys/fs/cgroup/memory.max")  # what a container may use, on Linux
# What has glibc, from 2.35 on, ask for pages of 2 MB, and where Linux says who gets
# them, and of what size they are.
TUNABLES, HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
PAGES = Path("/sys/kernel/mm/transparent_hugepage")


def keep_freed() -> bool:
    """Has this process keep the memory that it frees; returns whether its C library can.

    A compiled program for CPUs takes all that it needs within a call at once, and gives it back
    after the call. The system then hands it out anew at each call, page by page and filled with
    zeros, which is a quarter to a third of a step of a small model. The process stays as large as
    it once was, and may become larger than that by as much as a call takes.
    """
    if _glibc() == (0,):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(option, value) for option, value in KEEP_FREED.values()])


def wish_for_huge_pages() -> str | None:
    """What GLIBC_TUNABLES has to be for processes to get pages of 2 MB that they do not get now;
    None where that makes no difference, and where the variable names such pages already.

    A program whose calls take more than 64 MB in a thread of JAX's own gets them from the system
    anew in each call; with pages of 4 KB that is up to a seventh of its time, and the processor
    looks up more addresses. The C library reads the setting when a process starts, and at no other
    time.
    """
    others = os.environ.get(TUNABLES, "")
    if _glibc() < (2, 35) or HUGE_PAGES in others:
        return None
    try:
        is_given = "[madvise]" in (PAGES / "enabled").read_text()
        size = int((PAGES / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return None
    if not is_given or size != 2**21:
        return None
    return ":".join(filter(None, [others, f"{HUGE_PAGES}=1"]))


def _glibc() -> tuple[int, ...]:
    """The version of Linux's C library if that is glibc, such as (2, 36); else (0,)."""
    if platform.system() != "Linux":
        return (0,)
    library, version = platform.libc_ver()
    parts = re.match(r"(\d+)\.(\d+)", version)
    return tuple(map(int, parts.groups())) if library == "glibc" and parts else (0,)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the devices, or the host, have too little memory."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    if isinstance(error, ValueError):  # of what does not fit when it is put on a device
        return text.startswith("resource_exhausted")
    signs = "resource_exhausted", "out of memory", "out_of_memory"
    return isinstance(error, jax.errors.JaxRuntimeError) and any(sign in text for sign in signs)


def describe_memory(error: BaseException, needed: int | None) -> str:
    """One sentence: what did not fit, what the compiled program needs and how much there is.

    Args:
      error: one that `is_out_of_memory`.
      needed: bytes of the program that was compiled last, on each device; None if not known.
    """
    text = str(error)
    # In the words of XLA for CPUs, GPUs and TPUs; the last of a program that cannot be compiled.
    asked = sizes(r"(?:allocat\w*|reserve)(?: request for)? SIZE", text)
    free = sizes("There are SIZE free", text)
    both = needed_and_there(text)
    parts = ["the memory is too small"]
    if asked and not both:
        left = f", and {gigabytes(free[0])} were free" if free else ""
        parts.append(f"{gigabytes(asked[0])} were asked for at once{left}")
    if both:
        most, there = map(gigabytes, both)
        parts.append(f"the program needs {most} on a device of {there}")
    elif needed:
        parts.append(f"the program needs {gigabytes(needed)} on each device, weights included")
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        used = gigabytes(stats.get("bytes_in_use", 0))
        parts.append(
            f"{device.device_kind} has {gigabytes(stats['bytes_limit'])}, {used} of them in use"
        )
    elif total := host_memory():
        parts.append(f"this machine has {gigabytes(total)}")
    return "; ".join(parts)


def needed_and_there(text: str) -> list[float] | None:
    """Bytes that a program needs and that a device has, from XLA's words of one that does not fit;
    None if they are not there."""
    return sizes("Used SIZE of SIZE", text) or sizes(
        r"memory required for [\w ]+ \(SIZE\) exceeds available \w+ \(SIZE\)", text
    )


def host_memory() -> int | None:
    """Bytes of memory of this machine, or of the container that it is; None if not known."""
    if not hasattr(os, "sysconf"):
        return None
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # of a container, if this is one with a limit
        total = min(total, int(CONTAINER.read_text()))
    return total


def sizes(pattern: str, text: str) -> list[float] | None:
    """The numbers of bytes in a text, by a pattern with SIZE for each; None if it is not there."""
    found = re.search(pattern.replace("SIZE", r"([\d.]+) ?([A-Za-z]+)"), text)
    pairs = list(zip(found.groups()[::2], found.groups()[1::2], strict=True)) if found else []
    if not pairs or any(unit not in UNITS for _, unit in pairs):
        return None
    return [float(number) * UNITS[unit] for number, unit in pairs]


def gigabytes(size: float) -> str:
    """A number of bytes in words."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
