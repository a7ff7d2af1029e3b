"""The train step: what it changes, what it never touches, and that people do not see each other."""

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from idea_jax import pytrees, random_sd
from idea_jax.method import condition
from idea_jax.models import sd
from idea_jax.training.step import (
    Photos,
    draw_batch,
    init_state,
    make_optimizer,
    train_step,
    training_loss,
)

BATCH, SIZE, D = 5, 8, 32
RATES = {"pseudo_tokens": 1e-2, "adapter": 1e-3, "enhancer": 1e-3, "kv": 1e-3}


@pytest.fixture(scope="module")
def loaded():
    """A model of two levels with random weights, none of them a special value."""
    model = random_sd.config("tiny", "sd2", vocab_size=120)
    rng = np.random.default_rng(0)

    def fill(leaf):
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 25
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(fan_in), jnp.float32)

    return model, jax.tree.map(fill, sd.shapes(model))


@pytest.fixture(scope="module")
def paper_step(loaded):
    return jax.jit(one_step(loaded, PAPER))


def optimizer_for(method):
    return make_optimizer(
        {part: RATES[part] for part in method.parts()},
        beta1=0.9,
        beta2=0.999,
        epsilon=1e-7,
        weight_decay=1e-2,
    )


def person(loaded, method, seed, pictures=2):
    """State, photos and key of one random person."""
    model, frozen = loaded
    key = jax.random.key(seed)
    rng = np.random.default_rng(seed)
    face = rng.normal(size=512)
    start = jnp.asarray(rng.normal(size=(2, D)), jnp.float32)
    given = condition.init_given(model, method, key, start, face / np.linalg.norm(face))
    trainable = condition.init_trainable(model, method, key, start)
    # An open gate, so that the gradients of everything behind it are alive from the first step.
    trainable["adapter"]["gamma"] = jnp.float32(0.5)
    vocab = model.text.vocab_size
    ids = rng.integers(0, vocab, (3, 77)).astype(np.int32)
    ids[:, 5:7] = [vocab, vocab + 1]
    moments = rng.normal(size=(2, pictures, 2, SIZE, SIZE, 4)).astype(np.float32)
    photos = Photos(
        jnp.asarray(moments[0]), jnp.asarray(moments[1]), jnp.int32(pictures), jnp.asarray(ids)
    )
    return init_state(optimizer_for(method), trainable, given), photos, key


def one_step(loaded, method):
    return functools.partial(train_step, loaded[0], method, optimizer_for(method))


PAPER = condition.make_method("paper", kv="low_rank", reg_weight=8e-4)


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.parametrize("kv", ["low_rank", "full"])
def test_every_trainable_moves_and_frozen_weights_stay(loaded, paper_step, kv):
    model, frozen = loaded
    method = condition.make_method("paper", kv=kv, reg_weight=8e-4)
    state, photos, key = person(loaded, method, 0)
    before = jax.tree.map(np.array, frozen)
    step = paper_step if method == PAPER else jax.jit(one_step(loaded, method))
    new = state
    for i in range(2):
        new, metrics = step(frozen, new, draw_batch(model, photos, key, jnp.int32(i), BATCH))
    assert bool(metrics.finite) and int(new.step) == 2
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), new.trainable, state.trainable)
    still = [name for name, did_move in pytrees.flatten(moved).items() if not did_move]
    assert not still
    jax.tree.map(np.testing.assert_array_equal, new.given, state.given)
    jax.tree.map(np.testing.assert_array_equal, frozen, before)


def values_of(jaxpr, tainted):
    """Yields (tainted, shape) of every value a jaxpr computes; taint spreads from `tainted`."""
    tainted = dict(zip(jaxpr.invars, tainted, strict=True))

    def is_tainted(atom):
        return not isinstance(atom, jax.extend.core.Literal) and tainted.get(atom, False)

    for eqn in jaxpr.eqns:
        taint = [is_tainted(atom) for atom in eqn.invars]
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns") and len(inner.invars) == len(eqn.invars):
                yield from values_of(inner, taint)
        for out in eqn.outvars:
            tainted[out] = any(taint)
            yield any(taint), out.aval.shape


def weight_gradients(loss_fn, argnums, frozen, trainable, kernels):
    """Shapes of frozen kernels that occur among the values computed from the trainables."""
    grad = jax.grad(loss_fn, argnums=argnums)
    jaxpr = jax.make_jaxpr(grad)(frozen, trainable).jaxpr
    count = len(jax.tree.leaves(frozen))
    taint = [i >= count for i in range(len(jaxpr.invars))]
    found = {tuple(sorted(shape)) for tainted, shape in values_of(jaxpr, taint) if tainted}
    return found & kernels


def test_step_holds_no_gradient_of_a_frozen_weight(loaded):
    model, frozen = loaded
    state, photos, key = person(loaded, PAPER, 0)
    batch = draw_batch(model, photos, key, jnp.int32(0), BATCH)

    def loss_fn(frozen, trainable):
        return training_loss(model, PAPER, frozen, trainable, state.given, batch)[0]

    own = {tuple(sorted(leaf.shape)) for leaf in jax.tree.leaves(state.trainable)}
    kernels = {
        tuple(sorted(leaf.shape))
        for leaf in jax.tree.leaves((frozen.unet, frozen.cross_kv))
        if leaf.ndim >= 2
    } - own
    assert len(kernels) > 15
    assert not weight_gradients(loss_fn, 1, frozen, state.trainable, kernels)
    # The same search finds them where they are: when the frozen tree is differentiated.
    assert len(weight_gradients(loss_fn, 0, frozen, state.trainable, kernels)) > 10


def test_non_finite_step_leaves_the_state_as_it_was(loaded, paper_step):
    model, frozen = loaded
    state, photos, key = person(loaded, PAPER, 0)
    good, _ = paper_step(frozen, state, draw_batch(model, photos, key, jnp.int32(0), BATCH))
    batch = draw_batch(model, photos, key, jnp.int32(1), BATCH)
    broken = batch._replace(latents=batch.latents.at[0, 0, 0, 0].set(jnp.nan))
    after, metrics = paper_step(frozen, good, broken)
    assert not bool(metrics.finite)
    jax.tree.map(np.testing.assert_array_equal, after, good)


def test_each_part_has_its_own_learning_rate(loaded, paper_step):
    model, frozen = loaded
    state, photos, key = person(loaded, PAPER, 0)
    batch = draw_batch(model, photos, key, jnp.int32(0), BATCH)
    new, _ = paper_step(frozen, state, batch)
    # Adam's first step is the learning rate wherever the gradient is well above epsilon.
    for part, rate in RATES.items():
        moved = jax.tree.map(
            lambda a, b: jnp.abs(a - b).max(), new.trainable[part], state.trainable[part]
        )
        largest = max(float(x) for x in jax.tree.leaves(moved))
        assert 0.8 * rate < largest < 1.1 * rate, part


def test_tokens_in_a_basis_move_as_their_coordinates_would(loaded):
    model, frozen = loaded
    method = condition.make_method("textual_inversion", basis=3)
    rng = np.random.default_rng(5)
    basis = jnp.asarray(rng.normal(size=(3, 2, D)) * 0.1, jnp.float32)
    frozen = frozen._replace(shared={"basis": basis})
    begun, photos, key = person(loaded, PAPER, 0)
    start, state = begun.trainable["pseudo_tokens"], None
    optimizer = make_optimizer(
        {"pseudo_tokens": 0.2}, beta1=0.9, beta2=0.999, epsilon=1e-7, weight_decay=1e-2, basis=3
    )
    state = init_state(optimizer, {"pseudo_tokens": start}, {})
    step = jax.jit(functools.partial(train_step, model, method, optimizer))
    # The same with the coordinates as what is trained, by optax alone.
    adam = optax.adam(0.2, b1=0.9, b2=0.999, eps=1e-7)
    place, moments = jnp.zeros(3), adam.init(jnp.zeros(3))

    def tokens_at(place):
        return start + jnp.einsum("b,bnd->nd", place, basis)

    @jax.jit
    def loss(place, batch):
        return training_loss(model, method, frozen, {"pseudo_tokens": tokens_at(place)}, {}, batch)[
            0
        ]

    for i in range(3):
        batch = draw_batch(model, photos, key, jnp.int32(i), BATCH)
        state, _ = step(frozen, state, batch)
        updates, moments = adam.update(jax.grad(loss)(place, batch), moments)
        place = optax.apply_updates(place, updates)
    moved = state.trainable["pseudo_tokens"] - start
    assert float(jnp.abs(moved).max()) > 0.01
    np.testing.assert_allclose(state.trainable["pseudo_tokens"], tokens_at(place), atol=2e-5)


def test_vmap_and_shard_map_equal_the_single_person(loaded, paper_step):
    model, frozen = loaded
    people = [person(loaded, PAPER, seed) for seed in range(8)]

    def batches(i):
        return [draw_batch(model, photos, key, jnp.int32(i), BATCH) for _, photos, key in people]

    states = [state for state, _, _ in people]
    stacked = pytrees.stack(states)
    mesh = jax.make_mesh((8,), ("identity",), axis_types=(AxisType.Auto,))
    many = jax.vmap(one_step(loaded, PAPER), in_axes=(None, 0, 0))
    spread = jax.jit(
        jax.shard_map(
            many,
            mesh=mesh,
            in_specs=(P(), P("identity"), P("identity")),
            out_specs=P("identity"),
            check_vma=False,  # the gradient of jax 0.12.0's erfc (gelu) fails the check
        )
    )
    together, sharded = stacked, stacked
    for i in range(2):
        singles = [paper_step(frozen, s, b) for s, b in zip(states, batches(i), strict=True)]
        states = [state for state, _ in singles]
        losses = jnp.stack([metrics.loss for _, metrics in singles])
        stacked_batch = pytrees.stack(batches(i))
        together, metrics = jax.jit(many)(frozen, together, stacked_batch)
        if i == 0:
            compiled = spread.lower(frozen, sharded, stacked_batch).compile()
        sharded, sharded_metrics = spread(frozen, sharded, stacked_batch)
        np.testing.assert_allclose(metrics.loss, losses, rtol=1e-5)
        np.testing.assert_allclose(sharded_metrics.loss, losses, rtol=1e-5)
    assert len(sharded.step.sharding.device_set) == 8
    assert "all-reduce" not in compiled.as_text()
    # Fetched first: each row of a spread array is a collective of its own, and hundreds of them
    # under way at once can wait for each other on simulated devices.
    for result in jax.device_get((together, sharded)):
        for one, expected in zip(pytrees.unstack(result), states, strict=True):
            # Adam turns rounding in near-zero gradients into steps; the tokens' are large.
            got = one.trainable["pseudo_tokens"]
            np.testing.assert_allclose(got, expected.trainable["pseudo_tokens"], atol=1e-5)
            assert_trees_close(one.trainable, expected.trainable, atol=2e-4)


def test_batch_depends_on_person_and_step_alone(loaded):
    model, _ = loaded
    _, photos, key = person(loaded, PAPER, 0)
    first = draw_batch(model, photos, key, jnp.int32(3), BATCH)
    again = jax.jit(functools.partial(draw_batch, model, size=BATCH))(photos, key, jnp.int32(3))
    assert_trees_close(first, again, rtol=1e-6, atol=1e-6)
    other = draw_batch(model, photos, key, jnp.int32(4), BATCH)
    assert (np.asarray(first.noise) != np.asarray(other.noise)).all()
    assert (np.asarray(first.latents) != np.asarray(other.latents)).any()
    # Padding of the pictures, as for people with fewer of them, changes nothing.
    padded = photos._replace(
        mean=jnp.pad(photos.mean, ((0, 3), *[(0, 0)] * 4), constant_values=jnp.nan),
        logvar=jnp.pad(photos.logvar, ((0, 3), *[(0, 0)] * 4), constant_values=jnp.nan),
    )
    jax.tree.map(
        np.testing.assert_array_equal, draw_batch(model, padded, key, jnp.int32(3), BATCH), first
    )


def test_batch_draws_pictures_mirrors_texts_and_timesteps_evenly(loaded):
    model, _ = loaded
    _, photos, key = person(loaded, PAPER, 0)
    # One pixel per picture and mirror, which tells which of the four it is.
    photos = photos._replace(
        mean=jnp.arange(4.0).reshape(2, 2, 1, 1, 1), logvar=jnp.full((2, 2, 1, 1, 1), -60.0)
    )
    batch = draw_batch(model, photos, key, jnp.int32(0), 4000)
    shares = np.bincount(np.asarray(batch.latents).round().astype(int).ravel(), minlength=4) / 4000
    np.testing.assert_allclose(shares, 0.25, atol=0.03)
    texts = np.asarray(batch.token_ids)[:, None] == np.asarray(photos.token_ids)[None]
    np.testing.assert_allclose(texts.all(-1).mean(0), 1 / 3, atol=0.03)
    steps = np.asarray(batch.timesteps)
    assert steps.min() < 10 and steps.max() > 989 and abs(steps.mean() - 499.5) < 20


def test_posterior_is_sampled_with_its_spread(loaded):
    model, _ = loaded
    _, photos, key = person(loaded, PAPER, 0)
    shape = photos.mean.shape
    photos = photos._replace(mean=jnp.full(shape, 2.0), logvar=jnp.full(shape, np.log(0.09)))
    latents = np.asarray(draw_batch(model, photos, key, jnp.int32(0), 200).latents)
    assert abs(latents.mean() - 2) < 0.01 and abs(latents.std() - 0.3) < 0.01


def test_bf16_computes_close_to_float32_and_learns_in_float32(loaded):
    model, frozen = loaded
    state, photos, key = person(loaded, PAPER, 0)
    batch = draw_batch(model, photos, key, jnp.int32(0), BATCH)
    half = dataclasses.replace(model, compute_dtype="bfloat16")
    narrow = pytrees.cast(frozen, jnp.bfloat16)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(model, frozen):
        grad = jax.value_and_grad(training_loss, argnums=3, has_aux=True)
        (total, _), grads = grad(model, PAPER, frozen, state.trainable, state.given, batch)
        return total, grads

    (full_loss, full), (half_loss, rounded) = gradients(model, frozen), gradients(half, narrow)
    np.testing.assert_allclose(half_loss, full_loss, rtol=2e-2)
    for part in PAPER.parts():
        a, b = (
            jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(grads[part])])
            for grads in (full, rounded)
        )
        cosine = a @ b / (jnp.linalg.norm(a) * jnp.linalg.norm(b))
        assert cosine > 0.999, part  # measured: 0.99998 at least
    optimizer = optimizer_for(PAPER)
    step = functools.partial(train_step, half, PAPER, optimizer)
    new, metrics = jax.eval_shape(step, narrow, state, batch)
    wide = (new.trainable, new.opt_state, metrics.loss, rounded)
    floating = [x for x in jax.tree.leaves(wide) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floating} == {jnp.dtype("float32")}
