"""The autoencoder, and its decoder once more for latents that are off."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from idea_jax.mini import (
    drawings,
    networks,
)
from idea_jax.mini.pretrain import fit
from idea_jax.mini.pretrain.crops import FACE_SIZE, aligned_crop, unit
from idea_jax.mini.pretrain.run import JUDGE, RECOGNISER, Run
from idea_jax.models import sd
from idea_jax.models.vae import AutoencoderKL

DETAILS_WEIGHT = 0.1  # of what the judge sees, against the same

# Of what the UNet draws, next to what the encoder says: at most, in deviations of the latents.
LATENTS_OFF = 0.3
KL_WEIGHT = 3e-5  # of the mean KL of a latent, against the mean squared error of a pixel


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
        optimizer = fit.muon(params, steps, rate)
        params, losses = fit.fit(
            run, name, params, part_loss, batch(size), steps, optimizer, ema=0.998
        )
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
    optimizer = fit.muon(params, steps, 0.005)
    params, losses = fit.fit(run, "decoder", params, loss, batch, steps, optimizer, ema=0.998)
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
    means, stds, vae = [], [], fit.on_all_devices(frozen.vae)
    size = 64 if jax.default_backend() == "cpu" else 1024
    for start in progress(range(0, len(images), size)):
        rows = np.minimum(np.arange(start, start + size), len(images) - 1)
        batch = fit.on_all_devices(images[rows], split=True)
        mean, logvar = encode(vae, drawings.to_float(batch))
        means.append(np.asarray(mean))
        stds.append(np.exp(np.asarray(logvar) / 2))
    return np.concatenate(means)[: len(images)], np.concatenate(stds)[: len(images)]
