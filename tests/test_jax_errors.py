"""What JAX itself runs into: too little memory, devices that are not there, foreign settings."""

import os
import subprocess
import sys

import chaos
import jax
import jax.numpy as jnp
import pytest

import train_jax
from idea_jax import cli, jobs
from idea_jax.config.settings import SampleConfig, TrainConfig
from idea_jax.formats.identity import read_identity
from idea_jax.runtime import compile_cache, devices
from idea_jax.training import group

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TWO = "--max_train_steps 2 --train_batch_size 1 --report_to none --profile cross_init".split()


@pytest.fixture
def learn(smallest_checkpoint, photo_folder, tmp_path, capsys):
    """Trains; returns the exit code and what was said."""

    def command(*flags, out=tmp_path / "out", photos=photo_folder):
        about = ["--pretrained_model_name_or_path", smallest_checkpoint, "--output_dir", out]
        code = train_jax.main([str(x) for x in (*about, "--train_data_dir", photos, *TWO, *flags)])
        return code, capsys.readouterr().err

    return command


@pytest.mark.parametrize(
    ("cls", "flags", "advice"),
    [
        (TrainConfig, ["--train_data_dir", "d"], "a smaller --train_batch_size"),
        (SampleConfig, ["--identity", "i", "--prompt", "{}"], "a smaller --batch_size"),
    ],
)
def test_too_little_memory_is_one_message_with_numbers(cls, flags, advice, monkeypatch, capsys):
    """So much is asked for that the operating system refuses it at once."""
    monkeypatch.setattr(compile_cache, "needs", [3 * 2**30])

    def run(cfg):
        return [jnp.zeros((10**9, 4096)).block_until_ready()]

    assert cli.main(cls, run, ["--pretrained_model_name_or_path", "m", *flags]) == 1
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    for phrase in (
        "the memory is too small; 15,258.8 GiB were asked for at once",
        "the program needs 3.0 GiB on each device",
        "this machine has ",
        advice,
        "--mixed_precision bf16",
    ):
        assert phrase in line
    assert "Traceback" not in said


def test_an_error_that_is_none_of_memory_is_not_called_one():
    def run(cfg):
        raise RuntimeError("out of ideas")

    flags = ["--pretrained_model_name_or_path", "m", "--identity", "i", "--prompt", "{}"]
    with pytest.raises(RuntimeError, match="out of ideas"):
        cli.main(SampleConfig, run, flags)


def test_a_group_that_is_too_large_is_halved_before_anybody_is_given_up(
    learn, tmp_path, monkeypatch
):
    chaos.write_people(tmp_path / "people", 5)
    together, sizes = group.train_together, []

    def with_memory_for_two(work, *rest):
        sizes.append(work.layout.places)
        if work.layout.places > 2:
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."
            )
        return together(work, *rest)

    monkeypatch.setattr(group, "train_together", with_memory_for_two)
    in_fours = ["--identities_per_step", "4", "--mesh", "identity=1,data=1"]
    code, said = learn(*in_fours, photos=tmp_path / "people")
    assert code == 0, said
    assert sizes == [4, 2, 2, 2]
    assert {record.status for record in jobs.read(tmp_path / "out")} == {"done"}
    assert said.count("the memory is too small for 4 people in a step") <= 1

    def too_large(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    # Where each device has one person there is nothing left to halve.
    monkeypatch.setattr(group, "train_together", too_large)
    alone = ["--identities_per_step", "1", "--mesh", "identity=1,data=1", "--seed", "1"]
    code, said = learn(*alone, photos=tmp_path / "people", out=tmp_path / "other")
    assert code == 1 and "the memory is too small" in said and "Traceback" not in said


def test_settings_of_jax_that_change_numbers_are_harmless(learn, tmp_path, caplog):
    assert learn(out=tmp_path / "calm")[0] == 0
    foreign = {
        "jax_enable_x64": True,
        "jax_default_prng_impl": "rbg",
        "jax_random_seed_offset": 7,
        "jax_threefry_partitionable": False,
    }
    before = {name: getattr(jax.config, name) for name in foreign}
    try:
        for name, value in foreign.items():
            jax.config.update(name, value)
        assert learn(out=tmp_path / "foreign")[0] == 0
        assert {name: getattr(jax.config, name) for name in foreign} == before
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    for name in foreign:
        assert f"{name.upper()} is " in caplog.text
    calm, other = (tmp_path / out / jobs.RESULT for out in ("calm", "foreign"))
    assert calm.read_bytes() == other.read_bytes()
    assert read_identity(other).steps == 2


@pytest.mark.parametrize("platform", ["cuda", "tpu", "nonsense"])
def test_a_backend_that_is_not_there_is_one_message(platform, tmp_path):
    code = "import sys; from idea_jax import cli, config; import train_jax; sys.exit("
    code += "train_jax.main(sys.argv[1:]))"
    environment = {**os.environ, "JAX_PLATFORMS": platform, "PYTHONPATH": ROOT}
    flags = ["--pretrained_model_name_or_path", "mini", "--train_data_dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags, "--output_dir", str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"JAX has no device of JAX_PLATFORMS={platform}" in done.stderr
    assert "unset JAX_PLATFORMS" in done.stderr


def test_gigabytes_are_readable():
    assert devices.gigabytes(16384 * 10**9) == "15,258.8 GiB"
    assert devices.gigabytes(5 * 2**20) == "5.0 MiB"
