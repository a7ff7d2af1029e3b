"""SDXL against diffusers' pipeline: its networks, its whole text condition, gradients, pictures.

The checkpoint is a small one of `random_sd`, whose weights are all random (see reference.py).
"""

import copy
import dataclasses
import functools
import json
import shutil

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import original
import people
import pytest
import reference
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import sample_jax
from idea_jax import costs, export, random_sd
from idea_jax.config.reading import parse
from idea_jax.config.settings import SampleConfig
from idea_jax.data.tokenizer import load_tokenizer
from idea_jax.diffusion import samplers
from idea_jax.diffusion.schedule import ScheduleConfig, alphas_cumprod
from idea_jax.formats import learned_embeds
from idea_jax.formats.identity import IdentityError, check_identity, read_identity, write_identity
from idea_jax.method import condition
from idea_jax.models import hub, lora, sd, weights
from idea_jax.models.config_reader import UnsupportedConfig
from idea_jax.models.unet import project_kv
from idea_jax.pytrees import flatten
from idea_jax.sampling import run as sample

RTOL, ATOL = 1e-4, 1e-5
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def abstract(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def noise(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def nchw(x):
    return torch.tensor(x).permute(0, 3, 1, 2)


def nhwc(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


class World:
    """The same random SDXL in diffusers and here."""

    def __init__(self, folder):
        first = random_sd.write(folder / "first", "tiny", "sdxl")
        self.pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(first)
        self.pipe.set_progress_bar_config(disable=True)
        for seed, part in enumerate(PARTS):
            reference.randomise(getattr(self.pipe, part), seed)
        self.folder = folder / "checkpoint"
        self.pipe.save_pretrained(self.folder)
        self.model, self.frozen = sd.load(self.folder)
        text = self.model.text
        length = text.max_position_embeddings
        self.tokenizer = load_tokenizer(self.folder / "tokenizer", text.vocab_size, length)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("sdxl"))


def test_real_base_has_a_leaf_for_each_key_of_its_networks():
    """Of the real size, on torch's meta device."""
    model = random_sd.config("sdxl", "sdxl", random_sd.CLIP_VOCAB_SIZE)
    targets = sd.shapes(model)._asdict()
    with torch.device("meta"):
        networks = {
            ("unet", "cross_kv"): reference.unet_from(reference.SDXL_UNET),
            ("text",): reference.text_from(reference.SDXL_TEXT),
            ("text_2",): reference.text_from(reference.SDXL_TEXT_2),
            ("vae",): diffusers.AutoencoderKL.from_config(reference.SDXL_VAE),
        }
    tables = (weights.unet_table(True), weights.text_table(), weights.text_table("text_2"))
    tables += (weights.vae_table(),)
    for (trees, network), table in zip(networks.items(), tables, strict=True):
        headers = {k: (tuple(v.shape), "F32") for k, v in network.state_dict().items()}
        leaves = flatten({tree: targets[tree] for tree in trees})
        plan = weights.match_keys(table, headers, leaves, "torch")  # raises unless one to one
        assert set(plan) == set(headers)
        assert {target for target, _ in plan.values()} == set(leaves)
        assert set(weights.source_keys(table, list(leaves))) == set(leaves)
    assert reference.published_xl() == model
    count = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in targets.items()}
    assert count["unet"] + count["cross_kv"] == 2_567_463_684
    assert (count["text"], count["text_2"]) == (123_060_480, 694_659_840)
    # Keys and values of 10 layers of width 640 and 60 of 1280, from a context of width 2048.
    assert count["cross_kv"] == 2 * 2048 * (10 * 640 + 60 * 1280)


def test_a_person_of_the_real_size_has_a_pair_of_small_networks_for_each_encoder():
    """Of these widths; one pair of width 2048 would have 58 million values instead of 32."""
    model = random_sd.config("sdxl", "sdxl", random_sd.CLIP_VOCAB_SIZE)
    method = condition.make_method("paper", kv="low_rank")
    start = {"clip_l": abstract(2, 768), "clip_g": abstract(2, 1280)}
    fresh = functools.partial(condition.init_trainable, model, method)
    trees = jax.eval_shape(fresh, jax.random.key(0), start)
    assert trees["pseudo_tokens"] == start
    count = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in trees.items()}
    assert count["kv"] == 2 * 4 * (10 * (2048 + 640) + 60 * (2048 + 1280))
    pairs = sum(14 * width**2 + 526 * width + 1 for width in (768, 1280))
    assert count["adapter"] + count["enhancer"] == pairs


def test_real_base_needs_exactly_the_known_flops():
    """Forward at 1024, with the keys and values of 70 cross-attentions."""
    model = random_sd.config("sdxl", "sdxl", random_sd.CLIP_VOCAB_SIZE)

    def predict(frozen, latents, context, pooled, size_ids):
        kv = project_kv(frozen.cross_kv, context, model.dtype) | {"pooled": pooled}
        return sd.predict(model, frozen, latents, jnp.zeros(1, jnp.int32), kv, size_ids)

    inputs = abstract(1, 128, 128, 4), abstract(1, 77, 2048), abstract(1, 1280), abstract(1, 6)
    counted = costs.needed(predict, sd.shapes(model), *inputs) / 1e12
    np.testing.assert_allclose(counted, 6.76, rtol=2e-3)


def test_unet_and_its_gradients_match_diffusers(world):
    model, (context, pooled) = world.model, (noise(2, 2, 7, 80), noise(3, 2, 40))
    latents, weighting = noise(0, 2, 10, 13, 4), noise(1, 2, 10, 13, 4)
    timesteps = np.array([3, 871], np.int32)
    size_ids = np.array([[900, 1200, 10, 0, 1024, 1024], [32, 48, 0, 5, 512, 768]], np.int32)

    @jax.jit
    def run(frozen, context, pooled):
        def loss(context, pooled):
            kv = project_kv(frozen.cross_kv, context, jnp.float32) | {"pooled": pooled}
            prediction = sd.predict(model, frozen, latents, timesteps, kv, size_ids)
            return jnp.sum(prediction * weighting), prediction

        return jax.grad(loss, (0, 1), has_aux=True)(context, pooled)

    theirs = [torch.tensor(x, requires_grad=True) for x in (context, pooled)]
    added = {"text_embeds": theirs[1], "time_ids": torch.tensor(size_ids)}
    expected = world.pipe.unet(
        nchw(latents), torch.tensor(timesteps), theirs[0], added_cond_kwargs=added
    ).sample
    (expected * nchw(weighting)).sum().backward()
    gradients, prediction = run(world.frozen, context, pooled)
    np.testing.assert_allclose(prediction, nhwc(expected), rtol=RTOL, atol=ATOL)
    for ours, their in zip(gradients, theirs, strict=True):
        assert_close(ours, their.grad)


def test_a_backward_pass_that_keeps_less_gives_the_same_gradient(world):
    """And has fewer and smaller values to keep, those of the five samples that leave the forward
    pass."""
    latents, context, pooled = noise(0, 5, 8, 8, 4), noise(1, 5, 7, 80), noise(2, 5, 40)
    sizes = np.full((5, 6), 32, np.int32)
    kept, gradients = [], []
    for remat in (False, True):
        model = dataclasses.replace(world.model, remat=remat)

        def loss(context, model=model):
            kv = project_kv(world.frozen.cross_kv, context, jnp.float32) | {"pooled": pooled}
            times = np.array([500], np.int32)
            return jnp.sum(sd.predict(model, world.frozen, latents, times, kv, sizes) ** 2)

        forward = functools.partial(jax.vjp, loss)
        leaves = jax.tree.leaves(jax.eval_shape(forward, context)[1])
        kept.append(sum(x.size for x in leaves if x.shape[:1] == (5,)))
        gradients.append(jax.jit(jax.grad(loss))(context))
    assert_close(*gradients)
    assert kept[1] < 0.7 * kept[0]


def assert_close(ours, theirs):
    theirs = np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3 * np.sqrt(np.mean(theirs**2)))


def test_latents_with_mean_and_deviation_are_those_of_diffusers(world, tmp_path):
    """Encoded as its training scripts do it, decoded as its pipeline does."""
    mean, std = [0.1, -0.4, 0.2, 0.0], [1.3, 0.7, 2.0, 1.1]
    values = world.model.vae.to_dict() | {"latents_mean": mean, "latents_std": std}
    config = type(world.model.vae).from_dict(values, "vae/config.json")
    assert config.to_dict() == values
    model = dataclasses.replace(world.model, vae=config)
    images, latents = np.tanh(noise(0, 1, 16, 12, 3)), noise(1, 1, 4, 3, 4)
    vae, s = world.pipe.vae, config.scaling_factor
    posterior = vae.encode(nchw(images)).latent_dist
    ours, logvar = sd.encode_image(model, world.frozen, images)
    expected = (nhwc(posterior.mean) - np.float32(mean)) * s / np.float32(std)
    np.testing.assert_allclose(ours, expected, rtol=RTOL, atol=ATOL)
    expected = nhwc(posterior.std) * s / np.float32(std)
    np.testing.assert_allclose(np.exp(logvar / 2), expected, rtol=RTOL, atol=ATOL)
    unscaled = latents * np.float32(std) / s + np.float32(mean)
    expected = nhwc(vae.decode(nchw(unscaled)).sample)
    np.testing.assert_allclose(
        sd.decode(model, world.frozen, latents), expected, rtol=RTOL, atol=ATOL
    )


def test_a_lora_changes_the_layers_that_it_names_in_both_encoders(world, tmp_path):
    """Under the names of kohya and of diffusers."""
    layers = {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_{}.weight": ("text", 128, 32),
        "text_encoder_2.text_model.encoder.layers.1.mlp.fc1.lora_{}.weight": ("text_2", 192, 48),
    }
    tensors, changes = {}, {}
    for seed, (name, (tree, rows, columns)) in enumerate(layers.items()):
        up, down = noise(seed, rows, 2), noise(seed + 9, 2, columns)
        kinds = ("up", "down") if name.startswith("lora_te1") else ("B", "A")
        for kind, factor in zip(kinds, (up, down), strict=True):
            tensors[name.format(kind)] = torch.tensor(factor)
        changes[f"{tree}/encoder/layers_{seed}/mlp/fc1/kernel"] = 0.5 * (up @ down).T
    save_file(tensors, tmp_path / "style.safetensors")
    _, merged = sd.load(world.folder, loras=[lora.Lora(tmp_path / "style.safetensors", 0.5)])
    before, after = (flatten(frozen._asdict()) for frozen in (world.frozen, merged))
    for path, leaf in before.items():
        np.testing.assert_allclose(after[path], leaf + changes.get(path, 0), rtol=1e-5, atol=1e-6)


def test_a_lora_under_kohyas_names_for_sdxl_changes_every_layer_that_it_names(world, tmp_path):
    """They are those of the original layout; the same layers are changed in torch, by their own."""
    unet = copy.deepcopy(world.pipe.unet)
    layers = {f"{name}.weight": layer for name, layer in unet.named_modules()}
    names = original.unet_tensors({key: key for key in unet.state_dict()}, unet.config)
    tensors = {}
    torch.manual_seed(0)
    for key, name in names.items():
        weight = getattr(layers.get(name), "weight", torch.zeros(0))
        if weight.ndim < 2:  # a bias or a norm
            continue
        rows, *rest = weight.shape
        up, down = torch.randn(rows, 2), torch.randn(2, *rest) / weight[0].numel() ** 0.5
        own = key.removeprefix("model.diffusion_model.").removesuffix(".weight").replace(".", "_")
        tensors[f"lora_unet_{own}.lora_down.weight"] = down
        tensors[f"lora_unet_{own}.lora_up.weight"] = up.reshape(rows, 2, *[1] * len(rest[1:]))
        tensors[f"lora_unet_{own}.alpha"] = torch.tensor(1.0)
        with torch.no_grad():
            weight += 0.7 / 2 * torch.einsum("or,r...->o...", up, down)
    assert len(tensors) == 3 * sum(leaf.ndim > 1 for leaf in unet.state_dict().values())
    save_file(tensors, tmp_path / "style.safetensors")
    folder = shutil.copytree(world.folder, tmp_path / "changed")
    unet.save_pretrained(folder / "unet")
    _, merged = sd.load(world.folder, loras=[lora.Lora(tmp_path / "style.safetensors", 0.7)])
    _, expected = sd.load(folder)
    for ours, theirs in zip(jax.tree.leaves(merged), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_xl", [True, False])
def test_the_first_timestep_is_that_of_the_familys_pipeline(
    world, random_checkpoint, tmp_path, is_xl
):
    """SDXL's believes the `steps_offset` of a file; that of 1.x and 2.x corrects an old one."""
    folder = shutil.copytree(world.folder if is_xl else random_checkpoint, tmp_path / "own")
    path = folder / "scheduler" / "scheduler_config.json"
    said = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
    path.write_text(json.dumps(json.loads(path.read_text()) | said | {"steps_offset": 0}))
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.scheduler.set_timesteps(4)
    ours = samplers.visited_timesteps("euler", sd.read_configs(folder, "float32").schedule, 4)
    np.testing.assert_array_equal(ours, pipe.scheduler.timesteps)


def test_an_autoencoder_of_another_family_is_noticed(world, tmp_path, caplog):
    """By the scale of its latents alone: all else is the same in SDXL and in 1.x and 2.x."""
    for name, scale in (("its own", 0.13025), ("sd-vae-ft-mse", 0.18215)):
        (tmp_path / name).mkdir()
        config = {**world.model.vae.to_dict(), "scaling_factor": scale}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        read = sd.read_configs(world.folder, "float32", vae=tmp_path / name)
        assert read.vae.scaling_factor == scale
    (said,) = [record.getMessage() for record in caplog.records]
    assert "sd-vae-ft-mse is perhaps that of another family" in said
    assert "scaled by 0.18215" in said and "by 0.13025" in said


# --- the whole condition --------------------------------------------------------------------------


def their_condition(world, prompt, negative=None):
    """Embeddings and pooled output of a prompt and of its negative prompt, in diffusers."""
    return world.pipe.encode_prompt(
        prompt, negative_prompt=negative, device="cpu", do_classifier_free_guidance=True
    )


@pytest.mark.parametrize("negative", [None, "blurry, low quality"])
def test_whole_condition_is_that_of_diffusers(world, negative):
    """Both encoders before their last layer, and the pooled output; no negative prompt is zeros."""
    prompt = "a portrait of a king, oil on canvas"
    with torch.no_grad():
        embeds, none, pooled, pooled_none = their_condition(world, prompt, negative)
    model, frozen = world.model, world.frozen
    text = sd.encode_text(model, frozen, world.tokenizer([prompt]))
    against = sd.encode_negative(model, frozen, world.tokenizer([negative or ""]))
    for ours, states, summary in ((text, embeds, pooled), (against, none, pooled_none)):
        np.testing.assert_allclose(sd.context_of(model, ours), states, rtol=RTOL, atol=ATOL)
        np.testing.assert_allclose(ours["pooled"], summary, rtol=RTOL, atol=ATOL)
    assert bool(none.any()) == (negative is not None)
    encoded = sd.encode_text(model, frozen, world.tokenizer([""]))  # which is something else
    assert np.abs(encoded["pooled"]).max() > 0.1


def test_gradients_of_both_encoders_tokens_are_those_of_transformers(world):
    """Through condition and pooled output, with the tokens as rows that are appended to tables."""
    model, first = world.model, world.model.text.vocab_size
    tokens = world.tokenizer.with_placeholder("<x>", 2)
    ids = tokens(["a photo of <x>_v0 <x>_v1 at the beach", "<x>_v0"])
    own = {
        name: noise(i, 2, c.hidden_size)
        for i, (name, c) in enumerate(zip(sd.ENCODERS, model.encoders, strict=True))
    }
    weights_of = noise(7, 2, 77, model.context_dim), noise(8, 2, model.unet.pooled_dim)

    def loss(own):
        text = sd.encode_text(model, world.frozen, ids, own)
        context = sd.context_of(model, text)
        return jnp.sum(context * weights_of[0]) + jnp.sum(text["pooled"] * weights_of[1])

    value, ours = jax.jit(jax.value_and_grad(loss))(own)
    padded = np.where(np.cumsum(ids == first - 1, axis=1) > 1, 0, ids)
    states, rows = [], {}
    for name, encoder, ids_of in (
        ("clip_l", world.pipe.text_encoder, ids),
        ("clip_g", world.pipe.text_encoder_2, padded),
    ):
        embeddings = encoder.get_input_embeddings()
        rows[name] = torch.tensor(own[name], requires_grad=True)
        table = torch.cat([embeddings.weight, rows[name]])
        embeds = torch.nn.functional.embedding(torch.tensor(ids_of).long(), table)
        handle = embeddings.register_forward_hook(lambda *_, embeds=embeds: embeds)
        # Ids beyond the table mean nothing to it: their embeddings are given.
        known = torch.tensor(np.where(ids_of >= first, 0, ids_of))
        out = encoder(known, output_hidden_states=True)
        handle.remove()
        states.append(out.hidden_states[-2])
    expected = (torch.cat(states, -1) * torch.tensor(weights_of[0])).sum()
    expected = expected + (out.text_embeds * torch.tensor(weights_of[1])).sum()
    expected.backward()
    np.testing.assert_allclose(value, expected.detach(), rtol=1e-4)
    for name, theirs in rows.items():
        assert_close(ours[name], theirs.grad)


# --- pictures -------------------------------------------------------------------------------------


def latents_of(world, size, count=2):
    shape = (*(side // world.model.vae.downscale for side in size), 4)
    x, _ = samplers.initial_noise(jnp.uint32(7), jnp.arange(count), shape)
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("negative", "size", "sampler", "told"),
    [("", (32, 32), None, {}), ("blurry", (32, 48), "ddim", {"original": (70, 90), "cut": (5, 8)})],
)
def test_pictures_are_those_of_diffusers(world, tmp_path, negative, size, sampler, told):
    """Of a person whose tokens are in both encoders, from a file for other programs, by the command
    line."""
    tokens = {
        name: 0.3 * noise(i, 2, config.hidden_size)
        for i, (name, config) in enumerate(zip(sd.ENCODERS, world.model.encoders, strict=True))
    }
    file = tmp_path / "anna.safetensors"
    learned_embeds.write_webui(file, tokens, {})
    prompt = "a photo of {} smiling, in the rain"
    settings = ["--pretrained_model_name_or_path", world.folder, "--learned_embedding_path", file]
    settings += ["--prompt", prompt, "--save_dir", tmp_path / "out", "--seed", 7, "--batch_size", 2]
    settings += ["--height", size[0], "--width", size[1], "--num_images_per_prompt", 2, "--n_iter"]
    settings += [1, "--num_inference_steps", 4, "--guidance_scale", 5]
    settings += ["--scheduler", sampler] if sampler else []  # otherwise Euler's, as the file says
    settings += ["--negative_prompt", negative] if negative else []
    if told:
        settings += ["--original_size", *told["original"], "--crop_top_left", *told["cut"]]
    (folder,) = sample.run(parse(SampleConfig, list(map(str, settings))))
    ours = [np.asarray(Image.open(folder / f"0000{k}.png")) for k in range(2)]

    pipe = world.pipe.from_pretrained(world.folder)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.scheduler) is diffusers.EulerDiscreteScheduler
    if sampler == "ddim":
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    with safe_open(file, "pt") as both:
        for suffix, name in (("", "clip_l"), ("_2", "clip_g")):
            pipe.load_textual_inversion(
                both.get_tensor(name),
                token="<anna>",
                text_encoder=getattr(pipe, f"text_encoder{suffix}"),
                tokenizer=getattr(pipe, f"tokenizer{suffix}"),
            )
    theirs = pipe(
        prompt.format("<anna>"),
        negative_prompt=negative or None,
        num_images_per_prompt=2,
        latents=latents_of(world, size),
        height=size[0],
        width=size[1],
        num_inference_steps=4,
        guidance_scale=5.0,
        output_type="np",
        original_size=told.get("original"),
        crops_coords_top_left=told.get("cut", (0, 0)),
    ).images
    assert np.std(theirs) > 0.05
    for mine, their in zip(ours, theirs, strict=True):
        assert np.abs(mine / 255 - their).max() <= 2 / 255


# --- one file -------------------------------------------------------------------------------------

LARGER = {  # as large as the rules of the original layout ask for
    "unet": {
        "block_out_channels": (64, 128),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (1, 2),
        "cross_attention_dim": 192,
        "sample_size": 128,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 88,
    },
    "vae": {**original.SIZES["sd2"][1], "scaling_factor": 0.13025, "sample_size": 256},
    "text_encoder": original.SIZES["sd1"][2],
    "text_encoder_2": {
        **original.SIZES["sd2"][2],
        "architectures": ["CLIPTextModelWithProjection"],
        "projection_dim": 40,
    },
}


def test_a_checkpoint_in_one_file_is_that_in_a_folder(tmp_path):
    networks = {
        "unet": reference.unet_from(LARGER["unet"]),
        "vae": diffusers.AutoencoderKL.from_config(LARGER["vae"]),
        "text_encoder": reference.text_from(LARGER["text_encoder"]),
        "text_encoder_2": reference.text_from(LARGER["text_encoder_2"]),
    }
    folder, file, states = tmp_path / "folder", tmp_path / "xl.safetensors", {}
    for seed, (part, network) in enumerate(networks.items()):
        reference.randomise(network, seed)
        network.save_pretrained(folder / part)
        states[part] = network.state_dict()
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(reference.SDXL_SCHEDULER)
    )
    tensors = original.unet_tensors(states["unet"], LARGER["unet"])
    tensors |= original.vae_tensors(states["vae"], LARGER["vae"])
    first = original.text_tensors(states["text_encoder"], "sd1")
    tensors |= {
        key.replace("cond_stage_model.", "conditioner.embedders.0."): value
        for key, value in first.items()
    }
    tensors |= original.text_tensors(states["text_encoder_2"], "sdxl")
    signal = alphas_cumprod(ScheduleConfig.from_dict(reference.SDXL_SCHEDULER, "f"))
    sigmas = torch.tensor(np.sqrt((1 - signal) / signal), dtype=torch.float32)
    tensors = {key: value.clone().contiguous() for key, value in tensors.items()}
    save_file({**tensors, "denoiser.sigmas": sigmas}, file)  # some files have it
    model, frozen = sd.load(file)
    expected, theirs = sd.load(folder)
    assert model == expected and model.text_2.projection_dim == 40
    jax.tree.map(np.testing.assert_array_equal, frozen, theirs)
    assert hub.resolve(file).padding == "<|endoftext|>"
    save_file({**tensors, "denoiser.sigmas": 2 * sigmas}, tmp_path / "other.safetensors")
    with pytest.raises(UnsupportedConfig, match="another noise schedule .denoiser.sigmas is off"):
        sd.read_configs(tmp_path / "other.safetensors", "float32")


# --- what does not fit ----------------------------------------------------------------------------


def break_config(folder, part, **changes):
    path = folder / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def swap(folder, one, two):
    (folder / one).rename(folder / "aside")
    (folder / two).rename(folder / one)
    (folder / "aside").rename(folder / two)


def other_words(folder):
    shutil.rmtree(folder / "tokenizer_2")
    words = json.loads((folder / "text_encoder" / "config.json").read_text())["vocab_size"]
    random_sd.write_tokenizer(folder / "tokenizer_2", ["other"], pad="!", vocab_size=words)


BROKEN = {
    "no second encoder": (
        lambda f: shutil.rmtree(f / "text_encoder_2"),
        "there is no text_encoder_2",
    ),
    "no first encoder": (
        lambda f: shutil.rmtree(f / "text_encoder"),
        "lacks text_encoder/config.json",
    ),
    "no first tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "lacks tokenizer/"),
    "no weights of the second encoder": (
        lambda f: (f / "text_encoder_2" / "model.safetensors").unlink(),
        "text_encoder_2",
    ),
    "no projection": (
        lambda f: break_config(f, "text_encoder_2", architectures=["CLIPTextModel"]),
        "text_encoder_2 is a CLIPTextModel, expected a CLIPTextModelWithProjection",
    ),
    "no second tokenizer": (lambda f: shutil.rmtree(f / "tokenizer_2"), "lacks tokenizer_2/"),
    "no config of the second encoder": (
        lambda f: (f / "text_encoder_2" / "config.json").unlink(),
        "lacks text_encoder_2/config.json",
    ),
    "a refiner": (
        lambda f: [shutil.rmtree(f / name) for name in ("text_encoder", "tokenizer")],
        "it is SDXL's refiner",
    ),
    "swapped tokenizers": (lambda f: swap(f, "tokenizer", "tokenizer_2"), "are the two swapped"),
    "swapped encoders": (
        lambda f: swap(f, "text_encoder", "text_encoder_2"),
        "text_encoder is a CLIPTextModelWithProjection",
    ),
    "other words": (other_words, "have different words"),
    "another width": (
        lambda f: break_config(f, "text_encoder_2", hidden_size=64),
        "cross_attention_dim is 80, but the sum of the text encoders' hidden_size is 96",
    ),
    "another pooled width": (
        lambda f: break_config(f, "text_encoder_2", projection_dim=48),
        "pooled output that the UNet adds is 40, but the second text encoder's",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_belong_together_is_refused_with_one_message(world, tmp_path, name, capsys):
    spoil, message = BROKEN[name]
    folder = shutil.copytree(world.folder, tmp_path / "broken")
    spoil(folder)
    tokens = {
        n: noise(0, 2, c.hidden_size)
        for n, c in zip(sd.ENCODERS, world.model.encoders, strict=True)
    }
    learned_embeds.write_webui(tmp_path / "anna.safetensors", tokens, {})
    assert drawn(folder, tmp_path) == 1
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and not (tmp_path / "out").exists()


def drawn(folder, work, tokens="anna.safetensors"):
    flags = ["--pretrained_model_name_or_path", folder, "--learned_embedding_path", work / tokens]
    flags += ["--prompt", "{}", "--save_dir", work / "out"]
    return sample_jax.main(list(map(str, flags)))


def test_a_person_of_another_family_is_refused_and_no_folder_is_left(world, tmp_path, capsys):
    learned_embeds.write_webui(tmp_path / "one.safetensors", noise(0, 2, 32), {})
    assert drawn(world.folder, tmp_path, "one.safetensors") == 1
    assert "text width of 32, this checkpoint has 32 and 48" in capsys.readouterr().err
    person = people.person(world.model)
    write_identity(tmp_path / "identity.safetensors", person)
    again = read_identity(tmp_path / "identity.safetensors")
    check_identity(again, world.model, "it")
    jax.tree.map(np.testing.assert_array_equal, again.trainable, person.trainable)
    other = random_sd.config("tiny", "sd1", world.model.text.vocab_size)
    with pytest.raises(IdentityError, match="text width of 32 and 48, this checkpoint has 32"):
        check_identity(again, other, "it")


TOKENS = {
    "swapped": ({"clip_l": (2, 48), "clip_g": (2, 32)}, "text width of 48 and 32, this checkpoint"),
    "one of another size": ({"clip_l": (2, 32), "clip_g": (2, 64)}, "text width of 32 and 64"),
    "fewer of one": ({"clip_l": (2, 32), "clip_g": (1, 48)}, "2 tokens of clip_l and 1 of clip_g"),
    "the first alone": ({"clip_l": (2, 32)}, "text width of 32, this checkpoint has 32 and 48"),
    "the second alone": ({"clip_g": (2, 48)}, "expected the tensors clip_l and clip_g"),
}


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_that_do_not_fit_two_encoders_are_one_message(world, tmp_path, name, capsys):
    shapes, message = TOKENS[name]
    tensors = {key: torch.zeros(shape) for key, shape in shapes.items()}
    save_file(tensors, tmp_path / "anna.safetensors")
    assert drawn(world.folder, tmp_path) == 1
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("is_on_sdxl", [True, False])
def test_people_of_the_other_family_are_one_message_everywhere(
    world, random_checkpoint, tmp_path, is_on_sdxl, capsys
):
    """When they are drawn, alone or with somebody who fits, and exported for a checkpoint."""
    models = [world.model, sd.read_configs(random_checkpoint, "float32")]
    folder, (fits, other) = world.folder, models
    if not is_on_sdxl:
        folder, (other, fits) = random_checkpoint, models
    for name, model in (("fits", fits), ("other", other)):
        write_identity(tmp_path / f"{name}.safetensors", people.person(model, base_model="tiny"))
    base = ["--pretrained_model_name_or_path", folder]
    out = ["--save_dir", tmp_path / "out", "--prompt"]
    both = [f"{name}={tmp_path / name}.safetensors" for name in ("fits", "other")]
    for command, flags in (
        (sample_jax, [*base, "--identity", tmp_path / "other.safetensors", *out, "{}"]),
        (sample_jax, [*base, "--identity", *both, *out, "{fits} and {other}"]),
        (export, [tmp_path / "other.safetensors", "--out", tmp_path / "out", *base]),
    ):
        assert command.main([*map(str, flags)]) == 1
        said = capsys.readouterr().err
        assert "belongs to another model family" in said and "Traceback" not in said
        assert said.count("error: ") == 1 and not (tmp_path / "out").exists()
