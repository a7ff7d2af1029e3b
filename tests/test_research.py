"""The script of docs/research.md runs as printed; importing the package has no side effect."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from idea_jax import pytrees
from idea_jax.data import images

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ("ann.jpg", "bob.jpg")


def script():
    """The one Python block of docs/research.md."""
    text = (ROOT / "docs" / "research.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return code


def test_the_script_is_short_and_uses_public_functions_only():
    code = script()
    assert len(code.splitlines()) <= 60
    assert max(map(len, code.splitlines())) <= 100
    tree = ast.parse(code)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {
        alias.name
        for node in ast.walk(tree)
        if hasattr(node, "names")
        for alias in node.names
        if isinstance(alias, ast.alias)
    }
    # `_replace` is the documented, public method of every named tuple; `_` a value not used.
    assert not [name for name in names - {"_", "_replace"} if name.startswith("_")]
    unwanted = (ast.ClassDef, ast.Global, ast.Nonlocal)
    assert not [node for node in ast.walk(tree) if isinstance(node, unwanted)]


@pytest.fixture(scope="module")
def ran(random_checkpoint, tmp_path_factory):
    """The names that the script leaves behind, and the folder it ran in."""
    folder = tmp_path_factory.mktemp("research")
    (folder / "checkpoint").symlink_to(random_checkpoint)
    (folder / "arcface.onnx").symlink_to(random_checkpoint / "face" / "arcface.onnx")
    rng = np.random.default_rng(0)
    for name in PICTURES:
        pixels = rng.integers(0, 256, (64, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    # A context manager instead of monkeypatch, which lives for one test only.
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        names = {"__name__": "__main__"}
        exec(compile(script(), "docs/research.md", "exec"), names)
        yield names, folder


def test_the_script_trains_every_part_of_both_people(ran):
    names, _ = ran
    assert names["losses"].shape == (2,) and bool(jnp.isfinite(names["losses"]).all())
    for person, path, key in zip(
        pytrees.unstack(names["state"]), names["pictures"], names["keys"], strict=True
    ):
        start, _ = names["begin"](path, key)
        assert int(person.step) == 10
        assert set(person.trainable) == {"pseudo_tokens", "adapter", "enhancer", "kv"}
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), person.trainable, start.trainable)
        still = [name for name, did_move in pytrees.flatten(moved).items() if not did_move]
        assert not still
        jax.tree.map(np.testing.assert_array_equal, person.given, start.given)


def test_the_scripts_people_are_those_of_single_runs(ran):
    names, _ = ran
    people = [
        names["begin"](path, key)
        for path, key in zip(names["pictures"], names["keys"], strict=True)
    ]
    _, together = names["step_all"](names["frozen"], *pytrees.stack(people), names["keys"])
    single = jax.jit(names["my_loss"])
    for (state, photos), key, loss in zip(people, names["keys"], together, strict=True):
        batch = names["draw_batch"](names["model"], photos, key, state.step, size=4)
        alone = single(state.trainable, names["frozen"], state.given, batch)
        np.testing.assert_allclose(loss, alone, rtol=1e-5)
    assert abs(float(together[0] - together[1])) > 1e-4

    # Who trains beside whom, and at which place, does not matter: the same ten steps, exchanged.
    state, photos = pytrees.stack(people[::-1])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.array([1, 0]))
    for _ in range(10):
        state, losses = names["step_all"](names["frozen"], state, photos, keys)
    np.testing.assert_allclose(losses[::-1], names["losses"], rtol=1e-5)


def test_the_script_draws_each_person(ran):
    names, folder = ran
    grids = [np.array(Image.open(folder / f"{Path(p).stem}-drawn.png")) for p in PICTURES]
    height, width = names["size"]
    for grid in grids:
        assert grid.shape == (2 * height, 2 * width, 3) and grid.dtype == np.uint8
        assert grid.std() > 1  # not one flat colour
    assert (grids[0] != grids[1]).any()
    assert images.read_png_text(folder / "ann-drawn.png")["AIGenerated"] == "true"


# Runs in a process of its own. The packages that idea_jax builds on come first, so that what they
# do when they are imported is not counted here.
PROBE = r"""
import importlib, json, logging, os, pkgutil, sys, sysconfig
from pathlib import Path
import flax.linen, jax, jax.numpy, numpy, optax, PIL.Image, safetensors.numpy, tqdm, yaml

def settings():
    return {
        "environment": dict(os.environ),
        "jax": {k: repr(v) for k, v in jax.config.values.items()},
        "logging": [logging.root.level, repr(logging.root.handlers)],
        "folder": os.getcwd(),
        "numpy": repr(numpy.geterr()),
        "PIL": repr(PIL.Image.MAX_IMAGE_PIXELS),
    }

before, opened = settings(), []
sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" else None)
import idea_jax
for module in pkgutil.walk_packages(idea_jax.__path__, "idea_jax."):
    importlib.import_module(module.name)
opened = [os.fsdecode(p) for p in opened if isinstance(p, str | bytes | os.PathLike)]
after = settings()

installed = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")]
def is_own(path):  # neither code nor a part of an installed package
    if path in sys.path:
        return False
    path = Path(path).resolve()
    if path.suffix in (".py", ".pyc", ".so") or ".egg-info" in str(path):
        return False
    if Path(idea_jax.__file__).resolve().parent in path.parents:
        return True
    return path.parts[1] not in ("proc", "sys", "dev") and not any(
        folder in path.parents for folder in installed
    )

try:
    jax.devices()
    devices = "started"
except RuntimeError:
    devices = "refused"
print(json.dumps({
    "changed": [name for name in before if before[name] != after[name]],
    "variables": {k: v for k, v in after["environment"].items()
                  if before["environment"].get(k) != v},
    "unset": [k for k in before["environment"] if k not in after["environment"]],
    "files": [path for path in opened if is_own(path)],
    "opened": len(opened),
    "modules": sorted(sys.modules),
    "devices": devices,
}))
"""

HEAVY = {
    "torch",
    "insightface",
    "onnxruntime",
    "onnx",
    "transformers",
    "huggingface_hub",
    "diffusers",
    "tensorboardX",
    "skimage",
}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """What a fresh process reports that has imported every module of the package."""
    home = tmp_path_factory.mktemp("home")
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "HF_"))},
        # Starting a device on a platform that does not exist raises.
        "JAX_PLATFORMS": "no_such_platform",
        "HOME": str(home),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=home, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), home


def test_importing_starts_no_device(imported):
    # With this platform any use of a device fails, the imports above included.
    assert imported[0]["devices"] == "refused"


def test_importing_reads_no_file_and_changes_no_setting(imported):
    report, home = imported
    assert report["opened"] > 20  # the hook is at work: at least the modules themselves
    assert report["files"] == []
    # What keeps other libraries from reporting home has to be said before they are imported.
    quiet = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    assert report["variables"].items() <= quiet.items() and report["unset"] == []
    assert set(report["changed"]) <= {"environment"}
    assert list(home.iterdir()) == []


def test_importing_leaves_out_what_only_some_functions_need(imported):
    modules = imported[0]["modules"]
    in_package = {path.stem for path in (ROOT / "idea_jax").glob("*.py")} - {"__init__"}
    assert {f"idea_jax.{name}" for name in in_package} <= set(modules)
    assert not HEAVY & {name.partition(".")[0] for name in modules}
