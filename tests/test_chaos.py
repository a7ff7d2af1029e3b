"""No run is ever lost: trainings of many people that are killed, and whose files are damaged."""

import random
import shutil
import signal
import time
from contextlib import contextmanager

import chaos
import numpy as np
import pytest

from idea_jax import jobs


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled programs, shared by all starts."""
    return tmp_path_factory.mktemp("cache")


def job(tmp_path, model, cache, people, *flags):
    root = tmp_path / "people"
    if not root.exists():
        chaos.write_people(root, people)

    def make(name):
        return chaos.Job(model, root, tmp_path / name, cache, *flags)

    return make


def test_killed_stopped_and_damaged_training_ends_as_the_undisturbed_one(
    smallest_checkpoint, tmp_path, cache
):
    """The short form of `make chaos`."""
    flags = "--max_train_steps 20 --checkpointing_steps 4 --identities_per_step 2"
    make = job(tmp_path, smallest_checkpoint, cache, 3, *flags.split())
    calm = make("calm")
    code, said = calm.run()
    assert code == 0, said
    expected = calm.results()
    assert len(set(expected.values())) == 3

    wild = make("wild")

    def is_saving_again():
        found = wild.checkpoints()
        return found and (wild.is_saving() or int(found[-1].name) > 4)

    # Killed while checkpoints are written, after the first ones are complete.
    assert wild.kill_when(is_saving_again) == -signal.SIGKILL
    assert not wild.results()
    chaos.flip_a_bit(wild.checkpoints()[-1], np.random.default_rng(0))
    since = time.time()
    code = wild.kill_when(
        lambda: any(path.stat().st_ctime > since for path in wild.checkpoints()), signal.SIGTERM
    )
    assert code == 143, wild.said()
    assert "the same command goes on" in wild.said()
    (wild.out / "person-00" / ".tmp-left-by-a-crash").write_text("half")
    code, said = wild.run()
    assert code == 0, said
    assert wild.results() == expected
    assert not list(wild.out.rglob(".tmp-*"))
    records = jobs.read(wild.out)
    assert [record.status for record in records] == ["done"] * 3
    assert records[0].attempts >= 2 and records[0].result == expected["person-00"]


@pytest.mark.chaos
def test_twelve_people_survive_everything(smallest_checkpoint, tmp_path, cache):
    seed = int(time.time())
    print(f"seed {seed}")
    rng = random.Random(seed)
    steps = 40
    flags = f"--max_train_steps {steps} --checkpointing_steps 5 --identities_per_step 4"
    make = job(tmp_path, smallest_checkpoint, cache, 12, *flags.split())
    calm = make("calm")
    started = []

    def has_begun():
        if calm.begun() and not started:
            started.append(time.monotonic())
        return False

    process, _ = calm.start_and_wait(has_begun)
    assert process.returncode == 0, calm.said()
    expected, length = calm.results(), time.monotonic() - started[0]
    assert len(set(expected.values())) == 12

    wild = make("wild")

    def check():
        assert wild.results().items() <= expected.items()

    def after(seconds):
        """True that long after somebody was begun."""
        before, since = wild.begun(), []

        def is_time():
            if not since and wild.begun() - before:
                since.append(time.monotonic())
            return bool(since) and time.monotonic() - since[0] > seconds

        return is_time

    def damage(how):
        """Damages the newest checkpoint of somebody who is not done."""
        done = {name for name, record in wild.records().items() if record.status == "done"}
        open_ones = [p for p in wild.checkpoints() if p.parent.parent.name not in done]
        if open_ones:
            how(open_ones[-1])

    kills = 0
    while kills < 10:
        during_a_save = kills % 3 == 2
        wait = after(rng.uniform(0, length / 6))
        is_time = (lambda w=wait: w() and wild.is_saving()) if during_a_save else wait
        code = wild.kill_when(is_time)
        check()
        if code is None:  # it came to the end: somebody's results are lost, and it goes on
            shutil.rmtree(wild.out / rng.choice(sorted(expected)))
            continue
        kills += 1
        if kills == 4:
            damage(lambda path: chaos.flip_a_bit(path, np.random.default_rng(seed)))
        if kills == 7:
            damage(chaos.cut)
    # Stopped politely.
    shutil.rmtree(wild.out / "person-11", ignore_errors=True)
    code = wild.kill_when(after(length / 12), signal.SIGTERM)
    assert code in (143, -signal.SIGTERM) and wild.seconds_to_stop < 30
    check()
    # Not so politely: the second signal ends it at once.
    code = wild.kill_when(after(length / 24), signal.SIGTERM, signal.SIGTERM)
    assert code in (143, -signal.SIGTERM, None) and wild.seconds_to_stop < 5
    check()
    # A disk that fills while checkpoints are written, or results: said, and nothing is lost.
    first = wild.out / "person-00"
    manifest, begun = wild.out / jobs.MANIFEST, first / jobs.RECORD

    def all_have_begun():
        return begun.exists() and manifest.stat().st_mtime_ns > begun.stat().st_mtime_ns

    for is_time, flags, kept_out in (
        ((first / "checkpoints").exists, (), "/checkpoints"),
        (all_have_begun, ("--checkpointing_steps", "0"), f"{first}:"),
    ):
        shutil.rmtree(first)
        code, said = wild.run_on_a_disk_that_fills(is_time, *flags)
        # Tensorstore may say that a loop, closed after the first failed write, was closed.
        assert code == 1 and f'File "{chaos.ROOT}' not in said, said
        assert "cannot write" in said and kept_out in said, said
        check()
        assert not (first / jobs.RESULT).exists()
    # Photos that vanish after everybody was counted.
    shutil.rmtree(wild.out / "person-11", ignore_errors=True)
    before = wild.begun()
    away, home = tmp_path / "away", wild.root / "person-11"

    def vanish():
        if not away.exists() and wild.begun() - before:
            home.rename(away)
        return False

    process, _ = wild.start_and_wait(vanish)
    if away.exists():
        away.rename(home)
    check()
    if process.returncode:
        assert process.returncode == 1 and "person-11" in wild.said()
    code, said = wild.run()
    assert code == 0, said
    assert wild.results() == expected
    assert {record.status for record in jobs.read(wild.out)} == {"done"}
    left = [p for p in wild.out.rglob("*") if ".tmp-" in p.name]
    assert not left


class Pair(chaos.Job):
    """Two processes with four simulated devices each."""

    @contextmanager
    def running(self):
        """Both, and a function that tells what they said; ends what is left of them."""
        processes, said = [], []
        try:
            for variables in chaos.processes_of(2):
                processes.append(self.start(**variables))
                said.append(self.errors)
            yield processes, lambda: "\n".join(p.read_text("utf-8", "replace") for p in said)
        finally:
            for process in processes:
                chaos.end(process)

    def run_both(self):
        with self.running() as (processes, said):
            assert [process.wait(chaos.PATIENCE) for process in processes] == [0, 0], said()

    def checkpoints_of(self, number):
        return [p for p in self.checkpoints() if int(p.parent.parent.name[-2:]) % 2 == number]


def wait_until(is_time, processes, said):
    """Waits for something that happens while all of these run."""
    deadline = time.monotonic() + chaos.PATIENCE
    while not is_time():
        assert all(process.poll() is None for process in processes), said()
        assert time.monotonic() < deadline, said()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def pair(smallest_checkpoint, tmp_path_factory, cache):
    """What makes a `Pair`, and what one process with as many devices learned of the same people."""
    tmp_path = tmp_path_factory.mktemp("pair")
    chaos.write_people(tmp_path / "people", 8)

    def make(kind, name, *flags):
        steps = "--max_train_steps 20 --checkpointing_steps 4".split()
        made = kind(
            smallest_checkpoint, tmp_path / "people", tmp_path / name, cache, *steps, *flags
        )
        made.environment["XLA_FLAGS"] = chaos.XLA.format(4)
        return made

    one = make(chaos.Job, "one", "--mesh", "identity=4")
    code, said = one.run()
    assert code == 0, said
    expected = one.results()
    assert len(set(expected.values())) == 8
    return lambda name: make(Pair, name, "--mesh", "identity=8", "--distributed"), expected


def test_two_processes_learn_what_one_does(pair):
    make, expected = pair
    two = make("two")
    two.run_both()
    assert two.results() == expected
    lines = [jobs.from_line(line) for line in (two.out / jobs.MANIFEST).read_text().splitlines()]
    assert [record.status for record in lines] == ["done"] * 8


@pytest.mark.chaos
def test_one_of_two_processes_is_killed(pair):
    """The other one finishes its people; told to stop, it does not wait for the dead one."""
    make, expected = pair
    two = make("killed")
    with two.running() as (processes, said):
        wait_until(lambda: two.checkpoints_of(1), processes, said)
        processes[1].kill()
        wait_until(lambda: len(two.results()) >= 4, processes[:1], said)
        processes[0].send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert processes[0].wait(chaos.PATIENCE) == 143, said()
        assert time.monotonic() - started < 30
    assert two.results().items() <= expected.items()
    two.run_both()
    assert two.results() == expected


@pytest.mark.chaos
def test_two_processes_are_stopped_in_order(pair):
    """Process 0 waits for one that is late: for its people, and for its last checkpoints."""
    make, expected = pair
    two = make("stopped")
    with two.running() as (processes, said):
        wait_until(lambda: two.checkpoints_of(1), processes, said)
        processes[1].send_signal(signal.SIGSTOP)
        wait_until(lambda: len(two.results()) >= 4, processes, said)
        time.sleep(2)
        for process in processes:
            assert process.poll() is None, said()
            process.send_signal(signal.SIGTERM)
        time.sleep(8)  # JAX would have ended process 1 by now, had process 0 gone
        assert processes[0].poll() is None, said()
        processes[1].send_signal(signal.SIGCONT)
        assert [process.wait(chaos.PATIENCE) for process in processes] == [143, 143], said()
    assert two.results().items() <= expected.items()
    assert {r.status for r in jobs.read(two.out) if r.person not in two.results()} == {"waiting"}
    two.run_both()
    assert two.results() == expected
