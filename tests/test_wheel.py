"""What is installed is whole: a wheel in another folder shows every `--help` and runs the demo."""

import functools
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from test_documents import CONSOLE, FOUND
from test_help import PROGRAMS

ROOT = Path(__file__).resolve().parent.parent

SHOW = """
import runpy, sys
for program in sys.argv[1:]:
    sys.argv = [program, "--help"]
    try:
        runpy.run_module(program, run_name="__main__")
    except SystemExit as stop:
        assert stop.code in (0, None), (program, stop.code)
    else:
        raise AssertionError(program)
import idea_jax
print(idea_jax.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    built = ["bdist_wheel", "--dist-dir", folder, "--bdist-dir", folder / "built"]
    apart = ["egg_info", "--egg-base", folder, "build", "--build-base", folder / "base"]
    command = [sys.executable, "-c", "import setuptools; setuptools.setup()", *apart, *built]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def unpacked(wheel):
    """Its contents, in a folder of its own."""
    target = wheel.parent / "installed"
    zipfile.ZipFile(wheel).extractall(target)
    return target


def test_a_wheel_has_all_that_is_read(unpacked):
    files = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    data = [*(ROOT / "idea_jax" / "configs").glob("*.yaml"), ROOT / "idea_jax/mini/photo.png"]
    data += [path for path in (ROOT / "idea_jax/mini/checkpoint").rglob("*") if path.is_file()]
    missing = {str(path.relative_to(ROOT)) for path in data} - files
    assert not missing
    assert {"train_jax.py", "sample_jax.py"} <= files


def test_every_program_of_a_wheel_shows_its_help(unpacked, tmp_path):
    names = [name.removesuffix(".py") for name in PROGRAMS if not name.startswith("benchmarks")]
    shown = subprocess.run(
        [sys.executable, "-c", SHOW, *names],
        cwd=tmp_path,
        env={"PYTHONPATH": str(unpacked), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.strip().endswith(str(unpacked / "idea_jax" / "__init__.py"))
    assert shown.stdout.count("usage:") == len(names)


@pytest.mark.long
def test_a_wheel_in_a_new_environment_runs_the_demo(wheel, tmp_path):
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    # What the package requires comes from here, so that no network is needed; the package does not:
    # a .pth file beside another one is not read, and an editable install is such a file.
    folder = environment / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
    (folder / "required.pth").write_text(sysconfig.get_path("purelib") + "\n")
    variables = {"PATH": "", "HOME": str(tmp_path / "home")}
    run = functools.partial(
        subprocess.run, cwd=tmp_path, env=variables, capture_output=True, text=True
    )
    pip = [environment / "bin" / "pip", "install", "--no-index", "--no-deps", "--force-reinstall"]
    installed = run([*pip, wheel])
    assert installed.returncode == 0, installed.stderr

    place = run([environment / "bin" / "python", "-c", "import idea_jax; print(idea_jax.__file__)"])
    assert place.stdout.strip() == str(folder / "idea_jax" / "__init__.py")
    shown = run([environment / "bin" / "idea-demo"])
    assert shown.returncode == 0, shown.stderr
    assert (tmp_path / "demo" / "identity" / "identity.safetensors").is_file()
    assert len(list((tmp_path / "demo" / "pictures").glob("*/*.png"))) >= 4


# Documented commands that need no weights but those of a wheel, and no hours.
ALONE = (
    "--pretrained_model_name_or_path mini",
    "configs/mini_paper.yaml",
    "idea_jax.mini.sheet",
    "write_random_recogniser",
    "idea_jax.random_sd",
)
# A file of the reader's, many trainings, or a server, which ends when it is told to.
NEEDS_MORE = ("--lora", "--compare", "idea-serve", "idea-studio")


@pytest.mark.long
def test_documented_commands_of_a_wheel_run(unpacked, tmp_path):
    chosen = [command for _, command in FOUND if any(words in command for words in ALONE)]
    chosen = [command for command in chosen if not any(flag in command for flag in NEEDS_MORE)]
    assert len(chosen) >= 7
    # What they name: a photo, a folder of photos, and the package's files as in a checkout.
    photo = unpacked / "idea_jax" / "mini" / "photo.png"
    for folder in ("photos", "PHOTOS", "idea_jax/mini"):
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(photo, tmp_path / folder)
    shutil.copy(photo, tmp_path)
    (tmp_path / "configs").symlink_to(unpacked / "idea_jax" / "configs")
    environment = {"PYTHONPATH": str(unpacked), "PATH": "", "HOME": str(tmp_path / "home")}
    for command in sorted(chosen, key=lambda command: "idea-sample" in command):  # after learning
        program, *words = shlex.split(command, comments=True)
        if program in CONSOLE:
            script = CONSOLE[program]
            words = [script, *words] if script.endswith(".py") else ["-m", script, *words]
        words = [str(unpacked / word) if word.endswith("_jax.py") else word for word in words]
        done = subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
