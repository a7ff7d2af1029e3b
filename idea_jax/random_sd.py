"""A Stable Diffusion checkpoint with random weights, for tests and benchmarks.

It has the layout, the configs and the code path of a real one, and draws nothing but noise.

    python -m idea_jax.random_sd FOLDER [--size SIZE] [--family sd1|sd2|sdxl] [--seed N]
"""

import argparse
import dataclasses
import json
import re
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from idea_jax import launch
from idea_jax.data.text import TEMPLATES, shipped_names
from idea_jax.runtime.files import atomic_write, say

if TYPE_CHECKING:  # importing JAX takes a second, which --help does without
    from idea_jax.models import sd
    from idea_jax.models.clip_text import CLIPTextConfig

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
CLIP_VOCAB_SIZE = 49408

# What people ask for, so that prompts made of these words are one token a word.
PROMPT_WORDS = """
    a an the and or of in on at by to from with without for as is are this that his her their one
    two face faces person people man woman boy girl child portrait photo photograph picture image
    painting drawing sketch illustration cartoon sculpture statue poster logo art oil watercolor
    pencil style anime comic realistic wearing holding eating drinking reading writing riding
    running walking sitting standing sleeping dancing singing playing cooking looking smiling
    laughing crying sad happy angry surprised neutral young old big small large tall tiny beautiful
    oversized sweater shirt coat dress suit jacket scarf hat cap helmet glasses sunglasses crown
    necklace uniform armor kimono headphones beard hair red green blue yellow orange purple pink
    black white brown gray grey dark bright light colorful gold silver beach mountain forest garden
    park street city paris london tokyo new york snow rain desert river sea ocean lake sky moon
    space night day morning sunset winter summer spring autumn kitchen room restaurant cafe library
    school office stage stadium bridge tower castle house temple museum car bicycle horse dog cat
    bird fish tree flower flowers book guitar piano violin camera phone computer cup coffee tea cake
    cake pizza apple ball umbrella background front next under over behind close up full body head
    eye eyes nose mouth high low quality detailed blurry bad ugly watermark text chef doctor
    astronaut firefighter police officer soldier pirate king queen wizard superhero scientist
    teacher student singer band actor athlete cowboy knight robot together side plain left right
"""

_README = """\
# Random weights

This folder was written by `python -m idea_jax.random_sd --size {size} --family {family} \
--seed {seed}`.

It has the layout of a Stable Diffusion checkpoint ({family}), but **its weights are random
numbers**: nothing was trained, and everything it draws is noise. It is there to run the programs
where no real checkpoint is at hand. Its vocabulary is made up as well.
"""


def write(folder: str | Path, size: str = "tiny", family: str | None = None, seed: int = 0) -> Path:
    """Writes a complete checkpoint in diffusers layout, with random weights; returns the folder.

    Args:
      size: "tiny" (32x32 pictures, for tests), "demo" (64x64), a real size: "sd15", "sd21", "sdxl",
        or "sd21_text": the text encoder of "sd21" with the other networks of "tiny", to rehearse on
        a CPU what will run on Stable Diffusion 2.1.
      family: "sd2" (the default), "sd1", which "sd15" implies, or "sdxl". They differ as the real
        ones do: text encoders, heads per level, projections, activation and padding.
      seed: of the weights.

    Raises: FileExistsError if the folder is not empty; ValueError for an unknown size or family.
    """
    import jax

    from idea_jax.models import sd

    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder; name another one")
    own = OWN_FAMILY.get(size)
    family = family or own or "sd2"
    if size not in SIZES or family not in FAMILIES or own not in (None, family):
        raise ValueError(
            f"no random checkpoint of size {size!r} and family {family!r}: expected one of "
            f"{', '.join(SIZES)}, with {', '.join(FAMILIES)} (sd15 is sd1, sd21 and sd21_text are "
            "sd2)"
        )
    folder.mkdir(parents=True, exist_ok=True)
    words = [*PROMPT_WORDS.split(), *TEMPLATES, *shipped_names()]
    whole = CLIP_VOCAB_SIZE if size in ("sd15", "sd21", "sdxl") else None
    pad = "!" if family == "sd2" else EOS
    vocab_size = write_tokenizer(folder / "tokenizer", words, pad=pad, vocab_size=whole)
    if family == "sdxl":
        write_tokenizer(folder / "tokenizer_2", words, pad="!", vocab_size=whole)
    model = config(size, family, vocab_size)
    sd.save(folder, model, sd.init(model, jax.random.key(seed)))
    (folder / "README.md").write_text(_README.format(size=size, family=family, seed=seed))
    return folder


FAMILIES = ("sd1", "sd2", "sdxl")
OWN_FAMILY = {"sd15": "sd1", "sd21": "sd2", "sd21_text": "sd2", "sdxl": "sdxl"}

# size: text width, layers and heads; UNet channels, levels with attention, layers a block; VAE
# channels and layers a block; groups of the norms; side of the pictures.
SIZES = {
    "tiny": ((32, 2, 4), ((32, 64), 1, 1), ((16, 16, 32), 1), 8, 32),
    "demo": ((128, 4, 8), ((64, 128, 128), 2, 1), ((32, 32, 64, 64), 1), 16, 64),
    "sd21_text": ((1024, 23, 16), ((32, 64), 1, 1), ((16, 16, 32), 1), 8, 32),
    "sd15": ((768, 12, 12), ((320, 640, 1280, 1280), 3, 2), ((128, 256, 512, 512), 2), 32, 512),
    "sd21": ((1024, 23, 16), ((320, 640, 1280, 1280), 3, 2), ((128, 256, 512, 512), 2), 32, 512),
    "sdxl": ((768, 12, 12), ((320, 640, 1280), 2, 2), ((128, 256, 512, 512), 2), 32, 1024),
}
# What SDXL has besides: of its second text encoder width, layers, heads and the width of the pooled
# output; the width of each of the sizes that are added; transformer layers of each level.
SECOND = {
    "tiny": ((48, 2, 4, 40), 8, (1, 2)),
    "demo": ((160, 4, 8, 160), 32, (1, 1, 2)),
    "sdxl": ((1280, 32, 20, 1280), 256, (1, 2, 10)),
}


def config(size: str, family: str, vocab_size: int) -> "sd.StableDiffusion":
    """Returns the model of that size; "sd15", "sd21" and "sdxl" are SD 1.5, SD 2.1-base and SDXL
    1.0-base exactly."""
    from idea_jax.diffusion.schedule import ScheduleConfig
    from idea_jax.models import sd
    from idea_jax.models.clip_text import CLIPTextConfig
    from idea_jax.models.unet import UNetConfig
    from idea_jax.models.vae import VAEConfig

    (
        (width, layers, heads),
        (channels, crossed, unet_layers),
        (vae_channels, vae_layers),
        groups,
        (side),
    ) = SIZES[size]
    levels = len(channels)
    text = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act="gelu" if family == "sd2" else "quick_gelu",
    )
    text_2, own = second_of(size, text) if family == "sdxl" else (None, {})
    vae = VAEConfig(
        in_channels=3,
        out_channels=3,
        block_out_channels=vae_channels,
        layers_per_block=vae_layers,
        latent_channels=4,
        norm_num_groups=groups,
        sample_size=side,
        scaling_factor=0.13025 if text_2 else 0.18215,
    )
    # SDXL's level without attention is the first one, that of the others the last one.
    crosses = ["CrossAttn" if level < crossed else "" for level in range(levels)]
    crosses = crosses[::-1] if text_2 else crosses
    # SD 1.x has 8 heads at every level, others heads of 64 channels; smaller ones here if need be.
    head_width = min(64, channels[0] // 2)
    unet = UNetConfig(
        sample_size=side // vae.downscale,
        in_channels=4,
        out_channels=4,
        down_block_types=tuple(f"{cross}DownBlock2D" for cross in crosses),
        up_block_types=tuple(f"{cross}UpBlock2D" for cross in crosses[::-1]),
        block_out_channels=channels,
        layers_per_block=unet_layers,
        num_attention_heads=tuple(8 if family == "sd1" else c // head_width for c in channels),
        use_linear_projection=family != "sd1",
        norm_num_groups=groups,
        **{"transformer_layers": (1,) * levels, "cross_attention_dim": width, **own},
    )
    schedule = ScheduleConfig(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        set_alpha_to_one=False,
        steps_offset=1,
        sampler="euler" if text_2 else "ddim",
        timestep_spacing="leading" if text_2 else None,
    )
    is_xl = text_2 is not None
    return sd.StableDiffusion(text, unet, vae, schedule, text_2=text_2, zero_negative=is_xl)


def second_of(size: str, text: "CLIPTextConfig") -> tuple["CLIPTextConfig", dict[str, Any]]:
    """SDXL's second text encoder beside its first one, and what its UNet has besides."""
    from idea_jax.models.unet import SIZE_IDS

    (width, layers, heads, pooled), of_size, depths = SECOND[size]
    second = dataclasses.replace(
        text,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act="gelu",
        projection_dim=pooled,
    )
    return second, {
        "transformer_layers": depths,
        "cross_attention_dim": text.hidden_size + width,
        "addition_time_embed_dim": of_size,
        "addition_embed_dim": pooled + SIZE_IDS * of_size,
    }


def write_tokenizer(
    folder: str | Path,
    words: Iterable[str],
    *,
    pad: str = EOS,
    length: int = 77,
    vocab_size: int | None = None,
) -> int:
    """Writes a tokenizer in CLIP's file format in which each word is one token; returns its size.

    The order is CLIP's: 256 bytes, the same at the end of a word, merges, begin, end. "!" has id 0.

    Args:
      words: words, or texts whose words (runs of letters) are taken; case is of no account.
      pad: token that fills prompts up: "<|endoftext|>" in SD 1.x, "!" in SD 2.x.
      length: positions of the text encoder.
      vocab_size: fills the vocabulary up to this size with tokens that no text leads to.
    """
    texts = [unicodedata.normalize("NFC", text).lower() for text in words]
    merges = _merges(dict.fromkeys(w for text in texts for w in re.findall(r"[^\W\d_]+", text)))
    letters = [*_BYTES.values()]
    # Two merges may lead to one token.
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    tokens = [*dict.fromkeys(tokens)]
    if vocab_size is not None:
        tokens += [f"<|unused{i}|>" for i in range(vocab_size - len(tokens) - 2)]
    vocab = {token: i for i, token in enumerate([*tokens, BOS, EOS])}
    if vocab_size not in (None, len(vocab)):
        raise ValueError(f"these words need {len(vocab)} tokens, more than {vocab_size}")

    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        **special,
    }
    folder = Path(folder)
    for name, values in (
        ("vocab.json", vocab),
        ("tokenizer_config.json", settings),
        ("special_tokens_map.json", special),
    ):
        with atomic_write(folder / name) as path:
            path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    with atomic_write(folder / "merges.txt") as path:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(vocab)


def _byte_letters() -> dict[int, str]:
    """Returns the printable letter that stands for each byte, in CLIP's (GPT-2's) order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


_BYTES = _byte_letters()


def _merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Returns merges, in order of rank, under which byte-pair encoding joins each word into one.

    Word by word, merges are added at the end until the word is one token. Encoding applies the
    merge of the lowest rank first, so a new last merge changes nothing before all others have done
    their work: it never breaks a word that is one token already, and shortens the present one.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        *start, last = (_BYTES[byte] for byte in word.encode())
        parts = _encode([*start, f"{last}</w>"], ranks)
        while len(parts) > 1:
            ranks[parts[0], parts[1]] = len(ranks)
            parts = _encode(parts, ranks)
    return list(ranks)


def _encode(parts: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding: joins the pair of lowest rank, leftmost first, while one has a rank."""
    parts = list(parts)
    while len(parts) > 1:
        found = [ranks.get(pair, len(ranks)) for pair in zip(parts, parts[1:], strict=False)]
        best = min(found)
        if best == len(ranks):
            break
        i = found.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m idea_jax.random_sd",
        description="Writes a Stable Diffusion checkpoint with random weights.",
    )
    parser.add_argument("folder", type=Path, help="where to; must be empty or not exist")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--family", choices=FAMILIES, help="default: as the size implies, sd2")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    def work() -> None:
        from idea_jax.runtime import devices

        devices.check_backend()
        write(args.folder, args.size, args.family, args.seed)
        say(f"{args.folder}: a checkpoint with random weights ({args.size})")

    return launch.run(work, also=(ValueError,))


if __name__ == "__main__":
    sys.exit(main())
