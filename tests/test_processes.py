"""Several processes of a run: none of them ends another, and all share out the same people."""

import os
import signal
import subprocess
import sys
import threading
import time

import chaos
import pytest

from idea_jax.runtime import devices

# What a process does once it has joined the others; `pause` is short, `work` is longer.
SCRIPT = """
import sys, time
from pathlib import Path
from idea_jax.runtime import devices

def pause(): time.sleep(0.2)

def work(): time.sleep(8)  # JAX's service takes about five to end the others

devices.GRACE = 600  # for a machine on which everything takes longer
with devices.joined():
    Path(sys.argv[1]).touch()
    {0}
    print("worked")
"""


@pytest.fixture
def start(tmp_path):
    """Starts one process for each task, which is a line of Python."""
    started = []

    def start(*tasks):
        environment = chaos.processes_of(len(tasks))
        for task, variables in zip(tasks, environment, strict=True):
            path = tmp_path / variables["JAX_PROCESS_ID"]
            command = [sys.executable, "-c", SCRIPT.format(task), str(path)]
            process = subprocess.Popen(
                command,
                env=os.environ | {"PYTHONPATH": str(chaos.ROOT)} | variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            started.append(process)
        return started

    yield start
    for process in started:
        chaos.end(process)


def ends_of(processes):
    """Exit code and output of each."""
    said = [process.communicate(timeout=chaos.PATIENCE)[0] for process in processes]
    return [process.returncode for process in processes], said


@pytest.mark.parametrize(
    ("first", "code"),
    [("pause()", 0), ("sys.exit(3)", 3), ("raise devices.DevicesError('no room')", 1)],
)
def test_process_0_outlives_the_others_however_it_ends(start, first, code):
    codes, said = ends_of(start(first, "work()"))
    assert codes == [code, 0], said
    assert "worked" in said[1]
    assert code != 1 or "process 0 ends: no room" in said[0]


def test_process_0_that_is_told_to_stop_lets_the_others_end(start, tmp_path):
    """While it waits for them, too."""
    processes = start("devices.await_others()", "work()")
    while not all((tmp_path / name).exists() for name in "01"):
        assert all(process.poll() is None for process in processes), ends_of(processes)
        time.sleep(0.01)
    processes[0].send_signal(signal.SIGTERM)
    codes, said = ends_of(processes)
    assert codes == [143, 0], said
    assert "worked" in said[1] and "worked" not in said[0]


def test_process_0_that_is_told_to_stop_does_not_wait_for_ever(start):
    codes, said = ends_of(start("devices.GRACE = 1; sys.exit(3)", "work()"))
    assert codes == [3, -signal.SIGABRT], said


def test_others_end_before_process_0_and_do_not_wait_for_it(start):
    codes, said = ends_of(start("work()", "pause()"))
    assert codes == [0, 0], said


def test_processes_that_see_other_people_are_refused(start):
    three = "devices.check_same(['anna', 'bert', 'carl'], 'people', 'flags')"
    codes, said = ends_of(start(three, three, three.replace("bert", "b\\udce9rt")))
    assert codes == [0, 0, 1], said
    assert "process 2 sees other people than process 0 (3 people, " in said[2]


def test_process_0_looks_after_the_others_while_it_waits(monkeypatch):
    looks, are_gone = [], threading.Event()

    def look():
        looks.append(time.monotonic())
        if len(looks) == 3:
            are_gone.set()

    monkeypatch.setattr(devices.jax, "process_count", lambda: 2)
    monkeypatch.setattr(devices, "watch_others", lambda: are_gone)
    monkeypatch.setattr(devices, "PULSE", 0.01)
    devices.await_others(meanwhile=look)
    assert len(looks) == 3
    are_gone.clear()
    devices.await_others(0.05)  # and no longer than it may


def test_one_process_has_nobody_to_wait_for():
    devices.await_others()
    devices.check_same(["anna"], "people", "flags")
