"""The benchmark: what it makes of measurements, and that all stacks compute the same."""

import contextlib
import dataclasses
import inspect
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import (
    enhancer,
    identities,
    jobs,
    networks,
    options,
    picture,
    plans,
    products,
    profiling,
    quality,
    report,
    settings,
    stack_jax,
    stack_torch,
    summary,
    torch_job,
    workloads,
)
from benchmarks import machine as host
from benchmarks.settings import JOBS, WORKLOADS
from benchmarks.worker import StackError, Worker
from idea_jax.config import reading
from idea_jax.config.reading import build
from idea_jax.config.settings import SampleConfig, TrainConfig
from idea_jax.enhancer.step import Recipe, make_optimizer
from idea_jax.method import loss, shared
from idea_jax.models import hub, sd
from idea_jax.plan import work
from idea_jax.plan.settings import PlanConfig
from idea_jax.runtime import memory

ROOT = Path(__file__).resolve().parent.parent


def measured(**stacks):
    measurements = report.Measurements()
    for name, values in stacks.items():
        for index, value in enumerate(values):
            measurements.add("a step", name, value, "ms", is_first=index == 0)
    return measurements.summary()


def result_of(device="cpu", **parts):
    """A result of the mini on a quiet machine, with the parts that a test is about."""
    machine = {"cpu": "x", "cores": 2, "busy": 0, "python": "3", "versions": {}}
    return {"workload": "mini", "device": device, "machine": machine, "sizes": {}} | parts


def test_first_call_is_kept_apart_and_spread_is_relative_to_the_median():
    (row,) = measured(jax=[900, 10, 14, 12]).values()
    assert row["stacks"]["jax"] == {
        "min": 10,
        "median": 12,
        "spread": 4 / 12,
        "first": 900,
        "count": 3,
    }


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ({"loss": 1e-7, "tokens": 0.5}, "losses differ by at most 1.0e-07, cosine of the token"),
        ({"pictures": 1e-6}, "Compared before timing, eager: pictures differ by 1.0e-06"),
    ],
)
def test_report_of_one_part_tells_what_was_compared_in_it(found, told):
    assert told in report.markdown(result_of(compared={"eager": found}))


def test_ratio_within_the_spread_is_called_equal():
    steady = measured(jax=[0, 10, 10.1], eager=[0, 20, 20.1])["a step"]["stacks"]
    assert report.ratio(steady["jax"], steady["eager"]) == (2.0, True)
    noisy = measured(jax=[0, 10, 14], eager=[0, 11, 15])["a step"]["stacks"]
    assert report.ratio(noisy["jax"], noisy["eager"]) == (1.1, False)


def test_ratio_of_single_measurements_is_told_as_such():
    told = report.markdown(result_of(times=measured(jax=[0, 10], eager=[0, 20])))
    assert "| 2.00 x (of one measurement) |" in told


def test_report_holds_every_stack_with_its_ratio(tmp_path):
    result = result_of(
        sizes={"batch": 8},
        ceilings={"jax": 1e11},
        compared={"eager": {"loss": 1e-7, "tokens": 1.0, "pictures": 1e-6}},
        times=measured(jax=[0, 10, 10.2], eager=[0, 20, 20.1], compiled=[0, 10.2, 10.1]),
    )
    report.write(tmp_path, "mini-cpu", result)
    table = (tmp_path / "mini-cpu.md").read_text()
    assert "| a step | eager | 20 ms | 20.05 ms | 0% | 0 ms | 2.00 x |" in table
    assert "| a step | compiled | 10.1 ms | 10.15 ms | 1% | 0 ms | 1.01 x (equal" in table
    assert "busy" not in table
    result["machine"]["busy"] = 0.25
    assert "The machine was busy" in report.markdown(result)
    result["machine"]["busy"] = 0
    assert json.loads((tmp_path / "mini-cpu.json").read_text()) == result
    assert (tmp_path / "mini-cpu.svg").read_text().count("<rect") == 4


def test_report_says_what_was_left_out_and_takes_the_highest_ceiling_for_the_floor(tmp_path):
    result = result_of(
        device="gpu",
        ceilings={"jax": 1e12, "eager": 2e12},
        failed={"compiled": "Traceback\n  ...\nOutOfMemoryError: too much\n"},
        times={"train step, paper": measured(jax=[0, 10, 10])["a step"]},
        flops={"train_step": 4e9},
    )
    told = report.markdown(result)
    assert "**Left out, compiled: OutOfMemoryError: too much**" in told
    assert "makes 2 ms the floor" in told and "of which the floor is 20%" in told
    result["times"] = {"train step, paper": measured(eager=[0, 10, 10])["a step"]}
    assert "makes 2 ms the floor" in report.markdown(result)
    result["sizes"] = {"pictures": 16, "steps": 50}
    result["flops"]["sampling"] = 2e12
    drawings = plans.sampling(["jax"], WORKLOADS["mini", "cpu"])
    result["times"] |= {what: measured(jax=[0, 4000])["a step"] for what in drawings}
    told = report.markdown(result)
    assert "A drawing of 16 needs 2000.0 GF" in told and "makes 1e+03 ms the floor" in told
    assert "The drawing of 16 takes 4000 ms, of which the floor is 25%" in told


def test_whole_jobs_are_reported_with_their_first_and_what_is_inside_without(tmp_path):
    result = result_of(
        inside={"people in one step: 1": measured(jax=[900, 10])["a step"]},
        jobs={"both": measured(jax=[700, 20])["a step"]},
    )
    told = report.markdown(result)
    assert "| both | jax | 20 ms | 20 ms | 0% | 700 ms |  |" in told
    assert "| people in one step: 1 | jax | 10 ms | 10 ms | 0% |  |" in told
    rows = [line for line in told.splitlines() if line.startswith("|")]
    for header, rule, *row in (rows[:3], rows[3:]):
        assert {line.count("|") for line in (header, rule, *row)} == {header.count("|")}


def test_what_a_measure_saves_is_told_against_what_differs_in_it_alone():
    args = options.parse(["--device", "gpu", "--ablations", "bfloat16", "moments"])
    (row,) = plans.ablations(WORKLOADS["mini", "gpu"], args).values()
    assert list(row) == ["best", "calls", "moments", "flash", "bfloat16"]
    result = result_of(
        device="gpu",
        inside=measured(
            best=[0, 10, 10], calls=[0, 11, 11], flash=[0, 20, 20], bfloat16=[0, 60, 60]
        ),
    )
    told = report.markdown(result)
    assert "| best | 10 ms | 10 ms | 0% |  |" in told
    assert "| calls | 11 ms | 11 ms | 0% | against best: 1.10 x |" in told
    assert "| bfloat16 | 60 ms | 60 ms | 0% | against flash: 3.00 x |" in told


def test_machine_is_busy_by_what_others_compute_now_on_the_cores_of_this_process(
    tmp_path, monkeypatch
):
    stat, one = tmp_path / "stat", "cpu2 0 0 0 500 0 0 0 0 0 0\nintr 7\n"
    stat.write_text(f"cpu 9 9 9 9 9 9 9 9 9 9\ncpu0 100 0 50 800 40 5 5 0 70 0\ncpu1 1\n{one}")
    after, other = "cpu0 130 10 50 1100 60 5 25 20 90 0", "cpu2 10 0 0 890 0 0 0 0 0 0\nintr 7\n"

    def others_compute(seconds):
        assert seconds == 2
        # Of cpu1, which this process may not use, and of all cores nothing is read.
        stat.write_text(f"cpu 99 9 9 9 9 9 9 9 9 9\n{after}\ncpu1 9\n{other}")

    monkeypatch.setattr(time, "sleep", others_compute)
    monkeypatch.setattr(host, "cores", lambda: {0, 2})
    assert host.busy_share(stat=stat) == pytest.approx((80 + 10) / (400 + 400))
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 9, 9))
    assert host.busy_share(stat=tmp_path / "none") == 0.25


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--ablations flash", "--ablations flash: not measured with --workload mini --device cpu"),
        ("--workload sd21 --parts train people", "--parts people: not measured with"),
        ("--workload sd21 --ablations cores", "--ablations is for --parts ablations"),
        ("--parts train --people 2", "--people is for --parts people"),
        ("--stacks jax eager --torch_compile default", "is for --stacks compiled"),
        ("--stacks jax --patience 1 1", "--patience is for PyTorch's --stacks"),
        ("--parts kernels --patience 1 1", "--patience is for PyTorch's --stacks in --parts train"),
        ("--parts people --jobs 1 --patience 1 1", "--patience is for PyTorch's --stacks"),
        ("--patience nan -1", "expected a number of seconds above 0, got 'nan'"),
        ("--patience 1 -1", "expected a number of seconds above 0, got '-1'"),
        ("--patience inf 1", "expected a number of seconds above 0, got 'inf'"),
        ("--parts people --torch_compile default", "--torch_compile is for --stacks compiled"),
        ("--stacks jax published --parts sampling", "--stacks published: not measured with"),
        ("--stacks jax eager --parts kernels", "--stacks eager: not measured with --parts kernels"),
        ("--parts kernels --repeats 3", "--repeats is for --parts train, sampling, people and"),
        ("--repeats 0", "expected a whole number from 1 on, got '0'"),
        ("--name ../mini-cpu", "--name must be letters, digits, underscores, dots"),
        ("--stacks eager", "--stacks must hold jax"),
    ],
)
def test_flag_that_nothing_would_read_is_refused(flags, told, capsys):
    with pytest.raises(SystemExit):
        options.parse(flags.split())
    assert told in " ".join(capsys.readouterr().err.split())


def test_parts_are_those_that_a_workload_can_measure_and_reports_stay_out_of_the_documentation():
    args = options.parse([])
    assert tuple(args.parts) == options.PARTS and args.out == "outputs/benchmarks"
    assert args.ablations == ["cores", "moments", "trainables"]
    assert options.parse(["--workload", "sd21"]).parts == ("train", "sampling")
    assert options.parse(["--device", "gpu"]).ablations == list(settings.ABLATIONS["gpu"])
    assert options.parse(["--parts", "kernels"]).parts == ["kernels"]


def test_stacks_are_those_that_the_parts_measure():
    for flags, stacks in {
        "": ["jax", "published", "eager", "compiled"],
        "--parts sampling": ["jax", "eager", "compiled"],
        "--parts kernels": ["jax"],
        "--parts kernels --jobs 1 --torch_compile default": ["jax", "eager", "compiled"],
        "--parts people --repeats 3": ["jax"],
        "--parts train --patience 1 0.5 --stacks jax eager": ["jax", "eager"],
    }.items():
        assert options.parse(flags.split()).stacks == stacks


def test_all_stacks_use_one_gpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert host.environment("gpu")["CUDA_VISIBLE_DEVICES"] == "0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert host.environment("gpu")["CUDA_VISIBLE_DEVICES"] == "3"


def test_all_stacks_ask_for_the_same_pages_on_a_cpu(monkeypatch):
    for wish, expected in (("a=1:b=1", {"GLIBC_TUNABLES": "a=1:b=1"}), (None, {})):
        monkeypatch.setattr(memory, "wish_for_huge_pages", lambda wish=wish: wish)
        assert host.environment("cpu") == {"JAX_PLATFORMS": "cpu"} | expected
        assert "GLIBC_TUNABLES" not in host.environment("gpu")


def test_jobs_keep_their_programs_whatever_the_shell_says(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
    (tmp_path / "workload.json").write_text('{"name": "tiny", "checkpoint": "none"}')
    look = "import os; assert 'JAX_ENABLE_COMPILATION_CACHE' not in os.environ"
    monkeypatch.setattr(jobs, "commands", lambda *_: [[sys.executable, "-c", look]] * 3)
    failed = {}
    jobs.measure(tmp_path, "cpu", ["jax"], 1, "default", {}, failed)
    assert not failed


def test_without_torch_only_this_project_is_measured(monkeypatch, capsys):
    def version(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", version)
    assert options.parse(["--stacks", "jax"]).stacks == ["jax"]
    assert host.installed(["torch"]) == {}
    with pytest.raises(SystemExit):
        options.parse([])
    assert "need torch and diffusers, which are not installed" in capsys.readouterr().err


def test_inputs_of_another_workload_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(host, "busy_share", lambda: 0.0)
    workload = WORKLOADS["tiny", "cpu"]
    about = {"name": "tiny", "folder": str(tmp_path), "batch": 2, "pictures": 2}
    about |= {"dtype": "float32", "more": 1}
    (tmp_path / "workload.json").write_text(json.dumps(about))
    assert command.prepare(workload, "cpu", tmp_path)["dtype"] == "float32"
    for key, value in {"name": "mid", "batch": 8, "pictures": 4, "dtype": "bfloat16"}.items():
        (tmp_path / "workload.json").write_text(json.dumps(about | {key: value}))
        with pytest.raises(command.InputsError, match=f"{key}': '?{value}.*expected .*delete"):
            command.prepare(workload, "cpu", tmp_path)
    flags = ["--workload", "tiny", "--inputs", str(tmp_path), "--out", str(tmp_path / "out")]
    assert command.main([*flags, "--stacks", "jax"]) == 1
    assert "holds the inputs of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["train", "people", "ablations", "kernels", "convolutions"])
def test_run_without_a_result_of_this_project_leaves_the_report_of_another(
    tmp_path, monkeypatch, capsys, part
):
    monkeypatch.setattr(host, "busy_share", lambda: 0.0)
    monkeypatch.setattr(command, "prepare", lambda *_: {})
    gone, calls = StackError("jax: it is gone"), ("train_outputs", "train_time", "ablated_time")
    broken = Instead(dict.fromkeys((*calls, "kernels", "convolutions", "flops"), gone))
    broken.answers["ceiling"] = 1e9
    monkeypatch.setattr(command, "start", lambda stacks, *_: stacks.update(jax=broken))
    (tmp_path / "tiny-cpu.md").write_text("earlier")
    flags = ["--workload", "tiny", "--stacks", "jax", "--out", str(tmp_path), "--parts", part]
    assert command.main(flags) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-cpu.md"]
    assert (tmp_path / "tiny-cpu.md").read_text() == "earlier"
    assert "jax: it is gone" in capsys.readouterr().err


def test_device_and_folder_are_looked_at_before_anything_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(host, "environment", lambda device: {"JAX_PLATFORMS": "nothing"})
    assert command.main(["--device", "gpu", "--out", str(tmp_path)]) == 1
    assert "--device gpu: JAX finds no NVIDIA GPU here" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert command.main(["--out", str(tmp_path / "file")]) == 1
    assert f"cannot write {tmp_path / 'file'}" in capsys.readouterr().err


def test_stopped_by_a_signal_it_leaves_no_process_and_no_inputs(tmp_path):
    flags = ["--workload", "tiny", "--stacks", "jax", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    run = subprocess.Popen([sys.executable, "-m", "benchmarks", *flags], cwd=ROOT, env=environment)

    def its_processes():
        found = set()
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if str(tmp_path).encode() in path.read_bytes():
                    found.add(int(path.parent.name))
        return found - {run.pid}

    try:
        while not list(tmp_path.glob("idea-jax-bench-*/workload.json")) or not its_processes():
            assert run.poll() is None
            time.sleep(0.1)
        run.terminate()
        assert run.wait(30) == 128 + signal.SIGTERM
    finally:
        run.kill()
    assert not list(tmp_path.glob("idea-jax-bench-*")) and not its_processes()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("quality --people 1", "--people must lie between 2 and 1000, got 1"),
        ("quality --people 1001", "--people must lie between 2 and 1000, got 1001"),
        ("quality --each 0", "expected a whole number from 1 on, got '0'"),
        ("identities --people -3", "expected a whole number from 1 on, got '-3'"),
        ("identities --devices 2 --data 3", "--data 3 divides none of --devices 2"),
    ],
)
def test_sizes_that_measure_nothing_are_refused(flags, told, monkeypatch, capsys):
    name, *rest = flags.split()
    module = {"quality": quality, "identities": identities}[name]
    monkeypatch.setattr(sys, "argv", ["-m", *rest])
    with pytest.raises(SystemExit):
        module.main()
    assert told in capsys.readouterr().err


def test_time_is_that_of_a_step_of_one_person_or_of_a_call():
    steps = {"steps": 10, "batch": 8, "profile": "paper"}
    assert plans.milliseconds(2.0, "train_time", steps) == 200
    assert plans.milliseconds(2.0, "train_time", steps | {"people": 4}) == 50
    assert plans.milliseconds(2.0, "sample_time", {"pictures": 32, "steps": 50}) == 2000


def test_profile_counts_the_own_time_of_each_operation_once():
    """As of a CPU of two devices, where the three events of a wait lie in each other."""
    of_two = [
        ("ThunkExecutor::Execute", 0, 100),
        ("ynn_fusion.3", 0, 40),
        ("psum.7", 40, 60),
        ("Rendezvous", 42, 58),
        ("Wait: pending_threads=1/2", 45, 55),
        ("copy.2", 100, 20),
    ]
    events = [SimpleNamespace(name=n, start_ns=s, duration_ns=d) for n, s, d in of_two]
    lines = [
        SimpleNamespace(name="tf_XLATfrtCpuClient/1", events=events[::-1]),
        SimpleNamespace(name="python", events=events),
    ]
    profile = SimpleNamespace(planes=[SimpleNamespace(name="/host:CPU", lines=lines)])
    assert profiling.top_ten(profile) == [
        ["Wait: pending_threads=1/2", 55 / 120],
        ["ynn_fusion", 40 / 120],
        ["copy", 20 / 120],
        ["Rendezvous", 3 / 120],
        ["psum", 2 / 120],
    ]


def events_of(*spans):
    return [SimpleNamespace(name=n, start_ns=s, duration_ns=d) for n, s, d in spans]


def test_device_is_idle_where_no_stream_of_it_runs_anything():
    """Two streams that overlap, a gap of 30 ns, and another device that counts for nothing."""
    streams = [events_of(("a", 100, 40), ("b", 130, 20), ("c", 180, 20)), events_of(("d", 120, 5))]
    lines = [SimpleNamespace(name=f"Stream #{i}", events=e) for i, e in enumerate(streams)]
    lines.append(SimpleNamespace(name="XLA Modules", events=events_of(("all", 0, 900))))
    far = [SimpleNamespace(name="Stream #9", events=events_of(("e", 0, 9)))]
    planes = [("/device:GPU:1", far), ("/device:GPU:0", lines), ("/host:CPU", lines[:2])]
    data = SimpleNamespace(planes=[SimpleNamespace(name=n, lines=x) for n, x in planes])
    found = profiling.occupied(data)
    assert found == {
        "operations": 4,
        "busy_ms": pytest.approx(70e-6),
        "span_ms": pytest.approx(100e-6),
        "idle": pytest.approx(0.3),
    }
    nothing = profiling.occupied(SimpleNamespace(planes=[]))
    assert (nothing["operations"], nothing["idle"]) == (0, 0.0)


def test_block_that_is_no_whole_number_of_calls_is_refused():
    with pytest.raises(AssertionError, match="a multiple of 8 steps, got 12"):
        stack_jax.JaxStack.train_time(None, "paper", 8, steps=12, room=8)
    assert all(one.block % one.room == 0 for one in WORKLOADS.values())


def test_on_a_gpu_torch_has_its_memory_back_before_the_clock_runs(monkeypatch):
    told = []
    stack = object.__new__(stack_torch.Careful)
    stack.device = SimpleNamespace(type="cuda")
    for name in ("step", "drawn", "pictures"):
        monkeypatch.setattr(stack, name, lambda *x, n=name: told.append((n, *x)), raising=False)
    monkeypatch.setattr(stack_torch.torch.cuda, "synchronize", lambda: told.append("waits"))
    monkeypatch.setattr(stack_torch.torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(stack_torch.time, "perf_counter", lambda: told.append("clock") or 0.0)
    stack.train_time("paper", batch=8, steps=2)
    step = [("drawn", 8), ("step", None)]
    assert told == [*step, "waits", "clock", *step, *step, "waits", "clock"]
    told.clear()
    stack.sample_time(pictures=32, steps=50)
    assert told == [("pictures", 32, 2), "clock", ("pictures", 32, 50), "clock"]


class Instead:
    """A stack that answers from a table, an error by raising it, or as slowly as it is told."""

    def __init__(self, answers, seconds=0.0):
        self.answers, self.seconds, self.killed = answers, seconds, threading.Event()

    def __call__(self, call, **arguments):
        if call == "train_time" and self.killed.wait(self.seconds):
            raise StackError("killed")
        answer = self.answers.get(call)
        if callable(answer):
            answer = answer(**arguments)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(self):
        self.killed.set()

    def close(self):
        pass


def test_stack_that_fails_or_takes_too_long_is_left_out_and_the_others_stay():
    one = {"train_time": 1.0}
    stacks = {
        "jax": Instead(one | {"train_outputs": "ours.npz"}),
        "eager": Instead(one | {"train_outputs": StackError("out of memory")}),
        "compiled": Instead(one | {"train_outputs": "theirs.npz"}, seconds=60),
    }
    calls = {name: (name, "train_time", {"steps": 1}) for name in stacks}
    compared = {name: [["train_outputs", {"profile": "paper"}]] for name in stacks}
    failed, measurements = {}, report.Measurements()
    files = command.first_calls(stacks, compared, {"a": calls}, measurements, failed, 0.5)
    assert files == {("jax", "train_outputs", "paper"): "ours.npz"}
    assert failed.pop("eager") == "out of memory" and "not finished" in failed.pop("compiled")
    assert not failed
    for name in ("eager", "compiled"):
        stacks.pop(name)
    command.take_turns(stacks, {"a": calls}, 3, measurements, failed)
    assert measurements.summary()["a"]["stacks"]["jax"]["count"] == 3 and not failed


def test_nothing_is_compared_with_when_this_project_fails():
    stacks = {"jax": Instead({"train_outputs": StackError("no"), "train_time": 1.0})}
    compared = {"jax": [["train_outputs", {"profile": "paper"}]]}
    with pytest.raises(StackError, match="no"):
        command.first_calls(stacks, compared, {}, report.Measurements(), {}, 0.0)


def test_ctrl_c_asks_a_stack_for_nothing_more():
    asked = []

    def answer(call):
        def interrupted(**arguments):
            asked.append(call)
            raise KeyboardInterrupt

        return interrupted

    stack = Instead({call: answer(call) for call in ("train_time", "release")})
    with pytest.raises(KeyboardInterrupt):
        command.timed(stack, "train_time", {"steps": 1})
    assert asked == ["train_time"]


def test_memory_is_given_back_after_a_failure_too_whose_reason_stays():
    asked = []

    def release():
        asked.append("release")
        return StackError("gone")

    stack = Instead({"train_time": StackError("out of memory"), "release": release})
    with pytest.raises(StackError, match="out of memory"):
        command.timed(stack, "train_time", {"steps": 1})
    assert asked == ["release"]


def test_first_calls_are_made_one_stack_after_the_other_and_hold_the_compiling():
    order = []

    def stack(name):
        def outputs(profile):
            order.append((name, "compares"))
            time.sleep(0.3)  # compiles
            return f"{name}.npz"

        def seconds(steps):
            order.append((name, "times"))
            return 1e-3 * steps

        return Instead({"train_outputs": outputs, "train_time": lambda profile, **s: seconds(**s)})

    stacks = {name: stack(name) for name in ("jax", "eager")}
    calls = {name: (name, "train_time", {"profile": "paper", "steps": 2}) for name in stacks}
    compared = {name: [["train_outputs", {"profile": "paper"}]] for name in stacks}
    measurements, plan = report.Measurements(), {"a step": calls}
    command.first_calls(stacks, compared, plan, measurements, {}, None)
    assert order == [(name, what) for name in stacks for what in ("compares", "times")]
    command.take_turns(stacks, plan, 1, measurements, {})
    for row in measurements.summary()["a step"]["stacks"].values():
        assert row["first"] >= 300 and row["min"] == 1


def test_single_call_that_fails_beside_others_is_left_out():
    def train_time(people, **sizes):
        return StackError("Traceback\nOutOfMemory") if people == 16 else 2.0

    stacks = {"jax": Instead({"train_time": train_time})}
    plan = {"a": {str(n): ("jax", "train_time", {"steps": 1, "people": n}) for n in (16, 8)}}
    failed, measurements = {}, report.Measurements()
    command.first_calls(stacks, {}, plan, measurements, failed, None)
    assert failed == {"a, 16": "Traceback\nOutOfMemory"}
    command.take_turns(stacks, plan, 2, measurements, failed)
    assert list(measurements.summary()["a"]["stacks"]) == ["8"]


def test_measurement_that_fails_later_is_left_out_of_the_report_and_told():
    times = iter([1.0, 1.0, StackError("Traceback\nOutOfMemory")])
    stacks = {
        "jax": Instead({"train_time": 1.0, "memory": 5}),
        "eager": Instead({"train_time": lambda **sizes: next(times, StackError("again"))}),
    }
    plan = {"a": {name: (name, "train_time", {"steps": 1}) for name in stacks}}
    failed, measurements = {}, report.Measurements()
    command.first_calls(stacks, {}, plan, measurements, failed, None)
    command.take_turns(stacks, plan, 4, measurements, failed)
    assert failed == {"a, eager": "Traceback\nOutOfMemory"}
    assert {k: v["count"] for k, v in measurements.summary()["a"]["stacks"].items()} == {"jax": 4}
    assert command.memory(stacks, WORKLOADS["tiny", "cpu"], failed) == {"jax": 5}
    assert failed["memory of training, eager"] == "again"


def test_ceilings_are_measured_in_turns_and_the_best_one_counts():
    order, reached = [], {"jax": iter([3, 9, 5, 1, 1]), "eager": iter([2, 1, 1, 1, 8])}

    def stack(name):
        def ceiling(size):
            order.append(name)
            return next(reached[name])

        return Instead({"ceiling": ceiling})

    stacks = {name: stack(name) for name in reached}
    failed = {}
    assert command.ceilings(stacks, "cpu", failed) == {"jax": 9, "eager": 8} and not failed
    assert order == ["jax", "eager"] * 5


def test_stack_that_cannot_be_loaded_is_left_out_from_the_first_request_on():
    stacks = {name: Instead({"ceiling": 3.0}) for name in ("jax", "eager", "compiled")}
    stacks["eager"].answers["ceiling"] = StackError("ImportError")
    failed = {}
    assert command.ceilings(stacks, "cpu", failed) == {"jax": 3.0, "compiled": 3.0}
    assert failed == {"eager": "ImportError"}
    command.close_failed(stacks, failed)
    assert list(stacks) == ["jax", "compiled"]
    stacks["jax"].answers["ceiling"] = StackError("no device")
    with pytest.raises(StackError, match="no device"):
        command.ceilings(stacks, "cpu", {})


def test_job_that_fails_is_told_and_the_other_stack_measured(tmp_path, monkeypatch):
    (tmp_path / "workload.json").write_text('{"name": "tiny", "checkpoint": "none"}')
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "old").touch()
    programs = {"jax": ["pass"] * 3, "eager": ["pass", "raise OSError('disk full')", "pass"]}

    def commands(name, folder, *others):
        assert not (folder / "programs" / "old").exists(), "starts with programs of another run"
        return [[sys.executable, "-c", line] for line in programs[name]]

    monkeypatch.setattr(jobs, "commands", commands)
    failed = {}
    found = jobs.measure(tmp_path, "cpu", ["jax", "published", "eager"], 1, "default", {}, failed)
    assert {what: set(row["stacks"]) for what, row in found.items()} == {
        "learning, 2 steps": {"jax"},
        "drawing 2 pictures": {"jax"},
        "both": {"jax"},
        "a first picture": {"jax"},
    }
    assert list(failed) == ["whole jobs, eager"]
    assert failed["whole jobs, eager"].strip().splitlines()[-1] == "OSError: disk full"


def test_people_of_the_shared_enhancer_are_jobs_of_their_own(tmp_path):
    """Where the checkpoint has one; the job that PyTorch does too goes without it."""
    (tmp_path / "a.png").touch()
    about = {"photo": str(tmp_path / "a.png"), "checkpoint": str(hub.MINI_FOLDER)}
    given = tmp_path, about, "cpu", "default", tmp_path / "out", JOBS["tiny"]
    (_, _, *alone), *_ = jobs.commands("jax", *given)
    assert reading.parse(TrainConfig, alone).enhancer == "none"
    found = jobs.quick(tmp_path, about, "cpu")
    assert [reading.parse(TrainConfig, line[2:]).max_train_steps for line in found.values()] == [
        0,
        25,
    ]
    assert jobs.quick(tmp_path, about | {"checkpoint": str(tmp_path)}, "cpu") == {}


def test_products_alone_are_those_of_both_libraries():
    rng = np.random.default_rng(0)
    works = [products.Product(2, 3, 4, 5, batch=2), products.Convolution(1, 4, 2, 3)]
    for one_of in works:
        operands = one_of.operands(rng)
        ours, theirs = (make(one_of, operands)() for make in (products.of_xla, products.of_torch))
        is_map = isinstance(one_of, products.Convolution)
        for one, other in zip(ours, theirs, strict=True):
            other = other.permute(0, 2, 3, 1) if is_map else other
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    threads = torch.get_num_threads()
    found = products.measure(works, 1)
    torch.set_num_threads(threads)
    assert len(products.table(found).splitlines()) == len(works) + 3
    assert [one.flops() for one in works] == [2 * 2 * 3 * 4 * 5, 2 * 2 * 4 * 4 * 9 * 2 * 3]


def test_summary_is_five_lines_and_says_what_was_not_measured(tmp_path, capsys):
    assert summary.main([str(tmp_path)]) == 1
    assert "holds no report" in capsys.readouterr().err
    times = {
        "train step, paper": measured(jax=[0, 50], eager=[0, 60], compiled=[0, 50])["a step"],
        "drawing 16 at once, 50 steps": measured(jax=[0, 2000], eager=[0, 5000])["a step"],
    }
    report.write(tmp_path, "mini-cpu", result_of(times=times))
    met = {"a person, 25 steps": measured(jax=[9, 4.4])["a step"]}
    report.write(tmp_path, "mini-cpu-jobs", result_of(jobs=met))
    assert summary.main([str(tmp_path)]) == 0
    _, person, pictures, mini, mid = capsys.readouterr().out.splitlines()
    assert "not measured with 0 steps, 4.4 s with 25 steps" in person
    assert pictures.endswith("8.0/s") and "first picture not measured" in pictures
    assert mini.endswith("a step 1.20 x eager, 1.00 x compiled (equal); drawing 2.50 x eager")
    assert mid.endswith("a step not measured; drawing not measured")


def test_stack_that_computes_something_else_is_told(tmp_path):
    start, moved = np.zeros((2, 4)), np.ones((2, 4))
    np.savez(tmp_path / "inputs.npz", **{"paper/trainable/pseudo_tokens": start})
    for name, tokens in (("jax", moved), ("eager", moved), ("compiled", -moved), ("nan", moved)):
        losses = [1.0, np.nan] if name == "nan" else [1.0, 0.9]
        np.savez(tmp_path / f"{name}.npz", losses=losses, tokens=tokens)
    files = {
        (name, "train_outputs", "paper"): tmp_path / f"{name}.npz"
        for name in ("jax", "eager", "compiled", "nan")
    }
    found, failed = {}, {}
    command.compare(files, tmp_path, "cpu", found, failed)
    assert set(failed) == {"compiled", "nan"} and "expected within" in failed["compiled"]
    assert found["eager"] == {"loss": 0.0, "tokens": pytest.approx(1.0)}


def test_mismatch_of_pictures_is_told_in_halves_of_their_range(tmp_path):
    np.savez(tmp_path / "inputs.npz")
    drawn = np.full((2, 4, 4, 3), 100, np.uint8)
    for name, pictures in {"jax": drawn, "eager": drawn, "compiled": drawn - 1}.items():
        np.savez(tmp_path / f"{name}.npz", pictures=pictures)
    stacks = ("jax", "eager", "compiled")
    files = {(name, "sample_outputs", None): tmp_path / f"{name}.npz" for name in stacks}
    for device, left_out in {"cpu": {"compiled"}, "gpu": set()}.items():
        found, failed = {}, {}
        command.compare(files, tmp_path, device, found, failed)
        assert found["eager"] == {"pictures": 0.0}
        assert found["compiled"] == {"pictures": pytest.approx(1 / 127.5)}
        assert set(failed) == left_out


def test_side_measurement_that_fails_is_told_and_the_run_goes_on(tmp_path, monkeypatch):
    out = tmp_path / "out"
    stack = Instead(
        {
            "device": {"kind": "cpu"},
            "ceiling": 1e11,
            "train_time": 1.0,
            "kernels": StackError("Traceback\nno profile"),
            "flops": StackError("Traceback\nno count"),
            "convolutions": StackError("Traceback\nno memory"),
        }
    )
    monkeypatch.setattr(host, "busy_share", lambda: 0.0)
    monkeypatch.setattr(command, "prepare", lambda *_: {})
    monkeypatch.setattr(command, "start", lambda stacks, *_: stacks.update(jax=stack))
    monkeypatch.setattr(jobs, "measure", lambda *_: {})
    parts = ["kernels", "people", "convolutions"]
    assert command.main(["--parts", *parts, "--jobs", "1", "--out", str(out)]) == 1
    result = json.loads((out / "mini-cpu.json").read_text())
    assert set(result["failed"]) == {"kernels", "flops", "convolutions"}
    assert "people in one step: 4" in result["inside"] and "jobs" in result
    told = (out / "mini-cpu.md").read_text()
    assert "**Left out, kernels: no profile**" in told


def test_every_workload_has_sizes_for_both_devices_and_for_jobs():
    names = {name for name, _ in WORKLOADS}
    assert {(name, device) for name in names for device in ("cpu", "gpu")} == set(WORKLOADS)
    assert set(JOBS) == names


def test_process_that_fails_names_the_stack_and_the_reason(tmp_path):
    program = tmp_path / "failing.py"
    program.write_text(
        "from benchmarks import worker\n"
        "def divide(by):\n    print('not an answer')\n    return 1 / by\n"
        "worker.serve({'divide': divide})\n"
    )
    stack = Worker("failing", ["failing"], {"PYTHONPATH": f"{ROOT}:{tmp_path}"})
    assert stack("divide", by=4) == 0.25
    with pytest.raises(StackError, match="failing, divide: (?s:.*)division by zero"):
        stack("divide", by=0)
    assert stack("divide", by=2) == 0.5  # a failed request ends nothing
    stack.close()
    with pytest.raises((StackError, ValueError)):
        stack("divide", by=1)
    gone = Worker("failing", ["failing"], {"PYTHONPATH": f"{ROOT}:{tmp_path}"})
    gone.kill()
    for _ in range(2):
        with pytest.raises(StackError, match="the process ended with -9"):
            gone("divide", by=1)
    gone.kill()  # as the timer of its first calls may
    gone.close()


class Served:
    """A stack of this process, which answers what its module serves."""

    def __init__(self, module, stack):
        self.module, self.stack = module, stack

    def __call__(self, call, **arguments):
        assert call in self.module.CALLS
        return json.loads(json.dumps(getattr(self.stack, call)(**arguments)))

    def kill(self):
        raise AssertionError("nothing is given up here")


@pytest.mark.parametrize("apart", [0.01, 30.0])  # the ridge stays, and is cut off
def test_both_sides_have_one_regulariser(apart):
    rng = np.random.default_rng(0)
    anchor, delta = apart * rng.standard_normal((2, 64)), rng.standard_normal((5, 64))
    anchor, delta = np.float32(anchor), np.float32(delta)
    inverse = stack_torch.truncated_inverse(torch.from_numpy(anchor)).numpy()
    theirs = np.sqrt(np.maximum(((delta @ inverse) * delta).sum(axis=1), 1e-8))
    ours = loss.mahalanobis(jnp.asarray(delta), loss.anchor_metric(anchor, truncated=True))
    np.testing.assert_allclose(theirs, ours, rtol=1e-3)


def test_both_sides_of_a_small_run_agree_and_are_timed(tmp_path, smallest_checkpoint, monkeypatch):
    """What the slow tests below do with processes, once and as little of it as possible."""
    workload = dataclasses.replace(WORKLOADS["tiny", "cpu"], single=False)
    monkeypatch.setattr(workloads, "checkpoint_of", lambda *_: smallest_checkpoint)
    workloads.write("tiny", tmp_path, batch=workload.batch, pictures=2, dtype="float32")
    command.prepare(workload, "cpu", tmp_path)  # finds what it would have written
    about, inputs = settings.read(tmp_path), dict(np.load(tmp_path / "inputs.npz"))
    ours = stack_jax.JaxStack(tmp_path, "float32")
    theirs = stack_torch.open_stack(about, lambda _: inputs, "cpu", "eager", "default")
    types, step = [], theirs.step

    def step_told(draws):
        types.append({name: draw.dtype for name, draw in draws.items()})
        return step(draws)

    monkeypatch.setattr(theirs, "step", step_told)
    stacks = {"jax": Served(stack_jax, ours), "eager": Served(stack_torch, theirs)}
    wanted, measurements = plans.comparisons(stacks, workload), report.Measurements()
    differences, failed = {}, {}
    for part, plan_of in {"train": plans.train_steps, "sampling": plans.sampling}.items():
        plan = plan_of(stacks, workload)
        files = command.first_calls(stacks, wanted[part], plan, measurements, failed, None)
        command.compare(files, tmp_path, "cpu", differences, failed)
        command.take_turns(stacks, plan, 1, measurements, failed)
    assert not failed
    assert differences["eager"]["loss"] < 1e-5 and differences["eager"]["tokens"] > 0.9999
    assert differences["eager"]["pictures"] < 1e-4
    for row in measurements.summary().values():
        assert set(row["stacks"]) == {"jax", "eager"}
        assert all(one["min"] > 0 for one in row["stacks"].values())
    assert all(one == types[0] for one in types), "a compiled step is compiled more than once"
    assert all(stack("ceiling", size=64) > 0 for stack in stacks.values())
    product = ours.compiled["ceiling", 64]
    assert ours.ceiling(size=64) > 0 and ours.compiled["ceiling", 64] is product
    placed = ours.placed[workload.pictures]
    ours.sample_time(workload.pictures, workload.steps)
    assert buffers(ours.placed[workload.pictures]) == buffers(placed)


def buffers(tree):
    shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
    return [shard.data.unsafe_buffer_pointer() for shard in shards]


def test_command_lines_of_whole_jobs_are_understood(tmp_path):
    photo, sizes = tmp_path / "a.png", JOBS["tiny"]
    photo.touch()
    about = {"photo": str(photo), "checkpoint": str(tmp_path / "checkpoint")}
    for device, precision in (("cpu", "no"), ("gpu", "bf16")):
        given = tmp_path, about, device, "default", tmp_path / "out", sizes
        (_, script, *learn), (_, *draw), (_, *one) = jobs.commands("jax", *given)
        cfg = reading.parse(TrainConfig, learn)
        assert script == "train_jax.py" and Path(cfg.train_data_dir, "a.png").is_file()
        assert (cfg.max_train_steps, cfg.train_batch_size) == (sizes["steps"], sizes["batch"])
        for (script, *flags), pictures in ((draw, sizes["pictures"]), (one, 1)):
            drawn = reading.parse(SampleConfig, flags)
            assert script == "sample_jax.py" and drawn.num_images_per_prompt == pictures
            assert drawn.num_inference_steps == sizes["sampling_steps"]
            assert drawn.identity == [f"{cfg.output_dir}/identity.safetensors"]
            for parsed in (cfg, drawn):
                assert Path(parsed.compile_cache).is_relative_to(tmp_path / "programs")
                assert parsed.mixed_precision == precision
        for _, dash, module, kind, *others in jobs.commands("eager", *given):
            assert [dash, module] == ["-m", "benchmarks.torch_job"]
            inspect.signature(torch_job.COMMANDS[kind]).bind(*others)


def test_picture_is_profiled_with_the_program_that_draws_it(smallest_checkpoint, monkeypatch):
    loaded = sd.load(smallest_checkpoint, compute_dtype="float32")
    monkeypatch.setattr(networks, "load", lambda args: loaded)
    monkeypatch.setenv("XLA_FLAGS", "--as_said")
    args = picture.parse(["--pictures", "2", "--steps", "2", "--repeats", "1"])
    line = json.loads(json.dumps(picture.measure(args)))
    assert line["operations"] > 50 and line["XLA_FLAGS"] == "--as_said"
    assert 0 < line["busy_ms"] <= line["span_ms"] and 0 <= line["idle"] < 1
    assert 0 < sum(share for _, share in line["top_ten"]) <= 1 + 1e-3


def test_random_samples_are_those_that_the_step_of_the_enhancer_takes(smallest_checkpoint):
    cfg = build(PlanConfig, {}, {"checkpoint": str(smallest_checkpoint), "batch": 4})
    model, _ = work.read_model(cfg)
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    program = SimpleNamespace(
        model=model,
        config=shared.EnhancerConfig("mlp", model.text.hidden_size),
        mesh=mesh,
        recipe=Recipe(4),
        optimizer=make_optimizer(1.0, warmup=1, steps=1, clip=1.0, beta2=0.9, epsilon=1e-8),
    )
    side = model.unet.sample_size * model.vae.downscale
    *_, expected, _ = work.enhancer_shapes(cfg, program, side)
    made = enhancer.random_samples(model, 4)
    for found, leaf in zip(*map(jax.tree.leaves, (made, expected)), strict=True):
        assert (found.shape, found.dtype) == (leaf.shape, leaf.dtype)
    assert (made.token_ids >= model.text.vocab_size).any(axis=1).all()


def test_command_lines_of_the_gpu_script_are_understood():
    """Of all parts, and of their rehearsal on a CPU."""
    programs = {
        "benchmarks": options.parse,
        "benchmarks.identities": identities.parse,
        "benchmarks.picture": picture.parse,
        "benchmarks.enhancer": enhancer.parse,
        "train_jax.py": lambda flags: reading.parse(TrainConfig, flags),
        "sample_jax.py": lambda flags: reading.parse(SampleConfig, flags),
        "benchmarks.workloads": lambda flags: WORKLOADS[flags[0], "cpu"],
    }
    for more, platforms in ((["--rehearse"], {"cpu"}), ([], {"cpu", "cuda"})):
        shown = gpu_script("--show", *more, PYTHON="python")
        assert shown.returncode == 0, shown.stderr
        lines = [shlex.split(line) for line in shown.stdout.splitlines()]
        used, found = set(), set()
        for _, *words in lines:
            place = words.index("python")
            found |= {word.removeprefix("JAX_PLATFORMS=") for word in words[:place] if "=c" in word}
            name, *flags = words[place + 1 :]
            name, *flags = flags if name == "-m" else (name, *flags)
            programs[name](flags)
            used.add(name)
        assert used == set(programs) and found == platforms


def gpu_script(*arguments, **variables):
    command = ["bash", ROOT / "benchmarks" / "gpu.sh", *arguments]
    environment = {**os.environ, **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_gpu_script_goes_on_after_a_part_that_fails_and_says_what_was_left_out(tmp_path):
    program = tmp_path / "program"
    program.write_text(
        '#!/bin/bash\necho "{\\"ran\\": \\"$2\\"}"\n[ "$2" != benchmarks.enhancer ]\n'
    )
    program.chmod(0o755)
    out = tmp_path / "out"
    given = {"PYTHON": str(program), "BENCH_OUT": str(out), "BENCH_WORK": str(tmp_path / "work")}
    done = gpu_script("--rehearse", "enhancer", "attention", **given)
    ended = [json.loads(line) for line in (out / "parts.jsonl").read_text().splitlines()]
    assert [(one["part"], one["ended"]) for one in ended] == [
        ("enhancer", "1"),
        ("attention", "0"),
        ("attention", "0"),
    ]
    assert done.returncode == 1 and '{"ran": "benchmarks.picture"}' in done.stdout
    assert len((out / "attention.txt").read_text().splitlines()) == 2
    (out / "parts.jsonl").unlink()
    assert gpu_script("--rehearse", "people", BENCH_SECONDS="20", **given).returncode == 1
    (one,) = map(json.loads, (out / "parts.jsonl").read_text().splitlines())
    assert one["ended"] == "left_out"
    assert gpu_script("nothing", **given).returncode == 2


@pytest.mark.slow
def test_command_compares_times_and_reports_all_stacks(tmp_path, capsys):
    arguments = ["--workload", "tiny", "--stacks", "jax", "published", "eager"]
    assert command.main([*arguments, "--repeats", "2", "--jobs", "1", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "tiny-cpu.json").read_text())
    assert result["compared"]["published"]["tokens"] > 0.9999
    assert result["compared"]["eager"]["pictures"] < 1e-3
    assert set(result["times"]["train step, official"]["stacks"]) == {"jax", "published"}
    assert set(result["jobs"]["both"]["stacks"]) == {"jax", "eager"}
    assert result["kernels"] and result["flops"]["train_step"] > 0
    assert "Against the floor" in capsys.readouterr().out


@pytest.mark.slow
def test_stack_that_computes_something_else_is_not_timed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(command.TOLERANCES, "float32", {"loss": 0, "tokens": 2, "pictures": -1})
    arguments = ["--workload", "tiny", "--stacks", "jax", "eager", "--out", str(tmp_path)]
    assert command.main([*arguments, "--repeats", "1", "--parts", "train", "sampling"]) == 1
    assert "eager: differs from this project" in capsys.readouterr().err
    result = json.loads((tmp_path / "tiny-cpu.json").read_text())
    assert set(result["times"]["train step, paper"]["stacks"]) == {"jax"}


def test_help_needs_neither_jax_nor_torch():
    code = "import sys, benchmarks.__main__; print(sorted({'jax', 'torch'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert run.stdout.decode().strip() == "[]"
