"""The first stage: names, tokenizer, and random weights in the mini's configuration."""

import jax.numpy as jnp
import numpy as np

from idea_jax.data.tokenizer import Tokenizer, load_tokenizer
from idea_jax.diffusion import schedule
from idea_jax.mini import (
    captions,
    drawings,
    people,
    traits,
)
from idea_jax.mini.pretrain.budget import Budget
from idea_jax.mini.pretrain.run import TEXT_LENGTH, Run
from idea_jax.models import sd
from idea_jax.models.clip_text import CLIPTextConfig
from idea_jax.models.unet import UNetConfig
from idea_jax.models.vae import VAEConfig
from idea_jax.pytrees import stream
from idea_jax.random_sd import write_tokenizer
from idea_jax.runtime.files import atomic_write

# Twice SD's: of a picture this small, 8x8x4 keep who it is but not the mouth.
LATENT_CHANNELS = 8


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
        fields = traits.Traits._fields[half * traits.CODE_SIZE : (half + 1) * traits.CODE_SIZE]
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
