"""The mini's parts: names, captions, the small networks, training that can go on, measurements."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from idea_jax.config.settings import ConfigError
from idea_jax.data import text
from idea_jax.data.tokenizer import load_tokenizer
from idea_jax.faces.crops import align
from idea_jax.formats import enhancer
from idea_jax.mini import captions, drawings, lab, measures, networks, people, traits, trials
from idea_jax.mini.pretrain import __main__ as pretraining
from idea_jax.mini.pretrain import faces, order
from idea_jax.mini.pretrain import fit as fitting
from idea_jax.mini.pretrain import stages as all_stages
from idea_jax.mini.pretrain import text as captioning
from idea_jax.mini.pretrain.autoencoder import features_apart, train_decoder
from idea_jax.mini.pretrain.budget import BUDGETS, STAGE_NAMES
from idea_jax.mini.pretrain.crops import CROP_SHIFT, aligned_crop, disturbed, unit
from idea_jax.mini.pretrain.run import (
    RECOGNISER,
    RECORD,
    SUMS,
    TEXT_LENGTH,
    PretrainError,
    Run,
    write_record,
)
from idea_jax.mini.pretrain.start import name_embeddings
from idea_jax.mini.pretrain.text import caption_ids
from idea_jax.models import hub, sd
from idea_jax.random_sd import write_tokenizer
from idea_jax.runtime.files import file_digest

# People and their names


def test_names_are_unique_words_and_say_half_of_a_face_each():
    first, last = people.first_names(), people.last_names()
    assert len({*first, *last}) == 2 * people.NAMES
    assert all(re.fullmatch("[a-z]{3,}", name) for name in (*first, *last))
    one, other = people.named(np.array([3, 3]), np.array([5, 8])), traits.Traits._fields
    for field in other[: traits.CODE_SIZE]:
        left, right = getattr(one, field)
        assert left == right, f"{field} changed with the last name"
    differing = [f for f in other[traits.CODE_SIZE :] if np.diff(getattr(one, f))[0] != 0]
    assert len(differing) > traits.CODE_SIZE // 2


def test_people_of_a_split_are_the_same_however_many_are_asked_for():
    few, many = people.unnamed("test", 3), people.unnamed("test", 9)
    for a, b in zip(few, many, strict=True):
        np.testing.assert_array_equal(a, b[:3])
    codes = [people.unnamed(split, 50).eye_size for split in people.SPLITS]
    for one, other in itertools.combinations(codes, 2):
        assert not np.intersect1d(one, other).size
    with pytest.raises(ValueError, match="no split 'train'"):
        people.unnamed("train", 1)


# Captions


def said(caption):
    """What a caption claims, by looking for its words."""
    claims = {}
    colours = "|".join(traits.COLOURS)
    if match := re.search(rf"({colours}) (?:background|wall)", caption):
        claims["background"] = match[1]
    if match := re.search(rf"({colours}) shirt|dressed in ({colours})", caption):
        claims["shirt"] = match[1] or match[2]
    if match := re.search(rf"(?:({colours}) )?(cap|beanie|(?<!without a )hat)\b", caption):
        claims["hat"] = match[2]
        if match[1]:
            claims["hat_colour"] = match[1]
    if "without a hat" in caption:
        claims["hat"] = "none"
    for expression, words in (
        ("smiling", "smil"),
        ("sad", "sad"),
        ("surprised", "surprised"),
        ("neutral", "neutral"),
    ):
        if words in caption:
            claims["expression"] = expression
    for style, words in (
        ("photo", "photo"),
        ("painting", "painting"),
        ("sketch", "sketch|pencil"),
        ("cartoon", "cartoon|comic"),
    ):
        if re.search(words, caption):
            claims["style"] = style
    for field in ("light", "framing"):
        for kind in captions.KINDS[field][1:]:
            if re.search(rf"\b{kind}\b", caption):
                claims[field] = kind
    return claims


def random_words(rng):
    return {field: str(rng.choice(kinds)) for field, kinds in captions.KINDS.items()}


def test_captions_claim_nothing_that_the_picture_does_not_show():
    rng = np.random.default_rng(0)
    counts = dict.fromkeys(captions.KINDS, 0)
    for _ in range(3000):
        scene = random_words(rng)
        caption = captions.caption(rng, scene, "Zed Zed")
        assert re.search(r"\bof (.*\bof )?Zed Zed\b", caption), caption
        assert not re.search(r"\ba [aeiou]|  |\{", caption), caption
        for field, kind in said(caption).items():
            assert scene[field] == kind, f"{caption!r} but {field} is {scene[field]}"
            counts[field] += 1
    # Everything is mentioned often, nothing always.
    assert all(500 < count < 2900 for count in counts.values()), counts


def test_captions_of_pairs_name_both_in_their_order():
    rng = np.random.default_rng(1)
    for _ in range(300):
        caption = captions.pair_caption(rng, (random_words(rng), random_words(rng)), ("Aa", "Bb"))
        assert re.search(r"of Aa\b.*\bBb\b", caption), caption


def test_prompts_ask_for_what_they_say():
    for prompt in captions.PROMPTS:
        assert prompt.text.count("{}") == 1
        claims = said(prompt.text)
        if claims.get("style") == "photo":
            claims.pop("style")
        assert claims == dict(prompt.asks)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    words = [*captions.words(), *people.name_parts(), *people.first_names(), *people.last_names()]
    size = write_tokenizer(folder, words, pad="!", length=TEXT_LENGTH)
    return load_tokenizer(folder, size, TEXT_LENGTH)


def test_each_name_is_one_token_and_captions_fit_the_text_encoder(tokenizer):
    for names in (people.first_names(), people.last_names()):
        assert {len(tokenizer.ids(name)) for name in names} == {1}
    rng = np.random.default_rng(2)
    longest = max(
        len(tokenizer.ids(captions.caption(rng, random_words(rng), people.full_name(1, 2))))
        for _ in range(2000)
    )
    assert longest <= TEXT_LENGTH - 2
    # Also the texts that people are trained with, with the tokens of a placeholder.
    learner = tokenizer.with_placeholder("<person>", 2)
    for prompt in text.training_prompts(learner.placeholder):
        words = len(re.findall(r"[\w<>]+|-", prompt.replace("<person>_v", "v")))
        assert len(learner.ids(prompt)) == words, prompt


def test_names_of_similar_people_start_close_to_each_other(tokenizer):
    """The distance of two names' embeddings follows the difference of their codes."""
    table = np.random.default_rng(0).normal(0, 0.02, (tokenizer.vocab_size, 64)).astype(np.float32)
    named = name_embeddings(tokenizer, table)
    ids = np.concatenate([tokenizer.ids(name) for name in people.first_names()[:200]])
    who = people.named(np.arange(200), np.zeros(200, int))
    rows = named[ids]
    assert abs(rows.std() / 0.02 - 1) < 0.1
    apart, differ = [], []
    for i, j in itertools.combinations(range(0, 200, 4), 2):
        apart.append(np.linalg.norm(rows[i] - rows[j]))
        pair = [jax.tree.map(lambda leaf, k=k: leaf[k], who) for k in (i, j)]
        differ.append(traits.distance(*pair))
    assert np.corrcoef(apart, differ)[0, 1] > 0.6
    untouched = np.setdiff1d(
        np.arange(len(table)),
        [tokenizer.ids(n)[0] for n in (*people.first_names(), *people.last_names())],
    )
    np.testing.assert_array_equal(named[untouched], table[untouched])


# The small networks


def test_onnx_gives_what_the_network_gives(tmp_path):
    import onnxruntime

    net = networks.ConvNet((8, 8, 16), 32, halve=True)
    params = net.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    rng = np.random.default_rng(0)
    # Random biases and places too: the initial ones would hide that they are left out.
    params = jax.tree.map(
        lambda leaf: jnp.asarray(leaf + 0.05 * rng.standard_normal(leaf.shape), jnp.float32),
        params,
    )
    networks.write_onnx(tmp_path / "net.onnx", net, params, 32)
    images = rng.uniform(-1, 1, (3, 32, 32, 3)).astype(np.float32)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16).astype(jnp.float32), params)
    expected = net.apply({"params": half}, images)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    (got,) = session.run(None, {"input.1": images.transpose(0, 3, 1, 2)})
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected).mean() > 0.01


def test_a_saved_network_is_read_back_with_its_widths(tmp_path):
    net = networks.ConvNet((4, 8, 12), 7)
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    params = net.init(jax.random.key(1), images)["params"]
    networks.save(tmp_path / "net.safetensors", params)
    same, read = networks.load(tmp_path / "net.safetensors")
    assert same == net
    expected = net.apply({"params": params}, images)
    np.testing.assert_allclose(same.apply({"params": read}, images), expected, atol=5e-3)


def test_features_apart_sees_what_each_layer_gives():
    net = networks.ConvNet((4, 8), 3)
    one, other = jax.random.normal(jax.random.key(0), (2, 2, 8, 8, 3))
    params = net.init(jax.random.key(1), one)["params"]
    layers = networks.outputs(net, params, one)
    assert sorted(x.shape[-1] for x in layers) == [3, 4, 8, 8, 8]
    (last,) = (x for x in layers if x.ndim == 2)
    np.testing.assert_array_equal(last, net.apply({"params": params}, one))
    cosines = [
        jnp.sum(unit(a) * unit(b), axis=-1).mean()
        for a, b in zip(layers, networks.outputs(net, params, other), strict=True)
    ]
    expected = 2 - 2 * np.mean(cosines)  # the squared distance of two unit vectors
    value = features_apart(net, params, one, other)
    np.testing.assert_allclose(value, expected, rtol=1e-4)


def test_margin_loss_is_the_cross_entropy_of_a_wider_angle():
    angles = np.array([[1.2, 0.9, 2.0]])
    own = jnp.array([[1.0, 0.0, 0.0]])
    wider = angles + np.array([[faces.MARGIN, 0, 0]])
    logits = faces.SCALE * np.cos(wider)
    expected = -np.log(np.exp(logits[0, 0]) / np.exp(logits).sum())
    got = faces.margin_loss(jnp.cos(jnp.asarray(angles)), own)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


# Crops that the recogniser is trained on

POINTS = np.array([[20, 30], [33, 27], [28, 36], [23, 45], [34, 42]], np.float32)


def gradient(seed, side=64):
    """A smooth random picture, uint8[side, side, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("far", [0, 25])
def test_aligned_crop_is_that_of_insightface(far):
    """Also where the crop reaches beyond the edge of the picture."""
    image, points = gradient(0), POINTS + np.float32(far)
    theirs = align(Image.fromarray(image), points).astype(np.float32)
    to_float = drawings.to_float(image)
    ours = (np.asarray(aligned_crop(to_float, points, size=112)) + 1) * 127.5
    assert np.abs(ours - theirs).max() < 2 and theirs.std() > 20
    # At half the size it is what the recogniser's first layer leaves of theirs.
    halved = theirs.reshape(56, 2, 56, 2, 3).mean((1, 3))
    half = (np.asarray(aligned_crop(to_float, points, size=56)) + 1) * 127.5
    assert np.abs(half - halved).mean() < 1
    assert (theirs[-1, -1] == 0).all() == bool(far)


def test_aligned_crop_moves_turns_and_scales_what_is_on_it():
    image = drawings.to_float(gradient(1))

    def crop(**off):
        return np.asarray(aligned_crop(image, POINTS, size=56, **off))[4:-4, 4:-4]

    straight = crop()
    moved = crop(shift=(4 / 56, -2 / 56))
    np.testing.assert_allclose(moved[:-2, 4:], straight[2:, :-4], atol=1e-3)
    larger = crop(scale=2.0)
    np.testing.assert_allclose(larger[1::4, 1::4], straight[12:36:2, 12:36:2], atol=0.1)
    turned = crop(angle=np.pi / 2)  # clockwise: what was on top is on the right
    np.testing.assert_allclose(turned, np.rot90(straight, -1), atol=1e-3)


def test_crops_in_training_are_as_far_off_as_is_said_and_no_further():
    """A bright spot between the eyes and the mouth says where the crop's middle went."""
    spot = np.array([28.0, 36.0])
    rows, columns = np.mgrid[:64, :64]
    blob = np.exp(-((columns - spot[0]) ** 2 + (rows - spot[1]) ** 2) / 8)
    image = np.repeat(blob[:, :, None], 3, axis=2).astype(np.float32)
    count = 64
    images = jnp.broadcast_to(jnp.asarray(image), (count, 64, 64, 3))
    points = jnp.broadcast_to(POINTS, (count, 5, 2))
    seen = np.asarray(disturbed(images, jax.random.key(0), 56, points)).mean(-1)
    brightest = np.stack([np.unravel_index(p.argmax(), p.shape) for p in seen])[:, ::-1]
    straight = np.asarray(aligned_crop(images[0], POINTS, size=56)).mean(-1)
    at = np.array(np.unravel_index(straight.argmax(), straight.shape))[::-1]
    mirrored = np.stack([np.abs(brightest - at), np.abs(brightest - [55 - at[0], at[1]])])
    off = mirrored[np.argmin(mirrored.sum(-1), axis=0), np.arange(count)]
    allowed = CROP_SHIFT * 56 + 2
    assert off.max() <= allowed
    assert off.max() >= 2 and off.std() > 0.5


# Training


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "out", tmp_path / "work", BUDGETS["tiny"], 0, True)


def test_an_interrupted_training_ends_like_one_that_was_not(run, monkeypatch):
    kernel = np.random.default_rng(0).standard_normal((12, 12))
    params = {"layer": {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.zeros(12)}}

    def loss(params, batch, key):
        x = batch + 0.1 * jax.random.normal(key, batch.shape)
        return jnp.mean(jnp.square(x @ params["layer"]["kernel"] + params["layer"]["bias"][None]))

    def batch(rng):
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(rng)
        return rng.standard_normal((4, 12)).astype(np.float32)

    def train(name):
        optimizer = fitting.muon(params, 20, 0.3)
        # The name decides the random numbers, so both runs have the same, in folders of their own.
        other = Run(run.folder, run.work / name, run.budget, 0, True)
        return fitting.fit(other, "test", params, loss, batch, 20, optimizer, ema=0.9)

    calls, stop = [], None
    straight, losses = train("straight")
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])

    monkeypatch.setattr(fitting, "SAVE_SECONDS", 0)
    calls, stop = [], 7
    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        train("interrupted")
    assert threading.active_count() == threads  # the one that makes batches has ended
    calls, stop = [], None
    resumed, again = train("interrupted")
    assert len(calls) == 13 and again == losses
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)


@pytest.mark.parametrize("save_seconds", [0, 120])
def test_a_loss_that_is_no_number_stops_a_training_and_is_not_saved(run, monkeypatch, save_seconds):
    monkeypatch.setattr(fitting, "SAVE_SECONDS", save_seconds)
    params = {"a": {"bias": jnp.zeros(1)}}

    def loss(params, batch, key):
        return jnp.sum(params["a"]["bias"]) + batch

    inputs = iter([1.0, 1.0, np.inf, 1.0, 1.0])
    with pytest.raises(FloatingPointError, match="the loss of test is inf at step 2"):
        fitting.fit(run, "test", params, loss, lambda rng: next(inputs), 5, fitting.muon(params, 5))
    file = run.work / "test.state.safetensors"
    if save_seconds:
        assert not file.is_file()
    else:
        assert len(load_file(file)["losses"]) == 2


def test_weights_that_are_no_numbers_are_not_saved(run):
    """The last step is not followed by a loss that would tell."""
    params = {"a": {"bias": jnp.zeros(1)}}

    def loss(params, batch, key):
        return jnp.sqrt(jnp.sum(jnp.square(params["a"]["bias"])))  # 0, and its gradient 0 / 0

    with pytest.raises(FloatingPointError, match="weights of test are not finite at step 1"):
        fitting.fit(run, "test", params, loss, lambda rng: 0, 1, fitting.muon(params, 1))
    assert not (run.work / "test.state.safetensors").exists()


def test_seconds_of_a_stage_are_those_of_all_its_processes(run, monkeypatch):
    """Of the part that was done before it was interrupted, too."""
    params = {"a": {"bias": jnp.zeros(1)}}

    def loss(params, batch, key):
        return jnp.sum(jnp.square(params["a"]["bias"] - batch))

    def batch(rng):
        calls.append(rng)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return 1.0

    def stage(run):
        for name in ("one", "two"):
            fitting.fit(run, name, params, loss, batch, 2, fitting.muon(params, 2))
        return {}

    monkeypatch.setattr(fitting, "SAVE_SECONDS", 0)
    monkeypatch.setattr(all_stages, "STAGES", {"stage": stage})
    monkeypatch.setattr(all_stages, "NEEDS", {})
    run.folder.mkdir()
    calls = []
    with pytest.raises(KeyboardInterrupt):
        order.pretrain(run)
    for name in ("one", "two"):
        file = run.work / f"{name}.state.safetensors"
        saved = load_file(file)
        assert 0 < saved["seconds"] < 60
        save_file({**saved, "seconds": np.array(saved["seconds"] + 1000)}, file)
    order.pretrain(run)
    assert len(calls) == 5
    record = json.loads((run.folder / RECORD).read_text())
    assert 2000 <= record["stages"]["stage"]["seconds"] < 2100


def test_an_average_is_returned_where_one_is_asked_for(run):
    """Of two steps the first weighs (1 + 1) / (10 + 1): the decay grows from small values."""
    params = {"a": {"bias": jnp.zeros(1)}}

    def loss(params, batch, key):
        return jnp.sum(jnp.square(params["a"]["bias"] - 1.0))

    last, _ = fitting.fit(run, "last", params, loss, lambda rng: 0, 2, fitting.muon(params, 2))
    one, _ = fitting.fit(
        run, "one", params, loss, lambda rng: 0, 1, fitting.muon(params, 2), ema=0.99
    )
    mean, _ = fitting.fit(
        run, "mean", params, loss, lambda rng: 0, 2, fitting.muon(params, 2), ema=0.99
    )
    first, second = float(one["a"]["bias"][0]) / 0.9, float(last["a"]["bias"][0])
    expected = (2 / 11) * 0.9 * first + (9 / 11) * second
    np.testing.assert_allclose(mean["a"]["bias"][0], expected, rtol=1e-5)


def test_another_budget_does_not_continue_a_checkpoint(run):
    run.folder.mkdir()
    write_record(run.folder, {"seed": 1, "budget": {}, "stages": {}})
    with pytest.raises(ValueError, match="another seed or budget"):
        order.pretrain(run)


def test_a_work_folder_of_another_run_is_not_taken(run, monkeypatch):
    """Its drawings and states would pass for those of this seed."""
    monkeypatch.setattr(all_stages, "STAGES", {"one": lambda run: {}})
    monkeypatch.setattr(all_stages, "NEEDS", {})
    run.folder.mkdir()
    order.pretrain(run)
    other = dataclasses.replace(run, folder=run.folder.with_name("other"), seed=run.seed + 1)
    other.folder.mkdir()
    with pytest.raises(ValueError, match="another seed or budget"):
        order.pretrain(other)
    order.pretrain(dataclasses.replace(other, seed=run.seed))


def test_a_folder_of_something_else_is_not_written_to(run):
    other = run.folder / "unet" / "diffusion_pytorch_model.safetensors"
    other.parent.mkdir(parents=True)
    other.write_text("weights of somebody")
    with pytest.raises(PretrainError, match="not empty and has no pretraining.json"):
        order.pretrain(run)
    assert [path for path in run.folder.rglob("*") if path.is_file()] == [other]


def test_a_run_that_was_interrupted_in_its_first_stage_is_continued(run, monkeypatch):
    def stage(run):
        (run.folder / "names.txt").touch()
        if not calls:
            calls.append(run)
            raise KeyboardInterrupt
        return {}

    calls = []
    monkeypatch.setattr(all_stages, "STAGES", {"one": stage})
    monkeypatch.setattr(all_stages, "NEEDS", {})
    with pytest.raises(KeyboardInterrupt):
        order.pretrain(run)
    order.pretrain(run)
    assert "one" in json.loads((run.folder / RECORD).read_text())["stages"]


def test_two_processes_do_not_run_one_stage(run, monkeypatch):
    def stage(run):
        with pytest.raises(PretrainError, match="stage one .* by another process"):
            order.pretrain(run)
        return {}

    monkeypatch.setattr(all_stages, "STAGES", {"one": stage})
    monkeypatch.setattr(all_stages, "NEEDS", {})
    order.pretrain(run)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--seed", "-1"], "seed must lie between"),
        (["--work", "out/work"], "must not lie in out, the checkpoint"),
        (["--stages", "unet"], "stage unet needs vae and clip, which is not done yet"),
    ],
)
def test_what_cannot_be_begun_is_said_in_a_line(tmp_path, monkeypatch, capsys, args, said):
    monkeypatch.chdir(tmp_path)
    assert pretraining.main(["out", *args]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("*.safetensors"))


def test_jobs_run_the_command_itself(tmp_path, monkeypatch):
    """A process of its own for the first stage; from within the folder, which `.` names."""
    folder = tmp_path / "out"
    folder.mkdir()
    monkeypatch.chdir(folder)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        args = [".", "--budget", "tiny", "--jobs", "2", "--stages", "prepare", "--seed", "3"]
        assert pretraining.main(args) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    record = json.loads((folder / RECORD).read_text())
    assert record["seed"] == 3 and list(record["stages"]) == ["prepare"]
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert (tmp_path / "out-work" / "prepare.log").is_file()


def test_check_sums_are_of_what_belongs_to_the_checkpoint(run):
    run.folder.mkdir()
    (run.folder / "names.txt").write_text("Anna\n")
    (run.folder / ".tmp-left.safetensors").write_text("of a process that was killed")
    all_stages.finish(run)
    names = [line.split("  ")[1] for line in (run.folder / SUMS).read_text().splitlines()]
    assert names == ["README.md", "names.txt"]


def test_what_another_folder_was_made_with_is_asked_for_by_name(run):
    """The decoder needs a recogniser that an earlier version did not keep."""
    with pytest.raises(ValueError, match="recogniser.safetensors is missing"):
        run.made_before(RECOGNISER)


def test_a_record_from_before_there_was_a_stage_is_continued(run, monkeypatch):
    """The new stage is run, and the check sums are written again, since there are new files."""
    done = []
    stages = {name: lambda run, name=name: done.append(name) or {} for name in ("old", "new")}
    stages["finish"] = lambda run: done.append("finish") or {}
    monkeypatch.setattr(all_stages, "STAGES", stages)
    monkeypatch.setattr(all_stages, "NEEDS", {})
    budget = json.loads(json.dumps(dataclasses.asdict(run.budget)))
    before = {name: value for name, value in budget.items() if name != "detector"}
    record = {"seed": 0, "budget": before, "stages": {"old": {}, "finish": {}}}
    run.folder.mkdir()
    write_record(run.folder, record)
    order.pretrain(run)
    assert done == ["new", "finish"]
    after = json.loads((run.folder / RECORD).read_text())
    assert after["budget"] == budget and list(after["stages"]) == ["old", "new", "finish"]
    order.pretrain(run)
    assert len(done) == 2
    write_record(run.folder, record | {"budget": before | {"each": 99}})
    with pytest.raises(ValueError, match="another seed or budget"):
        order.pretrain(run)


# Stands for the command: does a stage in no time, or fails, and notes when it was at work.
STAGE = """
import json, sys, time
from pathlib import Path
from idea_jax.runtime.files import atomic_write
from filelock import FileLock
folder, name = Path(sys.argv[1]), sys.argv[-1]
begun = time.time()
if name == "bad":
    time.sleep(0.5)
    print("Traceback: it went wrong")
    sys.exit(3)
time.sleep(60 if name == "long" else 0.7)
with FileLock(folder / "lock"):
    record = json.loads((folder / "pretraining.json").read_text())
    record["stages"][name] = {"begun": begun, "ended": time.time()}
    with atomic_write(folder / "pretraining.json") as path:
        path.write_text(json.dumps(record))
"""


@pytest.fixture
def stages(run, monkeypatch, tmp_path):
    """Runs stages that need others, {name: needs}, and returns when each began and ended."""
    script = tmp_path / "stage.py"
    script.write_text(STAGE)

    def go(needs, jobs, only=()):
        monkeypatch.setattr(all_stages, "STAGES", dict.fromkeys(needs))
        monkeypatch.setattr(all_stages, "NEEDS", needs)
        run.folder.mkdir(exist_ok=True)
        about = {"seed": run.seed, "budget": dataclasses.asdict(run.budget), "stages": {}}
        if not (run.folder / RECORD).is_file():
            write_record(run.folder, about)
        command = [sys.executable, str(script), str(run.folder)]
        order.pretrain_at_once(run, only, jobs, command)
        return json.loads((run.folder / RECORD).read_text())["stages"]

    return go


def test_stages_that_do_not_need_each_other_run_at_the_same_time(stages):
    done = stages({"first": [], "a": ["first"], "b": ["first"], "c": ["first"], "last": "abc"}, 2)
    assert done["a"]["begun"] < done["b"]["ended"] and done["b"]["begun"] < done["a"]["ended"]
    assert done["c"]["begun"] >= min(done["a"]["ended"], done["b"]["ended"])  # two at a time
    assert done["first"]["ended"] <= min(done[name]["begun"] for name in "ab")
    assert done["last"]["begun"] >= max(done[name]["ended"] for name in "abc")


def test_a_stage_that_fails_stops_the_others_and_says_why(stages, run):
    started = time.monotonic()
    with pytest.raises(ChildProcessError, match="stage bad failed.* 3:\nTraceback: it went wrong"):
        stages({"good": [], "bad": ["good"], "long": ["good"], "after": ["long"]}, 3)
    assert time.monotonic() - started < 20
    assert list(json.loads((run.folder / RECORD).read_text())["stages"]) == ["good"]
    with pytest.raises(ValueError, match="stage after needs long, which is not done yet"):
        stages({"good": [], "bad": ["good"], "long": ["good"], "after": ["long"]}, 3, ["after"])


def test_every_stage_comes_after_those_that_it_needs():
    names = list(all_stages.STAGES)
    assert tuple(names) == STAGE_NAMES
    assert set(all_stages.NEEDS) == set(names) - {"prepare"}
    for name, needs in all_stages.NEEDS.items():
        assert all(names.index(needed) < names.index(name) for needed in needs)


def test_pictures_are_the_same_one_by_one_and_together(monkeypatch):
    """Drawn together as on a GPU; the last batch is not full."""
    who, keys = people.unnamed("test", 6), jax.random.split(jax.random.key(2), 6)
    scenes = drawings.random_scenes(jax.random.key(1), (6,))
    one_by_one = drawings.draw(who, scenes, keys).astype(int)
    monkeypatch.setattr(drawings, "at_once", lambda: True)
    monkeypatch.setattr(drawings, "BATCH_AT_ONCE", 4)
    together = drawings.draw(who, scenes, keys)
    # Rounding is the compiler's choice; a pixel on the edge of two values may take either.
    assert np.abs(together - one_by_one).max() <= 1
    assert one_by_one.std() > 30


def test_captions_do_not_depend_on_who_makes_them(run, tokenizer, monkeypatch):
    names = np.random.default_rng(0).integers(0, people.NAMES, (8, 2, 2))
    names[:6, 1] = -1  # nobody on the right
    scenes = drawings.random_scenes(jax.random.key(3), (8, 2))
    set_ = drawings.Drawings(np.zeros((8, 1), np.uint8), names, scenes)
    budget = dataclasses.replace(run.budget, captions=2)
    run = dataclasses.replace(run, budget=budget)
    alone = caption_ids(run, set_, tokenizer)
    monkeypatch.setattr(captioning, "CAPTIONED", 3)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    shared = caption_ids(run, set_, tokenizer)
    for ids, same in zip(alone, shared, strict=True):
        assert ids.shape == (8, 2, TEXT_LENGTH) and ids.dtype == np.int16
        np.testing.assert_array_equal(ids, same)
    seed = [run.seed, 7, 1, *b"captions"]
    np.testing.assert_array_equal(
        alone[0][7, 1], tokenizer([drawings.say_both(seed, set_, 7)[0]])[0]
    )


def test_one_text_of_several_is_what_numpy_chooses():
    """So that captions stay what they were when numpy chose them."""
    texts = "a b c d e".split()
    ours, its = (np.random.default_rng(5) for _ in range(2))
    assert [captions.one_of(ours, texts) for _ in range(50)] == [
        its.choice(texts) for _ in range(50)
    ]


def test_drawings_come_from_disk_where_they_are_there(tmp_path):
    key = jax.random.key(3)
    first = drawings.drawings(6, 0.5, key, tmp_path)
    assert (first.names[:3, 1] == -1).all() and (first.names[3:, 1] >= 0).all()
    # Some of those who are alone are people of the names file.
    assert (first.names[:3, 0, 0] == first.names[:3, 0, 1]).tolist() == [True, False, False]
    (path,) = tmp_path.glob("*.npy")
    np.save(path, 255 - np.load(path))
    again = drawings.drawings(6, 0.5, key, tmp_path)
    np.testing.assert_array_equal(again.images, 255 - first.images)


# Measurements


def test_auc_is_the_share_of_pairs_in_the_right_order():
    rng = np.random.default_rng(0)
    same, different = rng.normal(1, 1, 40).round(1), rng.normal(0, 1, 60).round(1)
    wins = np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a in same for b in different])
    assert measures.auc(same, different) == pytest.approx(wins, abs=1e-12)


def test_psnr_of_a_known_error():
    images = np.full((2, 4, 4, 3), 100, np.uint8)
    others = images + np.array([1, 5], np.uint8)[:, None, None, None]
    expected = [20 * np.log10(255 / error) for error in (1, 5)]
    np.testing.assert_allclose(measures.psnr(images, others), expected, rtol=1e-12)


def test_table_of_the_lab_says_what_was_closed_and_how_many_steps_it_took():
    scores = {
        "another person": [trials.Score(0.1, 1.0), trials.Score(0.3, 1.0)],
        "true drawings": [trials.Score(0.9, 1.0), trials.Score(1.1, 1.0)],
        "paper": [trials.Score(0.7, 0.5, 4.0, 60), trials.Score(0.9, 1.0, 6.0, 100)],
    }
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in trials.markdown(scores).split("\n")
    ]
    assert {len(row) for row in rows} == {7}
    assert [row[3] for row in rows[2:]] == ["0%", "100%", "75%"]
    assert [row[2] for row in rows[2:]] == ["0.100", "0.900", "0.700"]  # the worst
    assert rows[2][5:] == ["", ""] and rows[4][5:] == ["5.0", "80"]
    assert rows[4][1].startswith("0.800 (") and rows[4][4].startswith("75.0% (")


def test_differences_of_the_lab_are_of_the_same_people():
    """People differ by much more than the two configs do on each of them."""
    ahead = [trials.Score(value + 0.1, 0.9) for value in (0.2, 0.5, 0.9)]
    behind = [trials.Score(value, 1.0) for value in (0.2, 0.5, 0.9)]
    scores = {"true drawings": behind, "paper": ahead, "official": behind}
    (row,) = trials.differences(scores).split("\n")[2:]
    assert "paper - official" in row and "true drawings" not in row
    assert "+0.100 (+0.100 to +0.100)" in row and "-10.0% (-10.0% to -10.0%)" in row
    assert trials.differences({"paper": ahead}) == ""


def test_bootstrap_interval_is_about_two_standard_errors_wide():
    values = np.random.default_rng(0).normal(5, 2, 200)
    low, high = trials.interval(values)
    error = values.std(ddof=1) / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error * 2)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error * 2)


def test_verification_pairs_are_of_one_person_or_of_two():
    """Embeddings that tell people apart perfectly give 1 and 0."""
    who = np.repeat(np.arange(5), 3)
    same, different = measures.verification(np.eye(5)[who], who, 40, np.random.default_rng(0))
    assert len(same) == len(different) == 20
    assert (same == 1).all() and (different == 0).all()


def test_settings_of_the_lab_win_over_its_files_as_flags_do():
    def read(**overrides):
        cfg = trials.read_config("paper_alone", overrides)
        return cfg.max_train_steps, cfg.kv_learning_rate

    assert read() == (320, 2e-5)
    assert read(preset="fast") == (160, 4e-5)
    assert read(preset="fast", max_train_steps=100) == (100, 2e-5)
    with pytest.raises(ConfigError, match="unknown key 'step' in .*mini_paper_alone.yaml or"):
        read(step=1)


def test_photo_without_a_face_stops_the_lab_before_the_first_training(monkeypatch, capsys):
    folder = hub.resolve(hub.MINI).folder
    drawn = np.asarray(Image.open(trials.__file__.replace("trials.py", "photo.png")).convert("RGB"))
    photos = (drawn, np.full_like(drawn, 90))
    met = [trials.Acquaintance(photo[None], None, None) for photo in photos]
    monkeypatch.setattr(trials, "meet", lambda *_, **__: met)
    monkeypatch.setattr(trials.measures, "load", lambda _: measures.Mini(None, None, None, folder))
    monkeypatch.setattr(trials, "Lab", None)  # must not be called
    monkeypatch.setattr(trials, "judge_pictures", None)
    assert lab.main(["--people", "2", "--profiles", "cross_init", "paper"]) == 1
    message = capsys.readouterr().err
    assert "error: no face is found on the photos of 1 of 2 people (counted from 0: 1)" in message


# All of it, in small

VAE = "vae/diffusion_pytorch_model.safetensors"


def share_of_listed(run, ids):
    """Of captions int[N, T] with one name, how many have a first and a last name of one person."""
    _, _, tokenizer = run.load()
    first, last = (
        {tokenizer.ids(name)[0]: number for number, name in enumerate(names)}
        for names in (people.first_names(), people.last_names())
    )
    named = [
        [[numbers[t] for t in row if t in numbers] for numbers in (first, last)]
        for row in ids.tolist()
    ]
    alone = [pair[0] == pair[1] for pair in named if all(len(found) == 1 for found in pair)]
    assert len(alone) > 100
    return np.mean(alone)


def falls(losses):
    """Whether the last third of a training's losses lies below the first."""
    third = max(1, len(losses) // 3)
    return np.mean(losses[-third:]) < np.mean(losses[:third])


def test_a_stage_learns_and_is_done_once(tmp_path, monkeypatch):
    """A form in small of the test below: three stages, of which one trains."""
    run = Run(tmp_path / "tiny", tmp_path / "work", BUDGETS["tiny"], 0, quiet=True)
    with pytest.raises(PretrainError, match="needs drawings"):
        order.pretrain(run, ["recogniser"])
    chosen = ["prepare", "drawings", "recogniser"]
    order.pretrain(run, chosen)
    record = json.loads((run.folder / RECORD).read_text())
    assert list(record["stages"]) == chosen
    assert falls(record["stages"]["recogniser"]["losses"])
    monkeypatch.setattr(all_stages, "STAGES", dict.fromkeys(all_stages.STAGES))  # none is callable
    order.pretrain(run, chosen)
    assert json.loads((run.folder / RECORD).read_text()) == record


@pytest.mark.long
def test_every_stage_learns_and_a_second_call_does_nothing(tmp_path, monkeypatch):
    """`pretrain` from nothing: each loss falls, the folder is whole, and done stages stay done."""
    batches = {}
    fit = fitting.fit

    def noted(run, name, params, loss, batch, *args, **kwargs):
        batches[name] = batch
        return fit(run, name, params, loss, batch, *args, **kwargs)

    monkeypatch.setattr(fitting, "fit", noted)
    run = Run(tmp_path / "tiny", tmp_path / "work", BUDGETS["tiny"], 0, quiet=True)
    vae, vae_before = run.folder / VAE, tmp_path / "before.safetensors"

    def decoder(run):
        shutil.copy(vae, vae_before)
        return train_decoder(run)

    monkeypatch.setitem(all_stages.STAGES, "decoder", decoder)
    order.pretrain(run)
    record = json.loads((run.folder / RECORD).read_text())
    assert list(record["stages"]) == list(all_stages.STAGES)
    losses = {
        f"{name} {what}": values
        for name, stage in record["stages"].items()
        for what, values in stage.items()
        if what.startswith("losses")
    }
    assert len(losses) == 14
    for name, values in losses.items():
        assert falls(values), (name, values)
    # The decoder's own training leaves the latents as they were.
    before, after = load_file(vae_before), load_file(vae)
    changed = [name for name in after if not np.array_equal(before[name], after[name])]
    assert {name.split(".")[0] for name in changed} == {"decoder", "post_quant_conv"}
    # People of the names file are seen at the end only, and then in about half of all drawings.
    shares = {}
    for name, at in (("clip", 1), ("unet", 2), ("unet_names", 2), ("unet_again", 2)):
        seen = [batches[name](np.random.default_rng(number))[at] for number in range(30)]
        shares[name] = share_of_listed(run, np.concatenate(seen))
    assert shares["clip"] == shares["unet"] == 0
    assert all(0.35 < shares[name] < 0.6 for name in ("unet_names", "unet_again"))
    monkeypatch.setattr(
        all_stages, "STAGES", dict.fromkeys(all_stages.STAGES)
    )  # none can be called
    order.pretrain(run)
    # Its shared enhancer fits it, and its recogniser.
    made = enhancer.read(run.folder / enhancer.FILE)
    recogniser = file_digest(run.folder / "face" / "recogniser.onnx")
    enhancer.check(made, sd.read_configs(run.folder), "it", face_model=recogniser)
    # It learns the pictures first, then likeness.
    assert made.about["people"] == 8 and made.about["steps"] == 2
    assert made.about["earlier"]["steps"] == 4
    # It is a checkpoint like any other: it can be drawn with.
    mini = measures.load(str(run.folder))
    drawn = measures.draw(mini, "a photo of a face", 2, steps=2, batch_size=2)
    assert drawn.shape == (2, 64, 64, 3) and (drawn[0] != drawn[1]).any()
