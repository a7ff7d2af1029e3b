"""Times rows of many people and prompts in shared calls, beside a prompt a call; prints JSON lines.

    python -m benchmarks.rows

The people are faces drawn at random, as the mini's shared ID-Enhancer predicts them.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any


def measured(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Medians of the seconds of each way, taken in turns: by the clock, and of all cores."""
    times: dict[str, list] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            started, busy = time.perf_counter(), time.process_time()
            way()
            if turn:  # the first compiles
                times[name].append((time.perf_counter() - started, time.process_time() - busy))
    return {
        name: {
            "seconds": statistics.median(wall for wall, _ in own),
            "cpu_seconds": statistics.median(cpu for _, cpu in own),
            "fastest": min(wall for wall, _ in own),
        }
        for name, own in times.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rows", description=__doc__)
    parser.add_argument("--people", type=int, default=16, help="each is drawn with four prompts")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps")
    parser.add_argument("--batch_size", type=int, default=8, help="rows of a device in a call")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each")
    args = parser.parse_args(argv)
    # Only now, so that --help waits for nothing.
    import numpy as np

    from benchmarks import row_ways
    from idea_jax.models import hub
    from idea_jax.runtime import devices

    devices.use_cores(hub.local_folder("mini"))
    artists = {each: row_ways.open_engine(args.people, each) for each in (1, args.batch_size)}
    rows = row_ways.rows_of(artists[1], args.people, args.steps)
    for chosen in (rows, rows[:1]):
        ways = {"a prompt a call": lambda own=chosen: row_ways.a_prompt_a_call(artists[1], own)}
        for each, artist in artists.items():
            if len(chosen) > 1 or each == 1:
                ways[f"engine, {each} rows a device"] = lambda own=chosen, artist=artist: (
                    row_ways.in_shared_calls(artist, own)
                )
        first, *others = [np.stack(way()).astype(int) for way in ways.values()]
        told = {"rows": len(chosen), "devices": len(artists[1].devices)}
        told["largest_difference"] = max(int(np.abs(first - other).max()) for other in others)
        print(json.dumps(told | measured(ways, args.repeats)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
