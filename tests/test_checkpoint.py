"""Checkpoints: what is restored is what was saved, or an earlier one, and never anything else."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idea_jax.formats.identity import Identity, read_identity, write_identity
from idea_jax.method import condition
from idea_jax.runtime import versions
from idea_jax.training import resume
from idea_jax.training.resume import CheckpointError, Checkpoints
from idea_jax.training.step import init_state, make_optimizer

SETTINGS = {"seed": 1, "rate": 0.1, "names": ["a", "caf\udce9"], "nothing": None}


def state(step):
    rng = np.random.default_rng(step)
    tokens = jnp.asarray(rng.normal(size=(2, 64)), jnp.float32)
    optimizer = make_optimizer(
        {"pseudo_tokens": 0.1}, beta1=0.9, beta2=0.99, epsilon=1e-7, weight_decay=0.0
    )
    begun = init_state(optimizer, {"pseudo_tokens": tokens}, {"anchor": tokens})
    moments = jax.tree.map(
        lambda x: x + rng.integers(1, 9) if x.dtype == np.int32 else x + rng.normal(size=x.shape),
        begun.opt_state,
    )
    moments = jax.tree.map(lambda new, old: new.astype(old.dtype), moments, begun.opt_state)
    return begun._replace(opt_state=moments, step=jnp.int32(step))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints of the steps 2 and 4."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpoints = Checkpoints(folder, SETTINGS)
    for step in (2, 4):
        checkpoints.save(state(step))
    checkpoints.close()
    checkpoints.close()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def restore(folder, which="latest", settings=SETTINGS):
    checkpoints = Checkpoints(folder, settings)
    try:
        return checkpoints.restore(state(0), which)
    finally:
        checkpoints.close()


def assert_is(got, step):
    expected = state(step)._replace(given=state(0).given)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def steps(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_identity_files_of_the_exact_regulariser_load(tmp_path):
    """As `paper` wrote them before it took the truncated one."""
    method = dataclasses.replace(
        condition.make_method("paper", kv="none"), regulariser="mahalanobis"
    )
    tokens = np.ones((2, 8), np.float32)
    written = Identity(
        method,
        {"pseudo_tokens": tokens},
        {"anchor": tokens},
        "<a>",
        "m",
        None,
        seed=0,
        steps=1,
    )
    write_identity(tmp_path / "identity.safetensors", written)
    assert read_identity(tmp_path / "identity.safetensors").method == method


def test_newest_is_restored_and_an_earlier_one_by_its_path(folder):
    assert_is(restore(folder), 4)
    assert_is(restore(folder, folder / "2"), 2)
    assert steps(folder) == ["2"]  # the run goes on from there


def test_flipped_bits_are_never_restored(saved, tmp_path, caplog):
    rng = np.random.default_rng(0)
    files = [path.relative_to(saved) for path in sorted((saved / "4").rglob("*")) if path.is_file()]
    fell_back = 0
    for number, name in enumerate(files):
        folder = shutil.copytree(saved, tmp_path / str(number))
        raw = bytearray((folder / name).read_bytes())
        if not raw:
            continue
        raw[rng.integers(len(raw))] ^= 1 << int(rng.integers(8))
        (folder / name).write_bytes(raw)
        caplog.clear()
        got = restore(folder)
        if int(got.step) == 4:  # a bit that nobody reads
            assert_is(got, 4)
            assert steps(folder) == ["2", "4"]
            continue
        fell_back += 1
        assert_is(got, 2)
        assert "checkpoint 4 in" in caplog.text and "going back to an earlier one" in caplog.text
        assert steps(folder) == ["2", "damaged-4"]
    assert fell_back >= 3


def test_values_that_orbax_takes_for_good_are_compared_with_their_digests(
    folder, monkeypatch, caplog
):
    """As a flipped bit that its own checks let pass."""
    digests = resume.digests

    def of_other_values(tree, run):
        return digests(jax.tree.map(lambda x: x + 1, tree), run)

    with monkeypatch.context() as patch:
        patch.setattr(resume, "digests", of_other_values)
        assert restore(folder) is None
    assert steps(folder) == ["damaged-2", "damaged-4"]
    assert f"no whole one is left in {folder.resolve()}: starting from the" in caplog.text


def test_steps_that_were_damaged_can_be_saved_again(folder):
    for path in (folder / "4").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    checkpoints = Checkpoints(folder, SETTINGS)
    assert_is(checkpoints.restore(state(0), "latest"), 2)
    checkpoints.save(state(4))
    checkpoints.close()
    assert_is(restore(folder), 4)
    with pytest.raises(CheckpointError, match="there are: 2, 4"):
        restore(folder, folder / "damaged-4")


def test_damaged_one_that_was_asked_for_is_refused(folder):
    shutil.rmtree(folder / "2" / "state")
    with pytest.raises(CheckpointError, match="cannot be read.*name another one"):
        restore(folder, folder / "2")
    assert steps(folder) == ["2", "4"]


def test_other_settings_are_refused_and_cost_nothing(folder):
    with pytest.raises(CheckpointError, match=r"other settings \(seed: 1 -> 2\)"):
        restore(folder, settings=SETTINGS | {"seed": 2})
    assert steps(folder) == ["2", "4"]


def test_other_versions_are_named_where_they_may_be_the_reason_of_a_refusal(folder, monkeypatch):
    jax_now = versions.versions()["jax"]
    monkeypatch.setattr(versions, "versions", lambda: {"jax": "99.0", "python": "3"})
    assert_is(restore(folder), 4)  # they are no reason by themselves
    named = rf"; it was written with python \S+ \(now 3\), jax {jax_now} \(now 99\.0\)"
    with pytest.raises(CheckpointError, match=rf"other settings \(seed: 1 -> 2{named}"):
        restore(folder, settings=SETTINGS | {"seed": 2})
    with pytest.raises(CheckpointError, match=r"\(new: not given -> 1; it was written with"):
        restore(folder, settings=SETTINGS | {"new": 1})
    resumable = resume.resumable
    with monkeypatch.context() as patch:  # as an optimiser keeps its state elsewhere
        patch.setattr(resume, "resumable", lambda state: {"all": resumable(state)})
        for which in ("latest", folder / "4"):
            says = f"cannot be read here .*{named}; install these versions .*delete it"
            with pytest.raises(CheckpointError, match=says):
                restore(folder, which)
    assert steps(folder) == ["2", "4"]  # a good one is not put aside
    assert_is(restore(folder), 4)


def test_checkpoints_from_before_versions_were_kept_go_on(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(resume, "marks_of", dict)
        older = Checkpoints(folder, SETTINGS)
        older.save(state(6))
        older.close()
    monkeypatch.setattr(versions, "versions", lambda: {"jax": "99.0"})
    assert_is(restore(folder), 6)
    with pytest.raises(CheckpointError, match=r"other settings \(seed: 1 -> 2\);"):
        restore(folder, settings=SETTINGS | {"seed": 2})
