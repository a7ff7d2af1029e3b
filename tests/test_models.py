"""The networks against torch's diffusers and transformers, in float32 on the CPU.

The models are small and random; `quiet` ones show the epsilons of the norms (see reference.py).
"""

import copy
import dataclasses
import json
from functools import partial
from typing import NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
import transformers
from safetensors.numpy import load_file

from idea_jax.models import hub, sd, weights
from idea_jax.models.clip_text import CLIPTextConfig
from idea_jax.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from idea_jax.models.config_reader import UnsupportedConfig
from idea_jax.models.layers import GroupNorm, attention, conv3x3, gelu, timestep_embedding
from idea_jax.models.unet import UNetConfig, project_kv
from idea_jax.models.vae import VAEConfig
from idea_jax.pytrees import cast

RTOL, ATOL = 1e-4, 1e-5
KINDS = ["sd1", "sd2"]
TIMESTEPS = np.array([3, 871], np.int32)


class Loaded(NamedTuple):
    torch: reference.TorchModels
    model: sd.StableDiffusion
    frozen: sd.Frozen


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """(kind, quiet) -> the same weights in torch and here."""
    cache = {}

    def load(kind, quiet=False):
        if (kind, quiet) not in cache:
            folder = tmp_path_factory.mktemp(kind)
            built = reference.write_checkpoint(folder, kind, quiet)
            cache[kind, quiet] = Loaded(built, *sd.load(folder))
        return cache[kind, quiet]

    return load


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(x).permute(0, 3, 1, 2)


def nhwc(x: torch.Tensor) -> np.ndarray:
    return x.detach().permute(0, 2, 3, 1).numpy()


def assert_gradients_close(ours, theirs):
    theirs = np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3 * np.sqrt(np.mean(theirs**2)))


@pytest.mark.parametrize("kind", KINDS)
def test_unet_output_and_context_gradient_match_diffusers(loaded, kind):
    # 10x13 latents have odd sizes at a lower level, so that the way up has to crop.
    model = loaded(kind).model
    latents, weighting = noise(0, 2, 10, 13, 4), noise(1, 2, 10, 13, 4)
    context = noise(2, 2, 7, model.unet.cross_attention_dim)

    @jax.jit
    def run(frozen, context):
        def loss(context):
            kv = project_kv(frozen.cross_kv, context, jnp.float32)
            prediction = sd.predict(model, frozen, latents, TIMESTEPS, kv)
            return jnp.sum(prediction * weighting), prediction

        return jax.grad(loss, has_aux=True)(context)

    for quiet in (False, True):
        torch_models, _, frozen = loaded(kind, quiet)
        torch_context = torch.tensor(context, requires_grad=True)
        expected = torch_models.unet(nchw(latents), torch.tensor(TIMESTEPS), torch_context).sample
        (expected * nchw(weighting)).sum().backward()
        gradient, prediction = run(frozen, context)
        assert prediction.dtype == jnp.float32
        np.testing.assert_allclose(prediction, nhwc(expected), rtol=RTOL, atol=ATOL)
        assert_gradients_close(gradient, torch_context.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_vae_moments_and_images_match_diffusers(loaded, kind):
    model = loaded(kind).model
    scale = model.vae.scaling_factor
    images = np.tanh(noise(0, 2, 24, 20, 3))
    latents = noise(1, 2, 6, 5, 4)
    encode = jax.jit(partial(sd.encode_image, model))
    decode = jax.jit(partial(sd.decode, model))
    for quiet in (False, True):
        torch_models, _, frozen = loaded(kind, quiet)
        vae = torch_models.vae
        posterior = vae.encode(nchw(images)).latent_dist
        mean, logvar = encode(frozen, images)
        np.testing.assert_allclose(mean, nhwc(posterior.mean) * scale, rtol=RTOL, atol=ATOL)
        expected = nhwc(posterior.logvar) + 2 * np.log(scale)
        np.testing.assert_allclose(logvar, expected, rtol=RTOL, atol=ATOL)
        expected = nhwc(vae.decode(nchw(latents) / scale).sample)
        np.testing.assert_allclose(decode(frozen, latents), expected, rtol=RTOL, atol=ATOL)

    # log-variances far outside of the range that diffusers clips them to
    torch_models, _, frozen = loaded(kind)
    vae = copy.deepcopy(torch_models.vae)
    vae.quant_conv.weight *= 30
    loud = frozen.vae["quant_conv"] | {"kernel": frozen.vae["quant_conv"]["kernel"] * 30}
    _, logvar = encode(frozen._replace(vae=frozen.vae | {"quant_conv": loud}), images)
    expected = nhwc(vae.encode(nchw(images)).latent_dist.logvar) + 2 * np.log(scale)
    assert np.ptp(expected) == 50
    np.testing.assert_allclose(logvar, expected, rtol=RTOL, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_text_output_and_pseudo_token_gradient_match_transformers(loaded, kind):
    model = loaded(kind).model
    first = model.text.vocab_size
    pseudo = noise(0, 2, model.text.hidden_size)
    token_ids = np.random.default_rng(1).integers(0, first, (3, 77)).astype(np.int32)
    token_ids[:2, 5], token_ids[:2, 6], token_ids[1, 70] = first, first + 1, first
    weighting = noise(2, 3, 77, model.text.hidden_size)

    @jax.jit
    def run(frozen, pseudo):
        def loss(pseudo):
            hidden = sd.encode_text(model, frozen, token_ids, pseudo)
            return jnp.sum(hidden * weighting), hidden

        return jax.grad(loss, has_aux=True)(pseudo)

    for quiet in (False, True):
        torch_models, _, frozen = loaded(kind, quiet)
        # torch's way: a table with the rows of the pseudo tokens appended
        embeddings = torch_models.text.get_input_embeddings()
        table = embeddings.weight
        rows = torch.tensor(pseudo, requires_grad=True)
        embeds = torch.nn.functional.embedding(
            torch.tensor(token_ids).long(), torch.cat([table, rows])
        )
        handle = embeddings.register_forward_hook(lambda *_, embeds=embeds: embeds)
        ids = torch.tensor(np.minimum(token_ids, first - 1))
        expected = torch_models.text(ids).last_hidden_state
        handle.remove()
        (expected * torch.tensor(weighting)).sum().backward()
        gradient, hidden = run(frozen, pseudo)
        np.testing.assert_allclose(hidden, expected.detach(), rtol=RTOL, atol=ATOL)
        assert_gradients_close(gradient, rows.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_clip_skip_gives_the_hidden_state_that_diffusers_takes(tmp_path, kind):
    """The output of an earlier layer, through the last norm, as in diffusers' encode_prompt."""
    built = reference.write_checkpoint(tmp_path, kind)
    model, frozen = sd.load(tmp_path, clip_skip=1)
    ids = np.random.default_rng(1).integers(0, model.text.vocab_size, (2, 77)).astype(np.int32)
    with torch.no_grad():
        states = built.text(torch.tensor(ids).long(), output_hidden_states=True).hidden_states
        norm = [m for n, m in built.text.named_modules() if n.endswith("final_layer_norm")][0]
        expected = norm(states[-2])
    np.testing.assert_allclose(sd.encode_text(model, frozen, ids), expected, rtol=RTOL, atol=ATOL)
    with pytest.raises(UnsupportedConfig, match="--clip_skip 9 leaves nothing"):
        sd.load(tmp_path, clip_skip=9)


def test_another_autoencoder_takes_the_place_of_the_checkpoints_own(tmp_path):
    reference.write_checkpoint(tmp_path / "first", "sd1")
    reference.write_checkpoint(tmp_path / "second", "sd1", True)
    own, other = sd.load(tmp_path / "first")[1], sd.load(tmp_path / "second")[1]
    _, mixed = sd.load(tmp_path / "first", vae=hub.resolve_vae(str(tmp_path / "second")))
    same = partial(jax.tree.map, np.testing.assert_array_equal)
    same(mixed.vae, other.vae)
    same(mixed.unet, own.unet)
    # A folder of an autoencoder alone, as it is published.
    assert hub.resolve_vae(str(tmp_path / "second" / "vae")) == tmp_path / "second" / "vae"
    with pytest.raises(hub.CheckpointNotFound, match="no autoencoder in diffusers layout"):
        hub.resolve_vae(str(tmp_path))


def test_text_ids_beyond_the_pseudo_tokens_give_nan(loaded):
    _, model, frozen = loaded("sd1")
    first = model.text.vocab_size
    pseudo = noise(0, 2, model.text.hidden_size)
    encode = jax.jit(partial(sd.encode_text, model))
    assert np.isfinite(encode(frozen, np.array([[1, first + 1]], np.int32), pseudo)).all()
    assert np.isnan(encode(frozen, np.array([[1, first + 2]], np.int32), pseudo)).any()


def test_text_from_embeddings_equals_text_from_ids(loaded):
    _, model, frozen = loaded("sd1")
    token_ids = np.array([[1, 5, 7, 2]], np.int32)
    embeds = sd.embed_tokens(model, frozen, token_ids)
    assert embeds.shape == (1, 4, model.text.hidden_size)
    hidden = jax.jit(partial(sd.encode_token_embeds, model))(frozen, embeds)
    expected = jax.jit(partial(sd.encode_text, model))(frozen, token_ids)
    np.testing.assert_allclose(hidden, expected, rtol=1e-6)


def test_text_longer_than_the_positions_is_refused(loaded):
    _, model, frozen = loaded("sd1")
    with pytest.raises(ValueError, match="at most 77 tokens, got 78"):
        sd.encode_text(model, frozen, np.zeros((1, 78), np.int32))


def test_bfloat16_stays_close_to_float32(loaded):
    torch_models, model, frozen = loaded("sd1")
    model = dataclasses.replace(model, compute_dtype="bfloat16")
    frozen = cast(frozen, jnp.bfloat16)
    latents, images = noise(0, 2, 8, 8, 4), np.tanh(noise(1, 1, 8, 8, 3))
    context = noise(2, 2, 7, model.unet.cross_attention_dim)
    token_ids = np.arange(77, dtype=np.int32)[None]

    @jax.jit
    def run(frozen, timesteps):
        kv = project_kv(frozen.cross_kv, context, model.dtype)
        return {
            "unet": sd.predict(model, frozen, latents, timesteps, kv),
            "text": sd.encode_text(model, frozen, token_ids),
            "moments": sd.encode_image(model, frozen, images)[0],
            "images": sd.decode(model, frozen, latents),
        }

    unet, vae, text = torch_models
    scale = model.vae.scaling_factor
    exact = {
        "unet": nhwc(unet(nchw(latents), torch.tensor(TIMESTEPS), torch.tensor(context)).sample),
        "text": text(torch.tensor(token_ids)).last_hidden_state.numpy(),
        "moments": nhwc(vae.encode(nchw(images)).latent_dist.mean) * scale,
        "images": nhwc(vae.decode(nchw(latents) / scale).sample),
    }
    # Measured: 0.008 to 0.013; one rounding to bfloat16 is 0.2 %.
    for name, output in run(frozen, TIMESTEPS).items():
        assert output.dtype == jnp.float32
        error = np.sqrt(np.mean((output - exact[name]) ** 2) / np.mean(exact[name] ** 2))
        assert 1e-3 < error < 0.04, f"{name}: relative error {error:.4f}"
    # Rounded to bfloat16, both timesteps would be 1000.
    near, nearer = (run(frozen, np.full(2, t, np.int32))["unet"] for t in (999, 1000))
    assert np.any(np.asarray(near) != np.asarray(nearer))


def test_group_norm_statistics_are_float32():
    x = (3 + noise(0, 1, 32, 32, 8)).astype(jnp.bfloat16)
    norm = GroupNorm(2, 8, 1e-5, jnp.bfloat16)
    y = norm.apply(norm.init(jax.random.key(0), x), x)
    groups = np.asarray(x, np.float64).reshape(32 * 32, 2, 4)
    expected = (groups - groups.mean((0, 2))[:, None]) / groups.std((0, 2))[:, None]
    np.testing.assert_allclose(
        np.asarray(y, np.float64).reshape(expected.shape), expected, rtol=2**-8, atol=1e-3
    )


@pytest.mark.parametrize("dtype, within", [("float32", 1e-6), ("bfloat16", 0.03)])
def test_gelu_and_its_gradient_are_those_of_torch(dtype, within):
    values = np.concatenate([np.linspace(-12, 12, 4001), [-1e30, 1e30, 0.0]]).astype(np.float32)
    given = torch.from_numpy(values).requires_grad_()
    wanted = torch.nn.functional.gelu(given)
    wanted.backward(torch.ones_like(given))
    found, back = jax.vjp(gelu, jnp.asarray(values, dtype))
    (grads,) = back(jnp.ones_like(found))
    assert found.dtype == grads.dtype == dtype
    for ours, theirs in ((found, wanted.detach()), (grads, given.grad)):
        np.testing.assert_allclose(np.float32(ours), theirs, rtol=within, atol=within)
    small = jnp.asarray(-4.0, dtype)  # what a few bits of 1 + erf would not tell from zero
    np.testing.assert_allclose(float(gelu(small)), -1.267e-4, rtol=0.02)


def test_attention_softmax_is_float32():
    # Logits of about 110 that differ by about 1: bfloat16 would round them to multiples of 0.5.
    q, k, v = 10 + noise(0, 1, 4, 8), 4 + 0.1 * noise(1, 1, 32, 8), noise(2, 1, 32, 8)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    scaled = np.asarray(q * 8**-0.5, np.float64)[0]
    logits = scaled @ np.asarray(k, np.float64)[0].T
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares = shares / shares.sum(-1, keepdims=True)
    expected = shares @ np.asarray(v, np.float64)[0]
    np.testing.assert_allclose(
        np.asarray(attention(q, k, v, 1), np.float64)[0], expected, atol=0.01
    )


def test_attention_gradient_is_computed_in_the_compute_dtype():
    q, k, v = (jnp.asarray(noise(i, 2, 6, 8), jnp.bfloat16) for i in range(3))

    def loss(q, k, v):
        return jnp.sum(jnp.square(attention(q, k, v, 2).astype(jnp.float32)))

    gradient = jax.grad(loss, (0, 1, 2))
    for equation in jax.make_jaxpr(gradient)(q, k, v).jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            assert {x.aval.dtype for x in equation.invars} == {jnp.dtype("bfloat16")}
    exact = gradient(*(x.astype(jnp.float32) for x in (q, k, v)))
    for ours, expected in zip(gradient(q, k, v), exact, strict=True):
        np.testing.assert_allclose(ours.astype(jnp.float32), expected, atol=0.05)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_and_its_gradient_equal_the_formula_in_float64(causal):
    q, k, v, weight = (noise(i, 2, 9, 8) for i in range(4))

    def formula(q, k, v):
        q, k, v = (x.reshape(2, 9, 2, 4).transpose(0, 2, 1, 3) for x in (q, k, v))
        logits = q @ k.swapaxes(2, 3) / 2
        logits = jnp.where(jnp.tri(9, dtype=bool) | (not causal), logits, -jnp.inf)
        return (jax.nn.softmax(logits, -1) @ v).transpose(0, 2, 1, 3).reshape(2, 9, 8)

    def both(function, *arrays):
        out, pull = jax.vjp(function, *arrays[:3])
        return out, *pull(arrays[3])

    with jax.enable_x64(True):
        expected = both(formula, *(jnp.asarray(x, jnp.float64) for x in (q, k, v, weight)))
    got = both(lambda *x: attention(*x, 2, causal), *map(jnp.asarray, (q, k, v, weight)))
    for ours, exact in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-6)


def test_attention_gradient_transposes_no_matrix_of_weights():
    """XLA's product for CPUs is four times slower with its left operand taken by columns."""
    q, k, v = noise(0, 1, 32, 8), noise(1, 1, 16, 8), noise(2, 1, 16, 8)
    gradient = jax.grad(lambda *x: attention(*x, 2).sum(), (0, 1, 2))
    products = [
        equation
        for equation in jax.make_jaxpr(gradient)(q, k, v).jaxpr.eqns
        if equation.primitive.name == "dot_general"
    ]
    assert len(products) == 6
    for equation in products:
        left = equation.invars[0].aval.shape
        if left[2:] == (32, 16):
            ((contracted,), _), _ = equation.params["dimension_numbers"]
            assert contracted == 3


@pytest.mark.parametrize(
    ("side", "stride", "padding"),
    [(8, 1, ((1, 1), (1, 1))), (16, 2, ((1, 1), (1, 1))), (15, 2, ((0, 1), (0, 1)))],
)
def test_convolutions_of_small_maps_are_those_of_xla(side, stride, padding):
    """Wide and small maps are convolved by a product on CPUs, and by XLA's convolution elsewhere;
    values and both gradients are the same."""
    rng = np.random.default_rng(side)
    x = jnp.asarray(rng.standard_normal((2, side, side, 256)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 256, 16)), jnp.float32)
    module = conv3x3(16, jnp.float32, stride, padding)
    given = {"params": {"kernel": kernel, "bias": jnp.zeros(16)}}

    def ours(x, kernel):
        return module.apply({"params": given["params"] | {"kernel": kernel}}, x)

    def plain(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, padding, None, None, layout)

    def both(function):
        out, pull = jax.vjp(function, x, kernel)
        return out, pull(jax.random.normal(jax.random.key(0), out.shape))

    for a, b in zip(*map(jax.tree.leaves, (both(ours), both(plain))), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max())
    there = {
        place: str(jax.jit(ours).trace(x, kernel).lower(lowering_platforms=(place,)).as_text())
        for place in ("cpu", "tpu")
    }
    assert "convolution" not in there["cpu"] and "dot_general" not in there["tpu"]


@pytest.mark.parametrize(("flip", "shift"), [(True, 0), (False, 1)])
def test_timestep_embedding_matches_diffusers(flip, shift):
    from diffusers.models.embeddings import get_timestep_embedding

    timesteps = np.array([0, 1, 500, 999])
    expected = get_timestep_embedding(torch.tensor(timesteps), 32, flip, shift)
    # float32 angles near 1000 are known to 6e-5
    np.testing.assert_allclose(
        timestep_embedding(jnp.asarray(timesteps), 32, flip, shift), expected, atol=1e-4
    )


def convolutions(jaxpr) -> list:
    """All convolution equations of a jaxpr, nested ones included."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            found.append(equation)
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(parameter):
                found += convolutions(getattr(parameter, "jaxpr", parameter))
    return found


def is_jaxpr(x) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def test_vmap_over_identities_keeps_every_convolution_one(loaded):
    """With frozen weights shared, an identity axis becomes batch: no grouped convolutions."""
    _, model, frozen = loaded("sd1")
    latents = noise(0, 3, 2, 8, 8, 4)  # [identity, batch, ...]
    context = noise(1, 3, 2, 7, model.unet.cross_attention_dim)

    def predict(frozen, context, latents):
        kv = project_kv(frozen.cross_kv, context, jnp.float32)
        return sd.predict(model, frozen, latents, TIMESTEPS, kv)

    def gradient(frozen, context, latents):
        return jax.grad(lambda c: jnp.sum(predict(frozen, c, latents) ** 2))(context)

    axes = (None, 0, 0)
    for function in (predict, gradient):
        alone = jax.make_jaxpr(function)(frozen, context[0], latents[0])
        many = jax.make_jaxpr(jax.vmap(function, axes))(frozen, context, latents)
        batched = convolutions(many.jaxpr)
        assert len(batched) == len(convolutions(alone.jaxpr)) > 20
        for equation in batched:
            assert equation.params["feature_group_count"] == 1
            assert equation.params["batch_group_count"] == 1

    # and each identity gets what it gets alone
    together = jax.jit(jax.vmap(predict, axes))(frozen, context, latents)
    alone = jax.jit(predict)
    for i in range(3):
        expected = alone(frozen, context[i], latents[i])
        np.testing.assert_allclose(together[i], expected, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (UNetConfig, reference.SD15_UNET),
        (UNetConfig, reference.SD21_UNET),
        (UNetConfig, reference.SD21_V_UNET),
        (VAEConfig, reference.SD15_VAE),
        (VAEConfig, reference.SD21_VAE),
        (VAEConfig, reference.NEW_VAE),
        (CLIPTextConfig, reference.SD15_TEXT),
        (CLIPTextConfig, reference.SD21_TEXT),
    ],
)
def test_config_of_published_checkpoints_is_read_and_written_back(kind, values):
    config = kind.from_dict(values, "config.json")
    assert kind.from_dict(json.loads(json.dumps(config.to_dict())), "again") == config
    assert hash(config) == hash(kind.from_dict(values, "config.json"))


def test_config_attention_head_dim_is_the_number_of_heads():
    assert UNetConfig.from_dict(reference.SD15_UNET, "").num_attention_heads == (8, 8, 8, 8)
    assert UNetConfig.from_dict(reference.SD21_UNET, "").num_attention_heads == (5, 10, 20, 20)


@pytest.mark.parametrize(
    ("kind", "values", "changes"),
    [
        (UNetConfig, reference.SD15_UNET, {"class_embed_type": "timestep"}),
        (UNetConfig, reference.SD15_UNET, {"dual_cross_attention": True}),
        (UNetConfig, reference.SD15_UNET, {"only_cross_attention": True}),
        (UNetConfig, reference.SD15_UNET, {"num_attention_heads": 8}),
        (UNetConfig, reference.SD15_UNET, {"act_fn": "gelu"}),
        (UNetConfig, reference.SD15_UNET, {"center_input_sample": 0}),
        (UNetConfig, reference.SD15_UNET, {"layers_per_block": [2, 2, 2, 2]}),
        (UNetConfig, reference.SD15_UNET, {"attention_head_dim": [8, 8]}),
        (UNetConfig, reference.SD15_UNET, {"mid_block_type": "UNetMidBlock2D"}),
        (UNetConfig, reference.SD15_UNET, {"addition_embed_type": "image"}),
        (UNetConfig, reference.SD15_UNET, {"addition_time_embed_dim": 256}),
        (UNetConfig, reference.SD15_UNET, {"some_new_key": 1}),
        (VAEConfig, reference.SD15_VAE, {"mid_block_add_attention": False}),
        (VAEConfig, reference.SD15_VAE, {"down_block_types": ["AttnDownEncoderBlock2D"] * 4}),
        (VAEConfig, reference.SD15_VAE, {"shift_factor": 0.1}),
        (VAEConfig, reference.SD15_VAE, {"scaling_factor": "0.18"}),
        (CLIPTextConfig, reference.SD15_TEXT, {"hidden_act": "relu"}),
        (CLIPTextConfig, reference.SD15_TEXT, {"model_type": "t5"}),
        (CLIPTextConfig, reference.SD15_TEXT, {"vocab_size": None}),
        (UNetConfig, reference.SD15_UNET, {"dropout": 0.1, "some_new_key": 1, "norm_eps": "x"}),
    ],
)
def test_config_value_not_supported_is_refused_by_name(kind, values, changes):
    with pytest.raises(UnsupportedConfig, match=r"unet-or-so/config\.json") as error:
        kind.from_dict({**values, **changes}, "unet-or-so/config.json")
    for name in changes:
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("version", "size", "read"),
    [
        ("0.2.2", 32, 64),
        ("0.8.1", 32, 64),
        ("0.9.0.dev0", 32, 32),
        ("0.10.0", 32, 32),
        ("1.0", 32, 32),
        (None, 32, 32),
        ("0.6.0", 96, 96),
    ],
)
def test_config_of_an_old_conversion_has_the_size_that_diffusers_takes(version, size, read, caplog):
    about = {} if version is None else {"_diffusers_version": version}
    values = {k: v for k, v in reference.SD15_UNET.items() if k != "_diffusers_version"}
    where = f"{version}-{size}/config.json"
    config = UNetConfig.from_dict({**values, **about, "sample_size": size}, where)
    assert config.sample_size == read
    assert (f"{where}: sample_size is {size}" in caplog.text) == (read != size)
    # What diffusers' pipeline makes of the same settings, for a UNet of the least size.
    least = {"block_out_channels": [8], "norm_num_groups": 8, "layers_per_block": 1}
    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    unet = diffusers.UNet2DConditionModel.from_config(
        {**least, **blocks, "mid_block_type": None, **about, "sample_size": size}
    )
    names = "vae text_encoder tokenizer scheduler safety_checker feature_extractor".split()
    pipeline = diffusers.StableDiffusionPipeline(
        unet=unet, requires_safety_checker=False, **dict.fromkeys(names)
    )
    assert pipeline.unet.config.sample_size == read


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (UNetConfig, reference.SD15_UNET),
        (VAEConfig, reference.SD15_VAE),
        (CLIPTextConfig, reference.SD15_TEXT),
    ],
)
def test_config_key_that_says_nothing_is_named_and_left(kind, values, caplog):
    where = f"{kind.__name__}/config.json"
    config = kind.from_dict({**values, "a_new_key": None}, where)
    assert config == kind.from_dict(values, "")
    assert f"{where}: unknown key a_new_key" in caplog.text
    with pytest.raises(UnsupportedConfig, match="a_new_key = 0"):
        kind.from_dict({**values, "a_new_key": 0}, where)


def test_config_switch_that_is_null_is_off():
    values = {**reference.SD15_UNET, "dual_cross_attention": None, "class_embeddings_concat": None}
    assert UNetConfig.from_dict(values, "") == UNetConfig.from_dict(reference.SD15_UNET, "")


def test_config_with_unknown_block_type_is_refused_by_name():
    blocks = ["AttnDownBlock2D", *reference.SD15_UNET["down_block_types"][1:]]
    with pytest.raises(UnsupportedConfig, match="AttnDownBlock2D"):
        UNetConfig.from_dict({**reference.SD15_UNET, "down_block_types": blocks}, "config.json")


def test_networks_that_do_not_fit_together_are_refused(loaded):
    model = loaded("sd1").model
    with pytest.raises(UnsupportedConfig, match="cross_attention_dim is 32"):
        sd.StableDiffusion(model.text, loaded("sd2").model.unet, model.vae, model.schedule)
    with pytest.raises(UnsupportedConfig, match="compute dtype is 'float16'"):
        sd.StableDiffusion(model.text, model.unet, model.vae, model.schedule, "float16")


def test_init_fills_every_parameter_and_depends_on_the_key_only(loaded):
    model = loaded("sd2").model
    frozen = sd.init(model, jax.random.key(0))
    again = sd.init(model, jax.random.key(0))
    other = sd.init(model, jax.random.key(1))
    shapes = sd.shapes(model)
    jax.tree.map(np.testing.assert_array_equal, frozen, again)
    assert jax.tree.map(lambda x: x.shape, frozen) == jax.tree.map(lambda x: x.shape, shapes)
    kernel = frozen.unet["mid_block"]["resnets_0"]["conv1"]["kernel"]
    assert np.std(kernel) == pytest.approx((9 * 48) ** -0.5, rel=0.05)
    assert np.any(kernel != other.unet["mid_block"]["resnets_0"]["conv1"]["kernel"])
    assert np.any(kernel != frozen.unet["mid_block"]["resnets_1"]["conv1"]["kernel"])
    to_k = frozen.cross_kv["mid_block"]["attentions_0"]["transformer_blocks_0"]["to_k"]
    assert np.std(to_k) == pytest.approx(32**-0.5, rel=0.1)


@pytest.mark.slow
def test_full_size_unet_matches_diffusers():
    """SD 2.1-base's UNet at 64x64 latents; about 10 GB of memory."""
    torch_unet = reference.unet_from(reference.SD21_UNET)
    reference.randomise(torch_unet, 0)
    latents, context = noise(0, 1, 64, 64, 4), noise(1, 1, 77, 1024)
    timesteps = np.array([500], np.int32)
    expected = torch_unet(nchw(latents), torch.tensor(timesteps), torch.tensor(context)).sample

    model = reference.published(reference.SD21_UNET, reference.SD21_VAE, reference.SD21_TEXT)
    targets = {tree: sd.shapes(model)._asdict()[tree] for tree in ("unet", "cross_kv")}
    tensors = {name: tensor.numpy() for name, tensor in torch_unet.state_dict().items()}
    params = weights.to_params(weights.unet_table(True), tensors, targets, "torch")
    del torch_unet, tensors

    @jax.jit
    def run(params):
        kv = project_kv(params["cross_kv"], context, jnp.float32)
        return model.unet_model.apply({"params": params["unet"]}, latents, timesteps, kv)

    np.testing.assert_allclose(run(params), nhwc(expected), rtol=RTOL, atol=ATOL)


def test_image_encoder_matches_transformers(tmp_path):
    """Features and the gradient of the picture; the weights survive the way there and back."""
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        projection_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
    )
    torch.manual_seed(0)
    theirs = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**config.to_dict())
    ).eval()
    for parameter in theirs.parameters():  # biases and norms start at values that hide mistakes
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert CLIPVisionConfig.from_dict(values, "config.json") == config
    net = CLIPVisionModel(config)
    target = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    tensors = load_file(tmp_path / "model.safetensors")
    tree = weights.to_params(weights.vision_table(), tensors, {"vision": target}, "model")["vision"]

    images, weight = noise(0, 2, 64, 64, 3), noise(1, 2, 24)
    x = nchw(images).requires_grad_()
    features = theirs(x).image_embeds
    (features * torch.tensor(weight)).sum().backward()
    ours, pull = jax.vjp(lambda images: net.apply({"params": tree}, images), jnp.asarray(images))
    np.testing.assert_allclose(ours, features.detach().numpy(), rtol=RTOL, atol=ATOL)
    assert_gradients_close(pull(jnp.asarray(weight))[0], nhwc(x.grad))
    written = weights.to_tensors(weights.vision_table(), {"vision": tree})
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("hidden_act", "relu", "hidden_act"),
        ("patch_size", 7, "does not divide into patches"),
        ("num_attention_heads", 5, "does not divide into 5 heads"),
        ("num_channels", 1, "num_channels"),
        ("surprise", 1, "surprise"),
    ],
)
def test_image_encoder_config_not_supported_is_refused_by_name(name, value, problem):
    config = CLIPVisionConfig(32, 64, 24, 2, 4, 64, 8).to_dict() | {name: value}
    with pytest.raises(UnsupportedConfig, match=problem):
        CLIPVisionConfig.from_dict(config, "config.json")
