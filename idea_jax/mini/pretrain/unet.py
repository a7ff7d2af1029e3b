"""The denoising network."""

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from idea_jax.diffusion import schedule
from idea_jax.mini import (
    drawings,
)
from idea_jax.mini.pretrain import fit
from idea_jax.mini.pretrain.autoencoder import moments
from idea_jax.mini.pretrain.run import CAPTIONS, Run
from idea_jax.models import sd
from idea_jax.models.unet import project_kv
from idea_jax.runtime.files import atomic_write

EMPTY_CAPTIONS = 0.1


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
    optimizer = fit.muon(params, steps, rate)
    params, losses = fit.fit(run, name, params, loss, batch, steps, optimizer, ema=0.999)
    run.save(model, frozen._replace(**params), "unet")
    return {"losses": losses}
