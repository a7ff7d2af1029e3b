"""Programs that are kept as they were traced: found again, never wrongly, with the same results."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import sample_jax
import train_jax
from idea_jax.data.tokenizer import load_tokenizer
from idea_jax.runtime import compile_cache, sources, traces


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A folder of kept programs, in which nothing is yet."""
    monkeypatch.setattr(compile_cache, "KEEPS_TRACES", True)
    changed = {
        "jax_compilation_cache_dir": str(tmp_path / "cache"),
        "jax_enable_compilation_cache": True,  # a run with `--compile_cache off` may have been here
        "jax_debug_key_reuse": False,  # with it nothing is kept
    }
    before = {name: getattr(jax.config, name) for name in changed}
    for values in (changed, before):
        for name, value in values.items():
            jax.config.update(name, value)
        traces._ready.clear()
        if values is changed:
            yield tmp_path / "cache"


class Example:
    """A function of a factor, an array that it may overwrite, and a key; counts its traces."""

    def __init__(self):
        self.traced = 0

        @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
        def scale(factor, tree, key):
            self.traced += 1
            noise = jax.random.normal(key, tree["x"].shape)
            return {"x": tree["x"] * factor + noise, "sum": tree["x"].sum()}

        self.scale = scale
        self.kind = traces.KeptFunction(
            "scale", (0,), (1,), lambda factor, tree, key: {"x": 0, "sum": 0}
        )

    def __call__(self, factor=3.0, size=4, about=None):
        """The results, by what is kept or traced anew as in a new process."""
        traces._ready.clear()
        jax.clear_caches()
        self.traced = 0

        def arguments():
            return factor, {"x": jnp.arange(float(size))}, jax.random.key(1)

        traces.lower(self.kind, self.scale, arguments(), about)
        assert traces._ready or self.traced == 1
        found = traces.call(self.kind, self.scale, *arguments())
        return {name: np.asarray(leaf).tolist() for name, leaf in found.items()}


def test_what_was_traced_once_is_not_traced_again(cache):
    example = Example()
    plain = example.scale(3.0, {"x": jnp.arange(4.0)}, jax.random.key(1))
    plain = {name: np.asarray(leaf).tolist() for name, leaf in plain.items()}
    assert example() == plain and example.traced == 1
    assert example() == plain and example.traced == 0
    (path,) = cache.glob("scale-*.trace")
    assert path.stat().st_mode & 0o777 == 0o600
    # Other arguments than those it was lowered for go to the function itself.
    other = traces.call(example.kind, example.scale, 2.0, {"x": jnp.ones(2)}, jax.random.key(1))
    assert other["x"].shape == (2,) and example.traced == 1


def test_another_key_for_everything_that_a_program_depends_on(cache, monkeypatch):
    example = Example()
    example()

    def is_traced_anew(**changes):
        example(**changes)
        return example.traced == 1

    assert not is_traced_anew()
    assert is_traced_anew(factor=2.0) and is_traced_anew(size=5)
    assert is_traced_anew(about=["settings"]) and is_traced_anew(about=["others"])
    with monkeypatch.context() as patch:
        patch.setattr(sources, "digest", lambda: "of other sources")
        assert is_traced_anew()
    with monkeypatch.context() as patch:
        patch.setattr(traces, "versions", lambda: {"jax": "99"})
        assert is_traced_anew()
    jax.config.update("jax_default_matmul_precision", "float32")
    try:
        assert is_traced_anew()
    finally:
        jax.config.update("jax_default_matmul_precision", None)
    assert not is_traced_anew()


def test_a_changed_line_of_the_sources_is_another_digest(tmp_path, monkeypatch):
    package = tmp_path / "package"
    (package / "inner").mkdir(parents=True)
    (package / "one.py").write_text("x = 1\n")
    (package / "inner" / "two.py").write_text("y = 1\n")
    digest = sources.digest.__wrapped__
    # Files that are newer than the process may not be those that it has loaded.
    assert digest(package) is None
    monkeypatch.setattr(sources, "BEGAN", sources.time.time() + 60)
    first = digest(package)
    assert first == digest(package)
    (package / "inner" / "two.py").write_text("y = 2\n")
    second = digest(package)
    (package / "inner" / "two.py").rename(package / "two.py")
    assert len({first, second, digest(package)}) == 3
    assert sources.digest.__wrapped__() is not None  # the package's own


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9] + b"otherbits"), "is damaged"),
        (lambda path: path.write_bytes(b""), "is damaged"),
        (lambda path: path.chmod(0o666), "others than you can write it"),
    ],
)
def test_what_is_damaged_or_somebody_elses_is_made_again_with_a_notice(damage, said, cache, caplog):
    example = Example()
    expected = example()
    (path,) = cache.glob("scale-*.trace")
    damage(path)
    assert example() == expected and example.traced == 1
    assert said in caplog.text
    caplog.clear()
    assert example() == expected and example.traced == 0 and not caplog.text


def test_a_program_under_another_ones_name_is_not_taken(cache, caplog):
    example = Example()
    expected = example()
    (path,) = cache.glob("scale-*.trace")
    example(factor=5.0)
    (other,) = set(cache.glob("scale-*.trace")) - {path}
    shutil.copy(other, path)
    assert example() == expected and example.traced == 1 and "is damaged" in caplog.text


def test_what_does_not_say_what_it_is_is_traced_in_every_run(cache):
    example = Example()
    for about in ([lambda: 1], [object()], [np.zeros(5000)]):
        example(about=about)
        assert example.traced == 1 and not traces._ready
    jax.config.update("jax_debug_nans", True)
    try:
        example()
        assert example.traced == 1 and not traces._ready
    finally:
        jax.config.update("jax_debug_nans", False)
    assert not list(cache.glob("*.trace"))


def test_few_programs_are_kept(cache, monkeypatch):
    monkeypatch.setattr(traces, "MOST", 2)
    example = Example()
    for factor in (1.0, 2.0, 3.0):
        example(factor=factor)
    assert len(list(cache.glob("*.trace"))) == 2


def test_what_is_remembered_of_a_tokenizer_is_that_of_its_files(smallest_checkpoint, tmp_path):
    folder = tmp_path / "tokenizer"
    shutil.copytree(smallest_checkpoint / "tokenizer", folder)
    size = len(json.loads((folder / "vocab.json").read_text()))
    first = load_tokenizer(folder, size, 77)
    again = load_tokenizer(folder, size, 77)
    assert first.ids("a photo of a cat").tolist() == again.ids("a photo of a cat").tolist()
    lines = (folder / "merges.txt").read_text().splitlines()
    (folder / "merges.txt").write_text("\n".join(lines[:1]) + "\n")
    assert len(load_tokenizer(folder, size, 77).ids("photo")) > len(first.ids("photo"))


def test_kept_programs_learn_and_draw_the_same(
    smallest_checkpoint, photo_folder, tmp_path, monkeypatch
):
    """Without them, when they are made, and by those that were kept: to the last bit."""

    def run(name):
        traces._ready.clear()
        jax.clear_caches()
        out, drawn = tmp_path / name, tmp_path / f"{name}-drawn"
        common = ["--pretrained_model_name_or_path", str(smallest_checkpoint)]
        learn = ["--train_data_dir", str(photo_folder), "--output_dir", str(out)]
        learn += "--profile cross_init --max_train_steps 2 --train_batch_size 2".split()
        assert train_jax.main([*common, *learn, "--report_to", "none"]) == 0
        draw = ["--identity", str(out / "identity.safetensors"), "--save_dir", str(drawn)]
        draw += ["--prompt", "{}", "--num_inference_steps", "2", "--num_images_per_prompt", "1"]
        assert sample_jax.main([*common, *draw]) == 0
        (picture,) = drawn.rglob("00000.png")
        return load_file(out / "identity.safetensors"), picture.read_bytes()

    def never(*_):
        raise AssertionError("traced again")

    monkeypatch.setattr(compile_cache, "KEEPS_TRACES", False)
    plain = run("plain")
    monkeypatch.setattr(compile_cache, "KEEPS_TRACES", True)
    made = run("made")
    monkeypatch.setattr(traces, "trace", never)
    kept = run("kept")
    for (tensors, picture), how in ((made, "made"), (kept, "kept")):
        assert tensors.keys() == plain[0].keys()
        for name, values in plain[0].items():
            np.testing.assert_array_equal(tensors[name], values, err_msg=f"{how} {name}")
        assert picture == plain[1], how
