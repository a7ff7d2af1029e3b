"""People learned and drawn on SDXL, through the command lines, on the smallest such checkpoint."""

import json
import shutil

import jax
import numpy as np
import pytest
from conftest import write_smallest
from PIL import Image
from safetensors.numpy import load_file

import sample_jax
import train_jax
from idea_jax.faces import random_model
from idea_jax.formats.identity import read_identity
from idea_jax.models import sd
from idea_jax.pytrees import flatten
from idea_jax.training.photos import size_ids

STEPS = ["--max_train_steps", 4, "--train_batch_size", 2, "--learning_rate", 0.01]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = write_smallest(tmp_path_factory.mktemp("xl") / "smallest", "sdxl")
    random_model.write_random_recogniser(folder / "face" / "arcface.onnx")
    return folder


def train(checkpoint, photos, out, *flags):
    common = ["--pretrained_model_name_or_path", checkpoint, "--train_data_dir", photos]
    return train_jax.main([str(flag) for flag in (*common, "--output_dir", out, *STEPS, *flags)])


def draw(checkpoint, out, *flags):
    common = ["--pretrained_model_name_or_path", checkpoint, "--save_dir", out, "--n_iter", 1]
    common += ["--num_inference_steps", 3, "--num_images_per_prompt", 1]
    assert sample_jax.main([str(flag) for flag in (*common, *flags)]) == 0
    (picture,) = out.rglob("00000.png")
    return np.asarray(Image.open(picture)).astype(int)


@pytest.mark.parametrize("profile", ["paper", "official", "cross_init", "textual_inversion"])
def test_a_person_is_learned_in_both_encoders_and_drawn(
    checkpoint, photo_folder, tmp_path, profile
):
    kv = ["--kv", "low_rank"] if profile == "paper" else []
    anna = tmp_path / "anna"
    assert train(checkpoint, photo_folder, anna, "--profile", profile, *kv) == 0
    person = read_identity(anna / "identity.safetensors")
    assert person.is_of_sdxl and person.steps == 4
    start = person.given["anchor"]
    for name, width in zip(sd.ENCODERS, (8, 16), strict=True):
        tokens = person.trainable["pseudo_tokens"][name]
        assert tokens.shape == start[name].shape == (2, width)
        assert np.abs(tokens - start[name]).min() > 1e-4
    has_adapter = profile in ("paper", "official")
    if has_adapter:
        gates = [person.trainable["adapter"][name]["gamma"] for name in sd.ENCODERS]
        assert all(gate != 0 for gate in gates)
        where = person.trainable if profile == "paper" else person.given
        assert set(where["enhancer"]) == set(sd.ENCODERS)
    if profile == "paper":
        ups = [x for path, x in flatten(person.trainable["kv"]).items() if path.endswith("up")]
        assert all(np.abs(up).max() > 0 for up in ups)
    # What other programs read.
    both = load_file(anna / "webui" / "idea-person.safetensors")
    assert set(both) == set(sd.ENCODERS)
    for name, file in zip(
        sd.ENCODERS, ("learned_embeds.safetensors", "learned_embeds_2.safetensors"), strict=True
    ):
        (tokens,) = load_file(anna / file).values()
        np.testing.assert_array_equal(tokens, both[name])
        np.testing.assert_array_equal(tokens, person.trainable["pseudo_tokens"][name])
    # All of it draws, or the tokens alone.
    prompt = ["--prompt", "a photo of {}", "--scheduler", "ddim"]
    whole = draw(checkpoint, tmp_path / "whole", "--identity", anna, *prompt)
    file = anna / "webui" / "idea-person.safetensors"
    alone = draw(checkpoint, tmp_path / "alone", "--learned_embedding_path", file, *prompt)
    assert whole.shape == (8, 8, 3)
    assert (whole != alone).any() == (profile == "paper")


def test_loss_falls_and_a_resumed_training_ends_where_a_straight_one_does(
    checkpoint, photo_folder, tmp_path
):
    flags = ["--profile", "cross_init", "--seed", 3, "--max_train_steps", 60]
    flags += ["--train_batch_size", 8, "--learning_rate", 0.02, "--checkpointing_steps", 30]
    assert train(checkpoint, photo_folder, tmp_path / "straight", *flags) == 0
    curve = json.loads((tmp_path / "straight" / "run.json").read_text())["loss_curve"]
    losses = [loss for _, loss in curve]
    assert np.mean(losses[-10:]) < 0.97 * np.mean(losses[:10])
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "straight" / "checkpoints" / "30", cut / "checkpoints" / "30")
    assert train(checkpoint, photo_folder, cut, *flags, "--resume_from_checkpoint", "latest") == 0
    one, two = (
        read_identity(tmp_path / name / "identity.safetensors") for name in ("straight", "cut")
    )
    jax.tree.map(np.testing.assert_array_equal, one.trainable, two.trainable)


def test_two_people_are_learned_together_and_meet_in_a_picture(checkpoint, photo_folder, tmp_path):
    photos = tmp_path / "photos"
    for name, turn in (("anna", 0), ("ben", 90)):
        (photos / name).mkdir(parents=True)
        Image.open(photo_folder / "astronaut.jpg").rotate(turn).save(photos / name / "0.png")
    out = tmp_path / "people"
    assert train(checkpoint, photos, out, "--identities_per_step", 2, "--kv", "full") == 0
    people = [f"{name}={out / name}" for name in ("anna", "ben")]
    prompt = ["--scheduler", "ddim", "--prompt"]
    both = ["--identity", *people, *prompt]
    first = draw(checkpoint, tmp_path / "1", *both, "a photo of {anna} and {ben}")
    other = draw(checkpoint, tmp_path / "2", *both, "a photo of {ben} and {anna}")
    assert (first != other).any()
    # Somebody who is given twice is drawn as that one person.
    twice = ["--identity", f"a={out / 'anna'}", f"b={out / 'anna'}", *prompt]
    same = draw(checkpoint, tmp_path / "3", *twice, "a photo of {a} and {b}")
    again = draw(checkpoint, tmp_path / "4", *twice, "a photo of {b} and {a}")
    np.testing.assert_allclose(same, again, atol=1)


def test_sizes_are_those_of_the_picture_before_it_was_cut():
    assert size_ids((1200, 900), 512, center_crop=True) == (900, 1200, 0, 85, 512, 512)
    assert size_ids((300, 700), 512, center_crop=True) == (700, 300, 341, 0, 512, 512)
    assert size_ids((1200, 900), 512, center_crop=False) == (900, 1200, 0, 0, 512, 512)
