"""People in other programs: diffusers itself, and the rules of ComfyUI and AUTOMATIC1111.

The rules of the latter two were written anew from their formats; ComfyUI's modules are stand-ins
with the functions that the node calls.
"""

import dataclasses
import functools
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import diffusers
import enhancers as made
import jax
import jax.numpy as jnp
import numpy as np
import people
import pytest
import torch
from conftest import write_smallest
from safetensors import safe_open
from safetensors.torch import load_file

from idea_jax import export, random_sd
from idea_jax.data import text
from idea_jax.data.images import to_uint8
from idea_jax.data.tokenizer import load_tokenizer
from idea_jax.diffusers import load_identity
from idea_jax.diffusion import samplers
from idea_jax.formats import enhancer as enhancers
from idea_jax.formats import exported
from idea_jax.formats.identity import IdentityError, write_identity
from idea_jax.method import condition, shared
from idea_jax.method.portable import portable
from idea_jax.mini import halves
from idea_jax.models import hub, sd
from idea_jax.models.unet import cross_kv_shapes
from idea_jax.sampling import programs

NODE = Path(__file__).resolve().parent.parent / "integrations" / "comfyui"
STEPS = 4
PROMPT, NEGATIVE = "a photo of {} smiling", "blurry"


class World:
    """A checkpoint with a person, in JAX and in diffusers."""

    def __init__(self, folder, work, scale):
        self.folder, self.file = folder, work / "identity.safetensors"
        self.model, self.frozen = sd.load(folder)
        T = self.model.text.max_position_embeddings
        plain = load_tokenizer(folder / "tokenizer", self.model.text.vocab_size, T)
        self.tokenizer = plain.with_placeholder("<person>", 2)
        self.person = people.person(self.model, scale=scale, base_model=folder.name)
        write_identity(self.file, self.person)
        self.side = self.model.unet.sample_size * self.model.vae.downscale

    def pipe(self, kind=None, **settings):
        plain = diffusers.StableDiffusionPipeline
        own = plain if self.model.text_2 is None else diffusers.StableDiffusionXLPipeline
        found = (kind or own).from_pretrained(self.folder, local_files_only=True, **settings)
        found.set_progress_bar_config(disable=True)
        return found

    def ids(self, *prompts):
        filled = [text.fill(p, self.tokenizer.placeholder) if "{}" in p else p for p in prompts]
        return jnp.asarray(self.tokenizer(filled))

    def latents(self, seed=7):
        x, _ = samplers.initial_noise(
            jnp.uint32(seed), jnp.arange(1), (*[self.model.unet.sample_size] * 2, self.channels)
        )
        return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)

    @property
    def channels(self):
        return self.model.unet.in_channels

    def draw(self, guidance, person=None, shared_parts=None, strength=1.0):
        """Picture 0 of seed 7, as `sample_jax.py` draws it: int[side, side, 3]."""
        person, frozen = person or self.person, self.frozen
        if shared_parts is not None:
            frozen = frozen._replace(shared=jax.tree.map(jnp.asarray, shared_parts))
        kv = programs.prompt_keys_values(
            self.model,
            person.method,
            frozen,
            person.trainable,
            person.given,
            *self.ids(PROMPT, NEGATIVE),
            jnp.float32(strength),
        )
        drawn = programs.draw(
            self.model,
            self.frozen,
            kv,
            jnp.uint32(7),
            jnp.arange(1, dtype=jnp.int32),
            jnp.float32(guidance),
            programs.Sampling((self.side, self.side), self.model.schedule.sampler, STEPS),
        )
        return to_uint8(np.asarray(drawn))[0].astype(int)

    def draw_there(self, pipe, guidance, prompt=PROMPT, **settings):
        given = {"latents": self.latents(), "negative_prompt": NEGATIVE} | settings
        drawn = pipe(prompt, num_inference_steps=STEPS, guidance_scale=guidance, **given)
        return np.asarray(drawn.images[0]).astype(int)


@pytest.fixture(scope="module")
def world(smallest_checkpoint, tmp_path_factory):
    return World(smallest_checkpoint, tmp_path_factory.mktemp("sd2"), 0.3)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The same of SDXL, whose second text encoder says, as published ones do, that the end is 2.

    Its norms have groups of two channels: one of a channel alone takes away what is added to all
    pixels alike, and so the pooled output.
    """
    work = tmp_path_factory.mktemp("sdxl")
    folder = write_smallest(work / "checkpoint", "sdxl")
    for part, said in (("text_encoder_2", {"eos_token_id": 2}), ("unet", {"norm_num_groups": 4})):
        config = folder / part / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | said))
    return World(folder, work, 0.3)


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    """What `idea-export` writes of that person."""
    out = tmp_path_factory.mktemp("exported") / "anna"
    assert export.main([str(world.file), "--out", str(out)]) == 0
    return out


def apart(first, second):
    return np.abs(first - second).max()


@pytest.mark.parametrize("kind", [pytest.param("mini", marks=pytest.mark.long), "sd1", "sd2", "xl"])
def test_pictures_in_diffusers_are_those_of_this_project(kind, request, tmp_path):
    """From the same latents, without guidance and with it."""
    if kind == "sd2":
        world = request.getfixturevalue("world")
    elif kind == "xl":
        world = request.getfixturevalue("large")
    elif kind == "sd1":
        world = World(write_smallest(tmp_path / "sd1", "sd1"), tmp_path, 0.3)
    else:
        world = World(hub.MINI_FOLDER, tmp_path, 0.05)
    pipe = world.pipe()
    plain = world.draw_there(pipe, 7.5, PROMPT.replace("{}", "somebody"))
    loaded = load_identity(pipe, world.file)
    for guidance, loaded.strength in ((1.0, 1.0), (7.5, 1.0), (7.5, 0.5)):
        ours = world.draw(guidance, strength=loaded.strength)
        assert apart(world.draw_there(pipe, guidance), ours) <= 2
    # The parts are seen: without them it is another picture.
    for wrong in (-1, float("nan"), "1"):
        with pytest.raises(ValueError, match="strength must be a number"):
            loaded.strength = wrong
    assert loaded.strength == 0.5
    loaded.strength = 0.0
    assert apart(world.draw_there(pipe, 7.5), ours) > 10
    # Nobody is named: the plain model; and so once the person is gone.
    for _ in range(2):
        assert apart(world.draw_there(pipe, 7.5, PROMPT.replace("{}", "somebody")), plain) == 0
        loaded.unload()


def test_each_prompt_of_a_batch_names_somebody_or_nobody(world):
    pipe = world.pipe()
    alone = world.draw_there(pipe, 7.5, "a photo of a cat")
    load_identity(pipe, world.file)
    person = world.draw_there(pipe, 7.5)
    latents = world.latents().repeat(4, 1, 1, 1)
    drawn = pipe(
        ["a photo of a cat", PROMPT],
        negative_prompt=[NEGATIVE] * 2,
        latents=latents,
        num_images_per_prompt=2,
        num_inference_steps=STEPS,
        guidance_scale=7.5,
    ).images
    for picture, expected in zip(drawn, (alone, alone, person, person), strict=True):
        assert apart(np.asarray(picture).astype(int), expected) <= 1
    # What encode_prompt gave can be given back.
    embeds, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
    again = pipe(
        prompt_embeds=embeds,
        negative_prompt_embeds=negative,
        latents=world.latents(),
        num_inference_steps=STEPS,
        guidance_scale=7.5,
    ).images[0]
    assert apart(np.asarray(again).astype(int), person) <= 1


def test_other_pipelines_of_the_same_networks(world, folder):
    """An exported folder, in ControlNet's pipeline and in image to image."""
    pipe = world.pipe()
    load_identity(pipe, folder)
    person = world.draw_there(pipe, 7.5)
    # A new ControlNet adds nothing.
    control = diffusers.ControlNetModel.from_unet(
        pipe.unet, conditioning_embedding_out_channels=(16, 32)
    )
    parts = {**pipe.components, "safety_checker": None, "feature_extractor": None}
    parts = {**parts, "requires_safety_checker": False}
    controlled = diffusers.StableDiffusionControlNetPipeline(controlnet=control, **parts)
    load_identity(controlled, folder)
    controlled.set_progress_bar_config(disable=True)
    hint = torch.zeros(1, 3, world.side, world.side)
    assert apart(world.draw_there(controlled, 7.5, image=hint), person) <= 1
    # Without guidance a plain pipeline with the deltas in its weights is the same.
    photo = torch.rand(1, 3, world.side, world.side, generator=torch.Generator().manual_seed(0))
    settings = {"image": photo, "strength": 0.8, "guidance_scale": 1.0, "num_inference_steps": 8}
    from_photo = diffusers.StableDiffusionImg2ImgPipeline(**parts)
    from_photo.set_progress_bar_config(disable=True)
    load_identity(from_photo, folder)
    drawn = from_photo(PROMPT, generator=torch.Generator().manual_seed(1), **settings).images[0]
    merged = world.pipe(diffusers.StableDiffusionImg2ImgPipeline)
    for name, (down, up) in exported.read(folder)[0].own.items():
        merged.unet.get_submodule(name).weight.data += torch.tensor(up @ down)
    person = world.person
    embeds = condition.context(
        world.model, person.method, world.frozen, person.trainable, person.given, world.ids(PROMPT)
    )
    expected = merged(
        prompt_embeds=torch.tensor(np.asarray(embeds)),
        generator=torch.Generator().manual_seed(1),
        **settings,
    ).images[0]
    assert apart(*(np.asarray(picture).astype(int) for picture in (drawn, expected))) <= 2


def test_exported_person_of_sdxl_in_diffusers_with_and_without_this_project(
    large, tmp_path, monkeypatch
):
    """All of it with `load_identity`; with diffusers' own loaders all but the adapter, from files
    under either family of names."""
    out = tmp_path / "out"
    assert export.main([str(large.file), "--out", str(out)]) == 0
    person, about = exported.read(out)
    assert about["family"] == "other" and about["text_widths"] == [8, 16]
    pipe = large.pipe()
    loaded = load_identity(pipe, out)
    whole = large.draw(5.0)
    assert apart(large.draw_there(pipe, 5.0), whole) <= 2
    # What encode_prompt gave can be given back.
    names = ("", "negative_", "pooled_", "negative_pooled_")
    said = pipe.encode_prompt(PROMPT, negative_prompt=NEGATIVE)
    embeds = {f"{of}prompt_embeds": x for of, x in zip(names, said, strict=True)}
    again = large.draw_there(pipe, 5.0, None, negative_prompt=None, **embeds)
    assert apart(again, whole) <= 2
    loaded.unload()
    alone = dataclasses.replace(
        large.person, method=dataclasses.replace(large.person.method, adapter=False)
    )
    ours = large.draw(5.0, alone)
    (kohya,) = about["parts"]["loras"]
    for file in (exported.LORA, kohya):
        pipe = large.pipe()
        before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
        pipe.load_lora_weights(out, weight_name=file)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        after = pipe.unet.state_dict()
        changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
        assert changed == {f"{name}.weight" for name in person.own}
        for name, (down, up) in person.own.items():
            added = (after[f"{name}.weight"] - before[f"{name}.weight"]).numpy()
            np.testing.assert_allclose(added, up @ down, atol=1e-6)
        for name, suffix in (("tokens", ""), ("tokens_2", "_2")):
            pipe.load_textual_inversion(
                str(out),
                weight_name=about["parts"][name],
                token="<person>",
                text_encoder=getattr(pipe, f"text_encoder{suffix}"),
                tokenizer=getattr(pipe, f"tokenizer{suffix}"),
            )
        end = pipe.tokenizer_2.eos_token_id
        pipe.text_encoder_2.text_model.eos_token_id = end  # which load_identity sees to
        drawn = large.draw_there(pipe, 5.0, PROMPT.replace("{}", "<person>"))
        assert apart(drawn, ours) <= 2 < apart(drawn, whole)
    # As the README has it, word for word.
    block = next(part for part in (out / "README.md").read_text().split("```") if "suffix" in part)
    pipe = large.pipe()
    monkeypatch.chdir(tmp_path)
    exec(block, {"pipe": pipe})
    assert apart(large.draw_there(pipe, 5.0, PROMPT.replace("{}", "<person>")), ours) <= 2


def test_person_with_a_shared_enhancer_in_diffusers(world, tmp_path):
    cfg = made.config(world.model.text.hidden_size)
    path = tmp_path / "enhancer.safetensors"
    enhancers.write(path, cfg, made.tree(cfg, world.model), made.about())
    enhancer = enhancers.read(path)
    person = people.enhanced_person(world.model, cfg, enhancer.sha256, kv="low_rank")
    file = tmp_path / "identity.safetensors"
    write_identity(file, person)
    assert export.main([str(file), "--out", str(tmp_path / "out"), "--enhancer", str(path)]) == 0
    ours = world.draw(7.5, person, shared.frozen_part(enhancer.shared))
    for given, settings in ((file, {"enhancer": path}), (tmp_path / "out", {})):
        pipe = world.pipe()
        load_identity(pipe, given, **settings)
        assert apart(world.draw_there(pipe, 7.5), ours) <= 2
    with pytest.raises(enhancers.EnhancerError, match="enhancer=FILE"):
        load_identity(world.pipe(), file)


def test_what_diffusers_cannot_draw_is_one_message(world, tmp_path):
    pipe = world.pipe()
    with pytest.raises(FileNotFoundError, match="no identity file"):
        load_identity(pipe, tmp_path / "nobody")
    with pytest.raises(ValueError, match="strength"):
        load_identity(pipe, world.file, strength=-1)
    with pytest.raises(ValueError, match="one of tokenizer_2 and text_encoder_2"):
        extra = {"text_encoder_2": 1, "encode_prompt": 1, "load_textual_inversion": 1}
        load_identity(SimpleNamespace(**pipe.components, **extra), world.file)
    with pytest.raises(ValueError, match="lacks tokenizer"):
        load_identity(SimpleNamespace(), world.file)
    wide, odd, other = (tmp_path / f"{name}.safetensors" for name in ("wide", "odd", "other"))
    words = {"pseudo_tokens": np.zeros((2, 16), np.float32)}
    alone = condition.make_method("textual_inversion")
    write_identity(
        wide,
        dataclasses.replace(
            world.person,
            method=alone,
            trainable=words,
            given={"anchor": words["pseudo_tokens"]},
        ),
    )
    with pytest.raises(IdentityError, match="another model family"):
        load_identity(pipe, wide)
    trained = world.person.trainable
    elsewhere = {"down_blocks_7": trained["kv"]["mid_block"]}
    elsewhere = dataclasses.replace(world.person, trainable={**trained, "kv": elsewhere})
    write_identity(odd, elsewhere)
    with pytest.raises(IdentityError, match="does not fit this UNet"):
        load_identity(pipe, odd)
    write_identity(other, dataclasses.replace(world.person, seed=1))
    loaded = load_identity(pipe, world.file)
    with pytest.raises(ValueError, match="another person already"):
        load_identity(pipe, other)
    with pytest.raises(ValueError, match="negative prompt"):
        pipe("a photo", negative_prompt="{}")
    loaded.unload()
    load_identity(pipe, other)  # takes the place of the one before


def test_people_of_other_families_are_refused(world, large):
    with pytest.raises(IdentityError, match="text width of 8 and 16, and that of this pipeline"):
        load_identity(world.pipe(), large.file)
    with pytest.raises(IdentityError, match="text width of 8, and that of this pipeline is 8 and"):
        load_identity(large.pipe(), world.file)


def test_lora_file_in_diffusers_own_loader(world, folder):
    """peft adds it to the weights as it is, and the file of tokens gives both vectors; pictures are
    those of this project but for the adapter, with guidance too."""
    pipe = world.pipe()
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    (lora,) = (folder / "loras").iterdir()
    pipe.load_lora_weights(folder, weight_name=f"loras/{lora.name}")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    person, _ = exported.read(folder)
    changed = {
        n for n, value in pipe.unet.state_dict().items() if not torch.equal(value, before[n])
    }
    assert changed == {f"{name}.weight" for name in person.own}
    for name, (down, up) in person.own.items():
        key = f"{name}.weight"
        added = (pipe.unet.state_dict()[key] - before[key]).numpy()
        np.testing.assert_allclose(added, up @ down, atol=1e-6)
    pipe.load_textual_inversion(str(folder))
    rows = pipe.text_encoder.get_input_embeddings().weight[-2:].detach().numpy()
    np.testing.assert_array_equal(rows, world.person.trainable["pseudo_tokens"])
    word = pipe.tokenizer.convert_ids_to_tokens(len(pipe.tokenizer) - 2)
    method = dataclasses.replace(world.person.method, adapter=False)
    person = dataclasses.replace(world.person, method=method)
    drawn = world.draw_there(pipe, 7.5, PROMPT.replace("{}", word))
    assert apart(drawn, world.draw(7.5, person)) <= 2 < apart(drawn, world.draw(7.5))


# The networks of Stable Diffusion 1.5 and 2.1 have the same levels: 16
# cross-attentions. SDXL has 70.
KINDS = (("sd15", "sd1"), ("sd21", "sd2"), ("sdxl", "sdxl"))
WIDTHS = {"sd15": (768,), "sd21": (1024,), "sdxl": (768, 1280)}
FULL = [(size, random_sd.config(size, family, 49408).unet) for size, family in KINDS]


@functools.cache
def ldm_attentions(unet):
    """Width and number of the cross-attentions by their names in the original layout: blocks are
    counted through all levels, and on the way down one that halves ends each level but the last."""
    found = {}
    levels = list(zip(unet.block_out_channels, unet.transformer_layers, strict=True))
    each, number = unet.layers_per_block, 1
    for level, kind in enumerate(unet.down_block_types):
        for _ in range(each):
            if "CrossAttn" in kind:
                found[f"input_blocks.{number}.1"] = levels[level]
            number += 1
        number += level < len(levels) - 1
    found["middle_block.1"] = levels[-1]
    number = 0
    for level, kind in enumerate(unet.up_block_types):
        for _ in range(each + 1):
            if "CrossAttn" in kind:
                found[f"output_blocks.{number}.1"] = levels[::-1][level]
            number += 1
    return found


def a1111_module(key):
    """Where AUTOMATIC1111 looks for the layer of a kohya key, whose numbers are diffusers' or, of
    SDXL, the original layout's."""
    for pattern, name in (
        (r"lora_unet_down_blocks_(\d+)_attentions_(\d+)_(.+)", "input_blocks.{}.1"),
        (r"lora_unet_mid_block_attentions_(\d+)_(.+)", "middle_block.1"),
        (r"lora_unet_up_blocks_(\d+)_attentions_(\d+)_(.+)", "output_blocks.{}.1"),
    ):
        if match := re.fullmatch(pattern, key):
            *numbers, rest = match.groups()
            down, up = 1 + 3 * int(numbers[0]), 3 * int(numbers[0])
            number = (down if "input" in name else up) + int(numbers[-1])
            return name.format(number), rest
    _, side, kind, *numbers, rest = re.fullmatch(
        r"lora_unet_((input|middle|output)_(blocks?)(?:_(\d+))?_1)_(transformer_.+)", key
    ).groups()
    return ".".join([f"{side}_{kind}", *filter(None, numbers), "1"]), rest


def comfyui_modules(unet):
    """What ComfyUI calls the layers of a UNet in LoRAs: diffusers' names with `_` between, or those
    of the original layout."""
    names = {}
    both = zip(ldm_attentions(unet).items(), attentions_of(unet), strict=True)
    for (place, (_, depth)), theirs in both:
        for layer in range(depth):
            for letter in "kv":
                rest = f"transformer_blocks_{layer}_attn2_to_{letter}"
                names[f"lora_unet_{theirs}_{rest}"] = place
                names[f"lora_unet_{place.replace('.', '_')}_{rest}"] = place
    return names


def attentions_of(unet):
    return [f"{block}_{name}" for block, tree in cross_kv_shapes(unet).items() for name in tree]


@pytest.mark.parametrize(("size", "unet"), FULL)
def test_lora_file_by_the_rules_of_web_uis(size, unet, tmp_path):
    """Each layer is found once, with its shape; the weights that are added are the deltas."""
    rng, D = np.random.default_rng(0), unet.cross_attention_dim
    deltas = {}
    for name, module in diffusers_attentions(unet).items():
        for letter in "kv":
            down, up = rng.normal(size=(2, D)), rng.normal(size=(module, 2))
            deltas[f"{name}.attn2.to_{letter}"] = (np.float32(down), np.float32(up))
    path = tmp_path / "anna-kv.safetensors"
    exported.write_lora(path, deltas, WIDTHS[size], {})
    if size == "sdxl":
        exported.write_peft(tmp_path / "peft.safetensors", deltas, {})
        assert exported.read_lora(tmp_path / "peft.safetensors").keys() == deltas.keys()
    else:
        assert exported.read_lora(path).keys() == deltas.keys()
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    # AUTOMATIC1111: anything with metadata is SD 1 unless it says that it is another.
    family = "SD2" if metadata.get("ss_v2") == "True" else "SD1" if metadata else "unknown"
    family = "SDXL" if metadata.get("ss_base_model_version", "").startswith("sdxl_") else family
    assert family == {"sd15": "SD1", "sd21": "SD2", "sdxl": "SDXL"}[size]
    widths, known, seen = ldm_attentions(unet), comfyui_modules(unet), set()
    layers = {key.split(".")[0] for key in tensors}
    assert not any(key.endswith(".alpha") for key in tensors) and layers <= known.keys()
    for layer in layers:
        place, rest = a1111_module(layer)
        assert place == known[layer]  # both programs find the same one
        seen.add((place, rest))
        up, down = (tensors[f"{layer}.lora_{part}.weight"] for part in ("up", "down"))
        # Without alpha both scale by 1.
        assert (up @ down).shape == (widths[place][0], D)
    assert len(seen) == len(deltas) == {"sdxl": 140}.get(size, 32)


def diffusers_attentions(unet):
    """Widths by diffusers' names, from diffusers' own UNet without weights."""
    with torch.device("meta"):
        network = diffusers.UNet2DConditionModel.from_config(unet.to_dict())
    return {
        name: module.norm2.normalized_shape[0]
        for name, module in network.named_modules()
        if name.rpartition(".")[2].isdigit() and "transformer_blocks" in name.split(".")[-2]
    }


class FakeClip:
    """One text encoder as ComfyUI holds it, or two: tokens are numbers or vectors, in chunks of
    77."""

    def __init__(self, world, folders):
        self.world, self.folders = world, folders

    def tokenize(self, prompt):
        if self.world.model.text_2 is None:
            return {"h": self.chunks(prompt, "emb_params")}
        return {"g": self.chunks(prompt, "clip_g"), "l": self.chunks(prompt, "clip_l")}

    def chunks(self, prompt, key):
        plain, row = self.world.tokenizer, []
        for word in prompt.split():
            name = word.removeprefix("embedding:")
            if name == word:
                row += [(int(number), 1.0) for number in plain.ids(word)]
                continue
            for directory in self.folders():
                file = Path(directory) / f"{name}.safetensors"
                if file.is_file():
                    found = load_file(file)
                    vectors = found.get(key, next(iter(found.values())))
                    row += [(vector, 1.0) for vector in vectors]
                    break
        ends = [plain.eos] + [0 if key == "clip_g" else plain.pad] * 77
        return [[(plain.bos, 1.0), *row, *((n, 1.0) for n in ends)][:77]]

    def encode_from_tokens_scheduled(self, tokens):
        model, frozen = self.world.model, self.world.frozen
        vectors, ids = {}, None
        for key, (chunk,) in sorted(tokens.items()):  # "l", whose padding `encode_text` knows, last
            own = [token for token, _ in chunk if torch.is_tensor(token)]
            vectors[f"clip_{key}"] = np.stack(own)
            later = iter(range(model.text.vocab_size, model.text.vocab_size + len(own)))
            ids = [next(later) if torch.is_tensor(token) else token for token, _ in chunk]
        vectors = vectors.get("clip_h", vectors)
        encoded = sd.encode_text(model, frozen, jnp.asarray(ids)[None], vectors)
        joined = np.asarray(sd.context_of(model, encoded))
        return [[torch.tensor(joined), {"pooled_output": None}]]


@pytest.fixture
def comfyui(tmp_path, monkeypatch):
    """The node, with stand-ins for the modules of ComfyUI that it uses."""
    folders = {"embeddings": [str(tmp_path / "embeddings")]}
    paths = ModuleType("folder_paths")
    paths.models_dir = str(tmp_path)
    paths.add_model_folder_path = lambda kind, folder: folders[kind].append(folder)
    utils, core = (ModuleType(f"comfy.{name}") for name in ("utils", "sd"))
    utils.load_torch_file = lambda path, safe_load: load_file(path)
    core.load_lora_for_models = lambda model, clip, lora, model_strength, clip_strength: (
        [*model, (lora, model_strength, clip_strength)],
        clip,
    )
    package = ModuleType("comfy")
    package.utils, package.sd = utils, core
    for module in (package, utils, core, paths):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    spec = importlib.util.spec_from_file_location(
        "idea_jax_node", NODE / "__init__.py", submodule_search_locations=[str(NODE)]
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "idea_jax_node", module)
    spec.loader.exec_module(module)
    yield SimpleNamespace(node=module, root=tmp_path / "identities", folders=folders)
    sys.modules.pop("idea_jax_node.identity", None)


@pytest.mark.parametrize("kind", ["sd2", "xl"])
def test_comfyui_node_gives_the_condition_of_this_project(kind, request, comfyui, tmp_path):
    world = request.getfixturevalue("world" if kind == "sd2" else "large")
    folder = tmp_path / "exported"
    assert export.main([str(world.file), "--out", str(folder), "--to", "comfyui"]) == 0
    (comfyui.root / "anna").symlink_to(folder)
    node, person = comfyui.node.LoadIdentity(), world.person
    clip = FakeClip(world, lambda: comfyui.folders["embeddings"])
    ((choices, _),) = [v for k, v in node.INPUT_TYPES()["required"].items() if k == "identity"]
    assert choices == ["anna"] and node.RETURN_TYPES == ("MODEL", "CONDITIONING")
    model, conditioning = node.load([], clip, "anna", PROMPT, 0.5)
    ((given, _),) = conditioning
    expected = condition.context(
        world.model,
        person.method,
        world.frozen,
        person.trainable,
        person.given,
        world.ids(PROMPT),
        strength=0.5,
    )
    expected = sd.context_of(world.model, expected)
    np.testing.assert_allclose(given.numpy(), expected, rtol=1e-5, atol=1e-4)  # of values up to 12
    ((lora, *strengths),) = model
    assert strengths == [0.5, 0.0]
    (file,) = (folder / "loras").iterdir()
    assert lora.keys() == load_file(file).keys()
    # The words alone.
    model, ((given, _),) = node.load([], clip, "anna", PROMPT, 0.0)
    tokens = person.trainable["pseudo_tokens"]
    alone = sd.encode_text(world.model, world.frozen, world.ids(PROMPT), tokens)
    alone = sd.context_of(world.model, alone)
    np.testing.assert_allclose(given.numpy(), alone, rtol=1e-5, atol=1e-4)
    assert np.abs(expected - alone).max() > 0.1
    assert model == []


def test_comfyui_node_refuses_with_a_reason(world, large, folder, comfyui, tmp_path):
    (comfyui.root / "anna").symlink_to(folder)
    node = comfyui.node.LoadIdentity()
    clip = FakeClip(world, lambda: comfyui.folders["embeddings"])

    def load(name="anna", prompt=PROMPT, clip=clip):
        return node.load([], clip, name, prompt, 1.0)

    with pytest.raises(ValueError, match="no person"):
        load("../anna")
    with pytest.raises(ValueError, match="write {}"):
        load(prompt="a photo")
    (comfyui.root / "large").symlink_to(tmp_path / "large")
    assert export.main([str(large.file), "--out", str(tmp_path / "large")]) == 0
    with pytest.raises(ValueError, match="with 2 text encoders, and this checkpoint has 1"):
        load("large")
    with pytest.raises(ValueError, match="were not found"):
        load(clip=FakeClip(world, list))
    copy = comfyui.root / "copy"
    assert export.main([str(world.file), "--out", str(copy)]) == 0
    (copy / "adapter.safetensors").write_bytes(b"0" * 100)
    with pytest.raises(ValueError, match="another file"):
        load("copy")
    (copy / "identity.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        load("copy")
    assert export.main([str(world.file), "--out", str(tmp_path / "d"), "--to", "diffusers"]) == 0
    (comfyui.root / "d").symlink_to(tmp_path / "d")
    with pytest.raises(ValueError, match="other programs"):
        load("d")


@pytest.mark.parametrize("name", ["both halves", "prompt half, no adapter"])
def test_forms_that_are_measured(name, world):
    """Row 0 is the negative prompt's, row 1 the prompt's: with the delta and the adapter or not."""
    form, person, model = halves.FORMS[name], world.person, world.model
    given = (model, person.method, world.frozen, person.trainable, person.given)
    ids = world.ids(PROMPT, NEGATIVE)
    arrays = portable(person.method, person.trainable, person.given)
    encoded = sd.encode_text(model, world.frozen, ids, person.trainable["pseudo_tokens"])
    if form.adapter:
        encoded = encoded.at[0].set(condition.context(*given, ids[:1])[0])
    found = halves.keys_values(form, *given, ids)["mid_block"]["attentions_0"]
    weight = world.frozen.cross_kv["mid_block"]["attentions_0"]["transformer_blocks_0"]["to_v"]
    down, up = arrays.own["mid_block.attentions.0.transformer_blocks.0.attn2.to_v"]
    acts = {"prompt": (0, 1), "both": (1, 1), "none": (0, 0)}[form.kv]
    for row, (text_row, changes) in enumerate(zip((1, 0), acts, strict=True)):
        want = np.asarray(encoded[text_row]) @ (weight + changes * (up @ down).T)
        np.testing.assert_allclose(
            found["transformer_blocks_0"]["to_v"][row], want, rtol=1e-4, atol=1e-4
        )
