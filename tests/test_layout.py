"""Imports run downwards only, and no file, function or list of parameters grows without end."""

import ast
import functools
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the bottom up: a package, or a module beside them, and what its modules may import besides
# each other. A new package takes its place here in the same change.
ROWS = (
    # level 0: know nothing of each other, but for the base of all errors
    ("errors", ""),
    ("config", "errors"),
    ("pytrees", ""),
    ("costs", ""),
    ("runtime", "errors"),
    # level 1: what every command runs in, and one outside world each
    ("launch", "errors runtime"),
    ("publish", "errors runtime"),
    ("jobs", "errors launch runtime"),
    ("data", "errors runtime"),
    ("faces", "config data errors launch runtime"),
    ("diffusion", "errors pytrees"),
    # level 2: Stable Diffusion; knows no person
    ("models", "diffusion errors pytrees runtime"),
    ("random_sd", "data diffusion launch models runtime"),
    # level 3: the method, which knows no file, and the files that hold what was learned
    ("method", "models pytrees"),
    ("formats", "errors method models pytrees runtime"),
    # level 4: prompts drawn
    (
        "sampling",
        "config data diffusion errors faces formats jobs method models pytrees runtime",
    ),
    # level 5: people learned
    (
        "training",
        "config costs data diffusion errors faces formats jobs method models publish pytrees "
        "runtime sampling",
    ),
    # one enhancer for everybody
    (
        "enhancer",
        "config data diffusion errors faces formats jobs method models pytrees runtime sampling "
        "training",
    ),
    # people scored
    (
        "evaluation",
        "config data errors faces formats jobs method models pytrees runtime sampling training",
    ),
    # the drawn world, and a Stable Diffusion of it
    (
        "mini",
        "config data enhancer errors faces formats jobs launch method models pytrees runtime "
        "sampling training",
    ),
    (
        "mini.pretrain",
        "config data diffusion errors launch mini models pytrees random_sd runtime",
    ),
    # programs on devices that are not there
    (
        "plan",
        "config costs enhancer errors faces launch method models pytrees random_sd runtime "
        "sampling training",
    ),
    # all methods on one checkpoint, from photos to what can be passed on
    (
        "card",
        "config costs data enhancer errors evaluation faces formats jobs models plan runtime "
        "sampling",
    ),
    # level 6: the command line
    ("cli", "config launch models runtime"),
    ("batch", "cli config sampling"),
    ("train_enhancer", "cli enhancer launch"),
    ("evaluate", "card cli evaluation"),
    ("findings", "config data errors faces formats launch models runtime training"),
    ("doctor", "config findings launch runtime"),
    ("demo", "cli data faces launch mini models pytrees runtime"),
    ("exporting", "data formats method models publish runtime"),
    ("export", "config exporting launch runtime"),
    ("diffusers", "errors formats method models runtime"),
    (
        "serve",
        "cli config data errors evaluation export exporting faces formats jobs method mini models "
        "runtime sampling training",
    ),
    ("studio", "cli config runtime serve"),
)

FLAX = {
    "models.layers",
    "models.clip_text",
    "models.clip_vision",
    "models.unet",
    "models.vae",
    "method.modules",
    "mini.networks",
    "mini.detector",
}
# Imported inside the functions that need them: slow to import, or not needed by every run.
LAZY = {
    "insightface",
    "onnxruntime",
    "onnx",
    "transformers",
    "huggingface_hub",
    "orbax",
    "tensorboardX",
    "skimage",
    "tensorflow_datasets",
    "grain",
    "array_record",
    "pillow_heif",
    "tokenizers",
    "pyarrow",
}
# For the tests only.
NEVER = {"torch", "torchvision", "diffusers", "pytest", "tensorflow"}
# What is written for people who have it: the one module for diffusers' own pipelines.
THEIRS = {("diffusers", "torch")}
# What a module of pure functions has no business with.
OUTSIDE = {"pathlib", "os", "io", "logging", "time", "tqdm"}
PURE = {
    "training.step",
    "training.program",
    "training.sizing",
    "enhancer.step",
    "method.anchor",
    "method.condition",
    "method.loss",
    "method.modules",
    "method.portable",
    "method.shared",
    "diffusion.schedule",
    "diffusion.samplers",
}


def modules(package):
    """`{"models.sd": path}` for every module; packages themselves are left out."""
    return {
        ".".join(path.relative_to(package).with_suffix("").parts): path
        for path in sorted(package.rglob("*.py"))
        if path.name != "__init__.py"
    }


def imports(path):
    """(dotted name of a module or of a name in it, is it at module level) of a file's imports."""
    return imports_of(path.read_text(encoding="utf-8"))


@functools.cache
def imports_of(source):
    tree, found = ast.parse(source), []
    nested = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        at_top = id(node) not in nested
        if isinstance(node, ast.Import):
            found += [(alias.name, at_top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found += [(f"{base}.{alias.name}", at_top) for alias in node.names]
    return found


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


def package_of(module, rows):
    """The row that a module belongs to: its own, or that of its package; None without one."""
    return max((row for row in rows if f"{module}.".startswith(f"{row}.")), key=len, default=None)


def circle(edges):
    """Modules that import each other in a circle, in order; none as a rule."""
    done, path = set(), []

    def visit(module):
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        path.append(module)
        for other in sorted(edges[module]):
            if found := visit(other):
                return found
        done.add(path.pop())
        return []

    return next((found for module in sorted(edges) if (found := visit(module))), [])


def problems(package):
    """Everything in a package that runs against the tables above."""
    known = modules(package)
    allowed = {row: names.split() for row, names in ROWS}
    rows = {name: package_of(name, allowed) for name in known}
    found = [f"{name} has no row" for name, row in rows.items() if row is None]
    found += [f"{row} has a row and no file" for row in allowed if row not in rows.values()]
    edges = {name: set(own_imports(path, known)) for name, path in known.items()}
    for name, others in edges.items():
        row = rows[name]
        for other in sorted(others if row else ()):
            if rows.get(other) != row and rows.get(other) not in allowed[row]:
                found.append(f"{name} imports {other}")
        for other, at_top in imports(known[name]):
            outside = other.partition(".")[0]
            wrong = (
                (outside == "flax" and name not in FLAX)
                or (outside in LAZY and at_top)
                or (outside in NEVER and (at_top or (name, outside) not in THEIRS))
                or (outside in OUTSIDE and name in PURE)
            )
            if wrong:
                found.append(f"{name} imports {outside}")
    if turn := circle({name: others & set(known) for name, others in edges.items()}):
        found.append(f"{' imports '.join([*turn, turn[0]])}")
    return found


def test_imports_follow_the_table():
    assert problems(ROOT / "idea_jax") == []


def test_the_table_itself_runs_downwards():
    """Each name that a row allows is that of an earlier row, so the table can hold no circle."""
    order = [name for name, _ in ROWS]
    assert len(set(order)) == len(order)
    for position, (name, allowed) in enumerate(ROWS):
        assert set(allowed.split()) <= set(order[:position]), name


@pytest.mark.parametrize(
    ("module", "line", "problem"),
    [
        (
            "models/vae.py",
            "from idea_jax.training import tensorboard",
            "models.vae imports training.t",
        ),
        ("pytrees.py", "from idea_jax.runtime.files import slug", "pytrees imports runtime.files"),
        (
            "jobs.py",
            "def f():\n    import idea_jax.training.resume",
            "jobs imports training.resume",
        ),
        ("sampling/run.py", "from idea_jax.training import run", "sampling.run imports training."),
        ("sampling/plan.py", "from flax import linen", "sampling.plan imports flax"),
        ("faces/finding.py", "import onnxruntime as ort", "faces.finding imports onnxruntime"),
        ("data/images.py", "def f():\n    import torch.nn", "data.images imports torch"),
        ("method/loss.py", "from pathlib import Path", "method.loss imports pathlib"),
        ("data/images.py", "from .text import fill", "data.images imports .text"),
        (
            "data/images.py",
            "from idea_jax.data import folders",
            "data.images imports data.folders ",
        ),
        ("utils.py", "", "utils has no row"),
    ],
)
def test_an_import_against_the_table_is_found(tmp_path, module, line, problem):
    package = tmp_path / "idea_jax"
    code_alone = shutil.ignore_patterns("__pycache__", "checkpoint")
    shutil.copytree(ROOT / "idea_jax", package, ignore=code_alone)
    with open(package / module, "a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    (found,) = problems(package)
    assert found.startswith(problem)


@pytest.mark.parametrize("script", ["train_jax.py", "sample_jax.py"])
def test_scripts_import_the_package_only_when_they_run(script):
    """`--help` of a script, or importing it, costs no second of JAX before it is needed."""
    names = list(imports(ROOT / script))
    assert {name for name, at_top in names if at_top} <= {"sys"}
    assert {name for name, _ in names if name != "sys"} <= {
        "idea_jax.cli",
        "idea_jax.config.settings.TrainConfig",
        "idea_jax.config.settings.SampleConfig",
        "idea_jax.training.run",
        "idea_jax.sampling.run",
    }


# What may be longer: the renderer of faces, and the dataclasses in which each setting has its text.
LONG_FILES = {"idea_jax/mini/face.py", "idea_jax/config/settings.py"}
LONG_FUNCTIONS = {"idea_jax/mini/face.py"}
SOURCES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for folder in ("idea_jax", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def definitions(kind):
    """(file, definition) of every function or class of the package and the benchmarks."""
    for name, source in SOURCES.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, kind):
                yield name, node


def parameters(function):
    """Names of a function's parameters, but for the object whose method it is."""
    given = function.args
    names = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    return [name.arg for name in names if name is not None and name.arg not in ("self", "cls")]


def test_public_functions_have_eight_parameters_at_most():
    many = [
        f"{file}: {function.name}"
        for file, function in definitions(ast.FunctionDef)
        if not function.name.startswith("_") or function.name == "__init__"
        if len(parameters(function)) > 8
    ]
    assert many == []


def test_functions_have_eighty_lines_at_most():
    long = [
        f"{file}: {function.name}"
        for file, function in definitions(ast.FunctionDef)
        if function.end_lineno - function.lineno >= 80 and file not in LONG_FUNCTIONS
    ]
    assert long == []


def test_files_have_five_hundred_lines_at_most():
    long = {name for name, source in SOURCES.items() if len(source.splitlines()) > 500}
    assert long <= LONG_FILES


def test_each_class_has_a_name_of_its_own():
    places = {}
    for file, found in definitions(ast.ClassDef):
        places.setdefault(found.name, []).append(file)
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def test_the_formatter_is_not_kept_away():
    """Neither by a comment nor by brackets around what would otherwise have a line each."""
    tests = {path.name: path.read_text(encoding="utf-8") for path in ROOT.glob("tests/*.py")}
    literal = r"^\s*\*\((?!.* for )[^\n]+\),?$"  # but not `*(x for x in ...)`
    tricks = re.compile(rf"# fmt: (?:skip|off)\n|{literal}", re.MULTILINE)
    assert [name for name, source in {**SOURCES, **tests}.items() if tricks.search(source)] == []
