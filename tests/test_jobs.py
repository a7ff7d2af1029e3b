"""A run for many people: records, what is left to do, and people who fail beside others."""

import gc
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import weakref

import chaos
import pytest

import idea_jax
import train_jax
from idea_jax import jobs
from idea_jax.runtime import devices, versions
from idea_jax.runtime.files import WriteError
from idea_jax.training import group, many

TWO = "--max_train_steps 2 --train_batch_size 1 --report_to none --profile cross_init".split()
IN_PAIRS = [*TWO, "--identities_per_step", "2", "--mesh", "identity=1,data=1"]


@pytest.fixture
def run(smallest_checkpoint, tmp_path):
    def command(root, out, *flags):
        about = ["--pretrained_model_name_or_path", smallest_checkpoint, "--train_data_dir", root]
        return train_jax.main([str(x) for x in (*about, "--output_dir", out, *IN_PAIRS, *flags)])

    return command


def digests(out):
    files = out.glob(f"*/{jobs.RESULT}")
    return {path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_people_who_fail_are_taken_out_and_the_rest_is_as_without_them(
    run, tmp_path, monkeypatch, capsys, caplog
):
    caplog.set_level("INFO")
    root, out = tmp_path / "root", tmp_path / "out"
    chaos.write_people(root, 4)
    photos_of_one = sorted((root / "person-01").glob("*.png"))
    good = [path.read_bytes() for path in photos_of_one]
    # In other company, in other places, with fewer pictures beside them, and one place empty.
    chaos.write_people(tmp_path / "others", 3)
    assert run(tmp_path / "others", tmp_path / "calm") == 0
    expected = digests(tmp_path / "calm")

    for path, whole in zip(photos_of_one, good, strict=True):
        path.write_bytes(whole[:60])
    begin, broken, followed = many.begin, [], []

    def begin_with_a_fault(work, person, *rest):
        learner = begin(work, person, *rest)
        if person.name == "person-02" and not broken:
            broken.append(person.name)
            followed.append(weakref.ref(learner))
            photos = learner.photos
            learner.photos = photos._replace(mean=photos.mean * float("nan"))
        return learner

    monkeypatch.setattr(many, "begin", begin_with_a_fault)
    capsys.readouterr()
    gc.disable()
    try:
        assert run(root, out) == 1
        assert followed[0]() is None, "who failed is kept, with the arrays of their group"
    finally:
        gc.enable()
    message = capsys.readouterr().err
    assert message.count("error: ") == 1 and "1 of 4 people failed" in message
    assert "person-01: " in message and "0.png" in message
    assert "person-02 is taken out: step 1: loss nan" in caplog.text
    got = digests(out)
    assert sorted(got) == ["person-00", "person-02", "person-03"]
    assert got["person-00"] == expected["person-00"]
    assert got["person-02"] == expected["person-02"]  # the second time alone
    records = {record.person: record for record in jobs.read(out)}
    assert [records[f"person-0{n}"].attempts for n in range(4)] == [1, 2, 2, 1]
    assert records["person-01"].status == "failed" and "0.png" in records["person-01"].why
    assert records["person-03"].result == got["person-03"] and records["person-03"].steps == 2

    # The same command again does what is left, and nothing else.
    caplog.clear()
    before = (out / "person-00" / jobs.RESULT).stat().st_mtime_ns
    for path, whole in zip(photos_of_one, good, strict=True):
        path.write_bytes(whole)
    assert run(root, out) == 0
    assert "4 people, 3 of them done" in caplog.text
    assert digests(out)["person-01"] == expected["person-01"]
    assert (out / "person-00" / jobs.RESULT).stat().st_mtime_ns == before
    assert {record.status for record in jobs.read(out)} == {"done"}
    capsys.readouterr()
    assert jobs.main([str(out)]) == 0
    assert "4 people: 0 waiting, 0 running, 4 done, 0 failed" in capsys.readouterr().out

    # A result that was changed is made again; other settings are refused.
    (out / "person-00" / jobs.RESULT).write_bytes(b"changed")
    assert run(root, out) == 0
    assert "is gone or was changed" in caplog.text
    assert digests(out)["person-00"] == expected["person-00"]
    assert run(root, out, "--learning_rate", "0.5") == 1
    assert "was trained with other settings" in capsys.readouterr().err
    assert run(root, out, "--max_train_steps", "1") == 1
    assert "was trained for 2 steps; --max_train_steps may only grow" in capsys.readouterr().err
    assert digests(out) == {**got, "person-01": expected["person-01"]}


def test_people_without_usable_photos_and_people_who_are_gone_are_not_forgotten(
    run, tmp_path, capsys
):
    root, out = tmp_path / "root", tmp_path / "out"
    chaos.write_people(root, 2)
    (root / "person-01" / "0.png").rename(tmp_path / "0.png")
    (root / "person-01" / "1.png").rename(root / "person-01" / "phone.tiff")
    (root / "person-02").mkdir()
    (root / "person-02" / "notes.txt").write_text("x")

    def records():
        return {record.person: record for record in jobs.read(out)}

    assert run(root, out) == 1
    message = capsys.readouterr().err
    assert "2 of 3 people failed" in message and "found phone.tiff (suffix .tiff)" in message
    assert sorted(digests(out)) == ["person-00"]
    assert {r.person: (r.status, r.attempts) for r in records().values()} == {
        "person-00": ("done", 1),
        "person-01": ("failed", 2),
        "person-02": ("failed", 2),
    }
    before = records()
    # Nobody was trained whom other settings could touch, but they would mix with these ones.
    assert run(root, out, "--seed", "7", "--identities", "1:2") == 1
    assert "was trained with other settings" in capsys.readouterr().err
    assert records() == before
    # A choice of people keeps the others' lines.
    assert run(root, out, "--identities", "0:1") == 0
    assert records() == before
    # Of everybody, those who are gone are missed, unless they are done.
    shutil.rmtree(root / "person-00")
    shutil.rmtree(root / "person-02")
    (tmp_path / "0.png").rename(root / "person-01" / "0.png")
    capsys.readouterr()
    assert run(root, out) == 1
    message = capsys.readouterr().err
    assert "1 of 2 people failed" in message and "person-02: photos are gone" in message
    assert {r.person: r.status for r in records().values()} == {
        "person-00": "done",
        "person-01": "done",
        "person-02": "failed",
    }


def test_whose_photos_are_others_now_is_not_taken_for_done_nor_replaced(
    run, tmp_path, capsys, caplog
):
    root, out = tmp_path / "root", tmp_path / "out"
    chaos.write_people(root, 2)
    chaos.write_people(tmp_path / "others", 5)
    assert run(root, out) == 0
    before, kept = digests(out), tmp_path / "first.png"
    (root / "person-00" / "0.png").rename(kept)
    shutil.copy(tmp_path / "others" / "person-04" / "0.png", root / "person-00" / "photo-x.png")
    # More steps, which without checkpoints begin with the other photos; and as many as before.
    for flags, count in ((["--max_train_steps", "3", "--identities", "0:1"], 1), ([], 2)):
        caplog.clear()
        assert run(root, out, *flags) == 1
        said = capsys.readouterr().err
        failed = f"1 of {count} people failed"
        for phrase in (failed, str(out / "person-00"), str(root), "photos back"):
            assert phrase in said
        assert "photo-x" not in said + caplog.text + (out / jobs.MANIFEST).read_text()
        assert digests(out) == before
    # Who has the first photos again, under whatever name, is done.
    (root / "person-00" / "photo-x.png").unlink()
    kept.rename(root / "person-00" / "renamed.png")
    written = (out / "person-00" / jobs.RESULT).stat().st_mtime_ns
    assert run(root, out) == 0
    assert (out / "person-00" / jobs.RESULT).stat().st_mtime_ns == written
    assert {r.person: (r.status, r.why) for r in jobs.read(out)} == {
        "person-00": ("done", None),
        "person-01": ("done", None),
    }
    # Once the folder is gone the other person is learned.
    shutil.rmtree(out / "person-00")
    shutil.copy(tmp_path / "others" / "person-04" / "0.png", root / "person-00" / "renamed.png")
    assert run(root, out) == 0
    assert digests(out)["person-00"] != before["person-00"]


def test_other_settings_are_refused_before_anybody_is_done(run, tmp_path, capsys, monkeypatch):
    root, out = tmp_path / "root", tmp_path / "out"
    chaos.write_people(root, 3)

    def train_together(work, learners, finish):
        return signal.SIGTERM  # before anybody is done

    with monkeypatch.context() as patch:
        patch.setattr(group, "train_together", train_together)
        assert run(root, out) == 143
    before = (out / jobs.MANIFEST).read_text()
    with monkeypatch.context() as patch:
        patch.setattr(versions, "versions", lambda: {"idea_jax": "99.0"})
        assert run(root, out, "--seed", "7") == 1
    said = capsys.readouterr().err
    assert "person-00 was trained with other settings or weights than these (seed: 0 -> 7" in said
    assert f"; it was written with idea_jax {idea_jax.__version__} (now 99.0))" in said
    (out / jobs.SETTINGS).write_text("{")  # then it is not known what they were
    assert run(root, out, "--seed", "7") == 1
    assert "other settings or weights than these; use" in capsys.readouterr().err
    assert (out / jobs.MANIFEST).read_text() == before and not digests(out)
    shutil.rmtree(root / "person-02")  # who was not begun yet
    assert run(root, out) == 1
    assert "1 of 3 people failed" in (said := capsys.readouterr().err)
    assert "person-02: photos are gone" in said and len(digests(out)) == 2


HOLD = """
import pathlib, sys, time
from idea_jax import jobs
with jobs.only_run(pathlib.Path(sys.argv[1]), 0):
    print("held", flush=True)
    time.sleep(600)
"""


def test_second_run_in_a_folder_is_refused_until_the_first_one_ends_or_is_killed(
    run, tmp_path, capsys
):
    root, out = tmp_path / "root", tmp_path / "out"
    chaos.write_people(root, 2)
    command = [sys.executable, "-c", HOLD, str(out)]
    first = subprocess.Popen(command, cwd=chaos.ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "held\n"
        for given in ([root, out], [root / "person-00", out, "--identities_per_step", "1"]):
            assert run(*given) == 1
            assert f"another run is using {out}" in capsys.readouterr().err
        assert [path.name for path in out.iterdir()] == [".lock-0"]
        with jobs.only_run(out, 1):  # another process of the same run
            pass
    finally:
        chaos.end(first)
    with jobs.only_run(out, 0):
        pass
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(WriteError, match="cannot write"), jobs.only_run(tmp_path / "file", 0):
        pass


def record(person, status="done", **about):
    return jobs.Record(person, status, **about)


def test_board_keeps_what_is_known_and_starts_over_where_it_is_damaged(tmp_path, caplog):
    names = ["anna", "b\udce9rt", "carl"]
    board = jobs.Board(tmp_path, names, names[:2], is_first=True)
    board.plan(names[:2], "settings")
    board.note(names[:2], status="done", steps=3, result="no such file", ended=1.0)
    other = jobs.Board(tmp_path, names, names[2:], is_first=False)
    other.note(["carl"], status="failed", why="no photo", ended=2.0)
    board.publish()
    found = jobs.read(tmp_path)
    assert [(r.person, r.status) for r in found] == [
        ("anna", "done"),
        ("b\udce9rt", "done"),
        ("carl", "failed"),
    ]
    assert not list(tmp_path.rglob(".tmp-*"))
    again = jobs.Board(tmp_path, names, names, is_first=True)
    assert again.records == {r.person: r for r in found}
    assert not again.is_done("anna", 4)  # more steps are asked for
    assert not again.is_done("anna", 3)
    assert "is gone or was changed" in caplog.text
    for damaged in ("", "{", "[]", '{"person": "anna", "status": "dome"}', '{"person": 3}'):
        (tmp_path / "anna" / jobs.RECORD).write_text(damaged)
        caplog.clear()
        assert jobs.Board(tmp_path, names, names, is_first=True).records["anna"].status == "waiting"
        assert "cannot be used" in caplog.text


def test_status_looks_into_the_records_where_more_has_happened_than_the_manifest_says(tmp_path):
    before = {"failed": "waiting", "done": "running", "running": "waiting", "waiting": "waiting"}
    lines = [record(name, status, attempts=1) for name, status in before.items()]
    (tmp_path / jobs.MANIFEST).write_text("".join(jobs.to_line(line) + "\n" for line in lines))
    # Of the last one only the plan to train further is newer than their record.
    attempts = {"failed": 2, "done": 1, "running": 3, "waiting": 1}
    for name, count in attempts.items():
        status = "done" if name == "waiting" else name
        (tmp_path / name).mkdir()
        own = jobs.to_line(record(name, status, attempts=count))
        (tmp_path / name / jobs.RECORD).write_text(own)
    assert [r.status for r in jobs.read(tmp_path)] == list(before)
    (tmp_path / "done" / jobs.RECORD).write_text("{")
    assert jobs.read(tmp_path)[1] == lines[1]


def test_status_says_how_fast_it_goes_and_what_went_wrong(tmp_path, capsys, caplog):
    times = [(900.0, 900.0), (900.0, 900.0), (1800.0, 900.0), (1800.0, 920.0), (3600.0, 1800.0)]
    records = [record(f"p{n}", ended=end, seconds=took) for n, (end, took) in enumerate(times)]
    assert jobs.people_per_hour(records) == pytest.approx(5.0)
    records += [record("q", "waiting"), record("r", "running", attempts=2)]
    records.append(record("s", "failed", why="no face found", attempts=2, ended=5.0))
    said = jobs.summary(records, now=3660.0)
    assert said.splitlines() == [
        "8 people: 1 waiting, 1 running, 5 done, 1 failed",
        "5.0 people/hour, about 24 min 00 s left, the newest result is 1 min 00 s old",
        "running r (attempt 2)",
        "failed s (attempt 2): no face found",
    ]
    lines = [jobs.to_line(r) for r in records]
    (tmp_path / jobs.MANIFEST).write_text("\n".join([*lines[:3], lines[3][:20], *lines[4:]]))
    assert jobs.main([str(tmp_path)]) == 0
    assert "7 people: " in capsys.readouterr().out and "line 4" in caplog.text
    assert jobs.main([str(tmp_path / "none")]) == 1
    assert "no jobs.jsonl in" in capsys.readouterr().err
    assert json.loads(lines[0])["ended"] == 900.0 and jobs.duration(7260) == "2 h 01 min"
    assert time.time() > jobs.from_line(lines[0]).ended


def test_speed_is_that_of_the_time_in_which_somebody_was_trained():
    def group(ended, seconds, size=8):
        return [record(f"{ended} {n}", ended=ended, seconds=seconds + 0.2 * n) for n in range(size)]

    assert jobs.people_per_hour([]) is None
    one = group(100.0, 99.0)  # one group of eight in 100 seconds, however fast they are written
    assert jobs.people_per_hour(one) == pytest.approx(8 * 36, rel=0.01)
    long = [r for n in range(100) for r in group(100.0 * n, 100.0, size=64)]
    assert jobs.people_per_hour(long) == pytest.approx(64 * 36, rel=0.01)
    pause = [*one, *group(90_000.0, 99.0)]
    assert jobs.people_per_hour(pause) == pytest.approx(8 * 36, rel=0.01)
    beside = [*one, *group(101.0, 99.0)]  # of another process
    assert jobs.people_per_hour(beside) == pytest.approx(16 * 36, rel=0.02)


@pytest.mark.parametrize(
    ("asked", "together", "people", "batch", "mesh", "places"),
    [
        (None, None, 20, 8, (8, 1), 8),
        (None, None, 3, 8, (3, 1), 3),
        (None, 4, 20, 8, (4, 1), 4),
        (None, 12, 20, 8, (6, 1), 12),
        (None, None, 1, 4, (1, 4), 1),
        (None, None, 1, 5, (1, 5), 1),
        (None, None, 1, 12, (1, 6), 1),
        (None, None, 1, 11, (1, 1), 1),
        ({"identity": 2, "data": 4}, 6, 20, 8, (2, 4), 6),
    ],
)
def test_devices_are_laid_out(asked, together, people, batch, mesh, places):
    layout = devices.layout(asked, together, people, batch)
    assert tuple(layout.mesh.shape.values()) == mesh and layout.places == places


@pytest.mark.parametrize(
    ("asked", "together", "batch", "says"),
    [
        ({"identity": 4, "data": 4}, None, 8, "needs 16 devices"),
        ({"identity": 2, "data": 4}, None, 6, "cannot divide the 6 samples"),
        ({"identity": 4, "data": 1}, 6, 8, "no multiple of --mesh identity=4"),
    ],
)
def test_devices_that_do_not_fit_are_named(asked, together, batch, says):
    with pytest.raises(devices.DevicesError, match=says):
        devices.layout(asked, together, 20, batch)


CORES = """
import os, resource, sys
from pathlib import Path
os.sched_getaffinity = lambda process: set(range(int(sys.argv[2])))
from idea_jax.runtime import devices
devices.use_cores(Path(sys.argv[1]))
devices.check_backend()
import jax
import jax.numpy as jnp
print(jax.device_count())
devices.use_cores(Path(sys.argv[1]))  # too late, and no error

@jax.jit
def large(x):  # 144 MiB within a call, and none of them returned
    rows = x.reshape(-1, 2) @ x.reshape(2, -1)
    return rows @ x[: len(rows)]

def is_handed_out_anew(work):
    def pages():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        work()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return 2 * min(pages() for _ in range(3)) > 2**27 // resource.getpagesize()

x = jnp.ones(2**13 + 2**12)
print(is_handed_out_anew(lambda: bytes([1]) * 2**27))
print(is_handed_out_anew(lambda: large(x).block_until_ready()))
"""


@pytest.mark.parametrize(
    "size, cores, variables, count",
    [
        (2**20, 3, {}, 3),
        (2**20, 99, {}, devices.CORES),
        (2**31, 3, {}, 1),  # of a model of this size one copy is enough
        (0, 3, {}, 1),  # a name on the Hub
        (2**20, 3, {"JAX_NUM_CPU_DEVICES": "2"}, 2),
        (2**20, 3, {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}, 4),
    ],
)
def test_each_core_is_a_device_for_a_small_model_and_the_memory_of_a_large_one_is_kept(
    tmp_path, size, cores, variables, count
):
    if size:
        (tmp_path / "unet").mkdir()
        with open(tmp_path / "unet" / "model.safetensors", "wb") as file:
            file.truncate(size)  # without taking any room
    ours = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    others = {k: v for k, v in os.environ.items() if k not in ours}
    command = [sys.executable, "-c", CORES, str(tmp_path), str(cores)]
    environment = {**others, **variables, "PYTHONPATH": str(chaos.ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    is_glibc = platform.libc_ver()[0] == "glibc"
    kept = [is_glibc and size > 0, is_glibc and size == 2**31]
    assert done.stdout.split() == [str(count), *(str(not each) for each in kept)]


def test_mesh_of_several_processes_is_cut_into_equal_parts(monkeypatch):
    monkeypatch.setattr(devices.jax, "process_count", lambda: 2)
    monkeypatch.setattr(devices.jax, "process_index", lambda: 1)
    layout = devices.layout({"identity": 4, "data": 2}, 8, 20, 8)
    assert dict(layout.mesh.shape) == {"identity": 2, "data": 2} and layout.places == 4
    assert devices.own_share(list("abcde")) == ["b", "d"]
    with pytest.raises(devices.DevicesError, match="cannot be divided over 2 processes"):
        devices.layout({"identity": 3, "data": 2}, None, 20, 8)
