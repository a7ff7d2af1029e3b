"""Attention kernels: which one runs where, and that they compute what plain attention does."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

import sample_jax
import train_jax
from idea_jax import random_sd
from idea_jax.formats import learned_embeds
from idea_jax.method import condition
from idea_jax.models import flash, sd
from idea_jax.models.layers import attention, chunked_attention
from idea_jax.sampling import engine
from idea_jax.training import run as train
from idea_jax.training.program import Program, step_people
from idea_jax.training.step import Photos, init_state, make_optimizer


def device(platform, client="", capability=None):
    """What JAX says of a device that is not there."""
    return SimpleNamespace(
        platform=platform,
        device_kind=platform,
        client=SimpleNamespace(platform_version=client),
        compute_capability=capability,
    )


CPU, TPU = device("cpu"), device("tpu")
HOPPER, TURING = device("gpu", "cuda 13000", "9.0"), device("gpu", "cuda 13000", "7.5")
BLACKWELL, AMD = device("gpu", "cuda 13000", "12.0"), device("gpu", "rocm 60300", "gfx942")


def test_device_and_type_decide_the_kernel():
    assert flash.resolve("auto", HOPPER, "bfloat16") == "cudnn"
    assert flash.resolve("auto", BLACKWELL, "bfloat16") == "cudnn"
    assert flash.resolve("auto", HOPPER, "float32") == "xla"
    assert flash.resolve("auto", TPU, "float32") == "splash"
    assert flash.resolve("auto", CPU, "bfloat16") == "chunked"
    assert flash.resolve("chunked", HOPPER, "float32") == "chunked"
    assert flash.resolve("xla", TPU, "bfloat16") == "xla"
    for other in (TURING, AMD):
        assert flash.resolve("auto", other, "bfloat16") == "xla"
    for kind, other in (("cudnn", CPU), ("cudnn", TURING), ("cudnn", AMD), ("splash", HOPPER)):
        with pytest.raises(flash.UnsupportedAttention, match=f"--attention {kind} needs"):
            flash.resolve(kind, other, "bfloat16")


def test_short_sequences_and_unfit_heads_stay_with_xla():
    assert flash.choose("cudnn", 4096, 64) == "cudnn"
    assert flash.choose("splash", 1024, 64) == "splash"
    assert flash.choose("cudnn", 256, 64) == flash.choose("splash", 256, 64) == "xla"
    assert flash.choose("cudnn", 4096, 512) == flash.choose("cudnn", 4096, 60) == "xla"
    assert flash.choose("splash", 1100, 64) == "xla"
    assert flash.choose("chunked", 1031, 64) == "xla"  # a prime number
    sizes = {positions: flash.chunk(positions) for positions in (1024, 1600, 4096, 6144, 9216)}
    assert sizes == {1024: 128, 1600: 100, 4096: 256, 6144: 384, 9216: 576}


def test_chunks_are_attended_to_as_the_whole_is():
    q, k, v, cotangent = jax.random.normal(jax.random.key(0), (4, 2, 1024, 32))

    def both(kernel):
        mixed, pull = jax.vjp(lambda *given: kernel(*given, 4), q, k, v)
        return mixed, pull(cotangent)

    chunked, whole = jax.jit(lambda: (both(chunked_attention), both(attention)))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), chunked, whole)


@pytest.mark.parametrize("positions", [128, 384])  # one tile and three
def test_splash_equals_plain_attention_and_its_gradient(positions):
    rng = np.random.default_rng(0)
    shape = (2, positions, 32)
    q, k, v, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(4))

    def both(function):
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(weight)

    with jax.default_matmul_precision("highest"):  # a GPU would round to 10 bits
        plain = both(lambda *x: attention(*x, 2))
        kernel = both(lambda *x: flash.splash(*x, 2, interpret=True))
    for ours, expected in zip(kernel, plain, strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.skipif(
    not flash.has_cudnn(jax.local_devices()[0]), reason="needs an NVIDIA GPU of Ampere or later"
)
@pytest.mark.parametrize("positions", [1024, 4096])
@pytest.mark.parametrize("is_mapped", [False, True])
def test_cudnn_is_as_near_to_exact_attention_as_plain_attention_in_its_type(positions, is_mapped):
    """Run it with JAX_PLATFORMS=cuda,cpu. On an H100 both were off by 0.0022 to 0.0024."""
    rng = np.random.default_rng(0)
    shape = (4, 2, positions, 320) if is_mapped else (8, positions, 320)
    exact = [rng.normal(size=shape).astype(np.float32) for _ in range(4)]

    def both(function, dtype):
        q, k, v, weight = (jnp.asarray(x, dtype) for x in exact)
        function = jax.vmap(function) if is_mapped else function
        with jax.default_matmul_precision("highest"):
            out, pull = jax.jit(lambda *x: jax.vjp(function, *x))(q, k, v)
            return [np.asarray(x, np.float32) for x in (out, *pull(weight))]

    expected = both(lambda *x: attention(*x, 5), jnp.float32)
    plain = both(lambda *x: attention(*x, 5), jnp.bfloat16)
    kernel = both(lambda *x: flash.cudnn(*x, 5), jnp.bfloat16)
    for true, near, ours in zip(expected, plain, kernel, strict=True):
        size = np.linalg.norm(true)
        assert np.linalg.norm(ours - true) < 1.2 * np.linalg.norm(near - true) < 0.01 * size


@pytest.fixture
def _pretend_cudnn(monkeypatch):
    """Lowering for a GPU asks for the version of cuDNN and the kind of the card."""
    from jax._src.cudnn import fused_attention_stablehlo as kernel

    monkeypatch.setattr(kernel, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(kernel, "check_compute_capability", lambda capability: True)


def unet_gradient(model):
    """Gradient of a UNet with respect to keys and values, and abstract arguments for it."""
    shapes = sd.shapes(model)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, model.dtype), shapes)
    side = model.unet.sample_size
    latents = jax.ShapeDtypeStruct((1, side, side, 4), jnp.float32)
    kv = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, 77, x.shape[1]), x.dtype), shapes.cross_kv)

    def loss(kv, frozen, latents):
        return sd.predict(model, frozen, latents, jnp.int32(0), kv).sum()

    return jax.jit(jax.grad(loss)), (kv, shapes, latents)


@pytest.mark.usefixtures("_pretend_cudnn")
@pytest.mark.parametrize("kind", ["cudnn", "xla"])
def test_gpu_program_of_a_unet_holds_no_matrix_of_long_attention(kind):
    tiny = random_sd.config("tiny", "sd2", vocab_size=120)
    unet = dataclasses.replace(tiny.unet, sample_size=32)
    model = dataclasses.replace(tiny, unet=unet, compute_dtype="bfloat16", attention=kind)
    gradient, arguments = unet_gradient(model)
    text = gradient.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert ("__cudnn$fmha" in text) == (kind == "cudnn")
    assert ("1024x1024x" in text) == (kind == "xla")


@pytest.mark.usefixtures("_pretend_cudnn")
@pytest.mark.parametrize(("kind", "platform"), [("cudnn", "cuda"), ("splash", "tpu")])
@pytest.mark.parametrize(("data", "is_sharded"), [(1, False), (2, False), (2, True)])
def test_step_of_people_takes_the_kernel_of_each_accelerator(kind, platform, data, is_sharded):
    """The whole training step is lowered for a device that is not there."""
    tiny = random_sd.config("tiny", "sd2", vocab_size=120)
    unet = dataclasses.replace(tiny.unet, sample_size=32)
    model = dataclasses.replace(tiny, unet=unet, compute_dtype="bfloat16", attention=kind)
    shapes = sd.shapes(model)
    method = condition.make_method("paper", kv="low_rank", reg_weight=8e-4)
    rates = dict.fromkeys(method.parts(), 1e-3)
    optimizer = make_optimizer(rates, beta1=0.9, beta2=0.999, epsilon=1e-7, weight_decay=1e-2)
    start, face = np.zeros((2, model.text.hidden_size), np.float32), np.ones(512)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def state():
        key = jax.random.key(0)
        trainable = condition.init_trainable(model, method, key, start)
        return init_state(
            optimizer, trainable, condition.init_given(model, method, key, start, face)
        )

    def of_two(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), tree)

    moments = jax.ShapeDtypeStruct((1, 2, 32, 32, 4), np.float32)
    number = jax.ShapeDtypeStruct((), np.int32)
    ids = jax.ShapeDtypeStruct((27, model.text.max_position_embeddings), np.int32)
    people = of_two(jax.eval_shape(state)), of_two(Photos(moments, moments, number, ids))
    devices = np.array(jax.devices("cpu")[: 2 * data]).reshape(2, data)  # there may be one GPU
    mesh = Mesh(devices, ("identity", "data"), axis_types=(AxisType.Auto,) * 2)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, model.dtype), shapes)
    last = jax.ShapeDtypeStruct((2,), np.int32)
    program = Program(model, method, optimizer, 2, mesh, is_sharded, 3)
    traced = step_people.trace(program, shapes, *people, key, last, number)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert {"cudnn": "__cudnn$fmha", "splash": "tpu_custom_call"}[kind] in text
    assert "1024x1024x" not in text
    assert text.count("stablehlo.all_reduce") == (data > 1)


class Reached(Exception):
    """Raised where the networks would begin to compute."""


def test_kernel_that_was_chosen_reaches_the_networks(
    smallest_checkpoint, photo_folder, tmp_path, monkeypatch
):
    person = tmp_path / "learned_embeds.safetensors"
    learned_embeds.write(person, "<person>", np.zeros((2, 8), np.float32), {})
    common = ["--pretrained_model_name_or_path", smallest_checkpoint, "--attention", "splash"]
    learn = ["--train_data_dir", photo_folder, "--output_dir", tmp_path, "--profile", "cross_init"]
    drawing = ["--learned_embedding_path", person, "--prompt", "{}", "--save_dir", tmp_path]
    models = []

    def reached(model):
        models.append(model)
        raise Reached

    monkeypatch.setattr(flash, "resolve", lambda kind, device, dtype: f"{kind} as resolved")
    monkeypatch.setattr(train, "train_one", lambda work, *_: reached(work.base.model))
    monkeypatch.setattr(engine, "Engine", lambda model, *_, **__: reached(model))
    for program, own in ((train_jax, learn), (sample_jax, drawing)):
        with pytest.raises(Reached):
            program.main([str(argument) for argument in (*common, *own)])
    assert [model.attention for model in models] == ["splash as resolved"] * 2
    assert [model.unet_model.attention for model in models] == ["splash as resolved"] * 2


def test_kernel_that_the_device_lacks_is_refused_before_anything_is_loaded(
    random_checkpoint, tmp_path, capsys
):
    person = tmp_path / "learned_embeds.safetensors"
    learned_embeds.write(person, "<person>", np.zeros((2, 32), np.float32), {})
    arguments = ["--pretrained_model_name_or_path", random_checkpoint, "--save_dir", tmp_path / "x"]
    arguments += ["--learned_embedding_path", person, "--prompt", "{}", "--attention", "cudnn"]
    assert sample_jax.main([str(argument) for argument in arguments]) == 1
    assert "--attention cudnn needs an NVIDIA GPU" in capsys.readouterr().err
