"""Makes the mini: a whole Stable Diffusion of the drawn world, trained from nothing.

    python -m idea_jax.mini.pretrain FOLDER [--budget full|tiny] [--seed N] [--work FOLDER]
                                            [--stages NAME ...] [--jobs N]

FOLDER is a checkpoint in diffusers layout after every stage. Stages that its `pretraining.json`
lists are done; a stage that was interrupted goes on where it last saved its state, under --work.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from filelock import FileLock, Timeout
from jax.scipy.ndimage import map_coordinates
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers
from optax.contrib import muon as muon_optimizer
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from idea_jax import config, devices
from idea_jax.data.text import TextError, Tokenizer, load_tokenizer
from idea_jax.diffusion import schedule
from idea_jax.files import atomic_write
from idea_jax.mini import (
    captions,
    composites,
    detector,
    drawings,
    enhancer,
    networks,
    people,
    traits,
)
from idea_jax.models import sd, weights
from idea_jax.models.clip_text import CLIPTextConfig
from idea_jax.models.clip_vision import CLIPVisionConfig, CLIPVisionModel
from idea_jax.models.unet import UNetConfig, project_kv
from idea_jax.models.vae import AutoencoderKL, VAEConfig
from idea_jax.pytrees import stream
from idea_jax.random_sd import write_tokenizer
from idea_jax.signals import Interrupted

TEXT_LENGTH = 40  # positions of the text encoder
# Twice SD's: of a picture this small, 8x8x4 keep who it is but not the mouth.
LATENT_CHANNELS = 8
FACE_SIZE = 112  # of ArcFace's input
FACE_WIDTH = 512  # of its output
# How far the crops that a recogniser is trained on are off, at most: in shares of their side, in
# shares of their size, in radians. As far as a detector's points bring them, and a little further.
CROP_SHIFT, CROP_SCALE, CROP_ANGLE = 0.04, 0.06, np.radians(5)
MARGIN, SCALE = 0.2, 20.0  # of ArcFace's loss, arXiv 1801.07698; margin in radians
EMPTY_CAPTIONS = 0.1
SHARPNESS = 20.0  # of what is read off unit vectors by a matrix of singular values about 1
DETAILS_WEIGHT = 0.1  # of what the judge sees, against the same
# Of what the UNet draws, next to what the encoder says: at most, in deviations of the latents.
LATENTS_OFF = 0.3
KL_WEIGHT = 3e-5  # of the mean KL of a latent, against the mean squared error of a pixel
SAVE_SECONDS = 120
STOP_SECONDS = 10  # that a stage has to end by itself
AHEAD = 3  # batches that are made while one is learned from
COMPOSERS = 8  # processes at most that make the detector's pictures
CAPTIONED = 1500  # drawings whose captions one process makes in one go
# In the work folder: what the autoencoder is trained with, and the captions.
JUDGE, RECOGNISER = "judge.safetensors", "recogniser.safetensors"
CAPTIONS = "captions.safetensors"
RECORD = "pretraining.json"  # in the checkpoint: how it was made
SUMS = "SHA256SUMS"  # as sha256sum writes and checks them


@dataclass(frozen=True)
class Budget:
    """How much is drawn, and how long each stage trains: steps and samples a step."""

    drawings: int
    people: int
    each: int
    captions: int
    vae: tuple[int, int]
    vae_details: tuple[int, int]
    decoder: tuple[int, int]
    recogniser: tuple[int, int]
    detector: tuple[int, int]
    judge: tuple[int, int]
    clip: tuple[int, int]
    unet: tuple[int, int]
    unet_names: tuple[int, int]
    unet_again: tuple[int, int]
    enhancer: tuple[int, int]
    enhancer_people: int
    enhancer_each: int
    vae_widths: tuple[int, ...]
    unet_widths: tuple[int, ...]
    unet_layers: int
    text_width: int
    face_widths: tuple[int, ...]
    detector_widths: tuple[int, ...]


BUDGETS = {
    "full": Budget(
        drawings=96_000,
        people=2200,
        each=10,
        captions=4,
        vae=(2000, 8),
        vae_details=(3700, 8),
        decoder=(2500, 8),
        recogniser=(1400, 64),
        detector=(6000, 16),
        judge=(3000, 32),
        clip=(2700, 96),
        unet=(9000, 96),
        unet_names=(4000, 96),
        unet_again=(8000, 96),
        enhancer=(1500, 64),
        enhancer_people=2400,
        enhancer_each=4,
        vae_widths=(16, 32, 96, 112),
        unet_widths=(64, 128),
        unet_layers=1,
        text_width=192,
        face_widths=(16, 32, 64, 128),
        detector_widths=(24, 32, 64, 96),
    ),
    # Minutes, to see that every stage learns.
    "tiny": Budget(
        drawings=256,
        people=32,
        each=4,
        captions=1,
        vae=(12, 4),
        vae_details=(8, 4),
        decoder=(24, 4),
        recogniser=(60, 16),
        detector=(12, 4),
        judge=(16, 16),
        clip=(12, 16),
        unet=(16, 8),
        unet_names=(8, 8),
        unet_again=(8, 8),
        enhancer=(4, 8),
        enhancer_people=8,
        enhancer_each=2,
        vae_widths=(8, 8, 16, 16),
        unet_widths=(16, 32),
        unet_layers=1,
        text_width=32,
        face_widths=(8, 8, 16, 16),
        detector_widths=(8, 8, 16, 16),
    ),
}


class PretrainError(ValueError):
    """A run that cannot be begun or continued as it was asked for."""


class Training(NamedTuple):
    params: dict
    average: dict  # exponential moving average of params
    opt_state: optax.OptState


@dataclass
class Run:
    """Where a run writes to and what its stages share."""

    folder: Path
    work: Path
    budget: Budget
    seed: int
    quiet: bool = False
    before: float = 0.0  # seconds of training of a stage before it was interrupted

    @property
    def key(self) -> jax.Array:
        return jax.random.key(self.seed)

    def progress(self, rows: range, what: str) -> Iterator:
        return tqdm(rows, desc=what, disable=self.quiet)

    def named(self) -> drawings.Drawings:
        return drawings.drawings(
            self.budget.drawings,
            0.06,
            stream(self.key, "drawings of named people"),
            self.work / "drawings" / "named",
            lambda rows: self.progress(rows, "drawing named people"),
        )

    def portraits(self, split: str) -> drawings.Portraits:
        return drawings.portraits(
            people.unnamed(split, self.budget.people),
            self.budget.each,
            stream(self.key, f"drawings for {split}"),
            self.work / "drawings" / split,
            lambda rows: self.progress(rows, f"drawing for {split}"),
        )

    def made_before(self, name: str) -> Path:
        """Returns a file of the work folder. Raises: PretrainError if there is none."""
        if not (self.work / name).is_file():
            raise PretrainError(
                f"{self.work / name} is missing: another --work was used, or an earlier version; "
                "choose another folder and begin anew"
            )
        return self.work / name

    def load(self) -> tuple[sd.StableDiffusion, sd.Frozen, Tokenizer]:
        with self.lock():
            model, frozen = sd.load(self.folder)
        text = model.text
        tokenizer = load_tokenizer(
            self.folder / "tokenizer", text.vocab_size, text.max_position_embeddings
        )
        return model, frozen, tokenizer

    def save(self, model: sd.StableDiffusion, frozen: sd.Frozen, *parts: str) -> None:
        """Writes parts of the checkpoint, each in the layout of `sd.save`; the others stay."""
        with self.lock():
            sd.save(self.folder, model, frozen, dtype="float16", parts=parts)

    def lock(self) -> FileLock:
        """For what several stages write, which may run at the same time."""
        return FileLock(self.work / ".lock")


# Stages


def prepare(run: Run) -> dict:
    """Writes the names, the tokenizer and random weights."""
    names = "".join(f"{name}\n" for name in people.named_people())
    with atomic_write(run.folder / "names.txt") as path:
        path.write_text("# Names of people of the drawn world\n" + names, encoding="utf-8")
    words = [*captions.words(), *people.name_parts(), *people.first_names(), *people.last_names()]
    size = write_tokenizer(run.folder / "tokenizer", words, pad="!", length=TEXT_LENGTH)
    model = configuration(run.budget, size)
    frozen = sd.init(model, stream(run.key, "initial weights"))
    table = frozen.text["embeddings"]["token_embedding"]
    tokenizer = load_tokenizer(run.folder / "tokenizer", size, TEXT_LENGTH)
    table["embedding"] = jnp.array(name_embeddings(tokenizer, np.array(table["embedding"])))
    run.save(model, frozen, "text_encoder", "unet", "vae")
    return {"vocabulary": size}


def configuration(budget: Budget, vocab_size: int) -> sd.StableDiffusion:
    """Returns the mini's configuration: SD 2.1's, with fewer and narrower layers."""
    width, groups = budget.text_width, 8
    return sd.StableDiffusion(
        text=CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=512 * width // 192,
            num_hidden_layers=3,
            num_attention_heads=width // 32 if width > 32 else 4,
            max_position_embeddings=TEXT_LENGTH,
            hidden_act="gelu",
        ),
        unet=UNetConfig(
            sample_size=drawings.SIZE // 8,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            block_out_channels=budget.unet_widths,
            layers_per_block=budget.unet_layers,
            transformer_layers=(1, 1),
            num_attention_heads=tuple(max(1, w // 32) for w in budget.unet_widths),
            cross_attention_dim=width,
            use_linear_projection=True,
            norm_num_groups=groups,
        ),
        vae=VAEConfig(
            in_channels=3,
            out_channels=3,
            block_out_channels=budget.vae_widths,
            layers_per_block=1,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=groups,
            sample_size=drawings.SIZE,
        ),
        schedule=schedule.ScheduleConfig(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            set_alpha_to_one=False,
            steps_offset=1,
        ),
    )


def name_embeddings(tokenizer: Tokenizer, table: np.ndarray) -> np.ndarray:
    """Returns the token table with the rows of names set to what the names say.

    A real text encoder has seen its celebrities in so many captions that names of similar people
    lie close to each other. Here a name starts as a random linear map of the traits that its code
    stands for, of the table's scale, and training goes on from there: with a thousand times fewer
    captions, it would not find the order of two thousand names by itself.
    """
    width = table.shape[1]
    table = table.copy()
    rng = np.random.default_rng(0)
    codes = people.name_codes()
    for half, names in enumerate((people.first_names(), people.last_names())):
        fields = traits.Identity._fields[half * traits.CODE_SIZE : (half + 1) * traits.CODE_SIZE]
        columns = []
        who = people.identities(np.stack([codes[half]] * 2, axis=1))
        for field in fields:
            values = getattr(who, field)
            if field in traits.KINDS:
                shares = traits.KINDS[field] / np.sum(traits.KINDS[field])
                columns.append((np.eye(len(shares))[values] - shares) / np.sqrt(1 - np.max(shares)))
            else:
                columns.append(np.sqrt(3) * values[:, None])
        features = np.concatenate(columns, axis=1)
        mapped = features @ rng.standard_normal((features.shape[1], width))
        ids = np.concatenate([tokenizer.ids(name) for name in names])
        if len(ids) != len(names):
            raise AssertionError("each name must be one token")
        table[ids] = 0.02 * mapped / mapped.std()
    return table


def make_drawings(run: Run) -> dict:
    """Makes what several stages learn from: the drawings, and the captions as token ids."""
    for split in ("recognition", "scoring"):
        run.portraits(split)
    text = sd.read_configs(run.folder).text
    tokenizer = load_tokenizer(run.folder / "tokenizer", text.vocab_size, TEXT_LENGTH)
    true, wrong = caption_ids(run, run.named(), tokenizer)
    with atomic_write(run.work / CAPTIONS) as path:
        save_file({"true": true, "wrong": wrong}, path)
    return {}


def caption_ids(
    run: Run, set_: drawings.Drawings, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what is said about each drawing, and what is nearly true of it.

    Returns: int16[N, captions, T] each; where both are equal, there was nothing to replace.
    """
    starts = range(0, len(set_.names), CAPTIONED)
    unseen = set_._replace(images=set_.images[:, :0])  # not sent to other processes
    parts = [
        jax.tree.map(lambda leaf, rows=slice(start, start + CAPTIONED): leaf[rows], unseen)
        for start in starts
    ]
    say = functools.partial(ids_of_captions, tokenizer, run.seed, run.budget.captions)
    workers = min(len(parts), devices.cores())
    with processes(workers) if workers > 1 else nullcontext() as pool:
        made = pool.map(say, parts, starts) if pool else map(say, parts, starts)
        both = list(tqdm(made, "captions", len(parts), disable=run.quiet))
    true, wrong = map(np.concatenate, zip(*both, strict=True))
    return true, wrong


def ids_of_captions(
    tokenizer: Tokenizer, seed: int, count: int, set_: drawings.Drawings, first: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns `caption_ids` of a part of all drawings, the first of which is number `first`."""
    true, wrong = [], []
    for row in range(len(set_.names)):
        texts = [
            drawings.say_both([seed, first + row, number, *b"captions"], set_, row)
            for number in range(count)
        ]
        ids = tokenizer([text for both in texts for text in both]).astype(np.int16)
        true.append(ids[::2])
        wrong.append(ids[1::2])
    return np.stack(true), np.stack(wrong)


def processes(count: int, *initial) -> ProcessPoolExecutor:
    """Returns processes for work without JAX; each first calls initial[0](*initial[1:]).

    They are begun anew, as a copy of one that has used JAX may hang.
    """
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin, initial)


def _begin(function: Callable | None = None, *args) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # they end with the process that began them
    if function:
        function(*args)


def train_vae(run: Run) -> dict:
    """Trains the autoencoder on all drawings; its latents are scaled to unit variance.

    The second part adds the difference that the judge's layers see (as LPIPS does,
    arXiv 1801.03924): a mouth is few pixels, and to the squared error alone a blur will do.
    """
    model, frozen, _ = run.load()
    sets = [run.named().images, *(run.portraits(s).images for s in ("recognition", "scoring"))]
    images = np.concatenate(sets)
    net = model.vae_model
    judge, seen = networks.load(run.made_before(JUDGE))

    def loss(params, batch, key, details):
        target = drawings.to_float(batch)
        mean, logvar = net.apply({"params": params}, target, method=AutoencoderKL.encode)
        noise = jax.random.normal(key, mean.shape)
        latents = mean + jnp.exp(logvar / 2) * noise
        image = net.apply({"params": params}, latents, method=AutoencoderKL.decode)
        error = pixels_apart(image, target)
        kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1 - logvar)
        total = error + KL_WEIGHT * kl
        if details:
            total += DETAILS_WEIGHT * features_apart(judge, seen, image, target)
        return total

    def batch(size):
        return lambda rng: images[np.sort(rng.integers(0, len(images), size))]

    params, all_losses = frozen.vae, {}
    parts = (("vae", run.budget.vae, 0.01), ("vae details", run.budget.vae_details, 0.005))
    for name, (steps, size), rate in parts:
        part_loss = functools.partial(loss, details=name == "vae details")
        optimizer = muon(params, steps, rate)
        params, losses = fit(run, name, params, part_loss, batch(size), steps, optimizer, ema=0.998)
        all_losses[f"losses of {name}"] = losses
    frozen = frozen._replace(vae=params)
    sample = images[np.random.default_rng(0).integers(0, len(images), 512)]
    mean, _ = moments(model, frozen, sample)
    scale = float(model.vae.scaling_factor / np.std(mean))
    vae = dataclasses.replace(model.vae, scaling_factor=round(scale, 5))
    model = dataclasses.replace(model, vae=vae)
    run.save(model, frozen, "vae")
    return {**all_losses, "scaling_factor": vae.scaling_factor}


def train_decoder(run: Run) -> dict:
    """Trains the decoder alone to draw the same from latents that are off, as those of a UNet are.

    What counts as the same is also what a recogniser sees of a face. It is not the one that scores.
    """
    model, frozen, _ = run.load()
    named = run.named().images
    sets = [run.portraits(split) for split in ("recognition", "scoring")]
    faces, points = (np.concatenate([getattr(s, x) for s in sets]) for x in ("images", "points"))
    net = model.vae_model
    judge, seen = networks.load(run.made_before(JUDGE))
    recogniser, known = networks.load(run.made_before(RECOGNISER))
    parts = ("decoder", "post_quant_conv")
    most = LATENTS_OFF / model.vae.scaling_factor

    def loss(params, batch, key):
        images, points = batch
        target = drawings.to_float(images)
        mean, _ = net.apply({"params": frozen.vae}, target, method=AutoencoderKL.encode)
        how_far, where = jax.random.split(key)
        off = most * jax.random.uniform(how_far, (len(mean), 1, 1, 1))
        latents = mean + off * jax.random.normal(where, mean.shape)
        own = {"params": frozen.vae | params}
        image = net.apply(own, latents, method=AutoencoderKL.decode)
        crop = jax.vmap(functools.partial(aligned_crop, size=FACE_SIZE // 2))
        crops = [crop(pictures[: len(points)], points) for pictures in (image, target)]
        features = features_apart(judge, seen, image, target)
        features += features_apart(recogniser, known, *crops)
        return pixels_apart(image, target) + DETAILS_WEIGHT * features

    steps, size = run.budget.decoder

    def batch(rng):
        rows = np.sort(rng.integers(0, len(faces), size // 2))
        others = np.sort(rng.integers(0, len(named), size - size // 2))
        return np.concatenate([faces[rows], named[others]]), points[rows]

    params = {part: frozen.vae[part] for part in parts}
    optimizer = muon(params, steps, 0.005)
    params, losses = fit(run, "decoder", params, loss, batch, steps, optimizer, ema=0.998)
    run.save(model, frozen._replace(vae=frozen.vae | params), "vae")
    return {"losses": losses}


def pixels_apart(one: jax.Array, other: jax.Array) -> jax.Array:
    """Returns float32[]: the mean squared difference and a tenth of the absolute one."""
    return jnp.mean(jnp.square(one - other)) + 0.1 * jnp.mean(jnp.abs(one - other))


def features_apart(
    net: networks.ConvNet, params: dict, one: jax.Array, other: jax.Array
) -> jax.Array:
    """Returns float32[]: how far apart a network sees pictures, as the mean over its layers of the
    squared distance of their outputs, of unit length at each place."""

    def features(images):
        return [unit(x) for x in networks.outputs(net, params, images)]

    pairs = list(zip(features(one), features(other), strict=True))
    return sum(jnp.mean(jnp.sum(jnp.square(a - b), axis=-1)) for a, b in pairs) / len(pairs)


def moments(
    model: sd.StableDiffusion, frozen: sd.Frozen, images: np.ndarray, progress: Callable = iter
) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation of the scaled latents of uint8[N, 64, 64, 3]."""
    encode = jax.jit(lambda vae, x: sd.encode_image(model, frozen._replace(vae=vae), x))
    means, stds, vae = [], [], on_all_devices(frozen.vae)
    size = 64 if jax.default_backend() == "cpu" else 1024
    for start in progress(range(0, len(images), size)):
        rows = np.minimum(np.arange(start, start + size), len(images) - 1)
        batch = on_all_devices(images[rows], split=True)
        mean, logvar = encode(vae, drawings.to_float(batch))
        means.append(np.asarray(mean))
        stds.append(np.exp(np.asarray(logvar) / 2))
    return np.concatenate(means)[: len(images)], np.concatenate(stds)[: len(images)]


def train_recogniser(run: Run, split: str, name: str, *, aligned: bool) -> dict:
    """Trains a face recogniser with ArcFace's margin on the people of a split.

    Args:
        aligned: on crops as insightface cuts them by five points, otherwise on whole drawings.
    """
    set_ = run.portraits(split)
    count = run.budget.people
    # In training it sees what is left of a crop after the network's first layer has halved it.
    net = networks.ConvNet(run.budget.face_widths, FACE_WIDTH)
    side = FACE_SIZE // 2
    key = stream(run.key, f"recogniser for {split}")
    start = net.init(key, jnp.zeros((1, side, side, 3)))["params"]
    steps, size = run.budget.recogniser

    def shown(rows):
        return set_.images[rows], set_.points[rows] if aligned else None

    def raw(params, drawn, key):
        images, points = drawn
        seen = disturbed(drawings.to_float(images), key, side, points)
        return net.apply({"params": params}, seen)

    def features_of(params, drawn, key):
        features = raw(params, drawn, key)
        # Of one batch, as in batch normalisation: all faces are alike, and what they have in
        # common would keep every angle small.
        centred = features - features.mean(0, keepdims=True)
        return unit(centred / (features.std(0, keepdims=True) + 1e-3))

    # First each drawing is to find another one of the same person among those of a batch: from
    # random centres of so many people, the margin loss alone hardly begins to learn.
    def pair_loss(params, batch, key):
        one, other = jnp.split(features_of(params, batch, key), 2)
        return (
            margin_loss(one @ other.T, jnp.eye(len(one)))
            + margin_loss(other @ one.T, jnp.eye(len(one)))
        ) / 2

    def pairs(rng):
        who = rng.choice(count, size // 2, replace=False)
        which = rng.permuted(np.tile(np.arange(run.budget.each), (size // 2, 1)), axis=1)[:, :2]
        return shown((who[:, None] * run.budget.each + which).T.reshape(-1))

    optimizer = muon(start, steps // 2)
    start, before = fit(run, f"{name} pairs", start, pair_loss, pairs, steps // 2, optimizer)

    # Then ArcFace proper, against a centre for each person that starts at their mean.
    apply = jax.jit(features_of)
    first = run.budget.each * np.arange(count).reshape(-1, min(count, 50))
    means = sum(
        np.concatenate([apply(start, shown(row + i), jax.random.fold_in(key, i)) for row in first])
        for i in range(min(4, run.budget.each))
    )

    def loss(params, batch, key):
        drawn, who = batch
        cosine = features_of(params["net"], drawn, key) @ unit(params["centres"]).T
        return margin_loss(cosine, jax.nn.one_hot(who, count))

    def batch(rng):
        rows = rng.integers(0, len(set_.images), size)
        return shown(rows), set_.who[rows]

    params = {"net": start, "centres": unit(jnp.asarray(means))}
    optimizer = muon(params, steps // 2, 0.003)
    params, losses = fit(run, name, params, loss, batch, steps // 2, optimizer, ema=0.99)

    # The statistics of many batches go into the last layer.
    apply = jax.jit(raw)
    rows = np.random.default_rng(0).integers(0, len(set_.images), (32, size))
    features = np.concatenate(
        [apply(params["net"], shown(row), jax.random.fold_in(key, i)) for i, row in enumerate(rows)]
    )
    mean, std = features.mean(0), features.std(0) + 1e-3
    last = params["net"]["last"]
    last = {"kernel": last["kernel"] / std[None], "bias": (last["bias"] - mean) / std}
    trained = params["net"] | {"last": last}
    if aligned:
        networks.save(run.work / RECOGNISER, trained)
    whole = dataclasses.replace(net, halve=True)
    networks.write_onnx(run.folder / "face" / f"{name}.onnx", whole, trained, FACE_SIZE)
    return {"losses": losses, "losses of pairs": before}


def train_detector(run: Run) -> dict:
    """Trains a face detector on larger pictures made of the drawings that the recogniser sees."""
    set_ = run.portraits("recognition")
    alone = composites.Drawn(set_.images, set_.points[:, None])
    key = stream(run.key, "detector")
    who = people.unnamed("recognition", run.budget.people)
    pairs = composites.Drawn(*drawings.pairs(who, run.budget.people // 2, stream(key, "pairs")))
    net = detector.Detector(run.budget.detector_widths)
    start = net.init(stream(key, "start"), jnp.zeros((1, 32, 32, 3)))["params"]
    steps, size = run.budget.detector

    def loss(params, batch, key):
        del key
        found = net.apply({"params": params}, detector.scaled(batch.image))
        return detector.loss(found, batch.points, batch.state)

    batch = functools.partial(composites.composed, size)
    train = functools.partial(fit, run, "detector", start, loss, batch, steps)
    optimizer = muon(start, steps, 0.02)
    # A picture takes the host longer than it takes a GPU, and threads would wait for each other.
    workers = min(COMPOSERS, devices.cores() // 2)
    if workers > 1:
        with processes(workers, composites.share, alone, pairs) as pool:
            params, losses = train(optimizer, ema=0.99, pool=pool, ahead=2 * workers)
    else:
        composites.share(alone, pairs)
        params, losses = train(optimizer, ema=0.99)
    detector.write_onnx(run.folder / "face" / "detector.onnx", net, params)
    return {"losses": losses}


def margin_loss(cosine: jax.Array, own: jax.Array) -> jax.Array:
    """ArcFace's loss of cosines float32[B, K], one-hot `own`: the own angle counts as wider."""
    cosine = jnp.clip(cosine, -1 + 1e-6, 1 - 1e-6)
    shifted = jnp.cos(jnp.minimum(jnp.arccos(cosine) + MARGIN, np.pi))
    return jnp.mean(optax.softmax_cross_entropy(SCALE * jnp.where(own > 0, shifted, cosine), own))


def disturbed(
    images: jax.Array, key: jax.Array, size: int, points: jax.Array | None = None
) -> jax.Array:
    """Returns float32[B, size, size, 3]: shifted, scaled, mirrored, blurred, of other light.

    So that a network trained on drawings also knows the softer ones that a network makes.

    Args:
        images: float32[B, side, side, 3] in [-1, 1].
        points: float32[B, 5, 2], to cut ArcFace's crop by them, turned a little, too: as far off as
            a detector's points are. None for the whole picture.
    """
    side = images.shape[1]
    keys = jax.random.split(key, 7)
    B = len(images)
    if points is None:
        scale = (size / side) * (1 + 0.08 * jax.random.uniform(keys[0], (B, 1), minval=-1))
        shift = 0.05 * size * jax.random.uniform(keys[1], (B, 2), minval=-1)
        moved = jax.vmap(functools.partial(_moved, size=size))(images, scale, shift)
    else:
        by, angle = jnp.split(jax.random.uniform(keys[0], (B, 2), minval=-1), 2, axis=1)
        shift = CROP_SHIFT * jax.random.uniform(keys[1], (B, 2), minval=-1)
        off = (1 + CROP_SCALE * by[:, 0], CROP_ANGLE * angle[:, 0], shift)
        moved = jax.vmap(functools.partial(aligned_crop, size=size))(images, points, *off)
    flip = jax.random.bernoulli(keys[2], 0.5, (B, 1, 1, 1))
    moved = jnp.where(flip, moved[:, :, ::-1], moved)
    blurred = moved
    for axis in (1, 2):
        blurred = sum(jnp.roll(blurred, by, axis) for by in (-1, 0, 1)) / 3
    amount = jax.random.uniform(keys[3], (B, 1, 1, 1)) * jax.random.bernoulli(
        keys[4], 0.6, (B, 1, 1, 1)
    )
    moved = moved + amount * (blurred - moved)
    gain = 1 + 0.1 * jax.random.normal(keys[5], (B, 1, 1, 3))
    noise = 0.03 * jax.random.normal(keys[6], moved.shape)
    return jnp.clip((moved + 1) * gain - 1 + noise, -1, 1)


def _moved(image: jax.Array, scale: jax.Array, shift: jax.Array, size: int) -> jax.Array:
    both = jnp.broadcast_to(scale, (2,))
    centred = shift + (size - image.shape[0] * both) / 2
    return jax.image.scale_and_translate(
        image, (size, size, 3), (0, 1), both, centred, "linear", antialias=False
    )


def aligned_crop(
    image: jax.Array,
    points: jax.Array,
    scale: jax.Array = 1.0,
    angle: jax.Array = 0.0,
    shift: jax.Array | tuple[float, float] = (0.0, 0.0),
    *,
    size: int,
) -> jax.Array:
    """Returns ArcFace's crop float32[size, size, 3] of a picture in [-1, 1], black beyond its edge.

    As insightface cuts it at 112 pixels: bilinear, by the similarity that brings the five points
    float32[5, 2] to its template.

    Args:
        scale, angle, shift: of what is on the crop, about its middle: how much larger, how far
            turned (radians, clockwise) and moved (shares of the side, to the right and down).
    """
    from insightface.utils import face_align

    # Points as complex numbers: a similarity is then a product and a sum, and its least squares fit
    # a ratio of two scalar products.
    template = face_align.arcface_dst[:, 0] + 1j * face_align.arcface_dst[:, 1]
    p = points[:, 0] + 1j * points[:, 1]
    centred = p - p.mean()
    factor = jnp.vdot(centred, template - template.mean()) / jnp.vdot(centred, centred)
    pixels = (jnp.arange(size) + 0.5) * (FACE_SIZE / size) - 0.5
    middle = (FACE_SIZE - 1) / 2 * (1 + 1j)
    moved = FACE_SIZE * (shift[0] + 1j * shift[1])
    places = pixels[None] + 1j * pixels[:, None] - middle - moved
    places = places * jnp.exp(-1j * angle) / scale + middle
    places = (places - template.mean()) / factor + p.mean()
    at = [places.imag, places.real]
    sample = functools.partial(map_coordinates, order=1, mode="constant", cval=-1.0)
    return jnp.stack([sample(image[..., i], at) for i in range(3)], axis=-1)


def unit(x: jax.Array, axis: int = -1) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=axis, keepdims=True) + 1e-12)


OUTPUTS = sum(map(len, captions.KINDS.values()))  # logits of a scene


def split_logits(logits: jax.Array) -> dict:
    """Returns the logits of each field of a scene."""
    edges = np.cumsum([len(kinds) for kinds in captions.KINDS.values()])[:-1]
    return dict(zip(captions.KINDS, jnp.split(logits, edges, axis=-1), strict=True))


def train_judge(run: Run, name: str, images: np.ndarray, scenes: traits.Scene, path: Path) -> dict:
    """Trains a classifier that reads a scene off a picture of one person."""
    kinds = np.stack(scenes, axis=-1)
    net = networks.ConvNet(run.budget.face_widths[:1] + run.budget.face_widths[:3], OUTPUTS)
    start = net.init(stream(run.key, name), jnp.zeros((1, drawings.SIZE, drawings.SIZE, 3)))
    steps, size = run.budget.judge

    def loss(params, batch, key):
        images, kinds = batch
        x = disturbed(drawings.to_float(images), key, drawings.SIZE)
        return scene_error(net.apply({"params": params}, x), kinds)

    def batch(rng):
        rows = rng.integers(0, len(images), size)
        return images[rows], kinds[rows]

    optimizer = muon(start["params"], steps)
    params, losses = fit(run, name, start["params"], loss, batch, steps, optimizer, ema=0.99)
    networks.save(path, params)
    return {"losses": losses}


def scene_error(logits: jax.Array, kinds: jax.Array, shown: jax.Array | bool = True) -> jax.Array:
    """Returns float32[]: cross-entropy of what is read of scenes, the mean over their fields.

    Args:
        logits: float32[..., OUTPUTS], as `split_logits` takes them.
        kinds: int32[..., fields] in the order of `traits.Scene`.
        shown: bool[...], whether there is such a person.
    """
    scene = traits.Scene(*jnp.moveaxis(kinds, -1, 0))
    errors = []
    for field, values in split_logits(logits).items():
        each = optax.softmax_cross_entropy_with_integer_labels(values, getattr(scene, field))
        seen = (scene.hat > 0 if field == "hat_colour" else jnp.ones_like(each)) * shown
        errors.append(jnp.sum(each * seen) / jnp.maximum(jnp.sum(seen), 1))
    return sum(errors) / len(errors)


def train_own_judge(run: Run) -> dict:
    """Trains the judge that the autoencoder is trained with; it stays in the work folder."""
    parts = [run.portraits(split) for split in ("recognition", "scoring")]
    scenes = traits.Scene(*map(np.concatenate, zip(*(part.scenes for part in parts), strict=True)))
    images = np.concatenate([part.images for part in parts])
    return train_judge(run, "judge", images, scenes, run.work / JUDGE)


def train_scoring_judge(run: Run) -> dict:
    """Trains the judge of quality.py, on other drawings, from another start."""
    set_ = run.named()
    alone = set_.names[:, 1, 0] < 0
    scenes = traits.Scene(*(leaf[alone, 0] for leaf in set_.scenes))
    path = run.folder / "judge" / "model.safetensors"
    return train_judge(run, "scoring judge", set_.images[alone], scenes, path)


def image_configuration(budget: Budget) -> CLIPVisionConfig:
    """The small tower that CLIP's text encoder is trained against."""
    return CLIPVisionConfig(
        hidden_size=128 * budget.text_width // 192,
        intermediate_size=256 * budget.text_width // 192,
        projection_dim=budget.text_width,
        num_hidden_layers=3,
        num_attention_heads=4 if budget.text_width > 32 else 1,
        image_size=drawings.SIZE,
        patch_size=8,
        hidden_act="gelu",
    )


def train_clip(run: Run) -> dict:
    """Trains both towers on drawings and captions; the text encoder is frozen from then on.

    Name and clothes alone find the right caption of a batch, and a text encoder that never needed
    to say who smiles does not; a drawing network that reads it then cannot know. So each picture
    must also tell its caption from one in which a single thing is another (hard negatives, arXiv
    2210.01936), and one linear layer must read the scene off the outputs of both towers, as far as
    it is seen or said (labels in the space of texts and pictures, arXiv 2204.03610).
    """
    model, frozen, tokenizer = run.load()
    set_ = run.named()
    ids = load_file(run.made_before(CAPTIONS))
    config = image_configuration(run.budget)
    tower = CLIPVisionModel(config)
    key = stream(run.key, "clip")
    vision = tower.init(key, jnp.zeros((1, drawings.SIZE, drawings.SIZE, 3)))["params"]
    steps, size = run.budget.clip
    kinds = np.stack(set_.scenes, axis=-1)  # [N, 2, fields]
    shown = set_.names[:, :, 0] >= 0
    anybody = np.flatnonzero(~drawings.listed(set_))

    def read(params, states):
        """float32[B, 2, OUTPUTS] of unit vectors: what is there, left and right."""
        x = SHARPNESS * states @ params["kernel"] + params["bias"][None]
        return x.reshape(-1, 2, OUTPUTS)

    def loss(params, batch, key):
        images, ids, wrong, kinds, shown = batch
        x = drawings.to_float(images)
        x = x * (1 + 0.05 * jax.random.normal(key, (len(x), 1, 1, 1)))
        seen = unit(tower.apply({"params": params["vision"]}, x))
        both = jnp.concatenate([ids, wrong])
        states = model.text_model.apply({"params": params["text"]}, both)
        said = unit(pooled(states, both, tokenizer.eos))
        logits = jnp.exp(jnp.minimum(params["scale"], np.log(100.0))) * seen @ said.T
        is_wrong = jnp.any(ids != wrong, axis=1)
        hidden = jnp.concatenate([jnp.zeros(len(ids)), jnp.where(is_wrong, 0.0, -1e9)])
        own = jnp.arange(len(x))
        each = optax.softmax_cross_entropy_with_integer_labels
        of_texts = each(logits[:, : len(x)].T, own)
        apart = jnp.mean(each(logits + hidden[None], own) + of_texts) / 2
        readings = [
            scene_error(read(params["scene"], states), kinds, shown)
            for states in (seen, said[: len(x)])
        ]
        return apart + sum(readings) / 2

    def batch(rng):
        rows = rng.choice(anybody, size, replace=False)
        which = rng.integers(0, run.budget.captions, size)
        texts = [ids[kind][rows, which].astype(np.int32) for kind in ("true", "wrong")]
        return set_.images[rows], *texts, kinds[rows], shown[rows]

    scene = {"kernel": jnp.zeros((run.budget.text_width, 2 * OUTPUTS))}
    scene["bias"] = jnp.zeros(2 * OUTPUTS)
    params = {"text": frozen.text, "vision": vision, "scale": jnp.log(1 / 0.07), "scene": scene}
    # Adam moves rare rows as fast as common ones: at the full rate, names would lose what they say.
    optimizer = muon(params, steps, slow={"text/embeddings/token_embedding": 0.1})
    params, losses = fit(run, "clip", params, loss, batch, steps, optimizer)
    frozen = frozen._replace(text=params["text"])
    run.save(model, frozen, "text_encoder")
    tensors = weights.to_tensors(weights.vision_table(), {"vision": params["vision"]}, np.float16)
    folder = run.folder / "image_encoder"
    with atomic_write(folder / "model.safetensors") as path:
        save_file(tensors, path, metadata={"format": "pt"})
    write_json(folder / "config.json", config.to_dict())
    half = [0.5] * 3
    preprocessor = {"image_processor_type": "CLIPImageProcessor", "image_mean": half}
    preprocessor |= {"image_std": half, "size": {"shortest_edge": drawings.SIZE}}
    preprocessor |= {"crop_size": {"height": drawings.SIZE, "width": drawings.SIZE}}
    write_json(folder / "preprocessor_config.json", preprocessor)
    return {"losses": losses}


def pooled(states: jax.Array, ids: jax.Array, eos: int) -> jax.Array:
    """Returns float32[B, D]: the text encoder's output at the end of each text."""
    return states[jnp.arange(len(ids)), jnp.argmax(ids == eos, axis=1)]


def train_unet(run: Run, name: str, *, listed: float, rate: float, max_snr: float) -> dict:
    """Trains the denoising network on the frozen latents and text, with 10% empty captions.

    Args:
        name: of the part of the training, and of its budget.
        listed: share of samples that show somebody of the names file. In those a first name goes
            with one last name only, and who sees them from the start learns that each of the two
            says the whole face: then a name that is put together anew says little.
        max_snr: Min-SNR's gamma; times with less noise than that weigh less.
    """
    model, frozen, tokenizer = run.load()
    ids = load_file(run.made_before(CAPTIONS))["true"]
    cache = run.work / "latents.safetensors"
    if not cache.is_file():
        bar, images = "encoding drawings", run.named().images
        mean, std = moments(model, frozen, images, lambda rows: run.progress(rows, bar))
        with atomic_write(cache) as path:
            save_file({"mean": mean.astype(np.float16), "std": std.astype(np.float16)}, path)
    latents = load_file(cache)
    known = drawings.listed(run.named())
    anybody, somebody = np.flatnonzero(~known), np.flatnonzero(known)
    empty = tokenizer([""])[0]
    steps, size = getattr(run.budget, name)
    fixed = frozen.text
    # Min-SNR weights (arXiv 2303.09556, for the noise as target): most of the plain error is made
    # where little noise is left, and says nothing about who is in the picture.
    signal = schedule.alphas_cumprod(model.schedule)
    ratio = signal / (1 - signal)
    weights_of_times = jnp.asarray(np.minimum(ratio, max_snr) / ratio, jnp.float32)

    def loss(params, batch, key):
        mean, std, ids = batch
        noise_key, time_key, sample_key = jax.random.split(key, 3)
        latents = mean + std * jax.random.normal(sample_key, mean.shape)
        noise = jax.random.normal(noise_key, mean.shape)
        # One time from each part of the schedule: the same distribution, less noise in the loss.
        parts = model.schedule.num_train_timesteps / len(mean)
        times = (jnp.arange(len(mean)) + jax.random.uniform(time_key, (len(mean),))) * parts
        times = times.astype(jnp.int32)
        noisy = schedule.add_noise(model.schedule, latents, noise, times)
        text = sd.encode_text(model, frozen._replace(text=fixed), ids)
        kv = project_kv(params["cross_kv"], text, model.dtype)
        prediction = sd.predict(model, frozen._replace(unet=params["unet"]), noisy, times, kv)
        target = schedule.training_target(model.schedule, latents, noise, times)
        errors = jnp.mean(jnp.square(prediction - target), axis=(1, 2, 3))
        return jnp.mean(weights_of_times[times] * errors)

    def batch(rng):
        rows = np.where(
            rng.random(size) < listed, rng.choice(somebody, size), rng.choice(anybody, size)
        )
        said = ids[rows, rng.integers(0, ids.shape[1], size)].astype(np.int32)
        said = np.where(rng.random(size)[:, None] < EMPTY_CAPTIONS, empty, said)
        mean, std = (latents[name][rows].astype(np.float32) for name in ("mean", "std"))
        return mean, std, said

    params = {"unet": frozen.unet, "cross_kv": frozen.cross_kv}
    optimizer = muon(params, steps, rate)
    params, losses = fit(run, name, params, loss, batch, steps, optimizer, ema=0.999)
    run.save(model, frozen._replace(**params), "unet")
    return {"losses": losses}


def train_enhancer(run: Run) -> dict:
    """Trains the shared ID-Enhancer on drawn people of a split of their own."""
    drawn = enhancer.World(run.budget.enhancer_people, run.budget.enhancer_each, run.seed)
    found = enhancer.train(run.folder, run.work, drawn, *run.budget.enhancer)
    return {name: found[name] for name in ("people", "pictures", "loss_curve", "share_waited")}


_CARD = """\
# The mini

A Stable Diffusion of a drawn world, trained from nothing by `python -m idea_jax.mini.pretrain`
(seed {seed}; `pretraining.json` has the sizes, steps, losses and seconds). It knows {names} people
by name, nine colours, three hats, four expressions, four styles, and words for light and framing,
and nothing else. All of its people are made up. docs/mini.md of idea_jax says how good it is.
Licence: MIT, as the code.
"""


def finish(run: Run) -> dict:
    """Writes the model card and the check sums of all files."""
    card = _CARD.format(seed=run.seed, names=people.NAMES)
    with atomic_write(run.folder / "README.md") as path:
        path.write_text(card, encoding="utf-8")
    files = {
        str(path.relative_to(run.folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(run.folder.rglob("*"))
        if path.is_file() and path.name not in (RECORD, SUMS) and not path.name.startswith(".tmp-")
    }
    with atomic_write(run.folder / SUMS) as path:
        path.write_text("".join(f"{digest}  {name}\n" for name, digest in files.items()))
    return {"megabytes": round(sum((run.folder / n).stat().st_size for n in files) / 1e6, 2)}


# Of the later parts of the UNet. The last tenth of the way, where little noise is left, decides who
# is recognised.
WITH_NAMES = {"listed": 0.5, "rate": 0.006, "max_snr": 40.0}

# In the order in which they are begun: what others wait for longest, then what takes long.
STAGES: dict[str, Callable[[Run], dict]] = {
    "prepare": prepare,
    "drawings": make_drawings,
    "judge": train_own_judge,
    "vae": train_vae,
    "clip": train_clip,
    "unet": lambda run: train_unet(run, "unet", listed=0.0, rate=0.01, max_snr=5.0),
    "unet_names": lambda run: train_unet(run, "unet_names", **WITH_NAMES),
    "unet_again": lambda run: train_unet(run, "unet_again", **WITH_NAMES),  # rate rises anew
    "detector": train_detector,
    "recogniser": lambda run: train_recogniser(run, "recognition", "recogniser", aligned=True),
    "decoder": train_decoder,
    # It sees whole pictures, so that no score depends on a detector.
    "scoring": lambda run: train_recogniser(run, "scoring", "scoring", aligned=False),
    "scoring_judge": train_scoring_judge,
    "enhancer": train_enhancer,
    "finish": finish,
}
NEEDS = {
    "drawings": ["prepare"],
    "judge": ["drawings"],
    "vae": ["drawings", "judge"],
    "clip": ["drawings"],
    "unet": ["vae", "clip"],
    "unet_names": ["unet"],
    "unet_again": ["unet_names"],
    "detector": ["drawings"],
    "recogniser": ["drawings"],
    "decoder": ["vae", "recogniser"],
    "scoring": ["drawings"],
    "scoring_judge": ["drawings"],
    "enhancer": ["decoder", "recogniser", "unet_again"],
    "finish": ["scoring", "detector", "scoring_judge", "clip", "enhancer"],
}


# Mistakes of the input, the disk or a training: one message, no traceback.
INPUT_ERRORS = (
    PretrainError,
    config.ConfigError,
    TextError,
    weights.WeightsError,
    FloatingPointError,
    *enhancer.ERRORS,
)


# Training


def muon(
    params: dict, steps: int, rate: float = 0.01, slow: dict[str, float] | None = None
) -> optax.GradientTransformation:
    """Muon for the kernels, Adam at a tenth of the rate for all else; warm-up, cosine, clipping.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".

    Args:
        slow: start of a path of `params` -> factor on the rate of Adam there.
    """
    warm = max(1, min(100, steps // 10))

    def rates(peak):
        return optax.warmup_cosine_decay_schedule(
            peak / 10, peak, warm, max(steps, warm + 1), peak / 100
        )

    def path_of(entries):
        return "/".join(str(entry.key) for entry in entries)

    def matrix(entries, leaf):
        """Which axes are inputs and outputs, None for what is no kernel or hardly a matrix."""
        if not path_of(entries).endswith("kernel") or min(leaf.shape[-2:]) <= 8:
            return None
        return MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1)

    def factor(entries):
        name = path_of(entries)
        return next((f for start, f in (slow or {}).items() if name.startswith(start)), 1.0)

    def slowed(updates, state, params=None):
        del params
        return jax.tree.map_with_path(lambda path, u: factor(path) * u, updates), state

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon_optimizer(
            rates(rate),
            ns_steps=3,  # of five, the last two cost a seventh of the time of a UNet step here
            adam_learning_rate=rates(rate / 10),
            adam_b2=0.99,
            muon_weight_dimension_numbers=jax.tree.map_with_path(matrix, params),
        ),
        optax.GradientTransformation(lambda params: optax.EmptyState(), slowed),
    )


def fit(
    run: Run,
    name: str,
    params: dict,
    loss: Callable,
    batch: Callable,
    steps: int,
    optimizer: optax.GradientTransformation,
    *,
    ema: float = 0.0,
    pool: Executor | None = None,
    ahead: int = AHEAD,
) -> tuple[dict, list[float]]:
    """Minimises loss(params, batch, key); returns the averaged parameters and the mean losses.

    Step i depends on the seed, the name and i alone, so that a run that was interrupted goes on as
    if it had not been. Its state is in the work folder, saved every two minutes.

    Args:
        batch: rng -> arrays.
        ema: decay of the moving average that is returned; 0 returns the last parameters.
        pool: what makes the batches; a thread if None.
        ahead: batches that are made while one is learned from.

    Returns: the losses as at most 50 means over equal parts of the run.
    """
    key = stream(stream(run.key, "training"), name)

    def step(state, index, data):
        value, gradient = jax.value_and_grad(loss)(
            state.params, data, jax.random.fold_in(key, index)
        )
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(ema, (1.0 + index) / (10.0 + index)) if ema else 0.0
        average = jax.tree.map(lambda a, p: a * decay + p * (1 - decay), state.average, params)
        return Training(params, average, opt_state), value

    step = jax.jit(step, donate_argnums=0)
    params = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params)  # to be donated
    state = Training(params, jax.tree.map(jnp.copy, params), optimizer.init(params))
    leaves, structure = jax.tree.flatten(state)
    file = run.work / f"{name}.state.safetensors"
    losses: list[float] = []
    started, before = time.monotonic(), 0.0
    if file.is_file():
        saved = load_file(file)
        losses, before = saved["losses"].tolist(), float(saved.get("seconds", 0.0))
        run.before += before
        leaves = [jnp.asarray(saved[f"{i}"]) for i in range(len(leaves))]
        state = jax.tree.unflatten(structure, leaves)

    state = on_all_devices(state)

    def save():
        # The loss tells of the weights before a step only.
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)):
            raise FloatingPointError(f"weights of {name} are not finite at step {len(losses)}")
        tensors = {f"{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
        tensors["losses"] = np.array(losses, np.float64)
        tensors["seconds"] = np.array(before + time.monotonic() - started)
        with atomic_write(file) as path:
            save_file(tensors, path)

    def rng_of(index):
        return np.random.default_rng([run.seed, index, *name.encode()])

    def read(value):
        losses.append(float(value))  # waits for the step
        if not np.isfinite(losses[-1]):
            raise FloatingPointError(
                f"the loss of {name} is {losses[-1]} at step {len(losses) - 1}"
            )
        bar.update()
        if len(losses) % 20 == 1:
            bar.set_postfix_str(f"loss {np.mean(losses[-100:]):.4f}")

    last, begun = time.monotonic(), None  # `begun`: the loss of a step whose end nobody awaited
    rngs = (rng_of(index) for index in range(len(losses), steps))
    with (
        tqdm(total=steps, initial=len(losses), desc=name, disable=run.quiet) as bar,
        ThreadPoolExecutor(1) as own,
        closing(made_ahead(pool or own, batch, rngs, ahead)) as batches,
    ):
        for index, data in enumerate(batches, len(losses)):
            state, value = step(state, np.int32(index), on_all_devices(data, split=True))
            if begun is not None:  # the device has the next step already while the host waits
                read(begun)
            begun = value
            if time.monotonic() - last > SAVE_SECONDS:
                read(begun)
                begun = None
                save()
                last = time.monotonic()
        if begun is not None:
            read(begun)
    save()
    parts = np.array_split(np.array(losses), min(50, len(losses)))
    return state.average, [round(float(part.mean()), 5) for part in parts]


def made_ahead(pool: Executor, make: Callable, inputs: Iterator, ahead: int) -> Iterator:
    """Yields make(input) for each input, in order, while the pool makes the next ones."""
    waiting = deque()
    try:
        for each in inputs:
            waiting.append(pool.submit(make, each))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def on_all_devices(tree: object, split: bool = False) -> object:
    """Puts arrays on all devices; `split` puts a part on each, if all first axes can be split."""
    sizes = [leaf.shape[0] if np.ndim(leaf) else 1 for leaf in jax.tree.leaves(tree)]
    split = split and all(size % jax.device_count() == 0 for size in sizes)
    return jax.device_put(tree, _sharding(split))


@functools.cache
def _sharding(split: bool) -> NamedSharding:
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("data") if split else PartitionSpec())


def pretrain(run: Run, stages: Collection[str] = ()) -> None:
    """Runs the stages that are not done yet, or of these only the ones that are named.

    Raises: PretrainError if one of its folders is of another seed or budget, a stage is to run
        before one that it needs, or another process runs it.
    """
    about = begin(run)
    for name in STAGES:
        done = read_record(run.folder, about)["stages"]
        if name in done or (stages and name not in stages):
            continue
        check_needs(name, done)
        started, run.before = time.monotonic(), 0.0
        try:
            with FileLock(run.work / f".{name}.lock", timeout=0):
                result = STAGES[name](run)
        except Timeout as error:
            raise PretrainError(
                f"stage {name} of {run.folder} is being run by another process"
            ) from error
        result["seconds"] = round(run.before + time.monotonic() - started)
        with run.lock():
            record = read_record(run.folder, about)
            known = {**record["stages"], name: result}
            if name != "finish":  # its sums are those of all files
                known.pop("finish", None)
            # In one order, whatever was done first.
            record["stages"] = {n: known[n] for n in STAGES if n in known} | known
            write_json(run.folder / RECORD, record)


def pretrain_at_once(run: Run, stages: Collection[str], jobs: int, command: Sequence[str]) -> None:
    """As `pretrain`, with up to `jobs` stages at a time that do not need each other.

    Each runs in a process of its own and writes to STAGE.log in the work folder.

    Args:
        command: what runs a single stage when `--stages NAME` is added.

    Raises: PretrainError as `pretrain`; ChildProcessError if a stage fails, with its last words,
        once the others were stopped.
    """
    about = begin(run)
    # Each process would otherwise take three quarters of a GPU's memory.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
    running: dict[str, subprocess.Popen] = {}
    try:
        while True:
            ended = [name for name, process in running.items() if process.poll() is not None]
            for name in ended:
                if code := running.pop(name).returncode:
                    said = (run.work / f"{name}.log").read_text(errors="replace").splitlines()
                    words = "\n".join(said[-20:])
                    raise ChildProcessError(f"stage {name} failed with exit code {code}:\n{words}")
                print(f"{name}: done", file=sys.stderr)
            done = read_record(run.folder, about)["stages"].keys() - running.keys()
            left = [n for n in STAGES if n not in done | running.keys() and n in (stages or STAGES)]
            if not left and not running:
                return
            ready = [name for name in left if all(n in done for n in NEEDS.get(name, ()))]
            if not ready and not running:
                check_needs(left[0], done)
            for name in ready[: jobs - len(running)]:
                log = run.work / f"{name}.log"
                print(f"{name}: begun, see {log}", file=sys.stderr)
                with open(log, "wb") as output:
                    # Ctrl-C reaches this process only, which then stops all of them.
                    running[name] = subprocess.Popen(
                        [*command, "--stages", name],
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                        start_new_session=True,
                    )
            time.sleep(0.2)
    finally:
        stop(running.values())


def stop(running: Collection[subprocess.Popen]) -> None:
    """Ends processes that lead a group each, and all that is in the group."""
    for process in running:
        process.send_signal(signal.SIGINT)
    until = time.monotonic() + STOP_SECONDS
    for process in running:
        try:
            process.wait(max(0, until - time.monotonic()))
        except subprocess.TimeoutExpired:  # it compiles, perhaps, and hears nothing
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def begin(run: Run) -> dict:
    """Makes the work folder and returns what a record says of a run.

    Raises: PretrainError if there is something else in one of the folders. Drawings and states of
        another run would pass for this one's, and what is no mini at all would be overwritten.
    """
    if run.work.resolve().is_relative_to(run.folder.resolve()):
        raise PretrainError(f"--work {run.work} must not lie in {run.folder}, the checkpoint")
    for folder in (run.folder, run.work):
        if not (folder / RECORD).is_file() and folder.is_dir() and any(folder.iterdir()):
            raise PretrainError(
                f"{folder} is not empty and has no {RECORD}: it was not begun by this program; "
                "choose another folder"
            )
    about = {"seed": run.seed, "budget": dataclasses.asdict(run.budget)}
    about = json.loads(json.dumps(about))
    run.work.mkdir(parents=True, exist_ok=True)
    read_record(run.work, about)
    read_record(run.folder, about)
    write_json(run.work / RECORD, {**about, "stages": {}})
    if not (run.folder / RECORD).is_file():
        write_json(run.folder / RECORD, {**about, "stages": {}})
    return about


def check_needs(name: str, done: Collection[str]) -> None:
    if missing := [needed for needed in NEEDS.get(name, ()) if needed not in done]:
        raise PretrainError(f"stage {name} needs {' and '.join(missing)}, which is not done yet")


def read_record(folder: Path, about: dict) -> dict:
    """Returns what is known of a run: seed, budget, and the results of the stages that are done.

    A record made before there was some stage knows nothing of its budget, and is continued.
    """
    path = folder / RECORD
    if not path.is_file():
        return {**about, "stages": {}}
    record = json.loads(path.read_text())
    budget = {**about["budget"], **record["budget"]}
    if {"seed": record["seed"], "budget": budget} != about:
        raise PretrainError(f"{folder} was made with another seed or budget; choose another folder")
    return {**record, **about}


def write_json(path: Path, values: dict) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Trains the mini; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m idea_jax.mini.pretrain",
        description="Trains a miniature Stable Diffusion of the drawn world from nothing.",
    )
    parser.add_argument("folder", type=Path, help="checkpoint to write, or to go on with")
    parser.add_argument("--budget", choices=BUDGETS, default="full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="drawings and states (default: FOLDER-work)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=(), help="default: all")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="run up to N stages at a time that do not need each other, each in a process of its "
        "own (default: 1). Pays on a GPU whose host has several cores for each: one stage alone "
        "leaves it idle most of the time. On a CPU one stage uses all cores",
    )
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    folder = args.folder.resolve()  # `.` has no name
    work = args.work or folder.with_name(folder.name + "-work")
    run = Run(args.folder, work, BUDGETS[args.budget], args.seed)
    try:
        config.check_seed(args.seed)
        if args.jobs == 1:
            pretrain(run, args.stages)
        else:
            # Otherwise its stages would go on without it.
            for signum in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup has it
                    signal.signal(signum, lambda signum, _: sys.exit(128 + signum))
            command = [sys.executable, "-m", "idea_jax.mini.pretrain", str(args.folder)]
            command += ["--work", str(work), "--budget", args.budget, "--seed", str(args.seed)]
            pretrain_at_once(run, args.stages, args.jobs, command)
    except INPUT_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Interrupted):
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
