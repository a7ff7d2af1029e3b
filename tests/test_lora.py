"""LoRA files: merged as diffusers has them act, every key used or named, or one message."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import save_file

import sample_jax
from idea_jax.diffusion.samplers import initial_noise
from idea_jax.mini import measures, people
from idea_jax.models import hub, lora, sd
from idea_jax.models.lora import Lora
from idea_jax.models.tensor_files import WeightsError
from idea_jax.pytrees import flatten

RANK = 3


@pytest.fixture(scope="module")
def pipeline():
    found = StableDiffusionPipeline.from_pretrained(hub.MINI_FOLDER)
    found.scheduler = DDIMScheduler.from_config(found.scheduler.config)
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def layers(pipeline):
    """{(part, layer's name): factors}: every linear layer of attentions, and convolutions."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for part, pattern in (
        ("unet", r".*(to_[qkv]|to_out\.0|proj_in|net\.2|conv1|conv_shortcut|samplers\.0\.conv)"),
        ("text_encoder", r".*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"),
    ):
        for name, layer in getattr(pipeline, part).named_modules():
            if re.fullmatch(pattern, name) and hasattr(layer, "weight"):
                out, *rest = layer.weight.shape
                tail = [1] * (len(rest) - 1)
                size = layer.weight[0].numel() ** -0.5
                down = torch.randn((RANK, *rest), generator=generator) * size
                up = torch.randn((out, RANK, *tail), generator=generator) * 0.3
                found[part, name.removeprefix("text_model.")] = (down, up)
    assert {down.ndim for down, _ in found.values()} == {2, 4}
    return found


def kohya(layers, alpha=None):
    """kohya's names, with an alpha of its own for each layer unless one is given."""
    found = {}
    for number, ((part, name), (down, up)) in enumerate(layers.items()):
        text = "te_text_model" if part == "text_encoder" else "unet"
        key = f"lora_{text}_{name.replace('.', '_')}"
        own = 1 + number % 2 if alpha is None else alpha
        found |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        found[f"{key}.alpha"] = torch.tensor(float(own))
    return found


def peft(layers):
    found = {}
    for (part, name), (down, up) in layers.items():
        text = "text_model." if part == "text_encoder" else ""
        found[f"{part}.{text}{name}.lora_A.weight"] = down
        found[f"{part}.{text}{name}.lora_B.weight"] = up
    return found


def old(layers):
    """Names of diffusers before peft: attention processors, and one of CLIP's own."""
    found = {}
    for (part, name), (down, up) in layers.items():
        attention = re.fullmatch(r"(.+)\.(to_[qkv]|to_out)(\.0)?", name)
        if part == "text_encoder" and name.endswith("_proj"):
            base = f"text_encoder.text_model.{name}.lora_linear_layer."
        elif part == "unet" and attention:
            base = f"unet.{attention[1]}.processor.{attention[2]}_lora."
        else:
            continue
        found |= {f"{base}down.weight": down, f"{base}up.weight": up}
    return found


def write(path, tensors, **metadata):
    tensors = {key: value.clone().contiguous() for key, value in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt", **metadata})
    return path


@pytest.mark.parametrize("naming", ["kohya", "peft"])
def test_pictures_equal_those_of_diffusers_with_the_same_lora(pipeline, layers, naming, tmp_path):
    # diffusers 0.42 passes over alphas that differ from layer to layer: one for all.
    tensors = kohya(layers, 2) if naming == "kohya" else peft(layers)
    path = write(tmp_path / f"{naming}.safetensors", tensors)
    mini = measures.load()
    prompt = f"a photo of {people.full_name(5, 5)} smiling"
    plain = measures.draw(mini, prompt, 1, seed=7, steps=3, batch_size=1)
    _, frozen = sd.load(mini.folder, loras=[Lora(path, 0.7)])
    merged = dataclasses.replace(mini, frozen=frozen)
    ours = measures.draw(merged, prompt, 1, seed=7, steps=3, batch_size=1)
    noise, _ = initial_noise(7, np.arange(1), (8, 8, mini.model.unet.in_channels))
    pipeline.load_lora_weights(path, adapter_name=naming)
    pipeline.set_adapters([naming], [0.7])
    theirs = pipeline(
        [prompt],
        latents=torch.tensor(np.asarray(noise).transpose(0, 3, 1, 2).copy()),
        num_inference_steps=3,
        guidance_scale=measures.GUIDANCE,
        output_type="np",
    ).images
    pipeline.delete_adapters(naming)
    assert np.abs(ours.astype(int) - plain).max() > 50  # it does something
    assert np.abs(ours / 255 - theirs).max() <= 2 / 255


def test_all_namings_mean_the_same_and_every_layer_is_used(layers, tmp_path, caplog):
    caplog.set_level("INFO")
    config = {"unet.r": RANK, "unet.lora_alpha": RANK, "text_encoder.lora_alpha": RANK}
    files = {
        "kohya": write(tmp_path / "kohya.safetensors", kohya(layers, RANK)),
        "peft": write(tmp_path / "peft.safetensors", peft(layers)),
        "said": write(
            tmp_path / "said.safetensors", peft(layers), lora_adapter_metadata=json.dumps(config)
        ),
    }
    trees = {name: flatten(load(path, 0.5)) for name, path in files.items()}
    plain = flatten(load())
    for name in ("peft", "said"):
        assert all(np.array_equal(trees[name][p], trees["kohya"][p]) for p in plain)
    changed = {path for path in plain if not np.array_equal(plain[path], trees["kohya"][path])}
    assert len(changed) == len(layers)
    counts = [sum(part == own for own, _ in layers) for part in lora.PARTS]
    said = f"scale 0.5: {counts[0]} layers of the unet, {counts[1]} layers of the text_encoder"
    assert caplog.text.count(said) == 3
    # What is added is what the closed form says, for a linear layer with an alpha of its own.
    down, up = layers["unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    leaf = "unet/mid_block/attentions_0/transformer_blocks_0/attn1/to_q/kernel"
    own = kohya(layers)
    (alpha,) = [value for key, value in own.items() if key == f"{ONE}.alpha"]
    assert alpha != RANK
    tree = flatten(load(write(tmp_path / "own.safetensors", own), 0.5))
    expected = plain[leaf] + 0.5 * float(alpha) / RANK * (up @ down).numpy().T
    np.testing.assert_allclose(tree[leaf], expected, rtol=1e-5, atol=1e-6)


def load(path=None, scale=1.0):
    loras = [Lora(path, scale)] if path else []
    return sd.load(hub.MINI_FOLDER, loras=loras)[1]._asdict()


def test_older_names_and_several_files_add_up(layers, tmp_path):
    one = write(tmp_path / "old.safetensors", old(layers))
    assert len(lora.LoraFile(Lora(one)).modules) > 20
    twice = sd.load(hub.MINI_FOLDER, loras=lora.named([f"{one}:0.25", f"{one}:0.5", f"{one}:0"]))
    once = load(one, 0.75)
    for path, leaf in flatten(twice[1]._asdict()).items():
        np.testing.assert_allclose(leaf, flatten(once)[path], rtol=1e-4, atol=1e-5)
    plain = flatten(load())
    assert any(not np.array_equal(leaf, plain[path]) for path, leaf in flatten(once).items())


def test_alpha_of_peft_is_divided_as_its_config_says(layers, tmp_path):
    """A common alpha, one for a layer by the end of its name, and a root of the rank."""
    # Twice the rank is as a scale of 2.
    expected = flatten(load(write(tmp_path / "k.safetensors", kohya(layers, RANK)), 2))
    for number, config in enumerate(
        (
            {"unet.lora_alpha": 6, "text_encoder.lora_alpha": 6},
            {
                "unet.lora_alpha": 6,
                "text_encoder.lora_alpha": 1,
                "text_encoder.alpha_pattern": {
                    name: 6 for name in ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
                },
            },
            {
                "unet.lora_alpha": 6 / RANK**0.5,
                "unet.use_rslora": True,
                "text_encoder.lora_alpha": 6,
            },
        )
    ):
        path = tmp_path / f"{number}.safetensors"
        write(path, peft(layers), lora_adapter_metadata=json.dumps(config))
        for leaf, value in flatten(load(path)).items():
            np.testing.assert_allclose(value, expected[leaf], rtol=1e-4, atol=1e-5)


ONE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
GOOD = {
    f"{ONE}.lora_down.weight": torch.ones(2, 128),
    f"{ONE}.lora_up.weight": torch.ones(128, 2),
}
BAD = {
    "another width": (
        {**GOOD, f"{ONE}.lora_down.weight": torch.ones(2, 320)},
        "for a model of another width",
    ),
    "two ranks": ({**GOOD, f"{ONE}.lora_up.weight": torch.ones(128, 3)}, "another width"),
    "an unknown layer": (
        {**GOOD, **{k.replace("mid_block", "mid_blocks"): v for k, v in GOOD.items()}},
        "1 of 2 layers are not in this checkpoint",
    ),
    "half a layer": ({f"{ONE}.lora_down.weight": torch.ones(2, 128)}, "has no up"),
    "a stray key": ({**GOOD, "stray": torch.ones(2)}, "keys of no LoRA: stray"),
    "SDXL's second text encoder": (
        {
            "lora_te2_text_projection.lora_down.weight": torch.ones(2, 8),
            "lora_te2_text_projection.lora_up.weight": torch.ones(8, 2),
        },
        "is for another kind of model",
    ),
    "DoRA": ({**GOOD, f"{ONE}.dora_scale": torch.ones(128)}, "holds DoRA"),
    "LoHa": ({f"{ONE}.hada_w1_a": torch.ones(2, 2)}, "holds LoHa"),
    "three factors": ({**GOOD, f"{ONE}.lora_mid.weight": torch.ones(2, 2)}, "of three factors"),
    "no number": (
        {**GOOD, f"{ONE}.lora_up.weight": torch.full((128, 2), torch.nan)},
        "not finite",
    ),
    "integers": (
        {**GOOD, f"{ONE}.lora_up.weight": torch.ones(128, 2, dtype=torch.int64)},
        "is I64, expected one of",
    ),
    "no LoRA": ({"x": torch.ones(2)}, "is no LoRA"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_does_not_fit_is_refused_with_one_message(name, tmp_path):
    tensors, message = BAD[name]
    path = write(tmp_path / "bad.safetensors", tensors)
    with pytest.raises(WeightsError, match=re.escape(message)) as error:
        load(path)
    assert str(path) in str(error.value)


def test_tokens_of_web_uis_in_a_file_are_named(tmp_path, caplog):
    tokens = {"bundle_emb.anna.string_to_param.*": torch.ones(2, 192)}
    path = write(tmp_path / "bundle.safetensors", GOOD | tokens)
    plain, merged = flatten(load()), flatten(load(path))
    assert sum(not np.array_equal(leaf, merged[key]) for key, leaf in plain.items()) == 1
    assert "pseudo tokens (bundle_emb.anna" in caplog.text


def test_the_command_takes_files_with_a_scale_and_refuses_others(tmp_path, capsys):
    path = write(tmp_path / "a:b.safetensors", GOOD)
    assert lora.named([str(path), f"{path}:-0.5"]) == (Lora(path), Lora(path, -0.5))
    args = "--pretrained_model_name_or_path mini --learned_embedding_path x --prompt {}".split()
    args += ["--save_dir", str(tmp_path / "out"), "--lora"]
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:200])
    pickle = tmp_path / "old.pt"
    pickle.write_bytes(b"\x80\x02}.")
    vectors = write(tmp_path / "anna.safetensors", {"<anna>": torch.ones(1, 192)})
    args[3] = str(vectors)
    for given, message in (
        (f"{tmp_path}/none.safetensors", "does not exist"),
        (f"{path}:much", "'much' is no number"),
        (f"{path}:nan", "a finite scale"),
        (str(tmp_path), "is a folder"),
        (str(cut), "not a complete safetensors file"),
        (str(pickle), "from .safetensors only"),
    ):
        assert sample_jax.main([*args, given]) == 1
        said = capsys.readouterr().err
        assert message in said and "Traceback" not in said, said


def test_a_lora_is_merged_into_a_checkpoint_in_bfloat16_before_it_is_rounded(tmp_path):
    path = write(tmp_path / "one.safetensors", GOOD)
    _, frozen = sd.load(hub.MINI_FOLDER, compute_dtype="bfloat16", loras=[Lora(path, 0.001)])
    exact = load(path, 0.001)
    leaf = "unet/mid_block/attentions_0/transformer_blocks_0/attn1/to_q/kernel"
    rounded = jax.numpy.asarray(flatten(exact)[leaf], jax.numpy.bfloat16)
    np.testing.assert_array_equal(flatten(frozen._asdict())[leaf], rounded)
