"""A process for each stack, which answers one request after the other.

JAX and PyTorch never share a process: each would keep threads and device memory from the other. A
request is one line of JSON on standard input, its answer one line on standard output; while a
process waits for the next, it uses no core.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence


class StackError(RuntimeError):
    """A stack could not do what it was asked for; the message is its traceback."""


class Worker:
    """A running stack: `worker(call, **arguments)` returns what the stack's function returns."""

    def __init__(self, name: str, arguments: Sequence[str], environment: Mapping[str, str]):
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
            start_new_session=True,
        )

    def __call__(self, call: str, **arguments) -> object:
        """Raises: StackError if the function raised or the process is gone."""
        try:
            self._process.stdin.write(json.dumps({"call": call, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise StackError(f"{self.name}: the process ended with {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise StackError(f"{self.name}, {call}: {answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """Ends the process once it has answered what it was asked."""
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self._process.stdin.close()
        self._process.wait()

    def kill(self) -> None:
        """Ends the process at once, and all that it has started."""
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            os.killpg(self._process.pid, signal.SIGKILL)


def serve(calls: Mapping[str, Callable]) -> None:
    """Answers requests from standard input until it is closed."""
    # Whatever a library prints goes to standard error, so that answers stay alone on their pipe.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": calls[request["call"]](**request["arguments"])}
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
