"""Preparing the inputs of a shared ID-Enhancer, and training one."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import chaos
import jax
import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file
from test_people import write_celeb_a

from idea_jax import jobs, train_enhancer
from idea_jax.config.reading import parse
from idea_jax.data import text
from idea_jax.data.tokenizer import load_tokenizer
from idea_jax.enhancer import (
    drawing,
    fit,
    identity_loss,
    journal,
    likeness,
    prepare,
    samples,
    settings,
    shards,
    sources,
)
from idea_jax.enhancer import ridge as ridges
from idea_jax.enhancer import step as steps
from idea_jax.enhancer.beginning import refuse_another
from idea_jax.enhancer.shards import ShardsError
from idea_jax.faces import finding, random_model
from idea_jax.faces import models as face_models
from idea_jax.faces import table as face_table
from idea_jax.formats import enhancer
from idea_jax.method import shared
from idea_jax.models import sd
from idea_jax.runtime import compile_cache
from idea_jax.runtime.files import WriteError
from idea_jax.training.results import Base, OccupiedError

SIDE = 8


@pytest.fixture(scope="module")
def checkpoint(smallest_checkpoint, tmp_path_factory):
    """The smallest checkpoint, with a recogniser and without a detector."""
    folder = tmp_path_factory.mktemp("model") / "smallest"
    shutil.copytree(smallest_checkpoint, folder)
    random_model.write_random_recogniser(folder / "face" / "arcface.onnx")
    return folder


@pytest.fixture(scope="module")
def base(checkpoint):
    model, frozen = sd.load(checkpoint)
    tokenizer = load_tokenizer(
        checkpoint / "tokenizer", model.text.vocab_size, model.text.max_position_embeddings
    )
    return Base(model, frozen, tokenizer.with_placeholder("<person>", 2), "smallest", None)


def unit(seed):
    values = np.random.default_rng(seed).standard_normal(512).astype(np.float32)
    return values / np.linalg.norm(values)


def in_memory(counts=(2, 1, 3, 2, 2), named=False):
    """People who bring their faces along: so many pictures each."""

    def portrait(person, place):
        rng = np.random.default_rng([person, place])
        image = Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8))
        box = np.array([2, 2, 18, 18], np.float32)
        sight = face_table.Sight(box, None, 1.0, "0" * 64, unit([person, place]))
        said = ("a photo of {}",) * (place % 2)
        return sources.Portrait(sources.DrawnPicture(f"{person}-{place}", image), said, sight)

    def people(first):
        for number in range(first, len(counts)):
            name = np.array([number % 50 + 1, number % 7 + 1], np.int32) if named else None
            portraits = [portrait(number, place) for place in range(counts[number])]
            yield sources.NumberedPerson(number, portraits, name)

    return sources.Source("memory", "ours", len(counts), people, {}, "f" * 64)


@pytest.fixture(scope="module")
def studio(base):
    return prepare.Studio(base, None, SIDE, crop="center", shard_pictures=3)


@pytest.fixture(scope="module")
def quiet(studio, tmp_path_factory):
    """A folder that was prepared without any trouble."""
    folder = tmp_path_factory.mktemp("quiet") / "data"
    prepare.prepare(in_memory(), folder, studio)
    return folder


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".lock")}


# --- preparing ------------------------------------------------------------------------------------


def test_prepared_pictures_are_those_of_the_source(quiet, base):
    index = shards.read_index(quiet)
    assert (index.people, index.pictures, index.rejected) == (5, 10, 0)
    assert [shard.pictures for shard in index.shards] == [3, 3, 4]
    assert index.is_complete and "biometric" in (quiet / "index.json").read_text()
    assert all(path.stat().st_mode & 0o077 == 0 for path in quiet.glob("0*"))
    folder = samples.open_folder(quiet)
    assert folder.faces.person.tolist() == [0, 0, 1, 2, 2, 2, 3, 3, 4, 4]
    np.testing.assert_array_equal(folder.faces.face[4], unit([2, 1]))
    record = folder.pictures[4]
    assert record.person == 2 and len(record.token_ids) == 1 and not len(folder.pictures[3][1])
    placeholder = base.tokenizer.placeholder
    expected = base.tokenizer([text.fill("a photo of {}", placeholder)])
    np.testing.assert_array_equal(record.token_ids, expected)
    rng = np.random.default_rng([2, 1])
    pixels = rng.integers(0, 256, (20, 20, 3), np.uint8)
    pixels = prepare.images.to_pixels(Image.fromarray(pixels), SIDE, center_crop=True)
    mean, _ = sd.encode_image(base.model, base.frozen, np.stack([pixels, pixels[:, ::-1]]))
    np.testing.assert_allclose(record.mean, mean, atol=2e-3)


class Killed(BaseException):
    """The process is gone."""


@pytest.fixture
def trouble(monkeypatch):
    """Something happens when the picture of a person is looked at."""

    def at(number, act):
        look = prepare.look

        def looked(studio, person):
            if person.number == number:
                act()
            return look(studio, person)

        monkeypatch.setattr(prepare, "look", looked)

    return at


def kill():
    raise Killed


def test_a_preparation_that_was_killed_goes_on_as_if_it_had_not(
    quiet, studio, tmp_path, trouble, monkeypatch
):
    out = tmp_path / "data"
    trouble(4, kill)
    with pytest.raises(Killed):
        prepare.prepare(in_memory(), out, studio)
    (out / ".tmp-123.array_record").write_bytes(b"half")
    with pytest.raises(ShardsError, match="has not ended: 3 people"):
        samples.open_folder(out)
    monkeypatch.undo()
    before = (out / "00000.array_record").stat().st_mtime_ns
    prepare.prepare(in_memory(), out, studio)
    assert contents(out) == contents(quiet)
    assert (out / "00000.array_record").stat().st_mtime_ns == before  # not made again


def test_damaged_shards_are_named_and_made_again(quiet, studio, tmp_path):
    out = tmp_path / "data"
    shutil.copytree(quiet, out)
    path = out / "00001.array_record"
    raw = bytearray(path.read_bytes())
    start = raw.index(samples.open_folder(quiet).pictures[4].mean.tobytes())
    raw[start] ^= 1
    path.write_bytes(raw)
    folder = samples.open_folder(out)
    assert folder.pictures[0].person == 0
    with pytest.raises(ShardsError, match=r"00001.array_record is damaged"):
        folder.pictures[4]
    (out / "00002.safetensors").write_bytes(b"cut")
    with pytest.raises(ShardsError, match=r"00002.safetensors is damaged"):
        samples.open_folder(out)
    prepare.prepare(in_memory(), out, studio)
    assert contents(out) == contents(quiet)
    (out / "index.json").write_text("{")
    with pytest.raises(ShardsError, match=r"index.json is damaged.*--purge"):
        samples.open_folder(out)


def test_a_full_disk_costs_nothing_that_was_written(quiet, studio, tmp_path, trouble, monkeypatch):
    out, (_, hard) = tmp_path / "data", resource.getrlimit(resource.RLIMIT_FSIZE)
    trouble(4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard)))
    try:
        with pytest.raises(WriteError, match=r"cannot write .*array_record: File too large"):
            prepare.prepare(in_memory(), out, studio)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert shards.read_index(out).pictures == 6
    monkeypatch.undo()
    prepare.prepare(in_memory(), out, studio)
    assert contents(out) == contents(quiet)


def test_purge_deletes_what_was_prepared_and_nothing_else(quiet, tmp_path, capsys):
    out = tmp_path / "data"
    shutil.copytree(quiet, out)
    (out / "notes.txt").write_text("mine")
    assert train_enhancer.main(["--purge", str(out)]) == 0
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    assert train_enhancer.main(["--purge", str(out)]) == 1
    assert "is no prepared folder" in capsys.readouterr().err


def test_what_is_being_prepared_is_not_purged(quiet, studio, tmp_path, capsys):
    """What it writes afterwards would be faces of people that somebody believes deleted."""
    out = tmp_path / "data"
    shutil.copytree(quiet, out)
    with jobs.only_run(out, 0):
        assert train_enhancer.main(["--purge", str(out)]) == 1
        with pytest.raises(jobs.JobsError, match=r"another run is using .* another --prepare$"):
            prepare.prepare(in_memory(), out, studio)
    said = capsys.readouterr().err
    assert "is being prepared" in said and "nothing was deleted" in said
    assert contents(out) == contents(quiet)
    assert train_enhancer.main(["--purge", str(out)]) == 0 and not out.exists()


def test_pictures_that_cannot_be_used_are_listed_and_left_out(studio, tmp_path, capsys):
    """No face, unreadable, somebody without any; too few people is one message."""
    good = in_memory((2, 2))
    blind = sources.Portrait(sources.DrawnPicture("blind.png", Image.new("RGB", (20, 20))))

    def people(first):
        for person in good.people(0):
            yield person._replace(portraits=[blind, *person.portraits])
        yield sources.NumberedPerson(2, [blind])

    index = prepare.prepare(replace(good, people=people, count=3), tmp_path / "a", studio)
    assert (index.people, index.pictures, index.rejected) == (2, 4, 3)
    said = capsys.readouterr().err
    assert "3 pictures cannot be used" in said and said.count("blind.png") == 3
    faceless = replace(
        good, people=lambda first: iter([sources.NumberedPerson(0, [blind])]), count=1
    )
    with pytest.raises(ShardsError, match=r"of the 1 people only 0 can be used.*two people"):
        prepare.prepare(faceless, tmp_path / "b", studio)
    # Nothing was prepared, so nothing is left that other pictures would have to agree with.
    assert not (tmp_path / "b").exists()
    # Nor the face of the only person.
    with pytest.raises(ShardsError, match=r"only 1 can be used \(2 pictures can, 0 cannot\)"):
        prepare.prepare(in_memory((2,)), tmp_path / "c", studio)
    assert not (tmp_path / "c").exists()
    with pytest.raises(ShardsError, match=r"prepared in another way \(settings differ\)"):
        prepare.prepare(good, tmp_path / "a", replace(studio, seed=1))


def test_other_pictures_in_the_places_of_the_first_are_noticed(studio, tmp_path):
    def write(number, texts=""):
        for person in "ab":
            (tmp_path / person).mkdir(exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (20, 20 + number, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / person / "1.png")
        (tmp_path / "a" / "captions.jsonl").write_text(texts)
        return replace(sources.from_folders(tmp_path), face_model="f" * 64)

    out = tmp_path / ".out"
    out.mkdir()
    first = write(0)
    prepare.begin(first, out, studio)
    prepare.begin(write(0), out, studio)
    said = '{"file": "1.png", "text": "{} at sea"}'
    write(0)
    path = tmp_path / "a" / "1.png"
    path.write_bytes(path.read_bytes()[:-30] + bytes(30))
    same_size = replace(sources.from_folders(tmp_path), face_model="f" * 64)
    for other in (same_size, write(1), write(0, said)):
        with pytest.raises(ShardsError, match=r"prepared in another way \(the pictures differ\)"):
            prepare.begin(other, out, studio)
    # A folder from before this was noted goes on.
    older = replace(shards.read_index(out), facts={"pictures": first.facts["pictures"]})
    shards.write_index(out, older)
    prepare.begin(write(1), out, studio)
    # One that another version made is no damaged one.
    about = json.loads((out / shards.INDEX).read_text())
    (out / shards.INDEX).write_text(json.dumps({**about, "format_version": 9}))
    with pytest.raises(ShardsError, match=r"version 9, expected .* or install the idea_jax that"):
        prepare.begin(write(1), out, studio)


def test_other_pictures_in_a_data_set_are_noticed(studio, tmp_path):
    """Two sets of the same people with as many pictures each, which have no file names."""
    found = []
    for name, first in (("one", 0), ("two", 100)):
        (tmp_path / f"{name} raw").mkdir()
        write_celeb_a(tmp_path / name, tmp_path / f"{name} raw", first=first)
        found.append(replace(sources.from_celeb_a(tmp_path / name), face_model="f" * 64))
    one, two = found
    assert one.facts["pictures"] == two.facts["pictures"]
    (tmp_path / "out").mkdir()
    prepare.begin(one, tmp_path / "out", studio)
    with pytest.raises(ShardsError, match=r"prepared in another way \(the pictures differ\)"):
        prepare.begin(two, tmp_path / "out", studio)
    shutil.move(tmp_path / "one", tmp_path / "moved")
    same = replace(sources.from_celeb_a(tmp_path / "moved"), face_model="f" * 64)
    prepare.begin(same, tmp_path / "out", studio)


def test_folders_of_people_may_have_captions(tmp_path):
    for person in "ab":
        (tmp_path / person).mkdir()
        Image.new("RGB", (20, 20)).save(tmp_path / person / "1.png")
    captions = tmp_path / "a" / "captions.jsonl"
    captions.write_text('{"file": "1.png", "text": "{} at sea"}\n\n')
    one, two = sources.from_folders(tmp_path).people(0)
    assert one.portraits[0].texts == ("{} at sea",) and two.portraits[0].texts == ()
    captions.write_text('{"file": "1.png", "text": "somebody at sea"}')
    with pytest.raises(ShardsError, match=r"captions.jsonl, line 1 .*does not mention the person"):
        sources.from_folders(tmp_path)


class Finder:
    """Sees as many faces as the upper left pixel is red; each is the embedding of its green."""

    detector = None

    def look_at(self, image, name):
        red, green, _ = image.getpixel((0, 0))
        if red != 1:
            raise face_models.FaceError(f"{red} faces")
        box = np.array([0, 0, 4, 4], np.float32)
        near = unit(green // 10) + 0.2 * unit(1000 + green)
        return face_table.Sight(box, None, 1.0, "", near / np.linalg.norm(near))


def test_drawings_of_a_celebrity_count_if_they_are_alike():
    def portrait(red, green):
        image = Image.new("RGB", (20, 20), (red, green, 0))
        return sources.Portrait(sources.DrawnPicture(f"{green}", image))

    shown = [portrait(1, 10), portrait(1, 11), portrait(1, 50), portrait(0, 12), portrait(1, 13)]
    kept, rejected = sources.cast(Finder(), shown, 0.5)
    assert [p.picture.name for p in kept] == ["10", "11", "13"]
    assert sorted(picture.name for picture, _ in rejected) == ["12", "50"]
    kept, rejected = sources.cast(Finder(), [portrait(1, 10), portrait(1, 20)], 0.5)
    assert not kept and len(rejected) == 2


class Red:
    """Finds a face on every picture; its embedding says how red the picture is."""

    detector = None

    def look_at(self, image, name):
        pixels = np.asarray(image, np.float32)
        near = unit(0) + 0.1 * unit(int(pixels[..., 0].sum()))
        box = np.array([0, 0, 4, 4], np.float32)
        return face_table.Sight(box, None, 1.0, "", near / np.linalg.norm(near))


def test_celebrities_are_the_same_from_whatever_place_on(base):
    names = ["Ada Lovelace", "Alan Turing", "Grace Hopper", "Emmy Noether", "Marie Curie"]
    casting = sources.Casting(pictures=2, steps=2, batch=1)
    source = sources.celebrities(base, Red(), names, casting, side=SIDE)
    everybody, later = list(source.people(0)), list(source.people(3))
    assert [person.number for person in everybody] == [0, 1, 2, 3, 4]
    assert everybody[3].portraits[0].texts != everybody[3].portraits[1].texts
    for person, again in zip(everybody[3:], later, strict=True):
        np.testing.assert_array_equal(person.name_ids, again.name_ids)
        for one, other in zip(person.portraits, again.portraits, strict=True):
            assert one.picture.image.tobytes() == other.picture.image.tobytes()
    pictures = {p.picture.image.tobytes() for person in everybody for p in person.portraits}
    assert len(pictures) == 10


def test_held_out_people_are_drawn_from_one_picture(base, begun, quiet, monkeypatch):
    folder = samples.open_folder(quiet)
    (left,), sitters = likeness.hold_out([folder], 4, 0)
    assert len(sitters) == 1 and len(left) == 4  # a quarter of five people
    monkeypatch.setattr(likeness, "STEPS", 2)
    config, tree = begun
    mesh = drawing.mesh_of(jax.devices())
    placed = replace(base, frozen=drawing.put(base.frozen, mesh))
    sitting = likeness.Sitting("a photo of {}", count=2, guidance=3.0, side=SIDE, seed=0)
    found = likeness.measure(
        config, drawing.put(tree, mesh), placed, mesh, sitters * 4, Red(), sitting
    )
    assert found.found == 1 and -1 <= found.worst <= found.mean <= 1
    assert found.grid.shape == (SIDE, SIDE * 8, 3)


# --- samples --------------------------------------------------------------------------------------


def test_samples_show_another_picture_of_the_same_person(quiet):
    folder = samples.open_folder(quiet)
    plan = samples.Plan(
        [folder], [1.0], [np.arange(5)], size=5, seed=0, small=0.0, mean=0.0, flip=True
    )
    owners = {folder.faces.face[i].tobytes(): i for i in range(10)}
    means = {folder.pictures[i].mean[m].tobytes(): i for i in range(10) for m in range(2)}
    for step in range(6):
        drawn = [plan.sample(5 * step + row) for row in range(5)]
        one = [owners[sample.face.tobytes()] for sample in drawn]
        other = [means[sample.mean.tobytes()] for sample in drawn]
        people = folder.faces.person
        assert people[one].tolist() == people[other].tolist()
        assert sorted(people[one].tolist()) == [0, 1, 2, 3, 4]
        for a, b in zip(one, other, strict=True):
            assert (a == b) == (people[a] == 1)  # who has a single picture


@pytest.mark.parametrize("flip, shares", [(True, {0, 1}), (False, {0})])
def test_pictures_are_mirrored_where_that_is_wanted(quiet, flip, shares):
    folder = samples.open_folder(quiet)
    plan = samples.Plan(
        [folder], [1.0], [np.arange(5)], size=5, seed=0, small=0.0, mean=0.0, flip=flip
    )
    sides = {folder.pictures[i].mean[m].tobytes(): m for i in range(10) for m in range(2)}
    assert {sides[plan.sample(number).mean.tobytes()] for number in range(30)} == shares


def test_readers_share_out_the_samples_of_a_step_and_begin_anywhere(quiet):
    folder = samples.open_folder(quiet)

    def read(first, process, processes):
        plan = samples.Plan(
            [folder, folder],
            [3.0, 1.0],
            [np.arange(5), np.arange(1, 3)],
            size=4,
            seed=1,
            small=0.5,
            mean=0.5,
            flip=True,
        )
        reader = samples.Reader(plan, range(first, 4), process, processes)
        batches = list(reader)
        assert 0 <= reader.share_waited() <= 1
        reader.close()
        return batches

    whole, later = read(0, 0, 1), read(2, 0, 1)
    parts = [read(0, process, 2) for process in range(2)]
    assert len(whole) == 4 and len(later) == 2
    for step, batch in enumerate(whole):
        together = jax.tree.map(
            lambda *leaves: np.concatenate(leaves), *(part[step] for part in parts)
        )
        order = np.argsort(together.row)
        same = jax.tree.map(lambda leaf, order=order: leaf[order], together)
        jax.tree.map(np.testing.assert_array_equal, batch, same)
    for batch, same in zip(whole[2:], later, strict=True):
        np.testing.assert_array_equal(batch.face, same.face)


# --- one step -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(base):
    config = shared.EnhancerConfig("mlp", base.model.text.hidden_size, 2, 16)
    start = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
    key = jax.random.key(0)
    return config, shared.init_shared(config, base.model, key, start, 1.0, start[None])


def three_steps(base, begun, quiet, count, parts=1, is_sharded=False, poison=None):
    """Weights and losses after three steps on so many devices."""
    config, tree = begun
    mesh = drawing.mesh_of(jax.devices()[:count])
    folder = samples.open_folder(quiet)
    plan = samples.Plan(
        [folder], [1.0], [np.arange(5)], size=8, seed=0, small=0, mean=0.5, flip=True
    )
    optimizer = steps.make_optimizer(1e-3, warmup=2, steps=9, clip=1.0, beta2=0.99, epsilon=1e-6)
    recipe = steps.Recipe(8, parts, 0.3, 5.0, 0.9)
    specs = steps.shard_specs(base.frozen, count) if is_sharded else drawing.WHOLE
    frozen = drawing.put(base.frozen, mesh, specs)
    state = drawing.put(steps.init_state(optimizer, tree), mesh)
    constants = {name: leaf for name, leaf in tree.items() if name not in shared.TRAINED}
    losses = []
    for number in range(3):
        rows = [plan.sample(8 * number + row) for row in range(8)]
        batch = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
        if number == poison:
            batch = batch._replace(face=batch.face * np.nan)
        inputs = {"seed": np.uint32(0), "step": np.int32(number)}
        inputs["stop"] = np.zeros(count, np.int32)
        state, metrics = steps.train_step(
            steps.EnhancerProgram(base.model, config, recipe, optimizer, mesh, is_sharded),
            frozen,
            state,
            constants,
            batch,
            inputs,
        )
        losses.append(float(metrics.loss))
    return jax.device_get(state), losses


@pytest.fixture(scope="module")
def on_one(base, begun, quiet):
    return three_steps(base, begun, quiet, 1)


@pytest.mark.parametrize("layout", [{"count": 8}, {"count": 2, "parts": 2, "is_sharded": True}])
def test_devices_and_parts_of_a_step_do_not_matter(base, begun, quiet, on_one, layout):
    state, losses = three_steps(base, begun, quiet, **layout)
    np.testing.assert_allclose(losses, on_one[1], rtol=1e-5)
    assert int(state.step) == 3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state, on_one[0])
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(),
        state.trained["enhancer"],
        jax.device_get(begun[1]["enhancer"]),
    )
    assert max(jax.tree.leaves(moved)) > 1e-4  # it learned


def test_no_step_is_taken_from_one_that_is_not_finite_on(base, begun, quiet, on_one):
    state, losses = three_steps(base, begun, quiet, 1, poison=1)
    assert np.isnan(losses[1]) and np.isfinite(losses[2]) and int(state.step) == 1


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def celeb_a(checkpoint, tmp_path_factory):
    """A set in CelebA's schema, prepared by the command."""
    raw, data = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("celeb_a")
    write_celeb_a(data, raw)
    out = tmp_path_factory.mktemp("prepared") / "data"
    flags = ["--prepare", out, "--dataset", "celeb_a", "--dataset_dir", data, "--crop", "center"]
    flags += ["--pretrained_model_name_or_path", checkpoint]
    assert train_enhancer.main([*map(str, flags)]) == 0
    index = shards.read_index(out)
    assert (index.people, index.pictures) == (3, 8)
    return out


@pytest.fixture(scope="module")
def flags(checkpoint, celeb_a):
    """Of a training of three steps."""
    given = f"--pretrained_model_name_or_path {checkpoint} --data {celeb_a} --width 16"
    return [
        *given.split(),
        *"--max_train_steps 3 --train_batch_size 8 --warmup_steps 1 --adam_epsilon 1e-6".split(),
        *"--validation_steps 0 --report_to none".split(),
    ]


@pytest.fixture(scope="module")
def straight(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight")
    assert train_enhancer.main([*flags, "--output_dir", str(out)]) == 0
    return out


def same(one, other, atol):
    one, other = (enhancer.read(out / fit.RESULT) for out in (one, other))
    assert one.config == other.config and one.about == other.about
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), one.shared, other.shared)


def test_result_says_what_it_is_of(straight):
    found = enhancer.read(straight / fit.RESULT)
    about = found.about
    assert (about["people"], about["pictures"], about["steps"]) == (3, 8, 3)
    assert about["sources"] == ["celeb_a"] and "non-commercial research" in about["licence"]
    said = json.loads((straight / "run.json").read_text())
    assert len(said["loss_curve"]) == 3 and 0 <= said["share_waited"] <= 1
    tokens = [
        shared.predict(found.config, found.shared, unit(seed))["pseudo_tokens"] for seed in range(2)
    ]
    assert np.abs(tokens[0] - tokens[1]).max() > 0


def test_an_enhancer_of_other_people_is_not_replaced(
    flags, straight, quiet, celeb_a, tmp_path, capsys
):
    out = shutil.copytree(straight, tmp_path / "out")
    before = contents(out)
    other = [str(quiet) if word == str(celeb_a) else word for word in flags]
    assert train_enhancer.main([*other, "--output_dir", str(out)]) == 1
    said = capsys.readouterr().err
    for phrase in (f"3 people and 8 pictures of {celeb_a}", str(quiet), "choose another"):
        assert phrase in said
    assert contents(out) == before
    # Of the same people it may be trained again, also where its settings are no longer there.
    cfg = parse(settings.EnhancerTrainConfig, [*flags, "--output_dir", str(out), "--seed", "1"])
    about = enhancer.read(out / fit.RESULT).about
    refuse_another(cfg, about, out / fit.RESULT)
    (out / "config.yaml").unlink()
    refuse_another(cfg, about, out / fit.RESULT)
    (out / fit.RESULT).write_bytes(b"cut")
    with pytest.raises(OccupiedError, match="unknown people .* this run trains on 3"):
        refuse_another(cfg, about, out / fit.RESULT)


def stop_after_2(monkeypatch):
    """A training is told to stop in its second step."""
    inputs_of = fit.inputs_of

    def told_to_stop(work, batch, taken, stops):
        if taken == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return inputs_of(work, batch, taken, stops)

    monkeypatch.setattr(fit, "inputs_of", told_to_stop)


def test_stopped_run_goes_on_as_if_it_had_not_been(flags, straight, tmp_path, monkeypatch, capsys):
    stop_after_2(monkeypatch)
    out = ["--output_dir", str(tmp_path)]
    assert train_enhancer.main([*flags, *out]) == 143
    assert "stopped after step 2 of 3" in capsys.readouterr().err
    assert not (tmp_path / fit.RESULT).exists()
    monkeypatch.undo()
    assert train_enhancer.main([*flags, *out]) == 1  # refused: it would mix with the checkpoint
    resumed = [*flags, *out, "--resume_from_checkpoint", "latest", "--checkpointing_steps", "1"]
    assert train_enhancer.main([*resumed, "--seed", "1"]) == 1
    assert "other settings (seed: 0 -> 1)" in capsys.readouterr().err
    assert train_enhancer.main(resumed) == 0
    same(tmp_path, straight, 0)
    assert compile_cache.needs[-1] > 0  # of memory; told where there is too little
    said = (tmp_path / "run.json").read_text()
    assert train_enhancer.main(resumed) == 0  # nothing is left to do
    assert (tmp_path / "run.json").read_text() == said


def in_two_processes(flags, out):
    """Trains in two processes with a device each; returns exit codes and output of both."""
    command = [sys.executable, "-m", "idea_jax.train_enhancer", *flags, "--distributed"]
    command += ["--output_dir", str(out)]
    common = {"PYTHONPATH": str(chaos.ROOT), "XLA_FLAGS": chaos.XLA.format(1)}
    started = [
        subprocess.Popen(
            command,
            env=os.environ | common | variables,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True},
        )
        for variables in chaos.processes_of(2)
    ]
    try:
        said = [process.communicate(timeout=chaos.PATIENCE)[0] for process in started]
    finally:
        for process in started:
            chaos.end(process)
    return [process.returncode for process in started], said


def test_two_processes_train_what_one_does(flags, straight, tmp_path):
    codes, said = in_two_processes(flags, tmp_path)
    assert codes == [0, 0], said
    same(tmp_path, straight, 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--train_batch_size", "6"], "--train_batch_size 6 cannot be divided over 8 devices"),
        (["--data", "nowhere"], "nowhere is no prepared folder"),
        (["--data", "{celeb_a}=0"], "--data is FOLDER or FOLDER=WEIGHT"),
        (["--start", "ridge"], "nobody in --data has a name"),
        (["--validation_steps", "1", "--face_model", "{other}"], "the recogniser of SHA-256"),
    ],
)
def test_bad_input_is_one_message(flags, celeb_a, change, message, tmp_path, capsys):
    other = tmp_path / "other.onnx"
    random_model.write_random_recogniser(other, seed=1)
    kept = flags[:2] + flags[4:] if change[0] == "--data" else flags
    change = [word.format(celeb_a=celeb_a, other=other) for word in change]
    assert train_enhancer.main([*kept, *change, "--output_dir", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


@pytest.mark.parametrize("data", ["celeba", "celebrities"])
@pytest.mark.parametrize("model", ["sd15", "sd21", "sdxl"])
def test_shipped_configs_have_commands(model, data, request):
    path = request.config.rootpath / "configs" / f"enhancer_{model}_{data}.yaml"
    prepares, trains = (line.split()[4:] for line in path.read_text().splitlines()[:2])
    cfg = parse(settings.PrepareConfig, prepares)
    assert (cfg.people == "celebrities") == (data == "celebrities")
    trained = parse(settings.EnhancerTrainConfig, trains)
    assert trained.pretrained_model_name_or_path == cfg.pretrained_model_name_or_path


def test_folder_of_another_checkpoint_is_refused(flags, checkpoint, base, tmp_path, capsys):
    changed = tmp_path / "changed"
    shutil.copytree(checkpoint, changed)
    kernels = jax.tree.map(lambda leaf: leaf * 1.5, base.frozen.cross_kv)
    sd.save(changed, base.model, base.frozen._replace(cross_kv=kernels))
    swapped = [flags[0], str(changed), *flags[2:]]
    assert train_enhancer.main([*swapped, "--output_dir", str(tmp_path / "out")]) == 1
    assert "was prepared for another checkpoint" in capsys.readouterr().err


def test_a_lora_is_part_of_the_checkpoint(flags, checkpoint, base, tmp_path, capsys):
    """What is prepared with it is for it alone, and the training has it, too."""
    kernel = base.frozen.cross_kv["mid_block"]["attentions_0"]["transformer_blocks_0"]["to_v"]
    D, inner = kernel.shape
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v.lora"
    style, data = tmp_path / "style.safetensors", tmp_path / "data"
    thin = {"down": np.ones((1, D), np.float32), "up": np.ones((inner, 1), np.float32)}
    save_file({f"{key}_{name}.weight": value for name, value in thin.items()}, style)
    for number in range(4):
        person = tmp_path / "people" / str(number // 2)
        person.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(person / f"{number}.png")
    model = ["--pretrained_model_name_or_path", str(checkpoint), "--lora", str(style)]
    asked = ["--prepare", str(data), "--people", str(tmp_path / "people"), "--crop", "center"]
    assert train_enhancer.main([*model, *asked]) == 0
    rest = ["--data", str(data), "--output_dir", str(tmp_path / "out"), "--max_train_steps", "0"]
    small = ["--width", "16", "--train_batch_size", "8", "--validation_steps", "0"]
    run = [*rest, *small, "--report_to", "none"]
    assert train_enhancer.main([*model, *run]) == 0
    capsys.readouterr()
    assert train_enhancer.main([*model[:2], *run]) == 1
    assert "was prepared for another checkpoint" in capsys.readouterr().err


# --- ridge ----------------------------------------------------------------------------------------


def test_regression_is_exact_in_the_file_and_needs_no_step(studio, checkpoint, flags, tmp_path):
    prepare.prepare(in_memory((1, 2) * 10, named=True), tmp_path / "data", studio)
    out = tmp_path / "out"
    given = ["--data", str(tmp_path / "data"), "--output_dir", str(out), "--start", "ridge"]
    given += ["--kind", "linear", "--max_train_steps", "0"]
    given = [*flags[:2], *flags[4:], *given]
    assert train_enhancer.main(given) == 0
    found = enhancer.read(out / fit.RESULT)
    folder = samples.open_folder(tmp_path / "data")
    model, frozen = sd.load(checkpoint)
    people = [np.arange(len(folder.people))]
    faces, targets = ridges.examples([folder], people, model, frozen)
    ridge = ridges.fit(faces, targets.reshape(len(targets), -1))
    assert found.about["ridge"]["names"] == 20 and found.about["steps"] == 0
    face = unit(5)
    expected = ridge.target_mean + (face - ridge.face_mean) @ ridge.kernel
    predicted = shared.predict(found.config, found.shared, face)
    np.testing.assert_allclose(predicted["pseudo_tokens"].ravel(), expected, atol=1e-5)


def test_regression_finds_a_linear_map_and_says_how_good_it_is():
    rng = np.random.default_rng(0)
    faces = np.stack([unit(i) for i in range(600)])
    kernel = rng.standard_normal((512, 6))
    exact = ridges.fit(faces, faces @ kernel + 3)
    assert exact.r2 > 0.8
    noise = ridges.fit(faces, rng.standard_normal((600, 6)))
    assert noise.r2 < 0.05


# --- the identity loss ----------------------------------------------------------------------------


def of_drawings(base, begun, quiet, face_model, count):
    """A program that draws eight people on so many devices, its weights, and the loss of a step."""
    config, tree = begun
    folder = samples.open_folder(quiet)
    plan = samples.Plan([folder], [1.0], [np.arange(5)], size=8, seed=0, small=0, mean=0, flip=True)
    cfg = settings.EnhancerTrainConfig(
        "smallest", ["data"], id_loss_weight=2.0, id_loss_drawings=8, id_loss_inference_steps=2
    )
    mesh = drawing.mesh_of(jax.devices()[:count])
    finder = finding.open_finder(face_model, needs_detector=False)
    frozen = drawing.put(base.frozen, mesh)
    make = identity_loss.of_run(cfg, base, config, mesh, plan, finder)
    loss = make(range(4, 6))
    # Nothing of the tree is zero, so that all of it has a gradient.
    rng = np.random.default_rng(3)
    trained = {
        name: jax.tree.map(
            lambda leaf: np.asarray(leaf) + rng.normal(0, 0.05, leaf.shape).astype(np.float32),
            tree[name],
        )
        for name in shared.TRAINED
    }
    constants = {name: leaf for name, leaf in tree.items() if name not in shared.TRAINED}
    return loss, frozen, trained, constants, {"seed": np.uint32(0), "step": np.int32(4)}


@pytest.fixture(scope="module")
def face_model(checkpoint):
    return checkpoint / "face" / "arcface.onnx"


def test_drawings_have_the_gradient_of_their_likeness_on_any_number_of_devices(
    base, begun, quiet, face_model
):
    loss, *given = of_drawings(base, begun, quiet, face_model, 1)
    found = loss(*given)
    loss.close()
    spread, *there = of_drawings(base, begun, quiet, face_model, 2)
    other = spread(*there)
    spread.close()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, other)
    assert found.found == 8 and abs(found.similar) < 8  # of eight drawings

    # Along a random way the loss changes as its gradient says.
    rng = np.random.default_rng(4)
    frozen, trained, constants, inputs = given
    way = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), trained)

    def value(step):
        moved = jax.tree.map(lambda x, y: x + np.float32(step) * y, trained, way)
        again, *_ = of_drawings(base, begun, quiet, face_model, 1)
        similar = again(frozen, moved, constants, inputs).similar
        again.close()
        return 2.0 * (1 - float(similar) / 8)

    rise = (value(2e-3) - value(-2e-3)) / 4e-3
    along = sum(
        float((a * b).sum())
        for a, b in zip(jax.tree.leaves(found.grads), jax.tree.leaves(way), strict=True)
    )
    assert abs(along) > 1e-3
    np.testing.assert_allclose(along, rise, rtol=0.05)


def test_likeness_of_drawings_is_that_of_those_on_which_a_face_was_found(tmp_path):
    cfg = settings.EnhancerTrainConfig(
        "smallest", ["data"], report_to="none", id_loss_weight=1.0, id_loss_drawings=2
    )
    notes = journal.Journal(SimpleNamespace(cfg=cfg, first=False), tmp_path, 0)
    assert notes.likeness_of_drawings() is None
    step = steps.EnhancerMetrics(np.float32(0.1), np.float32(1), np.bool_(True), np.int32(0))
    notes.step(1, step, (np.float32(0), np.float32(0)))
    assert notes.likeness_of_drawings() == {"mean": None, "found": 0}
    notes.step(2, step, (np.float32(0.75), np.float32(1)))
    notes.step(3, step, (np.float32(1.05), np.float32(2)))
    assert notes.likeness_of_drawings() == {"mean": 0.6, "found": 0.5}
    notes.close()


def test_what_could_not_be_written_is_refused_before_the_training(flags, celeb_a, tmp_path, capsys):
    data = shutil.copytree(celeb_a, tmp_path / "data")
    index = json.loads((data / "index.json").read_text())
    (data / "index.json").write_text(json.dumps(index | {"licence": "/home/anna/terms"}))
    given = [str(data) if flag == str(celeb_a) else flag for flag in flags]
    assert train_enhancer.main([*given, "--output_dir", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert "cannot be described so: about has a path" in message and "Traceback" not in message


def test_training_goes_on_from_a_file_with_the_identity_loss(
    flags, straight, tmp_path, monkeypatch, capsys, caplog
):
    earlier = straight / "enhancer.safetensors"
    drawn = "--id_loss_weight 1 --id_loss_drawings 8 --id_loss_inference_steps 1".split()
    further = [*flags, "--init_enhancer", str(earlier), *drawn, "--checkpointing_steps", "1"]
    further.remove("--width")
    further.remove("16")
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    assert train_enhancer.main([*further, "--output_dir", str(whole)]) == 0
    stop_after_2(monkeypatch)
    assert train_enhancer.main([*further, "--output_dir", str(out)]) == 143
    monkeypatch.undo()
    again = [*further, "--output_dir", str(out), "--resume_from_checkpoint", "latest"]
    assert train_enhancer.main(again) == 0
    same(whole, out, 1e-6)
    codes, told = in_two_processes(further, tmp_path / "two")
    assert codes == [0, 0], told
    same(whole, tmp_path / "two", 1e-5)
    before, found = enhancer.read(earlier), enhancer.read(whole / "enhancer.safetensors")
    assert found.about["earlier"] == {"sha256": before.sha256, "steps": 3}
    assert found.config == before.config and found.config.basis > 0
    np.testing.assert_array_equal(found.shared["basis"], before.shared["basis"])
    said = json.loads((whole / "run.json").read_text())
    assert said["likeness_of_drawings"]["mean"] < 1 == said["likeness_of_drawings"]["found"]
    written = yaml.safe_load((whole / "config.yaml").read_text())
    assert written["width"] == before.config.width == 16  # of the file, and not of the settings
    # Files that another checkpoint's weights, or somebody who means harm, have made.
    made_by = {}
    for name, changes in (
        ("weights", {"base_weights": "0" * 64}),
        ("faces", {"face_model": "0" * 64}),
        ("path", {"licence": "~/anna"}),
    ):
        made_by[name] = tmp_path / f"{name}.safetensors"
        with safe_open(earlier, "numpy") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            described = json.loads(file.metadata()[enhancer.FORMAT])
        described["about"] |= changes
        save_file(tensors, made_by[name], {enhancer.FORMAT: json.dumps(described)})
    capsys.readouterr()
    begun = [*flags, "--init_enhancer", str(made_by["weights"]), "--max_train_steps", "0"]
    del begun[begun.index("--width") : begun.index("--width") + 2]
    assert train_enhancer.main([*begun, "--output_dir", str(tmp_path / "begun")]) == 0
    assert "on other weights than those of" in caplog.text
    for change, message in (
        ("--width 32", "--width is 32, and"),
        ("--start names", "--start has no effect with --init_enhancer"),
        ("--id_loss_weight 0", "--id_loss_drawings has no effect without --id_loss_weight"),
        ("--id_loss_drawings 7", "cannot be divided over 8 devices"),
        ("--shard_frozen", "leave --shard_frozen out"),
        (f"--init_enhancer {tmp_path / 'none'}", "cannot be read"),
        (f"--init_enhancer {made_by['faces']}", "or prepare --data with the checkpoint, the recog"),
        (f"--init_enhancer {made_by['path']}", "about has a path"),
        ("--id_loss_inference_steps 2000", "--id_loss_inference_steps is 2000; expected at most"),
    ):
        given = [*further, "--output_dir", str(tmp_path / "bad"), *change.split()]
        assert train_enhancer.main(given) in (1, 2)
        printed = capsys.readouterr().err
        assert message in printed and "Traceback" not in printed
