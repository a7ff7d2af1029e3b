"""The method's parts against closed forms and torch; what starts at zero effect has none."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch

from idea_jax import random_sd
from idea_jax.config import reading
from idea_jax.config.settings import TrainConfig
from idea_jax.method import anchor, condition, loss, modules
from idea_jax.models import sd
from idea_jax.models.unet import project_kv
from idea_jax.training.fingerprint import fingerprint_of
from idea_jax.training.start import method_of

D = 32


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd2")
    models = reference.write_checkpoint(folder, "sd2")
    return models, *sd.load(folder)


@pytest.fixture(scope="module")
def face():
    vector = np.random.default_rng(1).normal(size=512).astype(np.float32)
    return vector / np.linalg.norm(vector)


def person(method, model, face, seed=0):
    start = jax.random.normal(jax.random.key(seed + 100), (method.num_tokens, D))
    key = jax.random.key(seed)
    trainable = condition.init_trainable(model, method, key, start)
    return trainable, condition.init_given(model, method, key, start, face)


def perturb(tree, seed=0, scale=0.3):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [x + scale * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, moved)


def prompt_ids(model):
    ids = np.random.default_rng(2).integers(0, model.text.vocab_size, (2, 77)).astype(np.int32)
    ids[:, 4:6] = [model.text.vocab_size, model.text.vocab_size + 1]
    return ids


@pytest.mark.parametrize("rows", [2, 3, 5])
def test_exact_regulariser_equals_the_inverted_covariance(rows):
    rng = np.random.default_rng(rows)
    anchor_rows = rng.normal(size=(rows, D))
    delta = rng.normal(size=(rows, D))
    covariance = np.cov(anchor_rows.T) + 2e-5 * np.eye(D)
    expected = np.sqrt(np.diag(delta @ np.linalg.inv(covariance) @ delta.T))
    metric = loss.anchor_metric(np.float32(anchor_rows), truncated=False)
    got = loss.mahalanobis(jnp.float32(delta), metric)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_enhancer_passes_eight_numbers_of_the_face_for_each_anchor_row_but_one(n):
    """Each of its 8 heads can do no more than weigh n fixed values."""
    rng = np.random.default_rng(n)
    faces = rng.normal(size=(300, 512))
    faces /= np.linalg.norm(faces, axis=1, keepdims=True)
    width = 128
    rows = jnp.float32(rng.normal(size=(n, width)))
    enhancer = modules.IDEnhancer(width)
    params = enhancer.init(jax.random.key(0), jnp.zeros(512), rows)
    # A random start hardly looks at the face; after training it may, so its queries are larger.
    params["params"]["attention"]["to_q"]["kernel"] *= 20
    with jax.enable_x64():
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
        enhanced = jax.vmap(lambda face: enhancer.apply(params, face, rows))(jnp.asarray(faces))
    enhanced = np.asarray(enhanced)
    assert enhanced.dtype == np.float64 and enhanced.shape == (300, n, 2 * width)
    for row in range(n):
        np.testing.assert_array_equal(enhanced[:, row], enhanced[:, 0])
    centred = enhanced.reshape(300, -1) - enhanced.reshape(300, -1).mean(axis=0)
    size = np.linalg.svd(centred, compute_uv=False)
    passed = 8 * (n - 1)
    assert (size[passed:] < 1e-9).all()
    assert passed == 0 or size[passed - 1] > 1e-4


# A step within the span of the anchor rows: |delta|^2 / zeta minus nearly the same number. The
# difference is what a formula that subtracts squares loses.
def test_exact_regulariser_keeps_its_digits_between_the_rows():
    anchor_rows = np.random.default_rng(0).normal(size=(2, D))
    delta = 0.1 * (anchor_rows[:1] - anchor_rows[1:])
    metric = loss.anchor_metric(np.float32(anchor_rows), truncated=False)
    squared = np.sum((anchor_rows[0] - anchor_rows[1]) ** 2)
    expected = 0.1 * np.sqrt(squared / (squared / 2 + 2e-5))
    np.testing.assert_allclose(loss.mahalanobis(jnp.float32(delta), metric), [expected], rtol=1e-3)


@pytest.mark.parametrize(
    ("width", "scale", "ridge_is_cut"),
    [(D, 1.0, True), (D, 0.1, False), (1024, 1.0, True), (1024, 0.01, False)],
)
def test_truncated_regulariser_equals_torch_pinv(width, scale, ridge_is_cut):
    rng = np.random.default_rng(7)
    anchor_rows = (scale * rng.normal(size=(2, width))).astype(np.float32)
    delta = (0.1 * rng.normal(size=(2, width))).astype(np.float32)
    covariance = torch.cov(torch.tensor(anchor_rows.T)) + 2e-5 * torch.eye(width)
    inverse = torch.linalg.pinv(covariance)
    step = torch.tensor(delta)
    expected = torch.diagonal(step @ inverse @ step.T).clamp(min=1e-8).sqrt().numpy()
    metric = loss.anchor_metric(anchor_rows, truncated=True)
    assert (metric.ridge == 0) == ridge_is_cut
    # torch's float32 SVD of the covariance is the less accurate side: measured 3e-6 to 6e-4.
    np.testing.assert_allclose(loss.mahalanobis(delta, metric), expected, rtol=2e-3)


def test_cut_off_lies_where_the_pseudo_inverse_has_it():
    # For two rows the ridge survives while zeta > d 2^-23 (|row0 - row1|^2 / 2 + zeta).
    limit = np.sqrt(2 * (2e-5 / (1024 * 2.0**-23) - 2e-5))
    for factor, survives in ((0.99, True), (1.01, False)):
        rows = np.zeros((2, 1024), np.float32)
        rows[0, 0] = factor * limit
        assert (loss.anchor_metric(rows, truncated=True).ridge > 0) == survives


def test_regulariser_at_the_anchor_is_the_floor_with_zero_gradient():
    metric = loss.anchor_metric(np.eye(2, D, dtype=np.float32), truncated=False)
    value, gradient = jax.value_and_grad(lambda x: loss.mahalanobis(x, metric).sum())(
        jnp.zeros((2, D))
    )
    np.testing.assert_allclose(value, 2e-4, rtol=1e-6)
    np.testing.assert_array_equal(gradient, 0)


def test_one_token_has_the_ridge_alone():
    metric = loss.anchor_metric(np.ones((1, D), np.float32), truncated=False)
    delta = np.full((1, D), 0.1, np.float32)
    expected = [np.sqrt(D * 0.01 / 2e-5)]
    np.testing.assert_allclose(loss.mahalanobis(delta, metric), expected, rtol=1e-5)


def test_one_token_has_nothing_left_of_the_truncated_form():
    metric = loss.anchor_metric(np.ones((1, D), np.float32), truncated=True)
    value, gradient = jax.value_and_grad(lambda x: loss.mahalanobis(x, metric).sum())(
        jnp.full((1, D), 0.1)
    )
    assert value == pytest.approx(1e-4)  # the floor's root
    np.testing.assert_array_equal(gradient, 0)


def added_loss(cfg, squared_distance, away, seed):
    """What a run's regulariser adds to its loss where the anchor rows of width 1024 have that
    squared distance and each token lies `away` from its own, in a random direction."""
    rng = np.random.default_rng(seed)
    # The adapter's networks need a model, and have no part in this.
    method = dataclasses.replace(method_of(cfg), adapter=False)

    def of_length(length, rows):
        steps = rng.normal(size=(rows, 1024))
        return length * steps / np.linalg.norm(steps, axis=1, keepdims=True)

    rows = np.concatenate([np.zeros((1, 1024)), of_length(np.sqrt(squared_distance), 1)])
    rows = np.float32(rows + rng.normal(size=1024))
    model = random_sd.config("tiny", "sd2", random_sd.CLIP_VOCAB_SIZE)  # one text encoder
    given = condition.init_given(model, method, jax.random.key(0), rows, None)
    tokens = jnp.float32(rows + of_length(away, 2))
    return float(
        method.reg_weight * condition.regulariser(method, {"pseudo_tokens": tokens}, given)
    )


def settings(*flags):
    needed = ("--pretrained_model_name_or_path", "m", "--train_data_dir", "d")
    return reading.parse(TrainConfig, [*needed, *flags])


DENOISING = (0.1, 0.2)  # mean squared error of Stable Diffusion's noise prediction


@pytest.mark.parametrize("squared_distance", [1000, 1300, 1600])  # of SD 2.1's anchor rows
def test_paper_does_not_pin_tokens_where_published_identities_lie(squared_distance):
    for seed, away in enumerate((11, 12, 16)):  # published SD 2.1 identities lie 11 to 16 away
        pull = added_loss(settings(), squared_distance, away, seed)
        assert 0 < pull < 1e-3 * DENOISING[0]
    exact = added_loss(settings("--regulariser", "exact"), squared_distance, 12, 0)
    assert exact > 10 * DENOISING[1]


@pytest.mark.parametrize("profile", condition.PROFILES)
@pytest.mark.parametrize("name", condition.REGULARISERS)
def test_any_profile_takes_any_regulariser(profile, name):
    weight = () if name == "none" else ("--reg_weight", "0.5")
    cfg = settings("--profile", profile, "--regulariser", name, *weight)
    # Along the rows' difference a random direction has about a thirty-second of its length.
    along, across = 12 * np.sqrt(2 / 1300 / 1024), 12 / np.sqrt(2e-5)
    least, most = {
        "exact": (0.99 * across, 1.01 * across),
        "truncated": (0.2 * along, 3 * along),
        "euclidean": (11.99, 12.01),
        "none": (0, 0),
    }[name]
    assert 0.5 * least <= added_loss(cfg, 1300, 12, seed=3) <= 0.5 * most


def test_a_checkpoint_of_another_regulariser_is_not_gone_on_from():
    """`paper` had the exact one before it could be chosen; its checkpoints do not name it."""
    base = SimpleNamespace(name="m", revision=None, frozen=SimpleNamespace(cross_kv={}))

    def said(*flags):
        cfg = settings(*flags)
        return fingerprint_of(cfg, method_of(cfg), base, None).get("regulariser")

    assert said() == "mahalanobis_truncated"
    assert said("--regulariser", "exact") == "mahalanobis"
    assert said("--profile", "cross_init", "--regulariser", "exact") == "mahalanobis"
    # These may go on from checkpoints that do not name it.
    assert said("--reg_weight", "0") is said("--profile", "official") is None
    assert said("--profile", "cross_init", "--regulariser", "euclidean") is None


def test_euclidean_is_torch_pairwise_distance():
    delta = np.random.default_rng(0).normal(size=(3, D)).astype(np.float32)
    delta[2] = 0
    expected = torch.nn.functional.pairwise_distance(torch.tensor(delta), torch.zeros(3, D))
    np.testing.assert_allclose(loss.euclidean(delta), expected.numpy(), rtol=1e-5)


@pytest.mark.parametrize("kv", ["low_rank", "full", "none"])
def test_fresh_identity_draws_as_plain_tokens(loaded, face, kv):
    _, model, frozen = loaded
    method = condition.make_method("paper", kv=kv)
    trainable, given = person(method, model, face)
    ids = prompt_ids(model)
    plain = sd.encode_text(model, frozen, ids, trainable["pseudo_tokens"])
    context = condition.context(model, method, frozen, trainable, given, ids)
    np.testing.assert_array_equal(context, plain)
    kv_tree = condition.keys_values(model, method, frozen, trainable, context)
    expected = project_kv(frozen.cross_kv, plain, model.dtype)
    jax.tree.map(np.testing.assert_array_equal, kv_tree, expected)


def test_low_rank_delta_equals_the_full_delta_of_its_product(loaded, face):
    _, model, frozen = loaded
    low = condition.make_method("paper", kv="low_rank")
    full = condition.make_method("paper", kv="full")
    trainable, given = person(low, model, face)
    trainable = perturb(trainable)
    context = condition.context(model, low, frozen, trainable, given, prompt_ids(model))
    product = jax.tree.map(
        lambda d: d["down"] @ d["up"], trainable["kv"], is_leaf=lambda node: "down" in node
    )
    got = condition.keys_values(model, low, frozen, trainable, context, strength=0.7)
    merged = jax.tree.map(lambda w, d: w + 0.7 * d, frozen.cross_kv, product)
    expected = project_kv(merged, context, model.dtype)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, expected)
    as_full = condition.keys_values(
        model, full, frozen, trainable | {"kv": product}, context, strength=0.7
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), as_full, expected)


def test_strength_zero_leaves_the_tokens_alone(loaded, face):
    _, model, frozen = loaded
    method = condition.make_method("paper", kv="low_rank")
    trainable, given = person(method, model, face)
    trainable = perturb(trainable)
    ids = prompt_ids(model)
    plain = sd.encode_text(model, frozen, ids, trainable["pseudo_tokens"])
    expected = project_kv(frozen.cross_kv, plain, model.dtype)

    def draw(strength):
        return condition.drawing_keys_values(
            model, method, frozen, trainable, given, ids, strength=strength
        )

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), draw(0.0), expected)
    gap = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), draw(1.0), expected)
    assert min(jax.tree.leaves(gap)) > 1e-3


def test_official_identity_draws_with_the_tokens_alone(loaded, face):
    _, model, frozen = loaded
    method = condition.make_method("official")
    trainable, given = person(method, model, face)
    trainable = perturb(trainable)
    ids = prompt_ids(model)
    plain = sd.encode_text(model, frozen, ids, trainable["pseudo_tokens"])
    trained = condition.context(model, method, frozen, trainable, given, ids)
    assert np.abs(trained - plain).max() > 1e-3  # the adapter acts while training
    drawn = condition.drawing_keys_values(model, method, frozen, trainable, given, ids)
    expected = project_kv(frozen.cross_kv, plain, model.dtype)
    jax.tree.map(np.testing.assert_array_equal, drawn, expected)


def together(people, model, frozen, ids, strength=1.0):
    methods, trainables, givens = zip(*people, strict=True)
    return condition.keys_values_together(
        model, methods, frozen, trainables, givens, ids, strength=strength
    )


@pytest.mark.parametrize("kv", ["low_rank", "full", "none"])
def test_several_people_reduce_to_one(loaded, face, kv):
    _, model, frozen = loaded
    method = condition.make_method("paper", kv=kv)
    trainable, given = person(method, model, face)
    one = method, perturb(trainable), given
    V = model.text.vocab_size
    ids = prompt_ids(model)
    ids[:, 20:22] = [V, V + 1]
    expected = condition.drawing_keys_values(
        model, method, frozen, one[1], given, ids, strength=0.7
    )
    alone = together([one], model, frozen, ids, 0.7)
    jax.tree.map(np.testing.assert_array_equal, alone, expected)
    # The same person under two names; the second name's tokens have ids of their own.
    ids[:, 20:22] += 2
    twice = together([one, one], model, frozen, ids, 0.7)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), twice, expected)


def test_each_person_acts_at_their_own_tokens_and_all_at_the_others(loaded, face):
    _, model, frozen = loaded
    method = condition.make_method("paper", kv="low_rank")
    V = model.text.vocab_size
    ids = prompt_ids(model)[:1]
    ids[:, 10:12] = [V + 2, V + 3]
    shares = np.asarray(condition.position_shares([2, 2], V, ids))
    assert shares.shape == (2, 1, 77)
    np.testing.assert_array_equal(shares[:, 0, [4, 5, 10, 11]], [[1, 1, 0, 0], [0, 0, 1, 1]])
    assert (np.delete(shares[:, 0], [4, 5, 10, 11], axis=1) == 0.5).all()
    np.testing.assert_array_equal(shares.sum(axis=0), 1)
    people = []
    for seed in (0, 1):
        trainable, given = person(method, model, face, seed)
        people.append((method, perturb(trainable, seed), given))
    kv = together(people, model, frozen, ids)
    # The second person's K/V delta changes nothing where the first one's tokens stand.
    still = {**people[1][1], "kv": jax.tree.map(jnp.zeros_like, people[1][1]["kv"])}
    without = together([people[0], (method, still, people[1][2])], model, frozen, ids)
    for a, b in zip(jax.tree.leaves(kv), jax.tree.leaves(without), strict=True):
        gap = np.abs(np.asarray(a) - np.asarray(b))[0].max(axis=-1)
        assert gap[[4, 5]].max() < 1e-6 < 1e-3 < gap[[10, 11]].min()
    # Their order does not matter.
    swapped = ids.copy()
    swapped[:, 4:6], swapped[:, 10:12] = [V + 2, V + 3], [V, V + 1]
    other = together(people[::-1], model, frozen, swapped)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), other, kv)


def test_people_whose_tokens_draw_alone_stand_beside_others(loaded, face):
    _, model, frozen = loaded
    plain = condition.make_method("cross_init", num_tokens=3)
    paper = condition.make_method("paper", kv="none")
    V = model.text.vocab_size
    ids = prompt_ids(model)[:1]
    ids[:, 10:13] = [V + 2, V + 3, V + 4]
    one, given = person(paper, model, face)
    other, constants = person(plain, model, face, 1)
    people = [(paper, perturb(one), given), (plain, other, constants)]
    silent = together(people, model, frozen, ids, strength=0.0)
    tokens = jnp.concatenate([people[0][1]["pseudo_tokens"], other["pseudo_tokens"]])
    encoded = sd.encode_text(model, frozen, ids, tokens)
    expected = project_kv(frozen.cross_kv, encoded, model.dtype)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), silent, expected)
    assert (
        np.abs(
            jax.tree.leaves(together(people, model, frozen, ids))[0] - jax.tree.leaves(silent)[0]
        ).max()
        > 1e-3
    )


def test_face_reaches_the_condition(loaded, face):
    _, model, frozen = loaded
    method = condition.make_method("paper", kv="none")
    trainable, given = person(method, model, face)
    trainable = perturb(trainable)
    other = given | {"id_embed": -given["id_embed"]}
    ids = prompt_ids(model)
    a = condition.context(model, method, frozen, trainable, given, ids)
    b = condition.context(model, method, frozen, trainable, other, ids)
    assert np.abs(a - b).max() > 1e-4


def test_profiles_train_what_the_table_says(loaded, face):
    _, model, frozen = loaded
    expected = {
        "paper": {"pseudo_tokens", "adapter", "enhancer", "kv"},
        "official": {"pseudo_tokens", "adapter"},
        "cross_init": {"pseudo_tokens"},
        "textual_inversion": {"pseudo_tokens"},
    }
    for profile, parts in expected.items():
        kv = "low_rank" if profile == "paper" else "none"
        method = condition.make_method(profile, kv=kv)
        trainable, _ = person(method, model, face)
        assert set(trainable) == set(method.parts()) == parts


def torch_encoder_with_rows(models, rows):
    """A copy of the torch text encoder with further rows in its table."""
    folderless = reference.text_from(reference.TINY["sd2"][2])
    folderless.load_state_dict(models.text.state_dict())
    table = torch.nn.Embedding(len(models.text.get_input_embeddings().weight) + len(rows), D)
    old = models.text.get_input_embeddings().weight.data
    table.weight.data = torch.cat([old, rows])
    folderless.set_input_embeddings(table)
    return folderless.eval()


def test_anchor_of_names_is_the_encoded_column_mean(loaded):
    models, model, frozen = loaded
    names = np.array([[5, 6], [7, -1], [9, 11]])  # the second name has one token
    table = models.text.get_input_embeddings().weight.data
    rows = torch.stack([table[[5, 7, 9]].mean(0), table[[6, 11]].mean(0)])
    vocab = len(table)
    ids = torch.tensor([[118, vocab, vocab + 1, 119] + [3] * 73])
    with torch.no_grad():
        expected = torch_encoder_with_rows(models, rows)(ids).last_hidden_state[0, 1:3]
    got = anchor.from_names(model, frozen, names, bos=118, eos=119, pad=3)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_anchor_of_words_is_encoded_without_padding(loaded):
    models, model, frozen = loaded
    with torch.no_grad():
        expected = models.text(torch.tensor([[118, 20, 21, 119]])).last_hidden_state[0, 1:3]
    got = anchor.from_words(model, frozen, np.array([20, 21]), bos=118, eos=119)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-5)
    plain = anchor.from_input_embeddings(model, frozen, np.array([20, 21]))
    table = models.text.get_input_embeddings().weight.data
    np.testing.assert_array_equal(plain, table[[20, 21]].numpy())
