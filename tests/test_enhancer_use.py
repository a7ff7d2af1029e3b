"""People who begin with a shared ID-Enhancer: trained, not trained, drawn, drawn from photos."""

import dataclasses
import json
import shutil
from pathlib import Path

import chaos
import enhancers as made
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file
from test_compile_cache import Called, Program, check_is_alike, learning

import sample_jax
import train_jax
from idea_jax import jobs, random_sd
from idea_jax.config import reading
from idea_jax.config.settings import SampleConfig, TrainConfig
from idea_jax.data import images
from idea_jax.faces import embedding, finding, random_model
from idea_jax.formats import enhancer as enhancers
from idea_jax.formats.identity import FORMAT, Identity, IdentityError, read_identity, write_identity
from idea_jax.method import condition, shared
from idea_jax.models import hub, sd
from idea_jax.models.unet import project_kv
from idea_jax.runtime.files import file_digest, json_digest
from idea_jax.sampling import run as sample
from idea_jax.training import program, results
from idea_jax.training import run as train_steps
from idea_jax.training.fingerprint import LATER, digest_of_settings, fingerprint_of
from idea_jax.training.start import method_of
from idea_jax.training.step import rate_over_steps

QUICK = "--train_batch_size 2 --report_to none".split()
ONE = "--num_inference_steps 1 --num_images_per_prompt 1 --guidance_scale 1".split()
FILES = ("identity.safetensors", "learned_embeds.safetensors", "config.yaml", "run.json")


@pytest.fixture(scope="module")
def folder(smallest_checkpoint, tmp_path_factory):
    """A checkpoint with an enhancer."""
    return made.copy_with_one(smallest_checkpoint, tmp_path_factory.mktemp("with") / "smallest")


@pytest.fixture(scope="module")
def enhancer(folder):
    return enhancers.read(folder / enhancers.FILE)


@pytest.fixture(scope="module")
def loaded(folder, enhancer):
    """Model and frozen weights, the enhancer's part with them."""
    model, frozen = sd.load(folder)
    ours = jax.tree.map(jnp.asarray, shared.frozen_part(enhancer.shared))
    return model, frozen._replace(shared=ours)


def train(folder, photos, out, *flags):
    common = ["--pretrained_model_name_or_path", folder, "--train_data_dir", photos]
    return train_jax.main([str(flag) for flag in (*common, "--output_dir", out, *QUICK, *flags)])


def draw(folder, save_dir, *flags, prompt="a photo of {}"):
    common = ["--pretrained_model_name_or_path", folder, "--save_dir", save_dir, *ONE]
    return sample_jax.main([str(flag) for flag in (*common, "--prompt", prompt, *flags)])


def picture(printed):
    """The picture in the only folder that a drawing has printed."""
    (drawn,) = Path(printed.strip()).glob("000*.png")
    return np.asarray(Image.open(drawn))


@pytest.fixture(scope="module")
def predicted(folder, photo_folder, tmp_path_factory):
    """The results of no step; nothing that needs the networks of Stable Diffusion is loaded."""
    out = tmp_path_factory.mktemp("predicted")

    def load(*args, **settings):
        raise AssertionError("no step needs it")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sd, "load", load)
        patch.setattr(train_steps, "load_tokenizer", load)
        assert train(folder, photo_folder, out, "--preset", "fast") == 0
    return out


# --- the method -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", shared.KINDS)
def test_all_of_the_face_gets_through(kind):
    """Of the published enhancer eight numbers do (8 singular values that are not rounding)."""
    cfg = shared.EnhancerConfig(kind, 64, width=96)
    network, rng = cfg.network(64), np.random.default_rng(0)
    known = jnp.asarray(rng.normal(size=(20 if kind == "names" else 0, 2, 64)), jnp.float32)
    anchor = jnp.asarray(rng.normal(size=(2, 64)), jnp.float32)
    faces_seen = rng.normal(size=(1000, 512)).astype(np.float32)
    faces_seen /= np.linalg.norm(faces_seen, axis=1, keepdims=True)
    params = network.init(jax.random.key(0), faces_seen[0], anchor, known)
    params = jax.tree.map(lambda x: x + rng.normal(0, 0.02, x.shape).astype(np.float32), params)
    see = jax.jit(jax.vmap(lambda face: network.apply(params, face, anchor, known)))
    said = see(faces_seen)[0 if kind == "linear" else 1]  # the linear one has tokens and no F
    said = np.asarray(said).reshape(1000, -1)
    spectrum = np.linalg.svd(said - said.mean(axis=0), compute_uv=False)
    assert (spectrum > 1e-3 * spectrum[0]).sum() > 64


def test_the_basis_is_where_names_differ_and_as_far():
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(4, 2 * 6)) * np.array([3.0, 2.0, 1.0, 0.01])[:, None]
    names = (rng.normal(size=(500, 4)) @ mixed + 7).reshape(500, 2, 6).astype(np.float32)
    size = shared.basis_size(names)
    assert size == 3  # the fourth holds less than a hundredth
    basis = shared.basis_of(names, 4).reshape(4, -1)
    covariance = np.cov(names.reshape(500, -1).T, bias=True)
    np.testing.assert_allclose(basis.T @ basis, covariance, atol=1e-4)
    assert not shared.basis_of(names[:3], 4)[3:].any()


@pytest.mark.parametrize("kind", shared.KINDS)
def test_many_faces_at_once_are_as_one_by_one_and_all_begin_at_the_start(kind, loaded):
    model, _ = loaded
    cfg = made.config(model.text.hidden_size, kind)
    rng = np.random.default_rng(1)
    embeds = rng.normal(size=(3, 512)).astype(np.float32)
    embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
    tree = made.tree(cfg, model)
    together = jax.vmap(lambda face: shared.predict(cfg, tree, face))(embeds)
    for number, face in enumerate(embeds):
        alone = shared.predict(cfg, tree, face)
        for name, value in alone.items():
            np.testing.assert_allclose(together[name][number], value, atol=1e-5)
    if kind != "linear":
        assert np.abs(together["enhanced"][0] - together["enhanced"][1]).max() > 1e-3
    assert np.abs(together["pseudo_tokens"][0] - together["pseudo_tokens"][1]).max() > 1e-4
    names = jnp.ones((made.NAMES, 2, cfg.dim))
    fresh = shared.init_shared(cfg, model, jax.random.key(0), tree["start"], 0.02, names)
    for face in embeds:
        tokens = shared.predict(cfg, fresh, face)["pseudo_tokens"]
        np.testing.assert_array_equal(tokens, tree["start"])


def somebody(enhancer, model, seed=0, **settings):
    """A person whose own parts are all far from their start."""
    method = shared.person_method(enhancer.config, **settings)
    rng = np.random.default_rng(seed)
    face = rng.normal(size=512).astype(np.float32)
    face /= np.linalg.norm(face)
    key = jax.random.key(seed)
    person, given = shared.begin_person(enhancer.config, model, method, enhancer.shared, key, face)
    np.testing.assert_array_equal(given["anchor"], person["pseudo_tokens"])
    assert "id_embed" not in given and set(person) == set(method.parts())
    person = jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype(np.float32), person)
    return method, person, given


def prompt_ids(model, *people):
    """A text with all tokens of some people, and plain words."""
    vocabulary, ids = model.text.vocab_size, np.full((1, 77), 2, np.int32)
    count = sum(len(person["pseudo_tokens"]) for _, person, _ in people)
    ids[0, 3 : 3 + count] = range(vocabulary, vocabulary + count)
    return jnp.asarray(ids)


def together(loaded, *people, frozen=None, strength=1.0):
    model, ours = loaded
    methods, persons, givens = zip(*people, strict=True)
    ids = prompt_ids(model, *people)
    return condition.keys_values_together(
        model, methods, frozen or ours, persons, givens, ids, strength=strength
    )


KINDS_OF_OWN = [
    {"kv": "low_rank", "kv_rank": 3},
    {"kv": "none"},
    {"kv": "full", "own_adapter": True},
]


@pytest.mark.parametrize("settings", KINDS_OF_OWN)
def test_self_contained_draws_the_same_without_the_shared_tree(settings, loaded, enhancer):
    model, frozen = loaded
    method, person, given = somebody(enhancer, model, **settings)
    alone, whole = shared.self_contained(enhancer.config, method, enhancer.shared, person)
    bare = frozen._replace(shared={})
    for strength in (1.0, 0.5):
        two = together(loaded, (method, person, given), strength=strength)
        one = together(loaded, (alone, whole, {}), frozen=bare, strength=strength)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), one, two)
    plain = together(loaded, (method, person, given), strength=0.0)
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), plain, two))) > 0.01
    # With it in the picture there may be people of all kinds, and the file that is read back fits.
    other = somebody(enhancer, model, 1, kv="none")
    old = condition.make_method("cross_init")
    third = (old, {"pseudo_tokens": np.float32(person["pseudo_tokens"] / 2)}, {})
    mixed = together(loaded, (method, person, given), other, third)
    same = together(loaded, (alone, whole, {}), other, third)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), same, mixed)


@pytest.mark.parametrize(
    ("parts", "least", "most"),
    [
        ({"kv": "none"}, 24_576, 26_000),
        ({"kv": "low_rank"}, 900_000, 2_000_000),
        ({"kv": "low_rank", "own_adapter": True}, 20_000_000, 30_000_000),
    ],
)
def test_files_of_a_full_size_checkpoint_are_as_small_as_said(parts, least, most, tmp_path):
    """docs/enhancer.md and docs/files.md: 24 KB with tokens and F alone, below 2 MB by default."""
    model = random_sd.config("sd21", "sd2", 49_408)
    config = shared.EnhancerConfig(kind="mlp", dim=1024, num_tokens=2)
    method = shared.person_method(config, **parts)
    tree = jax.eval_shape(
        lambda key: condition.init_trainable(model, method, key, jnp.zeros((2, 1024))),
        jax.random.key(0),
    )
    person = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)
    sha256 = "0" * 64
    identity = Identity(method, person, {}, "<person>", "m", None, 0, 0, enhancer=sha256)
    write_identity(tmp_path / "identity.safetensors", identity)
    assert least <= (tmp_path / "identity.safetensors").stat().st_size <= most


def test_strength_zero_is_the_tokens_alone(loaded, enhancer):
    model, frozen = loaded
    method, person, given = somebody(enhancer, model, kv="low_rank")
    ids = prompt_ids(model, (method, person, given))
    encoded = sd.encode_text(model, frozen, ids, person["pseudo_tokens"])
    tokens = project_kv(frozen.cross_kv, encoded, model.dtype)
    for got in (
        condition.drawing_keys_values(model, method, frozen, person, given, ids, strength=0.0),
        together(loaded, (method, person, given), strength=0.0),
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, tokens)


# --- without a step -------------------------------------------------------------------------------


def test_no_step_writes_the_person_as_predicted(predicted, folder, enhancer, photo_folder):
    assert {name for name in FILES if (predicted / name).is_file()} == set(FILES)
    assert [path.suffix for path in (predicted / "webui").iterdir()] == [".safetensors"]
    identity = read_identity(predicted / "identity.safetensors")
    assert (identity.steps, identity.enhancer) == (0, enhancer.sha256)
    assert set(identity.trainable) == {"pseudo_tokens", "enhanced"} and identity.given == {}
    (photo,) = photo_folder.iterdir()
    finder = finding.open_finder(folder / "face" / "arcface.onnx", needs_detector=False)
    face = embedding.mean_embedding(finder.look(images.PictureFile(photo)).embed[None])
    expected = shared.predict(enhancer.config, enhancer.shared, face)
    for name, value in expected.items():
        np.testing.assert_allclose(identity.trainable[name], value, atol=1e-6)
    embeds = load_file(predicted / "learned_embeds.safetensors")
    np.testing.assert_array_equal(embeds["<person>"], identity.trainable["pseudo_tokens"])
    run = json.loads((predicted / "run.json").read_text())
    assert (run["steps"], run["last_loss"], run["enhancer"]) == (0, None, enhancer.sha256)
    cfg = reading.parse(TrainConfig, ["--config", str(predicted / "config.yaml")])
    assert (cfg.max_train_steps, cfg.kv_learning_rate, cfg.enhancer) == (0, 1e-4, "auto")


def test_nothing_measured_from_the_face_is_in_the_file_but_what_was_predicted(predicted):
    with safe_open(predicted / "identity.safetensors", "numpy") as file:
        about, names = json.loads(file.metadata()[FORMAT]), set(file.keys())
    assert about["format_version"] == 2
    assert names == {"trainable/pseudo_tokens", "trainable/enhanced"}
    assert (predicted / "identity.safetensors").stat().st_mode & 0o077 == 0


def test_earlier_run_is_not_described_as_the_new_one(predicted, folder, photo_folder, tmp_path):
    out = shutil.copytree(predicted, tmp_path / "out")
    run = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**run, "steps": 25}))
    assert train(folder, photo_folder, out, "--max_train_steps", "0") == 0
    assert json.loads((out / "run.json").read_text())["steps"] == 0


def test_placeholder_is_looked_up_also_without_a_tokenizer(folder, photo_folder, tmp_path, capsys):
    flags = "--max_train_steps 0 --placeholder_token photo".split()
    assert train(folder, photo_folder, tmp_path, *flags) == 1
    assert "'photo' is in the vocabulary already" in capsys.readouterr().err


# --- with steps -----------------------------------------------------------------------------------

STEPS = "--max_train_steps 4 --checkpointing_steps 2 --seed 5".split()


@pytest.fixture(scope="module")
def trained(folder, photo_folder, tmp_path_factory):
    """The results of four steps, with all that can happen on the way."""
    out = tmp_path_factory.mktemp("trained")
    way = "--save_steps 2 --validation_steps 4 --num_validation_images 1 --early_stopping 9"
    way += " --evaluation_steps 2"
    prompt = ["--validation_prompt", "a photo of {}"]
    assert train(folder, photo_folder, out, *STEPS, *way.split(), *prompt) == 0
    return out


def test_steps_begin_at_the_prediction(predicted, trained, enhancer):
    before, after = (read_identity(out / "identity.safetensors") for out in (predicted, trained))
    assert after.steps == 4 and after.enhancer == enhancer.sha256
    assert set(after.trainable) == {"pseudo_tokens", "enhanced", "kv"}
    moved = np.abs(after.trainable["pseudo_tokens"] - before.trainable["pseudo_tokens"]).max()
    assert 1e-3 < moved < 0.1  # four steps of at most 1e-2 each
    moved = np.abs(after.trainable["enhanced"] - before.trainable["enhanced"]).max()
    assert 1e-4 < moved < 0.01
    assert max(np.abs(x).max() for x in jax.tree.leaves(after.trainable["kv"])) > 0
    assert (trained / "identity-steps-2.safetensors").is_file()
    assert len(list((trained / "validation").iterdir())) == 1


def test_resumed_is_as_straight_and_only_with_the_same_enhancer(
    trained, folder, enhancer, photo_folder, tmp_path, capsys
):
    out = shutil.copytree(trained, tmp_path / "out")
    shutil.rmtree(out / "checkpoints" / "4")
    way = [*STEPS, *"--early_stopping 9 --evaluation_steps 2 --resume_from_checkpoint".split()]
    whole = file_digest(out / "identity.safetensors")
    (out / "identity.safetensors").unlink()
    assert train(folder, photo_folder, out, *way, "latest") == 0
    assert file_digest(out / "identity.safetensors") == whole
    # A cosine over more steps is another run from its first step on.
    more = [*way[2:], "latest", "--max_train_steps", "6"]
    assert train(folder, photo_folder, out, *more) == 1
    assert "max_train_steps: 4 -> 6" in capsys.readouterr().err
    assert train(folder, photo_folder, out, *way, "latest", "--lr_scheduler", "constant") == 1
    assert "lr_scheduler: cosine -> not given" in capsys.readouterr().err
    other = shutil.copytree(folder, tmp_path / "other")
    made.add_to(other, seed=1)
    for where, flags in ((other, []), (folder, ["--enhancer", "none"])):
        assert train(where, photo_folder, out, *way, "latest", *flags) == 1
        assert f"enhancer_sha256: {enhancer.sha256} -> " in capsys.readouterr().err
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["2", "4"]
    assert file_digest(out / "identity.safetensors") == whole


def test_parts_and_self_contained_as_asked_for(folder, photo_folder, enhancer, tmp_path, capsys):
    few, all_of_them = tmp_path / "few", tmp_path / "all"
    flags = "--max_train_steps 1 --train_parts".split()
    assert train(folder, photo_folder, few, *flags, "tokens,enhanced") == 0
    identity = read_identity(few / "identity.safetensors")
    assert set(identity.trainable) == {"pseudo_tokens", "enhanced"}
    wide = ["tokens,enhanced,kv,adapter", "--self_contained"]
    assert train(folder, photo_folder, all_of_them, *flags, *wide) == 0
    identity = read_identity(all_of_them / "identity.safetensors")
    assert set(identity.trainable) == {"pseudo_tokens", "enhanced", "kv", "adapter"}
    assert identity.enhancer is None and identity.method.kv_rank == 4 + enhancer.config.kv_rank
    # What a run has written as its settings is the same run again.
    for source, expected in ((few, "tokens,enhanced"), (all_of_them, wide[0])):
        cfg = reading.parse(TrainConfig, ["--config", str(source / "config.yaml")])
        again = reading.resolve(cfg, {"n_pseudo_tokens": 2, "beta": enhancer.config.beta})
        assert reading.to_yaml(again) == (source / "config.yaml").read_text()
        assert again.train_parts == expected
    # It draws without an enhancer; the other does not, and neither with a wrong one.
    plain = shutil.copytree(folder, tmp_path / "plain", ignore=shutil.ignore_patterns("enhancer"))
    whole = ["--identity", all_of_them / "identity.safetensors"]
    needy = ["--identity", few / "identity.safetensors"]
    assert draw(plain, tmp_path / "drawn", *whole) == 0
    capsys.readouterr()
    assert draw(plain, tmp_path / "drawn", *needy) == 1
    assert enhancer.sha256 in capsys.readouterr().err
    wrong = made.add_to(plain, seed=1)
    assert draw(plain, tmp_path / "drawn", *needy) == 1
    message = capsys.readouterr().err
    assert enhancer.sha256 in message and file_digest(wrong) in message
    assert draw(plain, tmp_path / "drawn", *needy, "--enhancer", folder / enhancers.FILE) == 0
    about = json.loads((Path(capsys.readouterr().out.strip()) / "run.json").read_text())
    assert about["identity"]["enhancer"] == enhancer.sha256


def test_people_together_are_as_each_alone_and_go_on_from_their_prediction(
    folder, tmp_path, capsys
):
    root, out = tmp_path / "root", tmp_path / "out"
    chaos.write_people(root, 3)
    two = "--identities_per_step 2 --mesh identity=1,data=1".split()
    assert train(folder, root, out, *two, "--max_train_steps", 0) == 0
    names = [f"person-0{n}" for n in range(3)]
    records = {record.person: record for record in jobs.read(out)}
    assert {(r.status, r.steps) for r in records.values()} == {("done", 0)}
    first = {n: read_identity(out / n / jobs.RESULT).trainable for n in names}
    assert np.abs(first[names[0]]["enhanced"] - first[names[1]]["enhanced"]).max() > 1e-4
    # Nobody is begun again; with more steps they go on; and never back.
    assert train(folder, root, out, *two, "--max_train_steps", 0) == 0
    assert {r.attempts for r in jobs.read(out)} == {1}
    steps = "--max_train_steps 2 --train_parts tokens,enhanced".split()
    assert train(folder, root, out, *two, *steps) == 0
    assert {(r.status, r.steps) for r in jobs.read(out)} == {("done", 2)}
    capsys.readouterr()
    assert train(folder, root, out, *two, "--max_train_steps", 0) == 1
    assert "choose another --output_dir" in capsys.readouterr().err
    name = names[1]
    assert train(folder, root / name, tmp_path / "alone", *steps) == 0
    alone = read_identity(tmp_path / "alone" / jobs.RESULT).trainable
    beside = read_identity(out / name / jobs.RESULT).trainable
    for part, value in alone.items():
        np.testing.assert_allclose(beside[part], value, atol=1e-5)
        assert np.abs(value - first[name][part]).max() > 1e-5


def test_spread_over_devices_with_shards_as_on_one(folder, photo_folder, tmp_path):
    steps = "--max_train_steps 2 --train_parts tokens,enhanced".split()
    sharded = ["--mesh", "data=2", "--shard_frozen"]
    assert train(folder, photo_folder, tmp_path / "one", *steps, "--mesh", "data=1") == 0
    assert train(folder, photo_folder, tmp_path / "two", *steps, *sharded) == 0
    one, two = (read_identity(tmp_path / out / jobs.RESULT).trainable for out in ("one", "two"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, two)


@pytest.mark.parametrize(
    "settings",
    [
        "--mixed_precision bf16",
        "--mesh data=2 --shard_frozen --train_parts tokens,enhanced,adapter --steps_per_call 2",
    ],
)
def test_step_is_lowered_for_what_it_is_called_with(
    settings, folder, photo_folder, tmp_path, monkeypatch
):
    step = Program()
    monkeypatch.setattr(program, "step_people", step)
    with pytest.raises(Called):
        train_jax.main(learning(folder, photo_folder, tmp_path / "out", settings))
    check_is_alike(step)


def test_rates_over_the_steps():
    assert rate_over_steps(0.1, "constant", 10, 0) == 0.1  # then the optimiser is that of ever
    cosine = rate_over_steps(0.1, "cosine", 10, 0)
    np.testing.assert_allclose([cosine(0), cosine(5), cosine(10)], [0.1, 0.05, 0], atol=1e-8)
    both = rate_over_steps(0.1, "cosine", 10, 4)
    values = [float(both(step)) for step in range(11)]
    np.testing.assert_allclose(values[:5], [0.02, 0.04, 0.06, 0.08, 0.1], atol=1e-7)
    assert values[7] == pytest.approx(0.05) and values[10] == pytest.approx(0, abs=1e-8)
    warm = rate_over_steps(0.1, "constant", 10, 1)
    np.testing.assert_allclose([warm(0), warm(1), warm(9)], [0.05, 0.1, 0.1], atol=1e-8)
    named = rate_over_steps(0.1, "constant_with_warmup", 10, 1)
    np.testing.assert_array_equal([named(0), named(9)], [warm(0), warm(9)])


@pytest.mark.parametrize(
    ("scheduler", "cycles"),
    [
        ("constant", 1),
        ("constant_with_warmup", 1),
        ("linear", 1),
        ("polynomial", 1),
        ("cosine", 1),
        ("cosine_with_restarts", 1),
        ("cosine_with_restarts", 3),
    ],
)
@pytest.mark.parametrize("warmup", [0, 4])
def test_rates_after_their_rise_are_those_of_diffusers(scheduler, cycles, warmup):
    import torch
    from diffusers.optimization import get_scheduler

    steps, rate = 40, 0.1
    theirs = get_scheduler(
        scheduler,
        torch.optim.SGD([torch.zeros(1)], lr=rate),
        num_warmup_steps=warmup,
        num_training_steps=steps,
        num_cycles=cycles,
    )
    expected = []
    for _ in range(steps + 1):
        expected.append(theirs.get_last_lr()[0])
        theirs.optimizer.step()
        theirs.step()
    ours = rate_over_steps(rate, scheduler, steps, warmup, cycles)
    got = [float(ours(step)) if callable(ours) else ours for step in range(steps + 1)]
    np.testing.assert_allclose(got[warmup:], expected[warmup:], atol=1e-7)


# --- drawn from photos ----------------------------------------------------------------------------


def test_a_photo_draws_as_the_identity_that_was_predicted_from_it(
    predicted, folder, photo_folder, enhancer, tmp_path, capsys
):
    (photo,) = photo_folder.iterdir()
    assert draw(folder, tmp_path, "--identity", predicted / "identity.safetensors") == 0
    expected = picture(capsys.readouterr().out)
    assert draw(folder, tmp_path, "--photo", photo) == 0
    out = capsys.readouterr().out
    assert np.abs(picture(out).astype(int) - expected).max() <= 1
    raw = (Path(out.strip()) / "run.json").read_text()
    about = json.loads(raw)["identity"]
    assert about["photo"] == [{"file": photo.name, "sha256": file_digest(photo)}]
    assert (about["steps"], about["enhancer"]) == (0, enhancer.sha256)
    assert str(photo_folder) not in raw
    # Two photos are one person between them, and the same one twice is one.
    second, pixels = tmp_path / "second.png", np.asarray(Image.open(photo))[:, ::-1] // 2
    Image.fromarray(pixels).save(second)
    cfg = SampleConfig("tiny", photo=[str(photo), str(second), str(photo)], prompt=["{}"])
    found = hub.resolve(str(folder))
    sitter = sample.see_sitter(cfg, enhancer, sd.read_configs(folder), found)
    assert [seen.name for seen in sitter.photos] == [photo.name, second.name]
    finder = finding.open_finder(folder / "face" / "arcface.onnx", needs_detector=False)
    embeds = [finder.look(images.PictureFile(path)).embed for path in (photo, second)]
    mean = embedding.mean_embedding(np.stack(embeds))
    expected = shared.predict(enhancer.config, enhancer.shared, mean)
    for name, value in expected.items():
        np.testing.assert_allclose(sitter.identity.trainable[name], value, atol=1e-6)


def test_what_does_not_fit_is_one_message(
    folder, random_checkpoint, photo_folder, predicted, enhancer, tmp_path, capsys
):
    (photo,) = photo_folder.iterdir()
    random_model.write_random_recogniser(tmp_path / "other.onnx", seed=1)
    file = folder / enhancers.FILE
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-7])
    older = tmp_path / "older.safetensors"
    without = {**enhancer.shared, "basis": enhancer.shared["basis"][:0]}
    enhancers.write(older, dataclasses.replace(enhancer.config, basis=0), without, enhancer.about)
    zero, other = ["--max_train_steps", 0], ["--face_model", tmp_path / "other.onnx"]
    out = shutil.copytree(predicted, tmp_path / "out")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for where, flags, says in (
        (folder, [*zero, "--enhancer", cut], "cut.safetensors cannot be used as an ID-Enhancer"),
        (folder, [*zero, "--enhancer", tmp_path / "no"], "cannot be read"),
        (folder, [*zero, *other], "it knows the faces of the recogniser with the SHA-256"),
        (folder, [*zero, "--n_pseudo_tokens", 3], "--n_pseudo_tokens is 3"),
        (folder, [*zero, "--beta", 0.5], "--beta is 0.5, and the shared ID-Enhancer is for 0.4"),
        (folder, ["--enhancer_learning_rate", 1e-4], "--enhancer_learning_rate has no effect"),
        (folder, ["--enhancer", older, "--token_basis", "names"], "holds no basis: leave it out"),
        (random_checkpoint, [*zero, "--enhancer", file], "its text width is 8, this checkpoint's"),
        (random_checkpoint, zero, "there is none: give --enhancer FILE, or a checkpoint that"),
        (random_checkpoint, ["--self_contained"], "without a shared ID-Enhancer"),
    ):
        assert train(where, photo_folder, out, *flags) == 1
        message = capsys.readouterr().err
        assert says in message and message.count("error: ") == 1, message
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    for where, flags, says in (
        (random_checkpoint, ["--photo", photo], "--photo needs a shared ID-Enhancer"),
        (folder, ["--photo", photo, "--enhancer", cut], "cannot be used as an ID-Enhancer"),
        (folder, ["--photo", photo, *other], "it knows the faces of the recogniser"),
        (folder, ["--photo", tmp_path / "none.png"], "none.png"),
        (random_checkpoint, ["--identity", predicted / jobs.RESULT, "--enhancer", file], "width"),
    ):
        assert draw(where, tmp_path / "drawn", *flags) == 1
        message = capsys.readouterr().err
        assert says in message and message.count("error: ") == 1, message


def test_other_weights_of_the_same_kind_are_a_warning(
    folder, photo_folder, predicted, tmp_path, caplog
):
    other = shutil.copytree(folder, tmp_path / "other")
    made.add_to(other, base_weights="f" * 64)
    (photo,) = photo_folder.iterdir()
    assert draw(other, tmp_path / "drawn", "--photo", photo) == 0
    assert "was trained for tiny, on other weights than those of other" in caplog.text
    caplog.clear()
    assert draw(folder, tmp_path / "drawn", "--photo", photo) == 0
    assert "on other weights" not in caplog.text


# --- runs and files of before ---------------------------------------------------------------------


def test_what_was_begun_before_there_were_these_settings_can_go_on():
    """Neither a checkpoint nor the record of a person of then names them."""
    before = {"seed": 0, "profile": "cross_init", "revision": None}
    now = {**before, **dict.fromkeys(LATER)}
    assert digest_of_settings(now) == json_digest(before)
    assert digest_of_settings({**now, "lr_scheduler": "cosine"}) != json_digest(before)
    cfg = reading.parse(
        TrainConfig,
        "--pretrained_model_name_or_path m --train_data_dir d --profile cross_init".split(),
    )
    base = results.Base(None, None, None, "m", None)
    about = fingerprint_of(cfg, method_of(cfg), base, None)
    assert {name: value for name in LATER if (value := about.get(name)) is not None} == {}


def test_without_an_enhancer_identities_are_written_and_read_as_ever(tmp_path):
    tokens = np.ones((2, 8), np.float32)
    identity = Identity(
        method=condition.make_method("cross_init"),
        trainable={"pseudo_tokens": tokens},
        given={"anchor": tokens},
        placeholder="<person>",
        base_model="tiny",
        revision=None,
        seed=0,
        steps=1,
    )
    path = tmp_path / "identity.safetensors"
    write_identity(path, identity)
    with safe_open(path, "numpy") as file:
        about = json.loads(file.metadata()[FORMAT])
    assert about["format_version"] == 1 and "enhancer" not in about
    assert set(about["method"]) == {
        "profile",
        "adapter",
        "train_enhancer",
        "acts_at_sampling",
        "regulariser",
        "cross_init",
        "kv",
        "kv_rank",
        "num_tokens",
        "beta",
        "reg_weight",
    }
    got = read_identity(path)
    assert (got.method, got.enhancer, got.needs_enhancer) == (identity.method, None, False)
    # A method of the one kind in a file of the other is refused.
    broken = dataclasses.replace(
        identity, method=dataclasses.replace(identity.method, shared_kv=True, enhanced=True)
    )
    write_identity(path, broken)
    with pytest.raises(IdentityError, match="not one of its format version"):
        read_identity(path)
