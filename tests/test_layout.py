"""Imports run downwards only, and each package is imported where it belongs."""

import ast
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the bottom up. A module may import those of the rows above its own that its row names; a name
# stands for a module, or with `.*` for all of a package. A new module takes its place here in the
# same change.
ROWS = (
    # level 0: know nothing of each other
    ("config", ""),
    ("pytrees", ""),
    ("files", ""),
    ("signals", ""),
    ("devices", "signals"),
    ("compile_cache", ""),
    # level 1: one format or one outside world each
    ("data.images", "files"),
    ("data.people", "data.images"),
    ("data.text", "files"),
    ("face_models", "files"),
    ("face_table", "face_models files"),
    ("faces", "face_models face_table config data.images data.people files"),
    ("portraits", "face_models face_table faces config"),
    ("random_face", "files"),
    ("learned_embeds", "files"),
    ("tensorboard", "files"),
    ("jobs", "files"),
    ("publish", "files"),
    ("diffusion.schedule", "pytrees"),
    ("diffusion.samplers", "diffusion.schedule pytrees"),
    # level 2: Stable Diffusion; knows no person
    ("models.flash", ""),
    ("models.layers", "models.flash"),
    ("models.clip_text", "models.layers"),
    ("models.unet", "models.layers"),
    ("models.clip_vision", "models.layers models.clip_text"),
    ("models.vae", "models.layers"),
    ("models.weights", "files pytrees"),
    ("models.hub", "models.weights"),
    ("models.sd", "models.* diffusion.schedule pytrees files"),
    ("random_sd", "models.* diffusion.schedule data.text files"),
    # level 3: the method; knows no file
    ("method.modules", "models.layers"),
    ("method.anchor", "models.sd pytrees"),
    ("method.loss", "pytrees"),
    ("method.condition", "method.* models.sd models.unet pytrees"),
    ("method.shared", "method.* models.sd pytrees"),
    ("formats.enhancer", "method.* models.sd models.hub pytrees files"),
    # level 4: one step, one person on disk, one prompt drawn
    ("train_step", "method.* models.sd diffusion.schedule pytrees"),
    ("checkpoint", "train_step method.* models.sd pytrees files"),
    (
        "sample",
        "checkpoint learned_embeds portraits compile_cache config pytrees files formats.enhancer "
        "data.* diffusion.* method.* models.*",
    ),
    # level 5: a run
    (
        "results",
        "sample checkpoint train_step learned_embeds tensorboard config files formats.enhancer "
        "data.* method.* models.*",
    ),
    ("group", "results checkpoint learned_embeds train_step signals config data.people"),
    (
        "train",
        "group results sample checkpoint train_step learned_embeds jobs devices signals faces "
        "face_models portraits publish formats.enhancer "
        "face_table compile_cache config pytrees files data.* diffusion.* method.* models.*",
    ),
    # one enhancer for everybody
    ("enhancer.settings", "config"),
    ("enhancer.shards", "files"),
    ("enhancer.samples", "enhancer.shards"),
    ("enhancer.step", "enhancer.samples train_step method.* models.sd diffusion.schedule pytrees"),
    ("enhancer.ridge", "enhancer.samples enhancer.shards method.* models.sd"),
    ("enhancer.drawing", "sample data.images models.*"),
    (
        "enhancer.sources",
        "enhancer.drawing enhancer.shards results faces face_table data.*",
    ),
    (
        "enhancer.prepare",
        "enhancer.* results checkpoint jobs faces face_table data.* models.sd files pytrees",
    ),
    (
        "enhancer.likeness",
        "enhancer.drawing enhancer.samples results faces face_models data.* method.* models.sd",
    ),
    (
        "enhancer.fit",
        "enhancer.* formats.enhancer train results sample checkpoint train_step tensorboard jobs "
        "devices signals faces config data.* files method.* models.* pytrees",
    ),
    # the drawn world: knows neither networks nor runs
    ("mini.traits", ""),
    ("mini.face", "mini.traits"),
    ("mini.world", "mini.* data.images pytrees"),
    ("mini.people", "mini.traits"),
    ("mini.captions", "mini.traits"),
    ("mini.drawings", "mini.* data.images files pytrees"),
    # the mini: a Stable Diffusion of that world
    ("mini.networks", "files pytrees"),
    ("mini.composites", ""),
    ("mini.detector", "mini.composites mini.networks"),
    (
        "mini.enhancer",
        "mini.* enhancer.* formats.enhancer results checkpoint jobs faces face_table data.text "
        "models.sd files pytrees",
    ),
    (
        "mini.pretrain",
        "mini.* models.* diffusion.schedule data.text config devices signals files pytrees "
        "random_sd",
    ),
    ("mini.looks", "mini.* faces config models.hub pytrees"),
    ("mini.quality", "mini.* sample faces models.* data.* config files pytrees"),
    (
        "mini.lab",
        "mini.* train group results train_step sample faces config data.images files method.shared "
        "models.hub pytrees",
    ),
    # level 6: the command line
    (
        "cli",
        "train results jobs devices signals sample checkpoint learned_embeds publish face_models "
        "files "
        "compile_cache config data.* diffusion.* models.* enhancer.shards formats.enhancer",
    ),
    (
        "train_enhancer",
        "cli enhancer.* train portraits results sample faces config data.* models.*",
    ),
    ("demo", "cli mini.* faces data.images files models.hub pytrees"),
)

FLAX = {
    *("models.layers", "models.clip_text", "models.clip_vision", "models.unet", "models.vae"),
    *("method.modules", "mini.networks", "mini.detector"),
}
# Imported inside the functions that need them: slow to import, or not needed by every run.
LAZY = {
    *("insightface", "onnxruntime", "onnx", "transformers", "huggingface_hub"),
    *("orbax", "tensorboardX", "skimage", "tensorflow_datasets", "grain", "array_record"),
    "pillow_heif",
}
# For the tests only.
NEVER = {"torch", "torchvision", "diffusers", "pytest", "tensorflow"}
# What a module of pure functions has no business with.
PURE = {"train_step": {"pathlib", "os", "io", "logging", "time", "tqdm"}}
PURE |= {
    f"method.{name}": PURE["train_step"]
    for name in ("anchor", "condition", "loss", "modules", "shared")
}
PURE["enhancer.step"] = PURE["train_step"]
PURE |= {f"diffusion.{name}": PURE["train_step"] for name in ("schedule", "samplers")}


def modules(package):
    """`{"models.sd": path}` for every module; packages themselves are left out."""
    return {
        ".".join(path.relative_to(package).with_suffix("").parts): path
        for path in sorted(package.rglob("*.py"))
        if path.name != "__init__.py"
    }


def imports(path):
    """Yields (dotted name of a module or of a name in it, is it at module level) of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nested = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        at_top = id(node) not in nested
        if isinstance(node, ast.Import):
            yield from ((alias.name, at_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((f"{base}.{alias.name}", at_top) for alias in node.names)


def own_imports(path, known):
    """The package's own modules that a file imports, inside functions too."""
    for name, _ in imports(path):
        if name.startswith("."):
            yield name  # relative: no row has such a name, so it is refused
        elif name.startswith("idea_jax."):
            inner = name.removeprefix("idea_jax.")
            parent = inner.rpartition(".")[0]
            if inner in known or parent in known:
                yield inner if inner in known else parent
            elif inner != "__version__":
                yield inner


def problems(package):
    """Everything in a package that runs against the tables above."""
    known = modules(package)
    order = [name for name, _ in ROWS]
    found = [f"{name} has no row" for name in known if name not in order]
    found += [f"{name} has a row and no file" for name in order if name not in known]
    for position, (name, allowed) in enumerate(ROWS):
        if name not in known:
            continue
        below = {
            other
            for other in order[:position]
            for pattern in allowed.split()
            if other == pattern or (pattern.endswith(".*") and other.startswith(pattern[:-1]))
        }
        for other in sorted(set(own_imports(known[name], known))):
            if other not in below:
                found.append(f"{name} imports {other}")
        for other, at_top in imports(known[name]):
            outside = other.partition(".")[0]
            wrong = (
                (outside == "flax" and name not in FLAX)
                or (outside in LAZY and at_top)
                or outside in NEVER
                or outside in PURE.get(name, ())
            )
            if wrong:
                found.append(f"{name} imports {outside}")
    return found


def test_imports_follow_the_table():
    assert problems(ROOT / "idea_jax") == []


def test_the_table_itself_runs_downwards():
    """Each name that a row allows is that of an earlier row, so the table can hold no circle."""
    order = [name for name, _ in ROWS]
    assert len(set(order)) == len(order)
    for position, (name, allowed) in enumerate(ROWS):
        for pattern in allowed.split():
            prefix = pattern.removesuffix("*")
            earlier = [other for other in order[:position] if other.startswith(prefix)]
            assert earlier, f"{name}: {pattern}"


@pytest.mark.parametrize(
    ("module", "line", "problem"),
    [
        ("models/unet.py", "from idea_jax.method import condition", "models.unet imports method."),
        ("pytrees.py", "from idea_jax.files import slug", "pytrees imports files"),
        ("train_step.py", "def f():\n    import idea_jax.checkpoint", "train_step imports check"),
        ("sample.py", "from idea_jax import train", "sample imports train"),
        ("sample.py", "from flax import linen", "sample imports flax"),
        ("faces.py", "import onnxruntime as ort", "faces imports onnxruntime"),
        ("data/images.py", "def f():\n    import torch.nn", "data.images imports torch"),
        ("method/loss.py", "from pathlib import Path", "method.loss imports pathlib"),
        ("data/images.py", "from .text import fill", "data.images imports .text"),
        ("utils.py", "", "utils has no row"),
    ],
)
def test_an_import_against_the_table_is_found(tmp_path, module, line, problem):
    package = tmp_path / "idea_jax"
    shutil.copytree(ROOT / "idea_jax", package, ignore=shutil.ignore_patterns("__pycache__"))
    before = problems(package)
    with open(package / module, "a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    (found,) = [new for new in problems(package) if new not in before]
    assert found.startswith(problem)


@pytest.mark.parametrize("script", ["train_jax.py", "sample_jax.py"])
def test_scripts_import_the_package_only_when_they_run(script):
    """`--help` of a script, or importing it, costs no second of JAX before it is needed."""
    names = list(imports(ROOT / script))
    assert {name for name, at_top in names if at_top} <= {"sys"}
    assert {name for name, _ in names if name != "sys"} <= {
        f"idea_jax.{name}" for name in ("cli", "config", "train", "sample")
    }
