"""A shared ID-Enhancer for SDXL: prepared, trained, kept in a file, drawn and trained with."""

import json
from dataclasses import replace
from pathlib import Path

import enhancers as made
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import write_smallest
from PIL import Image
from test_train_enhancer import SIDE, in_memory, unit

import sample_jax
import train_jax
from idea_jax import export, random_sd, train_enhancer
from idea_jax.data.tokenizer import load_tokenizer
from idea_jax.enhancer import fit, prepare, ridge, samples, shards
from idea_jax.faces import random_model
from idea_jax.formats import enhancer as enhancers
from idea_jax.formats import exported
from idea_jax.formats.identity import read_identity
from idea_jax.method import condition, shared
from idea_jax.models import sd
from idea_jax.runtime.files import file_digest
from idea_jax.training.photos import size_ids
from idea_jax.training.results import Base

MODEL = random_sd.config("tiny", "sdxl", vocab_size=100)
OTHER = random_sd.config("tiny", "sd2", vocab_size=100)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """With a recogniser, and a shared ID-Enhancer of random weights."""
    folder = write_smallest(tmp_path_factory.mktemp("xl") / "smallest", "sdxl")
    random_model.write_random_recogniser(folder / "face" / "arcface.onnx")
    made.add_to(folder)
    return folder


@pytest.fixture(scope="module")
def base(checkpoint):
    model, frozen = sd.load(checkpoint)
    tokenizer = load_tokenizer(checkpoint / "tokenizer", model.text.vocab_size, 77)
    return Base(model, frozen, tokenizer.with_placeholder("<person>", 2), "smallest", None)


@pytest.fixture(scope="module")
def data(base, checkpoint, tmp_path_factory):
    """A prepared folder of twenty people with names."""
    folder = tmp_path_factory.mktemp("data") / "data"
    studio = prepare.Studio(base, None, SIDE, crop="center", shard_pictures=8)
    seen_by = file_digest(checkpoint / "face" / "arcface.onnx")
    source = replace(in_memory((1, 2) * 10, named=True), face_model=seen_by)
    prepare.prepare(source, folder, studio)
    return folder


def run(command, *flags):
    return command.main([*map(str, flags)])


def train(checkpoint, data, out, *flags):
    common = ["--pretrained_model_name_or_path", checkpoint, "--data", data, "--output_dir", out]
    common += ["--width", 16, "--train_batch_size", 8, "--validation_steps", 0]
    return run(train_enhancer, *common, "--report_to", "none", "--adam_epsilon", 1e-6, *flags)


# --- the method and its file ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "names"])
def test_a_file_has_both_encoders_parts_and_fits_sdxl_alone(kind, tmp_path):
    cfg, path = made.config_for(MODEL, kind), tmp_path / "e.safetensors"
    tree = made.tree(cfg, MODEL)
    enhancers.write(path, cfg, tree, made.about())
    got = enhancers.read(path)
    assert got.config == cfg and cfg.widths == (32, 48)
    jax.tree.map(np.testing.assert_array_equal, got.shared, tree)
    enhancers.check(got, MODEL, path, face_model=None, num_tokens=2)
    with pytest.raises(enhancers.EnhancerError, match="text width is 32 and 48, this .* is 32;"):
        enhancers.check(got, OTHER, path, face_model=None)
    small = made.config_for(OTHER)
    enhancers.write(path, small, made.tree(small, OTHER), made.about())
    with pytest.raises(enhancers.EnhancerError, match="is 32, this checkpoint's is 32 and 48"):
        enhancers.check(enhancers.read(path), MODEL, path, face_model=None)
    for changed, says in (
        ({"start": {"clip_l": tree["start"]["clip_l"]}}, "start/clip_g is missing"),
        ({"scale": {"clip_l": np.float32(1), "clip_g": np.float32(0)}}, "its scale is 0"),
    ):
        with pytest.raises(enhancers.EnhancerError, match=says):
            enhancers.write(path, cfg, tree | changed, made.about())


def test_each_encoders_prediction_is_that_of_a_tree_of_its_own():
    cfg = made.config_for(MODEL)
    tree = made.tree(cfg, MODEL)
    person = shared.predict(cfg, tree, unit(1))
    for name, width in zip(sd.ENCODERS, cfg.widths, strict=True):
        own = {part: value[name] for part, value in tree.items() if part != "kv"}
        alone = shared.predict(made.config(width), own, unit(1))
        for part, value in alone.items():
            np.testing.assert_allclose(person[part][name], value, atol=1e-6)


def test_a_pair_for_each_encoder_is_half_of_one_of_their_width():
    """Of the real widths: 31 million values and less instead of 60."""
    model = random_sd.config("sdxl", "sdxl", random_sd.CLIP_VOCAB_SIZE)
    cfg = shared.EnhancerConfig("mlp", 768, dim_2=1280)
    start = cfg.each(lambda width: jax.ShapeDtypeStruct((2, width), jnp.float32))

    def fresh(start):
        ones = cfg.each(lambda _: 1.0)
        names = jax.tree.map(lambda leaf: leaf[None], start)
        return shared.init_shared(cfg, model, jax.random.key(0), start, ones, names)

    tree = jax.eval_shape(fresh, start)
    count = sum(leaf.size for leaf in jax.tree.leaves([tree["enhancer"], tree["adapter"]]))
    one = 2 * 2048 * 2048 + 4 * 2048 * 2048  # an adapter of that width alone
    assert count < one


@pytest.mark.parametrize("own", [{"kv": "none"}, {"kv": "low_rank", "own_adapter": True}])
def test_self_contained_draws_the_same_without_the_shared_tree(own, base, checkpoint):
    model, enhancer = base.model, enhancers.read(checkpoint / enhancers.FILE)
    method = shared.person_method(enhancer.config, **own)
    person, given = shared.begin_person(
        enhancer.config, model, method, enhancer.shared, jax.random.key(0), unit(3)
    )
    jax.tree.map(np.testing.assert_array_equal, given["anchor"], person["pseudo_tokens"])
    ids = jnp.asarray(base.tokenizer(["a photo of <person>_v0 <person>_v1"]))
    ours = jax.tree.map(jnp.asarray, shared.frozen_part(enhancer.shared))
    frozen = base.frozen._replace(shared=ours)
    two = condition.drawing_keys_values(model, method, frozen, person, given, ids)
    alone, whole = shared.self_contained(enhancer.config, method, enhancer.shared, person)
    one = condition.drawing_keys_values(model, alone, base.frozen, whole, {}, ids)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), one, two)
    plain = condition.drawing_keys_values(model, method, frozen, person, given, ids, strength=0.0)
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), plain, two)
    assert apart.pop("pooled") == 0 and min(jax.tree.leaves(apart)) > 1e-3


# --- preparing and training -----------------------------------------------------------------------


def test_prepared_pictures_come_with_their_sizes(data):
    index = shards.read_index(data)
    assert index.has_sizes
    folder = samples.open_folder(data)
    expected = size_ids((20, 20), SIDE, center_crop=True)
    assert folder.faces.size_ids.tolist() == [[*expected]] * 30
    plan = samples.Plan(
        [folder], [1.0], [np.arange(20)], size=4, seed=0, small=0, mean=0, flip=True
    )
    reader = samples.Reader(plan, range(1))
    (batch,) = reader
    reader.close()
    np.testing.assert_array_equal(batch.size_ids, np.tile(expected, (4, 1)))


def test_trained_enhancer_draws_from_a_photo_and_begins_a_person(
    checkpoint, data, photo_folder, tmp_path, capsys
):
    out = tmp_path / "enhancer"
    assert train(checkpoint, data, out, "--max_train_steps", 2, "--warmup_steps", 1) == 0
    found = enhancers.read(out / fit.RESULT)
    assert found.config.widths == (8, 16) and found.about["steps"] == 2
    said = json.loads((out / "run.json").read_text())
    assert len(said["loss_curve"]) == 2
    fresh = tmp_path / "fresh"
    assert train(checkpoint, data, fresh, "--max_train_steps", 0) == 0
    before = enhancers.read(fresh / fit.RESULT).shared
    for part in ("enhancer", "adapter"):
        for name in sd.ENCODERS:
            moved = jax.tree.map(
                lambda a, b: np.abs(a - b).max(), found.shared[part][name], before[part][name]
            )
            assert max(jax.tree.leaves(moved)) > 1e-6, (part, name)
    # Without training, straight from a photo.
    (photo,) = photo_folder.iterdir()
    model = ["--pretrained_model_name_or_path", checkpoint, "--enhancer", out / fit.RESULT]
    drawing = ["--num_inference_steps", 2, "--n_iter", 1, "--num_images_per_prompt", 1]
    drawing += ["--scheduler", "ddim", "--prompt", "a photo of {}"]
    capsys.readouterr()

    def picture(*flags):
        assert run(sample_jax, *model, *drawing, *flags) == 0
        (drawn,) = Path(capsys.readouterr().out.strip()).glob("000*.png")
        return np.asarray(Image.open(drawn)).astype(int)

    straight = picture("--photo", photo, "--save_dir", tmp_path / "photo")
    # No step writes the same person; a step changes them, and an export is whole.
    people = []
    for steps in (0, 2):
        anna = tmp_path / f"anna{steps}"
        flags = ["--train_data_dir", photo_folder, "--output_dir", anna, "--learning_rate", 0.1]
        flags += ["--max_train_steps", steps, "--train_batch_size", 2]
        assert run(train_jax, *model, *flags) == 0
        capsys.readouterr()
        people.append(read_identity(anna / "identity.safetensors"))
        drawn = picture("--identity", anna, "--save_dir", tmp_path / f"drawn{steps}")
        assert np.abs(drawn - straight).max() <= 1 or steps
    assert people[0].enhancer == found.sha256 and people[0].is_of_sdxl
    for name in sd.ENCODERS:
        tokens = [person.trainable["pseudo_tokens"][name] for person in people]
        assert np.abs(tokens[1] - tokens[0]).max() > 1e-4
    folder = tmp_path / "exported"
    asked = [tmp_path / "anna2", "--out", folder, "--enhancer", out / fit.RESULT]
    assert run(export, *asked) == 0
    person, about = exported.read(folder)
    assert about["enhancer"] == found.sha256 and set(person.adapter) == set(sd.ENCODERS)
    assert len(about["parts"]["peft_loras"]) == len(about["parts"]["loras"]) >= 1


def test_regression_is_exact_for_each_encoder_and_needs_no_step(base, checkpoint, data, tmp_path):
    flags = ["--start", "ridge", "--kind", "linear", "--max_train_steps", 0]
    assert train(checkpoint, data, tmp_path, *flags) == 0
    found = enhancers.read(tmp_path / fit.RESULT)
    assert set(found.about["ridge"]["r2"]) == set(sd.ENCODERS)
    folder = samples.open_folder(data)
    people = [np.arange(len(folder.people))]
    faces, targets = ridge.examples([folder], people, base.model, base.frozen)
    face = unit(5)
    predicted = shared.predict(found.config, found.shared, face)["pseudo_tokens"]
    for name, own in targets.items():
        fitted = ridge.fit(faces, own.reshape(len(own), -1))
        expected = fitted.target_mean + (face - fitted.face_mean) @ fitted.kernel
        np.testing.assert_allclose(predicted[name].ravel(), expected, atol=1e-5)


def test_celebrities_are_drawn_and_learned_from(checkpoint, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("Tom Cruise\nKing Queen\n", encoding="utf-8")
    out = tmp_path / "data"
    flags = ["--pretrained_model_name_or_path", checkpoint, "--prepare", out, "--celeb_path", names]
    flags += ["--people", "celebrities", "--celebrity_steps", 2, "--celebrity_pictures", 2]
    flags += ["--celebrity_likeness", -1, "--crop", "center"]
    assert run(train_enhancer, *flags) == 0, capsys.readouterr().err
    assert shards.read_index(out).has_sizes


def test_a_folder_for_another_family_is_refused(data, smallest_checkpoint, tmp_path, capsys):
    assert train(smallest_checkpoint, data, tmp_path / "out", "--max_train_steps", 1) == 1
    said = capsys.readouterr().err
    assert "another kind of checkpoint" in said and "Traceback" not in said
