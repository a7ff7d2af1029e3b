"""What JAX itself runs into: too little memory, devices that are not there, foreign settings."""

import os
import subprocess
import sys

import chaos
import jax
import jax.numpy as jnp
import pytest

import train_jax
from idea_jax import cli, jobs, random_sd
from idea_jax.config.settings import SampleConfig, TrainConfig
from idea_jax.formats.identity import read_identity
from idea_jax.mini import lab, looks, quality, sheet
from idea_jax.mini.pretrain import __main__ as pretrain
from idea_jax.runtime import compile_cache, memory
from idea_jax.training import group, many

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
    monkeypatch.setattr(compile_cache, "needs", [7 * 2**30])  # of an earlier run

    def run(cfg):
        compile_cache.needs.append(3 * 2**30)
        return [jnp.zeros((10**9, 4096)).block_until_ready()]

    assert cli.main(cls, lambda: run, ["--pretrained_model_name_or_path", "m", *flags]) == 1
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


NEEDED = "the program needs 3.0 GiB on each device, weights included"


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [  # as XLA for CPUs, GPUs and TPUs has said it to somebody
        (
            jax.errors.JaxRuntimeError,
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4770354232 bytes.",
            ["4.4 GiB were asked for at once", NEEDED],
        ),
        (
            jax.errors.JaxRuntimeError,
            "RESOURCE_EXHAUSTED: Failed to allocate request for 32.00MiB (33554432B) on device 0",
            ["32.0 MiB were asked for at once", NEEDED],
        ),
        (
            jax.errors.JaxRuntimeError,
            "RESOURCE_EXHAUSTED: Attempting to reserve 10.51G at the bottom of memory. That was "
            "not possible. There are 8.97G free, 0B reserved, and 8.97G reservable.",
            ["10.5 GiB were asked for at once, and 9.0 GiB were free", NEEDED],
        ),
        (  # weights that do not fit
            ValueError,
            "RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 196.00M. "
            "That was not possible. There are 60.94M free.; (0x0x0_HBM0)",
            ["196.0 MiB were asked for at once, and 60.9 MiB were free", NEEDED],
        ),
        (
            jax.errors.JaxRuntimeError,
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 21.95G of 15.48G hbm. Exceeded hbm capacity by 6.47G.",
            ["the program needs 21.9 GiB on a device of 15.5 GiB"],
        ),
        (
            jax.errors.JaxRuntimeError,
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (23.88G) exceeds available HBM (15.75G).",
            ["the program needs 23.9 GiB on a device of 15.8 GiB"],
        ),
        (MemoryError, "Unable to allocate 14.9 GiB for an array", ["14.9 GiB were", NEEDED]),
        (jax.errors.JaxRuntimeError, "INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory", [NEEDED]),
    ],
)
def test_numbers_of_every_kind_of_device_are_understood(kind, text, says, monkeypatch, tmp_path):
    error = kind(text)
    assert memory.is_out_of_memory(error)
    monkeypatch.setattr(memory, "CONTAINER", tmp_path / "memory.max")
    for limit, there in (("max", None), (str(2**28), "this machine has 256.0 MiB")):
        memory.CONTAINER.write_text(f"{limit}\n")
        first, *parts, last = memory.describe_memory(error, 3 * 2**30).split("; ")
        assert first == "the memory is too small"
        assert [part[: len(say)] for part, say in zip(parts, says, strict=True)] == says
        assert last == there or (there is None and last.startswith("this machine has "))
    assert not memory.is_out_of_memory(ValueError("a prompt about RESOURCE_EXHAUSTED"))


def test_an_error_that_is_none_of_memory_is_not_called_one():
    def run(cfg):
        raise RuntimeError("out of ideas")

    flags = ["--pretrained_model_name_or_path", "m", "--identity", "i", "--prompt", "{}"]
    with pytest.raises(RuntimeError, match="out of ideas"):
        cli.main(SampleConfig, lambda: run, flags)


def test_a_group_that_is_too_large_is_halved_before_anybody_is_given_up(
    learn, tmp_path, monkeypatch, caplog
):
    chaos.write_people(tmp_path / "people", 5)
    together, sizes, needs = group.train_together, [], []
    begin, begun = many.begin, []

    def with_memory_to_begin_three(work, person, *rest):
        begun.append(person.name)
        if len(begun) == 4:
            raise ValueError("RESOURCE_EXHAUSTED: Attempting to allocate 9.00M. There are 1B free.")
        return begin(work, person, *rest)

    def with_memory_for_two(work, *rest):
        sizes.append(work.layout.places)
        needs.extend(compile_cache.needs)
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
    (told,) = [r.getMessage() for r in caplog.records if "people in a step:" in r.getMessage()]
    for phrase in (
        "4 people in a step: the memory is too small; 0.0 MiB were asked for at once",
        f"the program needs {memory.gigabytes(needs[0])} on each device",
        "half of them are tried",
    ):
        assert phrase in told
    # Afterwards it is told what half of them need.
    assert len(needs) == 4 and needs[0] > needs[1] == needs[2] == needs[3]

    # The same where their photos and states do not fit together.
    monkeypatch.setattr(group, "train_together", together)
    monkeypatch.setattr(many, "begin", with_memory_to_begin_three)
    code, said = learn(*in_fours, photos=tmp_path / "people", out=tmp_path / "begun")
    assert code == 0, said
    assert [name[-1] for name in begun] == list("0123" + "01234")
    assert {record.status for record in jobs.read(tmp_path / "begun")} == {"done"}

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
    assert "unset JAX_PLATFORMS" in done.stderr and "()" not in done.stderr


def test_every_program_says_that_a_backend_is_not_there(tmp_path, monkeypatch, capsys):
    def absent():
        raise RuntimeError("no such backend")

    monkeypatch.setattr(jax, "local_devices", absent)
    for main, flags in (
        (random_sd.main, [tmp_path / "checkpoint"]),
        (sheet.main, [tmp_path / "sheet.png"]),
        (pretrain.main, [tmp_path / "mini"]),
        (quality.main, []),
        (lab.main, []),
        (looks.main, []),
    ):
        assert main([str(flag) for flag in flags]) == 1
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and "JAX has no device of JAX_PLATFORMS=" in said[0]
    assert list(tmp_path.iterdir()) == []


# Each program that needs JAX, with arguments that it accepts.
NEEDY = {
    "train_jax": "--pretrained_model_name_or_path mini --train_data_dir photos --output_dir out",
    "sample_jax": "--pretrained_model_name_or_path mini --identity file --prompt {} --save_dir out",
    "idea_jax.train_enhancer": "--pretrained_model_name_or_path mini --data data --output_dir out",
    "idea_jax.demo": "out",
    "idea_jax.random_sd": "out",
    "idea_jax.mini.lab": "",
    "idea_jax.mini.looks": "",
    "idea_jax.mini.pretrain": "out",
    "idea_jax.mini.quality": "--json out/quality.json",
    "idea_jax.mini.sheet": "out.png",
    "benchmarks": "--stacks jax --out out",
    "benchmarks.identities": "--devices 1",
    "benchmarks.quality": "--json out/quality.json",
}
# And those that do without it, with what they say of these arguments.
OTHERS = {
    "idea_jax.jobs": ("folder", "no jobs.jsonl in folder"),
    "idea_jax.faces": ("folder --out out/faces.safetensors", "folder"),
    "idea_jax.train_enhancer": ("--purge folder", "folder"),
}


def test_a_setting_of_jax_that_is_none_is_one_message_of_every_program(tmp_path):
    def start(name, program, arguments):
        (tmp_path / name).mkdir()
        return subprocess.Popen(
            [sys.executable, "-m", program, *arguments.split()],
            env={**os.environ, "JAX_ENABLE_X64": "maybe", "PYTHONPATH": ROOT},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path / name,
        )

    needy = {name: start(name, name, arguments) for name, arguments in NEEDY.items()}
    others = {name: start(f"{name}-2", name, arguments[0]) for name, arguments in OTHERS.items()}
    for name, process in needy.items():
        said = process.communicate()[1]
        assert process.returncode == 1 and len(said.splitlines()) == 1, f"{name}: {said}"
        assert "'maybe'" in said and "JAX_ENABLE_X64" in said, name
        assert list((tmp_path / name).iterdir()) == [], name
    for name, process in others.items():
        said = process.communicate()[1]
        assert process.returncode == 1 and len(said.splitlines()) == 1, f"{name}: {said}"
        assert said.startswith("error: ") and OTHERS[name][1] in said


def test_gigabytes_are_readable():
    assert memory.gigabytes(16384 * 10**9) == "15,258.8 GiB"
    assert memory.gigabytes(5 * 2**20) == "5.0 MiB"
