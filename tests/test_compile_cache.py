"""Compiled programs: where they are kept for a second process, and what is compiled ahead."""

import functools
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from filelock import FileLock
from jax.sharding import SingleDeviceSharding
from PIL import Image
from skimage import data

import sample_jax
import train_jax
from idea_jax.config import reading
from idea_jax.config.settings import SampleConfig, TrainConfig
from idea_jax.faces import random_model
from idea_jax.formats import learned_embeds
from idea_jax.method import anchor, condition
from idea_jax.models import hub, sd
from idea_jax.runtime import compile_cache, devices
from idea_jax.sampling import programs
from idea_jax.sampling import run as sample
from idea_jax.training import program as steps
from idea_jax.training import run as train

OPTIONS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)
# Compiles one program and says whether it was found.
PROGRAM = """
import sys, jax, jax.numpy as jnp
from idea_jax.runtime import compile_cache
compile_cache.use(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.endswith("cache_hits")))
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).block_until_ready()
print(sum(hits))
"""


@pytest.fixture(autouse=True)
def _options_afterwards():
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def kept_in():
    return jax.config.jax_compilation_cache_dir


def test_named_folder_is_made_and_used(tmp_path):
    compile_cache.use(str(tmp_path / "a" / "b"))
    assert kept_in() == str(tmp_path / "a" / "b") and (tmp_path / "a" / "b").is_dir()
    assert jax.config.jax_compilation_cache_max_size == compile_cache.MAX_BYTES


def test_home_in_a_config_file_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    compile_cache.use("~/programs")
    assert kept_in() == str(tmp_path / "programs")
    with pytest.raises(OSError, match="no such home folder"):
        compile_cache.use("~nobody-of-this-name/programs")


def test_without_a_name_the_folder_given_to_jax_stays_else_it_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    compile_cache.use(None)
    assert kept_in() == "/elsewhere"
    jax.config.update("jax_compilation_cache_dir", None)
    compile_cache.use(None)
    assert kept_in() == str(tmp_path / "idea_jax" / "compiled")


def test_off_keeps_nothing_and_holds_for_one_run(tmp_path, monkeypatch):
    compile_cache.use("off")
    assert not jax.config.jax_enable_compilation_cache
    compile_cache.use(str(tmp_path))
    assert jax.config.jax_enable_compilation_cache
    # Whoever has told JAX itself is obeyed.
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")
    jax.config.update("jax_enable_compilation_cache", False)
    compile_cache.use(str(tmp_path))
    assert not jax.config.jax_enable_compilation_cache


def test_folder_that_cannot_be_written_is_an_error_if_named_and_a_warning_if_not(
    tmp_path, monkeypatch, caplog
):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match="file"):
        compile_cache.use(str(blocked))
    monkeypatch.setattr(compile_cache, "user_folder", lambda: blocked / "compiled")
    jax.config.update("jax_compilation_cache_dir", None)
    compile_cache.use(None)
    assert kept_in() is None and "not kept" in caplog.text


def test_second_process_takes_the_program_of_the_first(tmp_path):
    root = Path(compile_cache.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "cache")]
    hits = [
        int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
        for _ in range(2)
    ]
    assert hits[0] == 0 and hits[1] > 0


def test_program_that_was_not_written_to_its_end_is_made_again_and_kept(tmp_path):
    """As after a kill or on a full disk: JAX alone would compile it in every run, and keep none."""

    def found():
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True
        )
        assert done.returncode == 0 and "persistent compilation cache" not in done.stderr
        return int(done.stdout)

    assert found() == 0
    whole, kept = found(), next(tmp_path.glob("jit__lambda*-cache"))
    used = kept.with_name(kept.name.removesuffix("-cache") + "-atime")
    half = kept.read_bytes()[: kept.stat().st_size // 2]
    for left, has_time in ((half, False), (b"", True)):
        kept.write_bytes(left)
        if not has_time:
            used.unlink()
        assert found() == whole - 1  # compiled once more
        assert used.is_file() and found() == whole
    # The very first one, without which JAX would keep none.
    for path in tmp_path.glob("*-*"):
        path.unlink()
    kept.write_bytes(half)
    assert found() == 0 and found() == whole


def test_only_unfinished_programs_are_removed_while_nobody_writes(tmp_path, monkeypatch):
    program = tmp_path / f"jit_one-{'0a' * 32}-cache"
    program.write_bytes(b"half of a progr")
    # What is no program stays, whatever it is called.
    others = [tmp_path / name for name in ("recipes-cache", f"jit_two-{'1b' * 32}-cache.txt")]
    for path in others:
        path.touch()
    (tmp_path / f"jit_three-{'2c' * 32}-cache").mkdir()
    (tmp_path / f"jit_four-{'3d' * 32}-cache").symlink_to(others[0])
    monkeypatch.setattr(compile_cache, "LOCK_SECONDS", 0)
    # Without JAX's lock the folder is that of a JAX that keeps everything.
    compile_cache.use(str(tmp_path))
    assert program.is_file()
    with FileLock(tmp_path / ".lockfile"):
        compile_cache.use(str(tmp_path))
        assert program.is_file() and kept_in() == str(tmp_path)
    before = set(tmp_path.iterdir())
    compile_cache.use(str(tmp_path))
    assert before - set(tmp_path.iterdir()) == {program}


def test_user_without_a_home_is_told_that_nothing_is_kept(monkeypatch, caplog):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(Path, "home", no_home)
    jax.config.update("jax_compilation_cache_dir", None)
    compile_cache.use(None)
    assert kept_in() is None and "not kept: Could not determine home" in caplog.text


@pytest.mark.parametrize("variable", [None, "3.5"])
def test_short_programs_are_kept_unless_the_user_has_said_from_when(variable, monkeypatch):
    name = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
    monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(name, variable)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 3.5)
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    compile_cache.use(None)
    expected = 3.5 if variable else compile_cache.MIN_SECONDS
    assert jax.config.jax_persistent_cache_min_compile_time_secs == expected


@pytest.mark.parametrize(
    ("program", "module", "own"),
    [
        (train_jax, train, ["--train_data_dir", "x"]),
        (sample_jax, sample, ["--identity", "x", "--prompt", "{}"]),
    ],
)
def test_programs_keep_what_they_compile_and_use_the_cores(program, module, own, monkeypatch):
    happened = []
    monkeypatch.setattr(compile_cache, "use", lambda folder: happened.append(("keep", folder)))
    monkeypatch.setattr(devices, "use_cores", lambda folder: happened.append(("cores", folder)))
    monkeypatch.setattr(module, "run", lambda cfg: happened.append("run") or [])
    common = ["--pretrained_model_name_or_path", "mini", "--compile_cache", "here"]
    assert program.main([*common, *own]) == 0
    assert happened == [("keep", "here"), ("cores", hub.local_folder("mini")), "run"]


def compiled_names(caplog):
    """What JAX has compiled since the log was cleared, in order."""
    line = re.compile(r"Finished XLA compilation of jit\((.+?)\) in")
    found = (line.match(message) for message in caplog.messages)
    return [name[1] for name in found if name]


def learning(checkpoint, photos, out, settings):
    arguments = ["--pretrained_model_name_or_path", checkpoint, "--train_data_dir", photos]
    arguments += ["--output_dir", out, "--max_train_steps", "2", "--train_batch_size", "2"]
    return [str(argument) for argument in (*arguments, *settings.split())]


def drawing(checkpoint, person, out, settings):
    arguments = ["--pretrained_model_name_or_path", checkpoint, "--learned_embedding_path", person]
    arguments += ["--save_dir", out, "--prompt", "{}", "{} smiling", "--num_inference_steps", "2"]
    return [str(argument) for argument in (*arguments, *settings.split())]


def test_step_and_sampler_are_compiled_while_weights_load_and_not_again(
    smallest_checkpoint, photo_folder, tmp_path, caplog, monkeypatch
):
    caplog.set_level(logging.DEBUG, "jax._src.dispatch")
    load, shapes_of, compiled, traced = sd.load, sd._shapes.__wrapped__, [], []
    sd._shapes.cache_clear()
    jax.clear_caches()  # what other tests of this process have compiled
    monkeypatch.setattr(
        sd, "_shapes", functools.lru_cache(lambda model: traced.append(1) or shapes_of(model))
    )

    def names():
        return compiled_names(caplog)

    def load_last(*args, **options):
        until = time.monotonic() + 120
        while expected not in names() and time.monotonic() < until:
            time.sleep(0.01)
        compiled.append(names())
        loaded = load(*args, **options)
        assert names() == compiled[-1], "reading weights compiles programs"
        return loaded

    monkeypatch.setattr(sd, "load", load_last)
    random_model.write_random_recogniser(tmp_path / "arcface.onnx")
    settings = "--profile paper --mixed_precision bf16 --steps_per_call 2"
    settings += f" --face_model {tmp_path / 'arcface.onnx'}"
    person = tmp_path / learned_embeds.FILE_NAME
    learn = learning(smallest_checkpoint, photo_folder, tmp_path, settings)
    draw = drawing(smallest_checkpoint, person, tmp_path / "drawn", "")
    for program, arguments, expected in (
        (train_jax, learn, "step_people"),
        (sample_jax, draw, "draw_everywhere"),
    ):
        caplog.clear()
        assert program.main(arguments) == 0
        assert expected in compiled.pop(), "was not compiled ahead"
        assert names().count(expected) == 1
        # Operations that are compiled one by one cost a start seconds, and no cache keeps them.
        assert len(names()) <= 20, names()
    assert len(traced) == 1, "shapes are computed more than once"


def test_what_precedes_the_first_step_is_one_program_each(smallest_checkpoint, caplog):
    model, frozen = sd.load(smallest_checkpoint)
    key, ids = jax.random.key(0), np.array([5, 6])
    # Of the words and the enhancer that is not trained, which the paper's profile does without.
    method = condition.make_method("official")
    jax.clear_caches()
    caplog.set_level(logging.DEBUG, "jax._src.dispatch")
    start = anchor.from_words(model, frozen, ids, bos=1, eos=2)
    condition.init_given(model, method, key, start, np.ones(512, np.float32))
    names = compiled_names(caplog)
    assert names.count("from_words") == names.count("init_enhancer") == 1
    assert len(names) <= 8, names


class Called(Exception):
    """Raised where the first call would begin."""


class Program:
    """Stands for a compiled program, and notes with what it was lowered and called."""

    def lower(self, *args, **settings):
        self.lowered = (args, settings)
        return SimpleNamespace(compile=lambda: None)

    def __call__(self, *args, **settings):
        self.called = (args, settings)
        raise Called


@pytest.fixture
def two_people(tmp_path):
    """A folder with two photos of one person and one of another."""
    for name, image in (("ann/1", data.astronaut()), ("ann/2", data.cat()), ("bob/1", data.cat())):
        path = tmp_path / "people" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).resize((64, 64)).save(path)
    return tmp_path / "people"


@pytest.mark.parametrize(
    ("settings", "are_two"),
    [
        ("--profile paper", False),
        ("--profile paper --kv full --steps_per_call 2 --n_pseudo_tokens 1", False),
        ("--profile official --mixed_precision bf16", True),
        ("--profile cross_init --mesh identity=2,data=2 --shard_frozen", True),
        ("--profile textual_inversion --identities_per_step 3 --early_stopping 1", True),
    ],
)
def test_step_is_lowered_for_what_it_is_called_with(
    settings, are_two, smallest_checkpoint, photo_folder, two_people, tmp_path, monkeypatch
):
    """Were a shape, a type or a place another, the call would compile a second program."""
    step = Program()
    monkeypatch.setattr(steps, "step_people", step)
    photos = two_people if are_two else photo_folder
    if "paper" in settings or "official" in settings:
        random_model.write_random_recogniser(tmp_path / "arcface.onnx")
        settings += f" --face_model {tmp_path / 'arcface.onnx'}"
    arguments = learning(smallest_checkpoint, photos, tmp_path / "out", settings)
    with pytest.raises(Called):
        train_jax.main(arguments)
    check_is_alike(step)


@pytest.mark.parametrize("settings", ["", "--mixed_precision bf16 --guidance_scale 1"])
def test_sampler_is_lowered_for_what_it_is_called_with(
    settings, smallest_checkpoint, tmp_path, monkeypatch
):
    sampler = Program()
    monkeypatch.setattr(programs, "draw_everywhere", sampler)
    person = tmp_path / "learned_embeds.safetensors"
    learned_embeds.write(person, "<person>", np.zeros((2, 8), np.float32), {})
    with pytest.raises(Called):
        sample_jax.main(drawing(smallest_checkpoint, person, tmp_path / "drawn", settings))
    check_is_alike(sampler)


def check_is_alike(program):
    """That a program was lowered with the shapes, types and places of its first call."""

    def about(tree):
        leaves, structure = jax.tree.flatten(tree)
        return structure, [of_array(x) if hasattr(x, "dtype") else x for x in leaves]

    def of_array(x):
        if isinstance(x, sd.StableDiffusion):  # has a type, too
            return x
        return x.shape, x.dtype, getattr(x, "weak_type", False), place_of(x)

    def place_of(x):
        place = getattr(x, "sharding", None)
        return None if isinstance(place, SingleDeviceSharding) else place

    lowered, called = map(about, (program.lowered, program.called))
    assert lowered[0] == called[0]
    assert lowered[1] == called[1]


def test_what_goes_wrong_ahead_is_left_to_the_call(caplog):
    caplog.set_level(logging.DEBUG, compile_cache.__name__)

    def fail():
        raise RuntimeError("out of memory")

    with compile_cache.ahead(fail):
        went_on = True
    assert went_on and "not compiled ahead" in caplog.text and "out of memory" in caplog.text


def test_nothing_is_compiled_after_an_error_of_the_block():
    happened, goes_on = [], threading.Event()

    def lower():
        goes_on.wait()
        return SimpleNamespace(compile=lambda: happened.append("compiled"))

    with pytest.raises(OSError, match="no file"), compile_cache.ahead(lower):
        threading.Timer(0.1, goes_on.set).start()
        raise OSError("no file")
    with compile_cache.ahead(lower):
        happened.append("loaded")
    assert happened == ["loaded", "compiled"]


def test_stop_while_a_program_is_compiled_ahead_ends_in_order(tmp_path):
    """After Thread.join that is interrupted, Python ends without the thread, which may crash it."""
    code = """
import signal, sys, time
from types import SimpleNamespace
from idea_jax.runtime import compile_cache
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for programs with &
def slow():
    time.sleep(0.5)  # by then the block's end waits
    print("compiles", flush=True)
    time.sleep(2)
    print("compiled", flush=True)
try:
    with compile_cache.ahead(lambda: SimpleNamespace(compile=slow)):
        pass
except KeyboardInterrupt:
    print("stopped", flush=True)
    sys.exit(130)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(compile_cache.__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "compiles\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "stopped\n"
    assert process.stdout.read() == "compiled\n", "ended without the thread"
    assert process.wait(30) == 130


def test_both_programs_have_the_flag():
    common = ["--pretrained_model_name_or_path", "mini", "--compile_cache", "off"]
    assert reading.parse(TrainConfig, [*common, "--train_data_dir", "x"]).compile_cache == "off"
    drawing = [*common, "--identity", "x", "--prompt", "{}"]
    assert reading.parse(SampleConfig, drawing).compile_cache == "off"
