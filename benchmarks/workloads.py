"""What all stacks run: one checkpoint, one photo, one person, and the random numbers.

`write` puts everything into a folder from which each stack reads the same: a checkpoint in
diffusers layout and `inputs.npz`. Names there are paths: `paper/trainable/adapter/gamma`.
"""

import functools
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from skimage import data

from benchmarks.settings import BETA, COMPARED_STEPS, RANK, REG_WEIGHT
from idea_jax import pytrees, random_sd
from idea_jax.data import text
from idea_jax.data.tokenizer import load_tokenizer
from idea_jax.diffusion import samplers
from idea_jax.faces import random_model
from idea_jax.method import condition
from idea_jax.models import hub, sd
from idea_jax.models.clip_text import CLIPTextConfig
from idea_jax.models.unet import UNetConfig
from idea_jax.models.vae import VAEConfig
from idea_jax.training.step import Photos, draw_batch

MINI_PHOTO = Path(random_sd.__file__).parent / "mini" / "photo.png"
PROMPT = "a photo of {} person"


def mid() -> sd.StableDiffusion:
    """SD 2.1 at a fifth of its width and half of its resolution: a UNet of 35 million weights."""
    plain = random_sd.config("sd21", "sd2", random_sd.CLIP_VOCAB_SIZE)
    unet = UNetConfig(
        **{
            **asdict(plain.unet),
            "sample_size": 32,
            "block_out_channels": (64, 128, 256, 256),
            "num_attention_heads": (1, 2, 4, 4),
            "cross_attention_dim": 256,
        }
    )
    text_encoder = CLIPTextConfig(
        **{
            **asdict(plain.text),
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
        }
    )
    vae = VAEConfig(
        **{**asdict(plain.vae), "block_out_channels": (32, 64, 128, 128), "sample_size": 256}
    )
    return sd.StableDiffusion(text_encoder, unet, vae, plain.schedule)


def checkpoint_of(name: str, folder: Path, dtype: str) -> Path:
    """The checkpoint of a workload; random weights are written into `folder`."""
    if name == "mini":
        return hub.resolve("mini", None, None).folder
    words = [*random_sd.PROMPT_WORDS.split(), *text.TEMPLATES, *text.shipped_names()]
    size = None if name == "tiny" else random_sd.CLIP_VOCAB_SIZE
    vocabulary = random_sd.write_tokenizer(folder / "tokenizer", words, pad="!", vocab_size=size)
    model = mid() if name == "mid" else random_sd.config(name, "sd2", vocabulary)
    sd.save(folder, model, sd.init(model, jax.random.key(0)), dtype=dtype)
    random_model.write_random_recogniser(folder / "face" / "arcface.onnx")
    return folder


def write(name: str, folder: Path, *, batch: int, pictures: int, dtype: str) -> dict:
    """Writes checkpoint and inputs of a workload; returns what the stacks are told about them.

    Args:
      dtype: of the checkpoint's weights; both "float32" and "bfloat16" are read exactly by both
        sides.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = checkpoint_of(name, folder / "checkpoint", dtype)
    model = sd.read_configs(checkpoint)
    lengths = model.text.vocab_size, model.text.max_position_embeddings
    placeholder = text.Placeholder("<person>", 2)
    tokenizer = load_tokenizer(checkpoint / "tokenizer", *lengths)
    tokenizer = tokenizer.with_placeholder(placeholder.token, placeholder.n)
    token_ids = tokenizer(text.training_prompts(placeholder))
    rng = np.random.default_rng(0)
    inputs = {
        "token_ids": token_ids,
        "prompt_ids": tokenizer([text.fill(PROMPT, placeholder)])[0],
        "negative_ids": tokenizer([""])[0],
        "initial_noise": initial_noise(model, pictures),
    }
    for profile in ("paper", "official"):
        inputs |= person(model, profile, rng)
    inputs |= {f"draws/{key}": value for key, value in draws(model, len(token_ids), batch).items()}
    side = model.unet.sample_size
    np.savez(folder / "inputs.npz", **inputs)
    photo = folder / "photo.png"
    pixels = side * model.vae.downscale
    if name == "mini":  # somebody whose face its networks can see
        shutil.copy(MINI_PHOTO, photo)
    else:
        Image.fromarray(data.astronaut()).resize((2 * pixels,) * 2).save(photo)
    about = {
        "name": name,
        "batch": batch,
        "pictures": pictures,
        "dtype": dtype,
        "folder": str(folder),
        "checkpoint": str(checkpoint),
        "photo": str(photo),
        "pixels": pixels,
        "latents": (side, side, model.unet.in_channels),
    }
    (folder / "workload.json").write_text(json.dumps(about))
    return about


def draws(model: sd.StableDiffusion, texts: int, batch: int) -> dict[str, np.ndarray]:
    """What this project draws in the first steps of key 0; leaves [COMPARED_STEPS, batch, ...]."""
    side = model.unet.sample_size
    shape = (1, 2, side, side, model.unet.in_channels)
    numbers = np.arange(texts, dtype=np.int32)[:, None]
    # Moments for which the sample of the posterior is the noise in it, or tells which of the
    # picture and its mirror was taken.
    plain = Photos(np.zeros(shape, np.float32), np.zeros(shape, np.float32), 1, numbers)
    which = np.broadcast_to(np.arange(2, dtype=np.float32)[None, :, None, None, None], shape)
    sides = plain._replace(mean=which, logvar=np.full(shape, -np.inf, np.float32))
    draw = jax.jit(functools.partial(draw_batch, model, size=batch))
    found = []
    for step in range(COMPARED_STEPS):
        drawn, mirrored = (draw(photos, jax.random.key(0), step) for photos in (plain, sides))
        found.append(
            {
                "mirror": mirrored.latents[:, 0, 0, 0].astype(int),
                "posterior": drawn.latents,
                "noise": drawn.noise,
                "timesteps": drawn.timesteps,
                "rows": drawn.token_ids[:, 0],
            }
        )
    return {key: np.stack([one[key] for one in found]) for key in found[0]}


def initial_noise(model: sd.StableDiffusion, pictures: int) -> np.ndarray:
    """The noise that the pictures of seed 0 start from, float32[pictures, h, w, C]."""
    side = model.unet.sample_size
    indices = jnp.arange(pictures, dtype=jnp.int32)
    noise, _ = samplers.initial_noise(jnp.uint32(0), indices, (side, side, model.unet.in_channels))
    return np.asarray(noise)


def person(model: sd.StableDiffusion, profile: str, rng: np.random.Generator) -> dict:
    """One person's trees, flat, with every part away from where its gradient would be zero."""
    method = method_of(profile)
    key = jax.random.key(0)
    width = model.text.hidden_size
    start = 0.1 * rng.standard_normal((2, width), np.float32)
    face = rng.standard_normal(512)
    given = condition.init_given(model, method, key, start, face / np.linalg.norm(face))
    trainable = condition.init_trainable(model, method, key, start)
    trainable["adapter"]["gamma"] = jnp.float32(0.5)
    if "kv" in trainable:
        trainable["kv"] = jax.tree.map(
            lambda x: x + 0.05 * rng.standard_normal(x.shape, np.float32), trainable["kv"]
        )
    flat = pytrees.flatten({profile: {"trainable": trainable, "given": given}})
    return {path: np.asarray(leaf) for path, leaf in flat.items()}


def method_of(profile: str) -> condition.Method:
    """The method that is timed: the paper's with low-rank keys and values, or the published one."""
    kv = "low_rank" if profile == "paper" else "none"
    return condition.make_method(profile, kv=kv, kv_rank=RANK, beta=BETA, reg_weight=REG_WEIGHT)


if __name__ == "__main__":
    name, folder, batch, pictures, dtype = sys.argv[1:]
    write(name, Path(folder), batch=int(batch), pictures=int(pictures), dtype=dtype)
