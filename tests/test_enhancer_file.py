"""The file of a shared ID-Enhancer: read as written, or refused with one message."""

import json
from dataclasses import replace

import enhancers as made
import jax
import numpy as np
import pytest

from idea_jax import random_sd
from idea_jax.formats import enhancer as enhancers
from idea_jax.method import shared
from idea_jax.runtime.files import write_tensors

MODEL = random_sd.config("tiny", "sd2", vocab_size=100)
CONFIG = made.config(MODEL.text.hidden_size)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A good file."""
    path = tmp_path_factory.mktemp("enhancer") / "enhancer.safetensors"
    enhancers.write(path, CONFIG, made.tree(CONFIG, MODEL), made.about())
    return path


@pytest.mark.parametrize("kind", shared.KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_was_written_is_read(kind, dtype, tmp_path):
    cfg = made.config(MODEL.text.hidden_size, kind)
    tree, path = made.tree(cfg, MODEL), tmp_path / "e.safetensors"
    enhancers.write(path, cfg, tree, made.about(), dtype=dtype)
    got = enhancers.read(path)
    assert (got.config, got.about) == (cfg, made.about()) and len(got.sha256) == 64
    expected = jax.tree.map(lambda x: np.float32(np.asarray(x, dtype)), tree)
    jax.tree.map(np.testing.assert_array_equal, got.shared, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(got.shared)} == {np.dtype(np.float32)}
    assert len(got.shared["names"]) == (made.NAMES if kind == "names" else 0)
    enhancers.check(got, MODEL, path, face_model="0" * 64, num_tokens=2)


def test_files_without_a_basis_are_written_and_read_as_before_there_was_one(tmp_path):
    cfg = replace(CONFIG, basis=0)
    path = tmp_path / "e.safetensors"
    enhancers.write(path, cfg, made.tree(cfg, MODEL), made.about())
    header, _ = header_of(path.read_bytes())
    said = json.loads(header["__metadata__"][enhancers.FORMAT])
    assert said["format_version"] == 1 and "basis" not in said["config"] and "basis" not in header
    got = enhancers.read(path)
    assert got.config == cfg and got.shared["basis"].shape == (0, 2, CONFIG.dim)


def test_what_cannot_be_used_is_never_written(whole, tmp_path):
    tree, path = made.tree(CONFIG, MODEL), tmp_path / "e.safetensors"
    before = whole.read_bytes()
    for changed, about, says in (
        ({"scale": np.float32(np.nan)}, {}, "scale is not finite"),
        ({"start": np.full((2, CONFIG.dim), 1e6)}, {}, "start is not finite"),  # in float16
        ({"kv": {}}, {}, "kv is missing"),
        ({}, {"sources": ["/home/anna/photos"]}, "about has a path"),
        ({}, {"licence": None}, "does not say its licence"),
        ({"basis": np.zeros((made.BASIS, 2, CONFIG.dim))}, {}, "largest number of basis is 0"),
        (
            {"basis": np.full((made.BASIS, 2, CONFIG.dim), 6e4)},
            {},
            "largest number of basis is 60000",
        ),
    ):
        for place in (path, whole):
            with pytest.raises(enhancers.EnhancerError, match=says):
                enhancers.write(place, CONFIG, tree | changed, made.about(**about), dtype="float16")
    assert not path.exists() and whole.read_bytes() == before


def header_of(content):
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header, data):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def test_cut_and_hostile_files_are_one_message(whole, tmp_path):
    content, path = whole.read_bytes(), tmp_path / "bad.safetensors"
    header, data = header_of(content)

    def described(**changes):
        about = json.loads(header["__metadata__"][enhancers.FORMAT]) | changes
        return with_header(header | {"__metadata__": {enhancers.FORMAT: json.dumps(about)}}, data)

    first = next(name for name in header if name != "__metadata__")
    twice = json.dumps(header)[:-1] + f', "{first}": {json.dumps(header[first])}}}'
    deep = "[" * 100_000 + "]" * 100_000
    whole_number = {**header, first: {**header[first], "dtype": "I32"}}
    huge = {"kind": "mlp", "dim": 2**40, "num_tokens": 2, "width": 16, "kv_rank": 2, "beta": 0.4}
    huge["basis"] = 3
    for bad, says in (
        (b"", "no safetensors file"),
        (content[:5], "no safetensors file"),
        (content[:200], "no safetensors file"),
        (content[:-1], "damaged"),
        ((2**62).to_bytes(8, "little") + content[8:], "no safetensors file"),
        (with_header(b'{"a": ' + deep.encode() + b"}", data), "does not describe itself"),
        (with_header({}, b""), "does not describe itself"),
        (with_header({"__metadata__": {enhancers.FORMAT: deep}}, b""), "does not describe itself"),
        (with_header(twice.encode(), data), "does not describe itself"),
        (with_header(whole_number, data), "values of type I32"),
        (described(format_version=4), "format version 4, expected 1, 2, 3, so that another"),
        (described(format_version=2), "format version 2, its dim_2 is 0 and its basis has 3"),
        (described(config={**huge, "dim": 32, "basis": 2**40}), "its basis is 1099511627776"),
        (described(config=huge), "its dim is 1099511627776"),
        (described(config={"kind": "gpt"}), "does not describe itself"),
        (described(config={**huge, "dim": 33}), "a multiple of 8"),
        (described(about=[]), "does not say how it was made"),
        (described(about=made.about(face_model="arcface")), "its face_model is no SHA-256"),
        (described(config={**huge, "dim": 32, "beta": 10**400}), "its beta is 1000"),
        (described(config={**huge, "dim": 32, "beta": 1e308}), "its beta is 1e+308"),
        (described(config={**huge, "dim": 32, "beta": -1}), "its beta is -1, expected 0 to 10000"),
        (described(about=made.about(sources=[{"a": 1}])), "its sources are [{'a': 1}]"),
        (described(about=made.about(people=False)), "its people is False, expected 0 or more"),
        (described(about=made.about(steps=-5)), "its steps is -5, expected 0 or more"),
        (described(about=made.about(licence="~/anna")), "about has a path"),
        (described(about=made.about(licence="mine\n\x1b[31m")), "a text that is more than a line"),
    ):
        path.write_bytes(bad)
        with pytest.raises(enhancers.EnhancerError) as caught:
            enhancers.read(path)
        message = str(caught.value)
        assert says in message and str(path) in message and len(message) < 1000, message
    with pytest.raises(enhancers.EnhancerError, match=r"none\.safetensors cannot be read"):
        enhancers.read(tmp_path / "none.safetensors")


def test_tensors_that_are_missing_too_many_or_of_another_shape_are_named(whole, tmp_path):
    header, _ = header_of(whole.read_bytes())
    tree = enhancers.pytrees.flatten(enhancers.read(whole).shared)
    delta = next(name for name in tree if name.startswith("kv/") and name.endswith("/up"))
    path = tmp_path / "bad.safetensors"
    for change, says in (
        ({"start": None}, "start is missing"),
        ({"adapter/more": np.zeros(3, np.float32)}, "adapter/more is unexpected"),
        ({"start": np.zeros((3, CONFIG.dim), np.float32)}, "start is (3, 32), expected (2, 32)"),
        ({"scale": np.float32(np.inf)}, "scale is not finite"),
        ({"scale": np.float32(0)}, "its scale is 0"),
        ({delta: None}, "expected down [32, 2] and up [2, width]"),
        ({"kv/../to_k/up": np.zeros((2, 4), np.float32)}, "'kv/../to_k/up' is unexpected"),
        ({delta + "/up": np.zeros((2, 4), np.float32)}, "is unexpected"),
        ({"names": np.zeros((3, 2, CONFIG.dim), np.float32)}, "it has 3 names, and is of kind mlp"),
    ):
        changed = {k: np.array(v) for k, v in (tree | change).items() if v is not None}
        write_tensors(path, changed, header["__metadata__"])
        with pytest.raises(enhancers.EnhancerError) as caught:
            enhancers.read(path)
        assert says in str(caught.value)


def test_an_enhancer_of_another_family_recogniser_or_number_of_tokens_is_refused(whole):
    ours = enhancers.read(whole)
    other = made.config(2 * CONFIG.dim)
    theirs = enhancers.Enhancer(other, made.tree(other, MODEL), made.about())
    for enhancer, model, settings, says in (
        (theirs, MODEL, {}, f"its text width is {other.dim}, this checkpoint's is {CONFIG.dim}"),
        (ours, MODEL, {"face_model": "1" * 64}, f"the SHA-256 {'0' * 64}"),
        (ours, MODEL, {"num_tokens": 3}, "predicts 2 pseudo tokens, and 3 are asked for"),
    ):
        settings = {"face_model": None, **settings}
        with pytest.raises(enhancers.EnhancerError) as caught:
            enhancers.check(enhancer, model, whole, **settings)
        assert says in str(caught.value) and "--enhancer none" in str(caught.value)
    kv = dict(ours.shared["kv"])
    kv.pop(next(iter(kv)))  # as of a UNet with fewer blocks
    fewer = enhancers.Enhancer(CONFIG, {**ours.shared, "kv": kv}, ours.about)
    with pytest.raises(enhancers.EnhancerError, match="do not fit the UNet of this checkpoint"):
        enhancers.check(fewer, MODEL, whole, face_model=None)


def test_which_file_is_meant(whole, tmp_path):
    assert enhancers.find("auto", tmp_path) is None
    assert enhancers.find("none", tmp_path) is None
    own = tmp_path / enhancers.FILE
    own.parent.mkdir()
    own.write_bytes(whole.read_bytes())
    assert enhancers.find("auto", tmp_path) == own
    assert enhancers.find("none", tmp_path) is None
    assert enhancers.find(str(whole), tmp_path) == whole
