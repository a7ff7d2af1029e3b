"""What the server tells of itself, in the text format of Prometheus."""

import bisect
import threading
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

import jax

LATENCIES = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
WINDOW = 60.0  # seconds that the speed is a mean of
COMPILED = "/jax/core/compile/backend_compile_duration"


class Histogram:
    """Counts of seconds in the buckets of `LATENCIES`."""

    def __init__(self) -> None:
        self.counts, self.sum = [0] * (len(LATENCIES) + 1), 0.0

    def add(self, seconds: float) -> None:
        """Counts one."""
        self.counts[bisect.bisect_left(LATENCIES, seconds)] += 1
        self.sum += seconds

    def lines(self, name: str, labels: str) -> list[str]:
        """As Prometheus reads it."""
        total, found, comma = 0, [], "," if labels else ""
        for limit, count in zip((*LATENCIES, "+Inf"), self.counts, strict=True):
            total += count
            found.append(f'{name}_bucket{{{labels}{comma}le="{limit}"}} {total}')
        braces = f"{{{labels}}}" if labels else ""
        return [*found, f"{name}_sum{braces} {self.sum:.6f}", f"{name}_count{braces} {total}"]


class Meters:
    """Counts of what happened since the server began; for any thread."""

    def __init__(self) -> None:
        self.lock, self.started = threading.Lock(), time.time()
        self.requests: Counter[tuple[str, str, int]] = Counter()
        self.latency: dict[tuple[str, str], Histogram] = {}
        self.calls, self.waits = Histogram(), Histogram()
        self.rows, self.compiles, self.compile_seconds = 0, 0, 0.0
        self.learned, self.refused = Counter[str](), Counter[str]()
        self.recent: deque[tuple[float, int]] = deque()
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def close(self) -> None:
        """Hears of no more compilations."""
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, seconds: float, **about: Any) -> None:
        if event == COMPILED:
            with self.lock:
                self.compiles += 1
                self.compile_seconds += seconds

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Notes an answer."""
        with self.lock:
            self.requests[method, route, status] += 1
            self.latency.setdefault((method, route), Histogram()).add(seconds)

    def called(self, seconds: float, rows: int) -> None:
        """Notes a call of the engine, and how many rows it drew."""
        with self.lock:
            self.calls.add(seconds)
            self.rows += rows
            self.recent.append((time.monotonic(), rows))
            self._let_go()  # also where nobody asks for the speed

    def waited(self, seconds: float) -> None:
        """Notes how long a request waited for its first row."""
        with self.lock:
            self.waits.add(seconds)

    def ended(self, state: str) -> None:
        """Notes how a job of learning ended."""
        with self.lock:
            self.learned[state] += 1

    def speed(self) -> float:
        """Rows a second over the last minute."""
        self._let_go()
        return sum(rows for _, rows in self.recent) / min(WINDOW, max(1.0, self.uptime()))

    def _let_go(self) -> None:
        """Forgets calls that the speed is no mean of any more."""
        oldest = time.monotonic() - WINDOW
        while self.recent and self.recent[0][0] < oldest:
            self.recent.popleft()

    def uptime(self) -> float:
        """Seconds since the server began."""
        return time.time() - self.started

    def text(self, gauges: dict[str, tuple[str, float]]) -> str:
        """All of it.

        Args:
          gauges: (help, value) of what is now, by name.
        """
        with self.lock:
            now = {
                "rows_per_second": ("rows drawn a second, over the last minute", self.speed()),
                "uptime_seconds": ("since the server began", self.uptime()),
                **gauges,
            }
            lines = []
            for name, (text, value) in now.items():
                lines += [*head(name, text, "gauge"), f"idea_{name} {written(value)}"]
            counts = {
                "rows_total": ("rows drawn", self.rows),
                "compiles_total": ("programs compiled", self.compiles),
                "compile_seconds_total": ("time that compiling took", self.compile_seconds),
            }
            for name, (text, value) in counts.items():
                lines += [*head(name, text, "counter"), f"idea_{name} {written(value)}"]
            lines += head("learned_total", "people learned, by how it ended", "counter")
            lines += [f'idea_learned_total{{state="{k}"}} {n}' for k, n in self.learned.items()]
            lines += head("requests_total", "requests answered", "counter")
            for (method, route, status), count in sorted(self.requests.items()):
                labels = f'method="{method}",route="{route}",status="{status}"'
                lines.append(f"idea_requests_total{{{labels}}} {count}")
            lines += head("request_seconds", "time until the whole answer was sent", "histogram")
            for (method, route), histogram in sorted(self.latency.items()):
                labels = f'method="{method}",route="{route}"'
                lines += histogram.lines("idea_request_seconds", labels)
            lines += head("call_seconds", "time of a call of the engine", "histogram")
            lines += self.calls.lines("idea_call_seconds", "")
            lines += head("wait_seconds", "time until the first row of a request", "histogram")
            lines += self.waits.lines("idea_wait_seconds", "")
        return "\n".join(lines) + "\n"


def written(value: float) -> str:
    """A number with all of its digits: a counter that is rounded stands still, and then leaps."""
    return str(int(value)) if value == int(value) else repr(float(value))


def head(name: str, text: str, kind: str) -> list[str]:
    """What goes before the values of a metric."""
    return [f"# HELP idea_{name} {text}", f"# TYPE idea_{name} {kind}"]


def memory() -> dict[str, tuple[str, float]]:
    """Gauges of the memory of this process, and of the first device."""
    found: dict[str, tuple[str, float]] = {}
    status = Path("/proc/self/status")
    if status.is_file():
        values = dict(line.split(":", 1) for line in status.read_text().splitlines())
        found["memory_bytes"] = "resident", float(values["VmRSS"].split()[0]) * 1024
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_in_use" in stats:
        found["device_memory_bytes"] = "in use on the first device", float(stats["bytes_in_use"])
    return found
