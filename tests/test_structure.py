"""What the compiled programs may hold: exact FLOPs at full size, and nothing that is constant.

A change that makes one of these fail makes every step slower; nothing else would show it.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from idea_jax import costs, pytrees, random_sd
from idea_jax.method import condition
from idea_jax.models import sd
from idea_jax.models.unet import project_kv
from idea_jax.sampling import programs
from idea_jax.training.step import Photos, draw_batch, init_state, make_optimizer, train_step

GIGA, SAMPLES = 1e9, 8


def abstract(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.fixture(scope="module")
def sd21():
    """SD 2.1-base and the shapes of its weights; nothing is allocated."""
    model = random_sd.config("sd21", "sd2", vocab_size=random_sd.CLIP_VOCAB_SIZE)
    return model, sd.shapes(model)


def person_of(model, kv):
    """A train step and the shapes of its arguments but for the frozen weights."""
    method = condition.make_method("paper", kv=kv, reg_weight=8e-4)
    rates = dict.fromkeys(method.parts(), 1e-3)
    optimizer = make_optimizer(rates, beta1=0.9, beta2=0.999, epsilon=1e-7, weight_decay=1e-2)
    # Zeros of the model's width are enough, since values do not matter.
    start, face = np.zeros((2, model.text.hidden_size), np.float32), np.ones(512)

    def state():
        key = jax.random.key(0)
        trainable = condition.init_trainable(model, method, key, start)
        given = condition.init_given(model, method, key, start, face)
        return init_state(optimizer, trainable, given)

    side, T = model.unet.sample_size, model.text.max_position_embeddings
    moments = abstract(1, 2, side, side, model.unet.in_channels)
    ids = abstract(27, T, dtype=jnp.int32)
    photos = Photos(moments, moments, abstract(dtype=jnp.int32), ids)
    draw = functools.partial(draw_batch, model, size=SAMPLES)
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = jax.eval_shape(draw, photos, key, abstract(dtype=jnp.int32))
    step = functools.partial(train_step, model, method, optimizer)
    return step, jax.eval_shape(state), batch


def test_full_size_unet_needs_exactly_the_known_flops(sd21):
    """References: torch's FlopCounter on the same network, forward and with the gradient of text
    condition and keys and values; 2,412 with those of all weights."""
    model, shapes = sd21
    inputs = abstract(1, 64, 64, 4), abstract(1, dtype=jnp.int32), abstract(1, 77, 1024)

    def loss(cross_kv, context, frozen, latents, timesteps):
        kv = project_kv(cross_kv, context, model.dtype)
        return sd.predict(model, frozen, latents, timesteps, kv).sum()

    arguments = (shapes.cross_kv, inputs[2], shapes, *inputs[:2])
    for function, expected in (
        (loss, 804.26),
        (jax.grad(loss, argnums=(0, 1)), 1675.1),
    ):
        counted = costs.needed(function, *arguments) / GIGA
        np.testing.assert_allclose(counted, expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("text condition's gradient", 1671.0),
        ("text encoder", 45.13),
        ("VAE encode", 1116.7),
        ("VAE decode", 2514.5),
    ],
)
def test_full_size_parts_need_exactly_the_known_flops(sd21, part, expected):
    """References: torch's FlopCounter on diffusers' and transformers' networks."""
    model, shapes = sd21
    latents, text = abstract(1, 64, 64, 4), abstract(1, 77, 1024)

    def loss(context, frozen, latents):
        kv = project_kv(frozen.cross_kv, context, model.dtype)
        return sd.predict(model, frozen, latents, jnp.zeros(1, jnp.int32), kv).sum()

    function, arguments = {
        "text condition's gradient": (jax.grad(loss), (text, shapes, latents)),
        "text encoder": (
            functools.partial(sd.encode_text, model),
            (shapes, abstract(1, 77, dtype=jnp.int32)),
        ),
        "VAE encode": (
            functools.partial(sd.encode_image, model),
            (shapes, abstract(1, 512, 512, 3)),
        ),
        "VAE decode": (functools.partial(sd.decode, model), (shapes, latents)),
    }[part]
    np.testing.assert_allclose(costs.needed(function, *arguments) / GIGA, expected, rtol=1e-3)


def test_full_size_picture_of_fifty_guided_steps_needs_exactly_the_known_flops(sd21):
    """A hundred passes through the UNet without the projection of text, and one decoding.

    The row that each timestep adds is computed once for all pictures.
    """
    model, shapes = sd21
    kv = jax.tree.map(lambda kernel: abstract(2, 77, kernel.shape[1]), shapes.cross_kv)

    def draw(frozen, kv, indices):
        sampling = programs.Sampling((512, 512), "ddim", 50)
        parts = (jnp.uint32(0), indices, jnp.float32(7.5))
        return programs.draw(model, frozen, kv, *parts, sampling)

    counted = costs.needed(draw, shapes, kv, abstract(1, dtype=jnp.int32)) / GIGA
    np.testing.assert_allclose(counted, 82600, rtol=1e-3)


@pytest.mark.parametrize(
    ("kv", "expected"), [("none", 14110), ("low_rank", 14112.8), ("full", 14206.5)]
)
def test_full_size_train_step_needs_exactly_the_known_flops(sd21, kv, expected):
    """Eight samples: UNet forward and gradient, text encoder and adapter; no VAE.

    Full deltas of keys and values are applied to the context beside the frozen kernels, which stay
    one array for all people.
    """
    model, shapes = sd21
    step, state, batch = person_of(model, kv)
    counted = costs.needed(step, shapes, state, batch) / GIGA
    np.testing.assert_allclose(counted, expected, rtol=1e-3)


def reads(function, *arguments):
    """`function`'s first argument with, for each leaf, whether any result depends on it."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    _, is_used = jax.interpreters.partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    leaves, structure = jax.tree.flatten(arguments[0])
    return jax.tree.unflatten(structure, is_used[: len(leaves)])


@pytest.fixture(scope="module")
def tiny():
    model = random_sd.config("tiny", "sd2", vocab_size=120)
    return model, sd.shapes(model)


def test_train_step_reads_every_network_but_the_autoencoder(tiny):
    model, shapes = tiny
    step, state, batch = person_of(model, "low_rank")
    used = reads(step, shapes, state, batch)
    for tree, expected in (("text", True), ("unet", True), ("cross_kv", True), ("vae", False)):
        assert set(jax.tree.leaves(getattr(used, tree))) == {expected}, tree


def test_sampler_reads_neither_text_encoder_nor_cross_attention_kernels(tiny):
    """Both did their work once for the prompt, outside of the loop over steps."""
    model, shapes = tiny
    kv = jax.tree.map(lambda kernel: abstract(2, 77, kernel.shape[1]), shapes.cross_kv)

    def draw(frozen, kv):
        sampling = programs.Sampling((32, 32), "ddim", 4)
        indices = jnp.arange(3, dtype=jnp.int32)
        parts = (jnp.uint32(0), indices, jnp.float32(7.5))
        return programs.draw(model, frozen, kv, *parts, sampling)

    used = reads(draw, shapes, kv)
    assert set(jax.tree.leaves((used.text, used.cross_kv))) == {False}
    assert set(jax.tree.leaves(used.unet)) == {True}
    decoder = {path: is_used for path, is_used in pytrees.flatten(used.vae).items()}
    assert {path.split("/")[0] for path, is_used in decoder.items() if is_used} == {
        "decoder",
        "post_quant_conv",
    }


@pytest.mark.parametrize("interval", [None, (0.2, 0.8)])
def test_loop_of_the_sampler_embeds_no_timestep(tiny, interval):
    """The rows of all timesteps are computed before it: no product of a single row is within."""
    model, shapes = tiny
    kv = jax.tree.map(lambda kernel: abstract(2, 77, kernel.shape[1]), shapes.cross_kv)

    def draw(frozen, kv, indices):
        sampling = programs.Sampling((32, 32), "ddim", 4, interval=interval)
        parts = (jnp.uint32(0), indices, jnp.float32(7.5))
        return programs.draw(model, frozen, kv, *parts, sampling)

    jaxpr = jax.make_jaxpr(draw)(shapes, kv, abstract(3, dtype=jnp.int32)).jaxpr

    def with_loop(jaxpr):
        """The jaxpr with a scan, in whichever call it is."""
        if any(e.primitive.name == "scan" for e in jaxpr.eqns):
            return jaxpr
        calls = [e.params["jaxpr"].jaxpr for e in jaxpr.eqns if e.primitive.name == "jit"]
        return next((found for call in calls if (found := with_loop(call))), None)

    program = with_loop(jaxpr)
    (loop,) = [e for e in program.eqns if e.primitive.name == "scan"]

    def rows(jaxpr):
        found = []
        for e in jaxpr.eqns:
            if e.primitive.name == "dot_general" and e.outvars[0].aval.ndim == 2:
                found.append(e.outvars[0].aval.shape[0])
            for branch in e.params.get("branches", ()):
                found += rows(branch.jaxpr)
        return found

    assert rows(loop.params["jaxpr"].jaxpr) == []
    assert len(rows(program)) > 6 and set(rows(program)) == {4}


def test_sampler_embeds_one_timestep_for_all_pictures(tiny):
    """The embedding's two products and those of the ResNet blocks have one row."""
    model, shapes = tiny
    kv = jax.tree.map(lambda kernel: abstract(6, 77, kernel.shape[1]), shapes.cross_kv)
    latents = abstract(6, 8, 8, 4)

    def rows(timesteps):
        predict = functools.partial(sd.predict, model)
        jaxpr = jax.make_jaxpr(predict)(shapes, latents, timesteps, kv).jaxpr
        products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
        two_axes = [e.outvars[0].aval.shape[0] for e in products if e.outvars[0].aval.ndim == 2]
        assert len(two_axes) > 6
        return set(two_axes)

    assert rows(abstract(dtype=jnp.int32)) == {1}
    assert rows(abstract(6, dtype=jnp.int32)) == {6}


def test_feature_maps_are_channels_last_and_never_transposed(tiny):
    """The heads of attention are the only axis that changes its place."""
    model, shapes = tiny
    kv = jax.tree.map(lambda kernel: abstract(2, 77, kernel.shape[1]), shapes.cross_kv)
    latents = abstract(2, 8, 8, 4)

    def both(frozen, latents, kv):
        prediction = sd.predict(model, frozen, latents, jnp.int32(0), kv)
        return prediction, sd.decode(model, frozen, latents)

    text = jax.jit(both).trace(shapes, latents, kv).lower().as_text()
    layouts = re.findall(r"stablehlo.convolution.*= (\[.*?\])x\[.*?\]->(\[.*?\])", text)
    assert set(layouts) == {("[b, 0, 1, f]",) * 2}
    assert text.count("stablehlo.convolution") > 30
    assert set(re.findall(r"stablehlo.transpose.*dims = (\[.*?\])", text)) == {"[0, 2, 1, 3]"}
    attentions = len(re.findall(r"stablehlo.exponential", text))  # a softmax each
    assert text.count("stablehlo.transpose") <= 4 * attentions


def test_counted_flops_are_those_of_the_operations():
    x, kernel = abstract(2, 8, 8, 3), abstract(3, 3, 3, 5)

    def convolve(x, kernel, stride):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, "SAME", None, None, layout)

    one = 2 * 2 * 8 * 8 * 5 * 27
    assert costs.count(lambda x, k: convolve(x, k, 1), x, kernel) == one
    assert costs.count(lambda x, k: convolve(x, k, 2), x, kernel) == one // 4
    gradient = jax.grad(lambda x, k: convolve(x, k, 2).sum())
    assert costs.needed(gradient, x, kernel) == one // 4
    a, b = abstract(4, 6), abstract(6, 7)
    looped = functools.partial(jax.lax.scan, lambda c, _: (c, a_product(c)), length=3, xs=None)
    assert costs.count(lambda a, b: looped((a, b)), a, b) == 3 * 2 * 4 * 6 * 7


def a_product(pair):
    return pair[0] @ pair[1]
