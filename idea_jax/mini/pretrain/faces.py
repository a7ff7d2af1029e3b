"""The face recognisers and the face detector of the drawn world."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from idea_jax.mini import (
    composites,
    detector,
    drawings,
    networks,
    people,
)
from idea_jax.mini.pretrain import fit
from idea_jax.mini.pretrain.crops import FACE_SIZE, disturbed, unit
from idea_jax.mini.pretrain.run import RECOGNISER, Run
from idea_jax.pytrees import stream
from idea_jax.runtime import devices

FACE_WIDTH = 512  # of its output


MARGIN, SCALE = 0.2, 20.0  # of ArcFace's loss, arXiv 1801.07698; margin in radians


COMPOSERS = 8  # processes at most that make the detector's pictures


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

    optimizer = fit.muon(start, steps // 2)
    start, before = fit.fit(run, f"{name} pairs", start, pair_loss, pairs, steps // 2, optimizer)

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
    optimizer = fit.muon(params, steps // 2, 0.003)
    params, losses = fit.fit(run, name, params, loss, batch, steps // 2, optimizer, ema=0.99)

    # The statistics of many batches go into the last layer.
    apply = jax.jit(raw)
    rows = np.random.default_rng(0).integers(0, len(set_.images), (32, size))
    features = np.concatenate(
        [apply(params["net"], shown(row), jax.random.fold_in(key, i)) for i, row in enumerate(rows)]
    )
    trained = whitened(params["net"], features)
    if aligned:
        networks.save(run.work / RECOGNISER, trained)
    whole = dataclasses.replace(net, halve=True)
    networks.write_onnx(run.folder / "face" / f"{name}.onnx", whole, trained, FACE_SIZE)
    return {"losses": losses, "losses of pairs": before}


def whitened(params: dict, features: np.ndarray) -> dict:
    """A network's parameters, its last layer changed so that the features given, float32[N, D],
    would have had mean 0 and deviation 1."""
    mean, std = features.mean(0), features.std(0) + 1e-3
    last = params["last"]
    last = {"kernel": last["kernel"] / std[None], "bias": (last["bias"] - mean) / std}
    return params | {"last": last}


def train_detector(run: Run) -> dict:
    """Trains a face detector on larger pictures made of the drawings that the recogniser sees."""
    set_ = run.portraits("recognition")
    alone = composites.Drawn(set_.images, set_.points[:, None])
    key = stream(run.key, "detector")
    who = people.unnamed("recognition", run.budget.people)
    pairs = composites.Drawn(*drawings.pairs(who, run.budget.people // 2, stream(key, "pairs")))
    net = detector.DetectorNet(run.budget.detector_widths)
    start = net.init(stream(key, "start"), jnp.zeros((1, 32, 32, 3)))["params"]
    steps, size = run.budget.detector

    def loss(params, batch, key):
        del key
        found = net.apply({"params": params}, detector.scaled(batch.image))
        return detector.loss(found, batch.points, batch.state)

    batch = functools.partial(composites.composed, size)
    optimizer = fit.muon(start, steps, 0.02)
    # A picture takes the host longer than it takes a GPU, and threads would wait for each other.
    workers = min(COMPOSERS, devices.cores() // 2)
    if workers > 1:
        with fit.processes(workers, composites.share, alone, pairs) as pool:
            batches = fit.Batches(batch, pool, ahead=2 * workers)
            params, losses = fit.fit(
                run, "detector", start, loss, batches, steps, optimizer, ema=0.99
            )
    else:
        composites.share(alone, pairs)
        params, losses = fit.fit(run, "detector", start, loss, batch, steps, optimizer, ema=0.99)
    detector.write_onnx(run.folder / "face" / "detector.onnx", net, params)
    return {"losses": losses}


def margin_loss(cosine: jax.Array, own: jax.Array) -> jax.Array:
    """ArcFace's loss of cosines float32[B, K], one-hot `own`: the own angle counts as wider."""
    cosine = jnp.clip(cosine, -1 + 1e-6, 1 - 1e-6)
    shifted = jnp.cos(jnp.minimum(jnp.arccos(cosine) + MARGIN, np.pi))
    return jnp.mean(optax.softmax_cross_entropy(SCALE * jnp.where(own > 0, shifted, cosine), own))
