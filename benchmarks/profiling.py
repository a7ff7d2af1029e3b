"""What a profile says of a program: the operations that take most, and when the device is idle."""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax


def record(run: Callable[[], object]) -> jax.profiler.ProfileData:
    """The profile of a call, whose programs should be compiled by then."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (path,) = Path(folder).rglob("*.xplane.pb")
        return jax.profiler.ProfileData.from_serialized_xspace(path.read_bytes())


def operations(data: jax.profiler.ProfileData) -> Iterator[tuple[str, list]]:
    """(name of the device, events) of each line of a profile that holds operations."""
    for plane in data.planes:
        for line in plane.lines:
            if plane.name.startswith("/device:GPU"):
                holds_operations = line.name.startswith("Stream")
            elif plane.name.startswith("/device:TPU"):
                holds_operations = line.name == "XLA Ops"
            else:
                holds_operations = "XLAEigen" in line.name or "XLATfrtCpuClient" in line.name
            if holds_operations:
                yield plane.name, list(line.events)


def top_ten(data: jax.profiler.ProfileData) -> list[list]:
    """[name, share of the time of all] of the operations that take most, numbers cut off names.

    Counted is an operation's own time, without that of others inside it: a wait for another device
    lies in an event for the meeting, which lies in the collective.
    """
    spent = Counter()
    for device, events in operations(data):
        for name, own in own_times(events):
            # On a CPU the executor's own events, which hold all others, have C++ names.
            if "GPU" in device or "::" not in name:
                spent[name.split(".")[0]] += own
    total = sum(spent.values()) or 1
    return [[name, time_ns / total] for name, time_ns in spent.most_common(10)]


def own_times(events: Iterable) -> list[tuple[str, float]]:
    """(name, ns without the events inside it) of each event of one line of a profile."""
    found, open_ones = [], []  # the latter as (end, place in found), outermost first
    for event in sorted(events, key=lambda e: (e.start_ns, -e.duration_ns)):
        while open_ones and open_ones[-1][0] <= event.start_ns:
            open_ones.pop()
        if open_ones:
            end, outer = open_ones[-1]
            found[outer][1] -= min(event.duration_ns, end - event.start_ns)
        open_ones.append((event.start_ns + event.duration_ns, len(found)))
        found.append([event.name, event.duration_ns])
    return [(name, own) for name, own in found]


def occupied(data: jax.profiler.ProfileData) -> dict[str, float]:
    """How far operations fill the time of the first device of a profile.

    Returns: "operations", how many there were; "busy_ms", in which one or more of them ran;
      "span_ms", from the start of the first to the end of the last; "idle", the share of the span
      in which none ran. A graph of kernels (a command buffer) that the profiler shows as one event
      counts as busy from end to end.
    """
    of_device: dict[str, list] = {}
    for device, events in operations(data):
        of_device.setdefault(device, []).extend(
            (event.start_ns, event.start_ns + event.duration_ns)
            for event in events
            if "GPU" in device or "::" not in event.name
        )
    ran = sorted(next((one for _, one in sorted(of_device.items()) if one), []))
    if not ran:
        return {"operations": 0, "busy_ms": 0.0, "span_ms": 0.0, "idle": 0.0}
    busy, until = 0.0, ran[0][0]
    for start, end in ran:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    span = until - ran[0][0]
    return {
        "operations": len(ran),
        "busy_ms": busy / 1e6,
        "span_ms": span / 1e6,
        "idle": 1 - busy / span if span else 0.0,
    }
