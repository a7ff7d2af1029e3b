"""Where compiled programs are kept, and that a second process takes them from there."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import sample_jax
import train_jax
from idea_jax import compile_cache, config, devices, sample, train
from idea_jax.models import hub

OPTIONS = (
    *("jax_enable_compilation_cache", "jax_compilation_cache_dir"),
    *("jax_compilation_cache_max_size", "jax_persistent_cache_min_compile_time_secs"),
)
# Compiles one program and says whether it was found.
PROGRAM = """
import sys, jax, jax.numpy as jnp
from idea_jax import compile_cache
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


def test_without_a_name_the_folder_given_to_jax_stays_else_it_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    compile_cache.use(None)
    assert kept_in() == "/elsewhere"
    jax.config.update("jax_compilation_cache_dir", None)
    compile_cache.use(None)
    assert kept_in() == str(tmp_path / "idea_jax" / "compiled")


def test_off_keeps_nothing():
    compile_cache.use("off")
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
    root = Path(compile_cache.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "cache")]
    hits = [
        int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
        for _ in range(2)
    ]
    assert hits[0] == 0 and hits[1] > 0


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


def test_both_programs_have_the_flag():
    common = ["--pretrained_model_name_or_path", "mini", "--compile_cache", "off"]
    assert (
        config.parse(config.TrainConfig, [*common, "--train_data_dir", "x"]).compile_cache == "off"
    )
    drawing = [*common, "--identity", "x", "--prompt", "{}"]
    assert config.parse(config.SampleConfig, drawing).compile_cache == "off"
