"""`--help` of everything that has a command line, and help texts that say what they were given."""

import ast
import configparser
import contextlib
import dataclasses
import importlib
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import sample_jax
import train_jax
from idea_jax.config import reading
from idea_jax.config.settings import SAME_THING, ConfigError, SampleConfig, setting

ROOT = Path(__file__).resolve().parent.parent
# Started by the benchmark alone, with a fixed number of arguments.
WORKERS = {
    "benchmarks.stack_jax",
    "benchmarks.stack_torch",
    "benchmarks.torch_job",
    "benchmarks.workloads",
}


def is_main_block(node):
    return isinstance(node, ast.If) and "'__main__'" in ast.unparse(node.test)


def programs():
    """Every file with a `__main__` block: scripts by their file's name, modules by their own."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("idea_jax/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]
    for file in sorted(files):
        if any(map(is_main_block, ast.parse(file.read_text(encoding="utf-8")).body)):
            name = file.relative_to(ROOT)
            yield str(name) if len(name.parts) == 1 else ".".join(name.with_suffix("").parts)


PROGRAMS = sorted(programs())


def test_programs_are_found():
    assert {"train_jax.py", "sample_jax.py", "idea_jax.faces.__main__", "benchmarks.__main__"} < {
        *PROGRAMS
    }
    assert {*PROGRAMS} >= WORKERS


@contextlib.contextmanager
def signals_kept():
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("program", [name for name in PROGRAMS if name not in WORKERS])
def test_help_is_shown(program, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with signals_kept(), pytest.raises(SystemExit) as stop:
        if program.endswith(".py"):
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=False)
    told = capsys.readouterr()
    assert stop.value.code in (0, None)
    assert told.out.startswith("usage:") and "--help" in told.out
    assert told.err == ""


# Shows the help of each program; the first that imports one of these is told.
QUICK = """
import runpy, sys
for program in sys.argv[1:]:
    sys.argv = [program, "--help"]
    try:
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__")
    except SystemExit as stop:
        assert stop.code in (0, None), program
    slow = {"jax", "flax", "transformers", "insightface", "onnxruntime", "torch"} & {*sys.modules}
    assert not slow, f"{program} imports {slow}"
"""


def test_help_waits_for_nothing_that_is_slow_to_import():
    names = [name.removesuffix(".__main__") for name in PROGRAMS if name not in WORKERS]
    done = subprocess.run(
        [sys.executable, "-c", QUICK, *names],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage:") == len(names)


def commands():
    """What each command of setup.cfg starts, and the ways in which its help is asked for."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", "utf-8")
    modes = {"idea-evaluate": [["--card", "x"]], "idea-train-enhancer": [["--prepare", "x"]]}
    lines = parser["options.entry_points"]["console_scripts"].strip().splitlines()
    for name, module in (re.split(r"\s*=\s*|:", line.strip())[:2] for line in lines):
        for mode in [[], *modes.get(name, [])]:
            yield module, [*mode, "--help"]


@pytest.mark.parametrize(("module", "flags"), list(commands()))
def test_what_one_command_calls_a_thing_every_other_understands(module, flags, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(module).main(flags)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    told = set(re.findall(r"--\w+", " ".join(lines)))
    for names in SAME_THING:
        named = {f"--{name}" for name in names}
        assert named <= told or not named & told


def test_two_names_of_one_thing_are_no_contradiction_or_one_message(capsys):
    needed = ["--checkpoint", "m", "--identity", "i", "--prompt", "{}"]
    cfg = reading.parse(SampleConfig, [*needed, "--out", "o", "--pictures", "2", "--output_dir=o"])
    assert (cfg.pretrained_model_name_or_path, cfg.save_dir) == ("m", "o")
    assert cfg.num_images_per_prompt == 2
    with pytest.raises(SystemExit) as stop:
        reading.parse(SampleConfig, [*needed, "--out", "o", "--save_dir", "p"], prog="program")
    (message,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert stop.value.code == 2 and "--out o and --save_dir p say the same thing twice" in message
    # The same name twice is one that was changed, such as at the end of a line of a script.
    assert reading.parse(SampleConfig, [*needed, "--out", "o", "--out", "p"]).save_dir == "p"
    with pytest.raises(ConfigError, match="unknown key 'out' in x; did you mean 'save_dir'"):
        reading.build(SampleConfig, {"out": "o"}, {}, source="x")


def test_help_texts_are_told_as_they_are(capsys):
    """argparse expands them: a bare % was a traceback, or from Python 3.14 on an earlier one."""
    texts = ("100% of %s", "%(prog)s", "half %")

    @dataclasses.dataclass(frozen=True)
    class Settings:
        number: int = setting(3, texts[0])
        word: str = setting("5%d", texts[1], choices=("5%d", "y"), switch=("on", "5%d", "y"))
        yes: bool = setting(False, texts[2])
        words: list[str] | None = setting(None, texts[0])

    with pytest.raises(SystemExit) as stop:
        reading.parse(Settings, ["--help"], prog="program")
    told = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert told.count(f"{texts[0]}") == 2 and f"{texts[0]} (default: 3)" in told
    assert f"{texts[1]} (default: 5%d)" in told and texts[2] in told
    assert "the same as --word 5%d" in told


@pytest.mark.parametrize("script", [train_jax, sample_jax])
def test_a_command_calls_itself_as_it_was_called(script, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/idea-something", "--no_such_flag"])
    with pytest.raises(SystemExit):
        script.main()
    assert "idea-something: error: " in capsys.readouterr().err
