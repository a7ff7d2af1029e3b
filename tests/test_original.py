"""Checkpoints in one file: the same trees as from diffusers' layout, or one message."""

import json
import re

import jax
import numpy as np
import original
import pytest
import reference
import torch
import yaml
from diffusers import AutoencoderKL
from diffusers.loaders import single_file_utils as theirs
from PIL import Image
from safetensors.torch import load_file, save_file

import sample_jax
import train_jax
from idea_jax import random_sd
from idea_jax.data.tokenizer import load_tokenizer
from idea_jax.diffusion.schedule import ScheduleError
from idea_jax.formats import learned_embeds
from idea_jax.models import hub, sd, weights
from idea_jax.models import original as ours
from idea_jax.models.config_reader import UnsupportedConfig
from idea_jax.models.original_config import read_configs
from idea_jax.models.tensor_files import TensorFiles, WeightsError
from idea_jax.pytrees import flatten


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def written(request, tmp_path_factory):
    """Kind, file, folder in diffusers' layout, and torch models of one random checkpoint."""
    path = tmp_path_factory.mktemp(request.param) / "photo-real.safetensors"
    return request.param, *original.write(path, request.param)


@pytest.fixture(scope="module")
def sd2(tmp_path_factory):
    """File and folder of a checkpoint of SD 2.x's family, with a tokenizer beside."""
    folder = tmp_path_factory.mktemp("sd2")
    file, inner, _ = original.write(folder / "model.safetensors", "sd2")
    random_sd.write_tokenizer(inner / "tokenizer", ["a", "photo"], pad="!", vocab_size=600)
    return file, inner


def test_the_trees_are_those_of_diffusers_layout_bit_for_bit(written, caplog):
    kind, file, folder, _ = written
    expected_model, expected = sd.load(folder)
    caplog.set_level("INFO")
    model, frozen = sd.load(file, prediction_type="epsilon")
    assert model == expected_model
    own, other = flatten(frozen._asdict()), flatten(expected._asdict())
    assert own.keys() == other.keys()
    for path, leaf in own.items():
        np.testing.assert_array_equal(leaf, other[path], path)
    # What is not read is said: averages, the schedule, losses, a counter.
    for said in ("3 of averages", "5 of the noise schedule", "2 of the training of the auto"):
        assert said in caplog.text
    assert ("last layer" in caplog.text) == (kind == "sd2")
    assert hub.resolve(file).name == "photo-real"  # what is written of it is no path


def test_diffusers_reads_the_file_as_the_same_weights(written):
    """So that the converter of these tests goes by the layout, and not by the code it tests."""
    kind, file, folder, models = written
    tensors = load_file(file)
    unet, vae, _ = original.SIZES[kind]
    configs = [json.loads((folder / p / "config.json").read_text()) for p in ("unet", "vae")]
    read = theirs.convert_ldm_unet_checkpoint(dict(tensors), configs[0])
    expected = models.unet.state_dict()
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[key], expected[key]) for key in read)
    read = theirs.convert_ldm_vae_checkpoint(dict(tensors), configs[1])
    expected = models.vae.state_dict()
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[key].reshape(expected[key].shape), expected[key]) for key in read)
    if kind == "sd1":
        read = theirs.convert_ldm_clip_checkpoint(dict(tensors))
    else:
        read = theirs.convert_open_clip_checkpoint(models.text, dict(tensors))
    read = {key.removeprefix("text_model."): value for key, value in read.items()}
    for key, value in models.text.state_dict().items():
        assert torch.equal(read[key.removeprefix("text_model.")], value), key


@pytest.mark.parametrize(
    ("kind", "configs"),
    [
        ("sd1", (reference.SD15_UNET, reference.SD15_VAE, reference.SD15_TEXT)),
        ("sd2", (reference.SD21_UNET, reference.SD21_VAE, reference.SD21_TEXT)),
    ],
    ids=["SD 1.5", "SD 2.1-base"],
)
def test_every_key_of_the_published_checkpoints_is_one_leaf(kind, configs, monkeypatch):
    """Shapes alone, without memory; their names follow from diffusers' networks."""
    with torch.device("meta"):
        unet, vae = reference.unet_from(configs[0]), AutoencoderKL.from_config(configs[1])
        text = reference.text_from(configs[2])
        tensors = original.unet_tensors(unet.state_dict(), configs[0])
        tensors |= original.vae_tensors(vae.state_dict(), configs[1])
        tensors |= original.text_tensors(text.state_dict(), kind)

    class Headers(TensorFiles):
        def __init__(self, paths):
            self.headers = {key: (tuple(value.shape), "F16") for key, value in tensors.items()}
            self.metadata = {}

    monkeypatch.setattr(ours, "TensorFiles", Headers)
    file = ours.Original("published.safetensors")
    found = read_configs(file, prediction_type="epsilon")
    expected = reference.published(*configs)
    assert found.text == expected.text
    # An autoencoder's pictures of 768 are no shape, and change nothing that is computed.
    assert vars(found.vae) | {"sample_size": 0} == vars(expected.vae) | {"sample_size": 0}
    heads = {"num_attention_heads": ()}
    assert vars(found.unet) | heads == vars(expected.unet) | heads
    assert tuple(found.unet.num_attention_heads) == tuple(expected.unet.num_attention_heads)
    file.check_rest()
    targets = sd.shapes(expected)._asdict()
    for part, table, trees in (
        (
            "unet",
            weights.unet_table(expected.unet.use_linear_projection),
            ("unet", "cross_kv"),
        ),
        ("vae", weights.vae_table(), ("vae",)),
        ("text_encoder", weights.text_table(), ("text",)),
    ):
        headers = file.part(part).headers
        leaves = flatten({tree: targets[tree] for tree in trees})
        plan = weights.match_keys(table, headers, leaves, "file")  # raises unless one to one
        assert {target for target, _ in plan.values()} == set(leaves)


def test_a_picture_from_the_file_is_that_from_the_folder(sd2, tmp_path, capsys):
    """The tokenizer comes from elsewhere, and fills up as SD 2.x does whatever it says itself."""
    file, folder = sd2
    vectors = np.random.default_rng(0).normal(size=(2, 128)).astype(np.float32)
    learned_embeds.write(tmp_path / "anna.safetensors", "<anna>", vectors, {})
    random_sd.write_tokenizer(tmp_path / "words", ["a", "photo"], vocab_size=600)
    config = tmp_path / "v2.yaml"
    config.write_text(yaml.safe_dump(v2_config()))
    pictures = []
    for number, flags in enumerate(
        (
            [file, "--tokenizer_name", tmp_path / "words", "--prediction_type", "v_prediction"],
            [file, "--tokenizer_name", folder, "--original_config", config],
            [folder, "--prediction_type", "v_prediction"],
        )
    ):
        out = tmp_path / str(number)
        args = ["--pretrained_model_name_or_path", *flags, "--save_dir", out]
        args += ["--learned_embedding_path", tmp_path / "anna.safetensors"]
        args += "--num_images_per_prompt 1 --num_inference_steps 2 --height 16 --width 16".split()
        args += ["--guidance_scale", "2", "--prompt", "a photo of {}"]
        assert sample_jax.main([str(arg) for arg in args]) == 0, capsys.readouterr().err
        (png,) = out.glob("*/00000.png")
        pictures.append(np.asarray(Image.open(png).convert("RGB")))
    assert pictures[0].std() > 5
    np.testing.assert_array_equal(pictures[0], pictures[1])
    np.testing.assert_array_equal(pictures[0], pictures[2])


def v2_config(**unet):
    """An original config as published for SD 2.x, but for the sizes."""
    params = {
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 64,
        "num_res_blocks": 1,
        "num_head_channels": 64,
        "context_dim": 128,
    }
    return {
        "model": {
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                "parameterization": "v",
                "linear_start": 0.00085,
                "linear_end": 0.0120,
                "timesteps": 1000,
                "image_size": 64,
                "scale_factor": 0.18215,
                "unet_config": {"params": params | unet},
            },
        }
    }


def test_what_the_unet_predicts_is_said_by_someone(sd2, tmp_path):
    file, _ = sd2
    with pytest.raises(UnsupportedConfig, match="--prediction_type v_prediction"):
        sd.read_configs(file)
    tensors = load_file(file)
    for name, change, metadata, expected in (
        ("spec", {}, {"modelspec.prediction_type": "v"}, "v_prediction"),
        ("base", {"global_step": torch.tensor(875000)}, {}, "epsilon"),
        ("mark", {"v_pred": torch.zeros(0)}, {}, "v_prediction"),
    ):
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors | change, path, metadata={"format": "pt", **metadata})
        model = sd.read_configs(path)
        assert model.schedule.prediction_type == expected
        assert model.unet.sample_size == (96 if expected == "v_prediction" else 64)
        assert sd.read_configs(path, prediction_type="epsilon").schedule.prediction_type == (
            "epsilon"
        )


def changed(**changes):
    """A function of tensors: those with a new value, and None takes one away."""

    def change(tensors):
        tensors = {**tensors, **{key: value for key, value in changes.items()}}
        return {key: value for key, value in tensors.items() if value is not None}

    return change


UNET = "model.diffusion_model."
BAD = {
    "refiner": (changed(**{"conditioner.embedders.0.model.x": torch.ones(2)}), "SDXL's refiner"),
    "inpainting": (
        changed(**{f"{UNET}input_blocks.0.0.weight": torch.ones(64, 9, 3, 3)}),
        "an inpainting model: its UNet takes 9 channels",
    ),
    "ControlNet": (changed(**{"control_model.x": torch.ones(2)}), "a ControlNet"),
    "without a UNet": (
        lambda tensors: {k: v for k, v in tensors.items() if not k.startswith(UNET)},
        "has no unet",
    ),
    "without texts": (
        lambda tensors: {k: v for k, v in tensors.items() if "cond_stage" not in k},
        "has no text_encoder",
    ),
    "without an autoencoder": (
        lambda tensors: {k: v for k, v in tensors.items() if "first_stage" not in k},
        "has no autoencoder; give one with --vae",
    ),
    "a layer too few": (changed(**{f"{UNET}out.2.bias": None}), "conv_out.bias"),
    "a layer too many": (
        changed(**{f"{UNET}extra.0.weight": torch.ones(2)}),
        r"extra\.0\.weight \[2\]",
    ),
    "a stranger": (changed(**{"other.weight": torch.ones(2)}), "belong to no part"),
    "another shape": (
        changed(**{f"{UNET}time_embed.0.bias": torch.ones(3)}),
        "time_embedding.linear_1.bias",
    ),
    "packed attention of another width": (
        changed(
            **{"cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias": torch.ones(400)}
        ),
        "v_proj.bias",
    ),
    "another schedule": (changed(alphas_cumprod=torch.zeros(1000)), "another noise schedule"),
    "a LoRA": (
        lambda tensors: {"lora_unet_mid_block.lora_down.weight": torch.ones(2, 2)},
        "a LoRA: give it with --lora",
    ),
    "one part": (lambda tensors: {"down_blocks.0.x": torch.ones(2)}, "one part of a checkpoint"),
    "pseudo tokens": (lambda tensors: {"emb_params": torch.ones(2, 8)}, "pseudo tokens"),
    "nothing": (lambda tensors: {"x": torch.ones(2)}, "has no unet"),
}


def test_a_mark_says_that_no_signal_is_left_at_the_end(sd2, tmp_path):
    file, _ = sd2
    path, marks = tmp_path / "marked.safetensors", {"ztsnr": torch.zeros(0)}
    save_file(load_file(file) | marks | {"v_pred": torch.zeros(0)}, path)
    found = sd.read_configs(path).schedule
    assert found.rescale_betas_zero_snr
    assert (found.prediction_type, found.timestep_spacing) == ("v_prediction", "trailing")
    with pytest.raises(ScheduleError, match="'epsilon', expected 'v_prediction'"):
        sd.read_configs(path, prediction_type="epsilon")


@pytest.mark.parametrize("name", BAD)
def test_a_file_of_another_kind_is_refused_with_one_message(sd2, tmp_path, name):
    file, _ = sd2
    change, message = BAD[name]
    path = tmp_path / "bad.safetensors"
    save_file(change(load_file(file)), path)
    with pytest.raises((UnsupportedConfig, WeightsError), match=message) as error:
        sd.load(path, prediction_type="epsilon")
    assert str(path) in str(error.value)


def test_a_cut_file_and_a_pickle_are_refused_by_the_command(sd2, photo_folder, tmp_path, capsys):
    file, _ = sd2
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:100_000])
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(b"\x80\x02}.")
    for path, message in ((cut, "not a complete safetensors file"), (pickle, "foreign code")):
        args = ["--pretrained_model_name_or_path", str(path), "--train_data_dir", str(photo_folder)]
        assert train_jax.main([*args, "--output_dir", str(tmp_path / "out")]) == 1
        said = capsys.readouterr().err
        assert message in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (yaml.safe_dump(v2_config(model_channels=320)), "model_channels is 320, and by the shapes"),
        (yaml.safe_dump(v2_config(num_head_channels=48)), "do not divide into heads of 48"),
        (yaml.safe_dump(v2_config(num_heads="8")), "num_heads = '8', expected one int"),
        ("model: 3", "is no original config"),
        ("a: [", "is no original config"),
        ("!!python/object/apply:os.system ['true']", "is no original config"),
    ],
)
def test_an_original_config_that_does_not_fit_is_refused(sd2, tmp_path, content, message):
    config = tmp_path / "config.yaml"
    config.write_text(content)
    with pytest.raises(UnsupportedConfig, match=re.escape(message)):
        sd.read_configs(sd2[0], original_config=str(config))
    with pytest.raises(UnsupportedConfig, match="is for a checkpoint in one file"):
        sd.read_configs(sd2[1], original_config=str(config))


def test_another_autoencoder_stands_in_for_one_that_is_not_there(sd2, tmp_path):
    file, folder = sd2
    path = tmp_path / "without.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "first_stage" not in k}, path)
    model, frozen = sd.load(path, prediction_type="epsilon", vae=folder / "vae")
    expected_model, expected = sd.load(folder)
    assert model == expected_model
    jax.tree.map(np.testing.assert_array_equal, frozen.vae, expected.vae)


def test_clips_tokenizer_comes_with_the_package():
    """Token ids that are published with CLIP and the checkpoints."""
    sizes = (49408, 77)
    one = load_tokenizer(hub.CLIP_TOKENIZER, *sizes, ours.PADDING["sd1"])
    two = load_tokenizer(hub.CLIP_TOKENIZER, *sizes, ours.PADDING["sd2"])
    assert (one.bos, one.eos, one.pad) == (49406, 49407, 49407)
    assert (two.bos, two.eos, two.pad) == (49406, 49407, 0)
    assert one.ids("a photo of a cat").tolist() == [320, 1125, 539, 320, 2368]
    assert one.ids("An astronaut riding a horse").tolist() == [550, 18376, 6765, 320, 4558]


def test_a_tokenizer_that_is_none_is_named(sd2, tmp_path):
    with pytest.raises(hub.CheckpointNotFound, match="vocab.json and merges.txt"):
        hub.resolve(sd2[0], tokenizer_name=str(tmp_path))
