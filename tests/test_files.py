"""Atomic writing, safe names, and the tree operations that other tests take for granted."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from idea_jax import jobs, pytrees
from idea_jax.runtime import files
from idea_jax.runtime.files import atomic_write, slug, write_tensors

ROOT = Path(__file__).resolve().parent.parent
UMASK = os.umask(0)
os.umask(UMASK)


def test_failed_write_leaves_the_earlier_file_and_no_trace(tmp_path):
    path = tmp_path / "result.bin"
    path.write_bytes(b"earlier")
    with pytest.raises(OSError, match="disk"), atomic_write(path) as temporary:
        temporary.write_bytes(b"half")
        raise OSError("disk full")
    assert path.read_bytes() == b"earlier"
    assert os.listdir(tmp_path) == ["result.bin"]


def test_written_file_has_the_usual_permissions(tmp_path):
    path = tmp_path / "deep" / "result.png"
    with atomic_write(path) as temporary:
        assert temporary.suffix == ".png" and temporary.parent == path.parent
        temporary.write_bytes(b"x")
    (tmp_path / "plain").write_bytes(b"x")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_private_file_is_for_its_owner_alone(tmp_path):
    path = tmp_path / "result.safetensors"
    for private, mode in ((True, 0o600), (False, 0o666 & ~UMASK), (True, 0o600)):
        write_tensors(path, {"a": np.zeros(2)}, {}, private=private)
        assert path.stat().st_mode & 0o777 == mode


def test_equal_tensors_and_metadata_are_equal_files(tmp_path):
    tensors = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array(3.0, np.float32)}
    metadata = {f"key {i}": str(i) for i in range(20)}
    for i in range(3):
        write_tensors(tmp_path / f"{i}.safetensors", tensors, metadata)
    assert len({(tmp_path / f"{i}.safetensors").read_bytes() for i in range(3)}) == 1
    with safe_open(tmp_path / "0.safetensors", "numpy") as file:
        assert file.metadata() == metadata
        for name, value in tensors.items():
            np.testing.assert_array_equal(file.get_tensor(name), value)
            assert file.get_tensor(name).shape == value.shape


@pytest.mark.parametrize("text", ["../../x", "/abs", "a/b", "\0", "é" * 400, "🙂", ".", "..", ""])
def test_slug_is_one_safe_name(text):
    name = slug(text)
    assert name == os.path.basename(name)
    assert 8 <= len(name) <= 89 and name.isascii() and not name.startswith(".")


def test_slug_tells_texts_apart_that_look_alike():
    alike = ["a b", "a-b", "A b", "a  b", "a/b", "a b."]
    assert len({slug(text) for text in alike}) == len(alike)
    assert slug("A photo of {}").startswith("a-photo-of-")


def test_flatten_and_unflatten_are_inverse():
    tree = {"b": {"x": np.ones(2), "a": np.zeros(())}, "a": np.arange(3)}
    flat = pytrees.flatten(tree)
    assert list(flat) == ["a", "b/a", "b/x"]
    assert jax.tree.structure(pytrees.unflatten(flat)) == jax.tree.structure(tree)


def test_stack_and_unstack_are_inverse():
    trees = [{"x": jnp.full((2,), float(i)), "y": jnp.asarray(i)} for i in range(3)]
    for one, back in zip(trees, pytrees.unstack(pytrees.stack(trees)), strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, back)


def test_streams_differ_and_survive_a_new_process():
    key = jax.random.key(0)
    data = [jax.random.key_data(pytrees.stream(key, name)).tolist() for name in ("noise", "text")]
    assert data[0] != data[1]
    code = (
        "import jax; from idea_jax.pytrees import stream; "
        "print(jax.random.key_data(stream(jax.random.key(0), 'noise')).tolist())"
    )
    fresh = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert fresh.stdout.strip() == str(data[0])


def say(text, tmp_path, **how):
    """Runs `files.say` in a process of its own; returns what came of it."""
    code = "import os, sys\nfrom idea_jax.runtime import files\n"
    code += "files.say(os.fsdecode(bytes.fromhex(sys.argv[1])))\nfiles.say('done')"
    return subprocess.run(
        [sys.executable, "-c", code, os.fsencode(text).hex()],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONIOENCODING": how.pop("encoding", "utf-8"),
        },
        stderr=subprocess.PIPE,
        **{"stdout": subprocess.PIPE, **how},
    )


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [
        ("utf-8", "out/ünï-日本-\\udcff".encode()),
        ("ascii", b"out/\\xfcn\\xef-\\u65e5\\u672c-\\udcff"),
        ("cp1252", "out/ünï-\\u65e5\\u672c-\\udcff".encode("cp1252")),
    ],
)
def test_what_a_terminal_cannot_say_does_not_end_a_finished_run(tmp_path, encoding, printed):
    done = say("out/ünï-日本-\udcff", tmp_path, encoding=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.splitlines() == [printed, b"done"]


def test_a_pipe_that_nobody_reads_does_not_end_a_finished_run(tmp_path):
    read, write = os.pipe()
    os.close(read)
    try:
        done = say("out", tmp_path, stdout=write)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_what_is_made_in_vain_goes_again(tmp_path):
    """Folders of a run that has written nothing; those that were there before stay."""
    deep = tmp_path / "a" / "b"
    files.check_writable(deep)
    with pytest.raises(RuntimeError), files.atomic_write(deep / "c" / "file"):
        raise RuntimeError
    with pytest.raises(RuntimeError), files.write_together(deep / "c"):
        raise RuntimeError
    with pytest.raises(RuntimeError), jobs.only_run(deep, 0):
        files.check_writable(deep / "person")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    deep.mkdir(parents=True)
    files.check_writable(deep)
    with pytest.raises(RuntimeError), jobs.only_run(deep, 0):
        (deep / "person").touch()
        raise RuntimeError
    assert {path.name for path in deep.iterdir()} >= {"person"}
    with jobs.only_run(tmp_path / "kept", 0):
        with pytest.raises(jobs.JobsError), jobs.only_run(tmp_path / "kept", 0):
            pass
        (tmp_path / "kept" / "result").touch()
    assert (tmp_path / "kept" / "result").is_file()


def test_a_folder_that_another_run_removes_while_it_is_empty_is_made_again(tmp_path):
    calls = []

    def make():
        calls.append(1)
        if len(calls) < 3:
            (tmp_path / "a").rmdir()
        return (tmp_path / "a" / "file").write_text("x")

    assert files.make_in(tmp_path / "a", make) == 1 and len(calls) == 3


def test_a_file_in_the_place_of_a_folder_is_not_a_full_disk(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(files.WriteError, match="a file is where a folder is needed") as told:
            files.check_writable(place)
        assert "disk space" not in str(told.value)
