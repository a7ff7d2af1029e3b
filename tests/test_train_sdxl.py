"""People learned and drawn on SDXL, through the command lines, on the smallest such checkpoint."""

import dataclasses
import json
import shlex
import shutil

import jax
import numpy as np
import pytest
from conftest import write_smallest
from PIL import Image
from safetensors.numpy import load_file

import sample_jax
import train_jax
from idea_jax import costs
from idea_jax.config.reading import parse
from idea_jax.config.settings import SampleConfig, TrainConfig
from idea_jax.diffusion import samplers
from idea_jax.faces import random_model
from idea_jax.formats.identity import read_identity
from idea_jax.models import sd
from idea_jax.pytrees import flatten
from idea_jax.sampling import engine, programs
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


@pytest.mark.parametrize("draws", [False, True])
def test_the_pair_for_few_steps_has_commands(draws, request):
    name = "lightning_sdxl_draw" if draws else "lightning_sdxl"
    path = request.config.rootpath / "configs" / f"{name}.yaml"
    program, *flags = shlex.split(path.read_text().splitlines()[0])[1:]
    assert (program, flags[1]) == (
        "sample_jax.py" if draws else "train_jax.py",
        f"configs/{name}.yaml",
    )
    flags[1] = path
    cfg = parse(SampleConfig if draws else TrainConfig, [*map(str, flags)])
    assert "lightning" in cfg.pretrained_model_name_or_path
    if not draws:
        assert cfg.profile == "paper"


def test_few_steps_without_guidance_draw_in_one_row_each(
    checkpoint, photo_folder, tmp_path, request, monkeypatch
):
    """A person of the base, by the settings of the pair; half of the rows, and each step is that of
    diffusers' Euler with trailing spacing (tests/test_samplers.py)."""
    anna, configs = tmp_path / "anna", request.config.rootpath / "configs"
    asked = ["--config", configs / "lightning_sdxl.yaml", "--max_train_steps", 1]
    asked += ["--mixed_precision", "no", "--resolution", 8]
    assert train(checkpoint, photo_folder, anna, *asked) == 0
    seen, draw_rows = [], programs.draw_rows

    def draw_rows_seen(model, frozen, kv, numbers, guidance, sampling):
        seen.append((guidance, sampling))
        return draw_rows(model, frozen, kv, numbers, guidance, sampling)

    monkeypatch.setattr(programs, "draw_rows", draw_rows_seen)
    given = ["--config", configs / "lightning_sdxl_draw.yaml", "--mixed_precision", "no"]
    given += ["--pretrained_model_name_or_path", checkpoint, "--save_dir", tmp_path / "drawn"]
    given += ["--identity", anna, "--prompt", "a photo of {}", "--num_images_per_prompt", 1]
    assert sample_jax.main([*map(str, given)]) == 0
    ((guidance, sampling),) = set(seen)
    assert guidance is None and (sampling.scheduler, sampling.steps) == ("euler", 4)
    model = sd.read_configs(checkpoint, "float32")
    spaced = dataclasses.replace(model.schedule, timestep_spacing="trailing")
    assert samplers.visited_timesteps("euler", spaced, 4).tolist() == [999, 749, 499, 249]

    def flops(scale):
        how = programs.Sampling((8, 8), "euler", 4)
        kind = engine.Kind(how, 1, scale is not None)
        given = engine.call_shapes(model, kind, 1, engine.mesh_of(jax.devices()[:1]))
        return costs.needed(lambda *given: draw_rows(model, *given, how), *given)

    assert flops(None) < 0.6 * flops(5.0)


def test_sizes_are_those_of_the_picture_before_it_was_cut():
    assert size_ids((1200, 900), 512, center_crop=True) == (900, 1200, 0, 85, 512, 512)
    assert size_ids((300, 700), 512, center_crop=True) == (700, 300, 341, 0, 512, 512)
    assert size_ids((1200, 900), 512, center_crop=False) == (900, 1200, 0, 0, 512, 512)
