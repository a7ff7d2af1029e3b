"""Who is drawn, and on which pictures: identity files and prompts in, drawings out."""

import functools
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from idea_jax.config.settings import COMPUTE_DTYPES, ConfigError, SampleConfig, reading
from idea_jax.data import images, text
from idea_jax.data.tokenizer import Tokenizer, Tokens
from idea_jax.diffusion.schedule import ScheduleConfig
from idea_jax.formats import learned_embeds
from idea_jax.formats.identity import Identity, read_identity, tokens_of_each
from idea_jax.method import condition
from idea_jax.models import flash, hub, lora, sd
from idea_jax.runtime.files import file_digest, slug

log = logging.getLogger(__name__)

NOBODY = "<person>"  # the placeholder of people without a name of their own in prompts


def open_model(cfg: Any) -> tuple[hub.Checkpoint, sd.StableDiffusion, dict[str, Any]]:
    """The checkpoint that a run draws with, its networks, and what `sd.load` takes besides its
    folder; weights are not read yet.

    Args:
      cfg: a SampleConfig or BatchConfig.

    Raises:
      CheckpointNotFound, UnsupportedConfig: there is none, or none that can be used.
      LoraError, ConfigError: a LoRA file is not there, or the attention kernel not available.
    """
    loras = lora.named(cfg.lora)  # a file that is not there is said before anything is fetched
    found = hub.resolve_for(cfg)
    dtype = COMPUTE_DTYPES[cfg.mixed_precision]
    attention = flash.resolve(cfg.attention, jax.local_devices()[0], dtype)
    vae = hub.resolve_vae(cfg.vae) if cfg.vae else None
    changes = {"vae": vae, "clip_skip": cfg.clip_skip, **reading(cfg)}
    model = sd.read_configs(found.folder, dtype, **changes)
    model = replace(model, attention=attention, schedule=own_schedule(cfg, model.schedule))
    weights = {"variant": cfg.variant, "compute_dtype": dtype, "loras": loras}
    return found, model, changes | weights


def own_schedule(cfg: Any, schedule: ScheduleConfig) -> ScheduleConfig:
    """A checkpoint's schedule with what a run says of its noise levels."""
    names = {"karras_sigmas": "use_karras_sigmas"}
    said = {names.get(name, name): value for name, value in said_of_levels(cfg).items()}
    return replace(schedule, **said)


def said_of_levels(cfg: Any) -> dict:
    """What a run says of noise levels, by the names of its settings; empty if it says nothing."""
    said = {name: getattr(cfg, name) for name in ("timestep_spacing", "karras_sigmas")}
    return {name: value for name, value in said.items() if value is not None}


def read_prompts(cfg: SampleConfig) -> list[str]:
    """The prompts of a run, in order, each once.

    Raises:
      TextError: the prompt file cannot be read or is empty.
    """
    prompts = cfg.prompt if cfg.prompt_file is None else text.read_prompts(Path(cfg.prompt_file))
    unique = list(dict.fromkeys(prompts))
    if len(unique) < len(prompts):
        log.warning("%d repeated prompts are drawn once", len(prompts) - len(unique))
    return unique


@dataclass(frozen=True)
class Sitter:
    """Somebody who is drawn: their identity, the file it came from, their name in prompts; or the
    photos instead of a file."""

    name: str
    identity: Identity
    source: Path | None
    photos: tuple[images.PictureFile, ...] = ()

    def about(self) -> dict:
        """What pictures of them depend on; of paths no more than the files' own names."""
        if self.source is not None:
            where: dict = {"file": self.source.name, "sha256": file_digest(self.source)}
        else:
            where = {"photo": [{"file": p.name, "sha256": p.sha256()} for p in self.photos]}
        method, enhancer = self.identity.method, self.identity.enhancer
        ours = {"enhancer": enhancer} if enhancer is not None else {}
        return {**where, "profile": method.profile, "steps": self.identity.steps, **ours}


def read_sitters(cfg: SampleConfig) -> list[Sitter]:
    """The people that a run draws, in order.

    Raises:
      ConfigError: two have the same name, or a folder is one of many people.
      IdentityError, EmbedsError, FileNotFoundError: a file cannot be used.
    """
    if cfg.identity is None:
        return [Sitter("", *read_tokens(cfg))]
    sitters = []
    for given in cfg.identity:
        named = re.fullmatch(r"([^={}/]+)=(.+)", given)
        path = Path(given)
        if named and not path.exists():
            path = Path(named[2])
        is_named = named and path == Path(named[2])
        if path.is_dir():
            check_single(path)
            path = path / "identity.safetensors"
        # Training calls all of them identity.safetensors, in a folder with the person's name.
        own = path.resolve().parent.name if path.stem == "identity" else path.stem
        name = named[1] if is_named else own
        sitters.append(Sitter(name, read_identity(path), path))
    names = [sitter.name for sitter in sitters]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"several of --identity are called {', '.join(twice)}; tell them apart with NAME=FILE"
        )
    return sitters


def check_single(folder: Path) -> None:
    """Raises ConfigError if a folder is one of many people, whom it names."""
    if (folder / "identity.safetensors").is_file():
        return
    people = sorted(file.parent.name for file in folder.glob("*/identity.safetensors"))
    if people:
        shown = ", ".join(people[:8]) + (f" and {len(people) - 8} more" if people[8:] else "")
        raise ConfigError(
            f"--identity {folder} holds {len(people)} people, each in a folder of their own: "
            f"{shown}; name those to draw, such as --identity {folder / people[0]}"
        )


def read_tokens(cfg: SampleConfig) -> tuple[Identity, Path]:
    """The token embeddings that a run draws with, as an identity, and their file."""
    path, notice = learned_embeds.locate(Path(cfg.learned_embedding_path))
    if notice:
        log.warning(notice)
    whole = path.with_name("identity.safetensors")
    if whole.is_file():
        log.warning(
            "drawing with the token embeddings alone; --identity %s holds all that was learned",
            whole,
        )
    tokens = learned_embeds.read_both(path)
    if cfg.token is None and len(tokens) > 1:
        raise ConfigError(
            f"{path} holds {len(tokens)} learned tokens, {', '.join(tokens)}: choose one with "
            "--token NAME"
        )
    # Legacy files leave out the angle brackets that the token was trained with.
    named = {name: vectors for name, vectors in tokens.items() if is_same(name, cfg.token)}
    if cfg.token in tokens:
        named = {cfg.token: tokens[cfg.token]}
    if len(named) != 1:
        raise ConfigError(f"--token {cfg.token} is not in {path}, which holds {', '.join(tokens)}")
    (vectors,) = named.values()
    count = len(tokens_of_each(vectors)[0])
    identity = Identity(
        method=condition.make_method("textual_inversion", num_tokens=count),
        trainable={"pseudo_tokens": vectors},
        given={},
        # Prompts say {}; the file's own name for the token may be a word of the vocabulary.
        placeholder=NOBODY,
        base_model="unknown",
        revision=None,
        seed=0,
        steps=0,
        embeds_only=True,
    )
    return identity, path


def is_same(name: str, asked: str | None) -> bool:
    """Whether a token of a file is the one that was asked for, if any was."""
    return asked is None or name.strip("<>").lower() == asked.strip("<>").lower()


@dataclass(frozen=True)
class Drawing:
    """One folder of pictures: a prompt, and whom it shows.

    Attributes:
      prompt: as it was given.
      cast: numbers of the people in it.
      tokens: the tokens of the first of the cast follow the vocabulary, then the second's.
      folder: in which the prompt's folder lies, below the run's.
    """

    prompt: str
    cast: tuple[int, ...]
    tokens: Tokens
    folder: str


def plan(
    cfg: SampleConfig, prompts: list[str], sitters: list[Sitter], plain: Tokenizer
) -> tuple[list[Drawing], Tokens]:
    """The drawings of a run, and the tokens of the negative prompt.

    A prompt with {} is drawn once for each person, one with {NAME} once.

    Raises:
      TextError: a prompt names nobody, or somebody unknown, or is far too long.
      ConfigError: the negative prompt names a person.
    """
    drawings = []
    people = {sitter.name: placeholder_of(sitter.identity) for sitter in sitters}
    for prompt in prompts:
        if is_for_each(prompt, list(people)):
            for number, (name, placeholder) in enumerate(people.items()):
                folder = safe_name(name) if len(sitters) > 1 else "."
                tokens = tokens_of(prompt, {name: placeholder}, plain)
                drawings.append(Drawing(prompt, (number,), tokens, folder))
            continue
        cast = tuple(k for k, name in enumerate(people) if f"{{{name}}}" in prompt)
        drawings.append(Drawing(prompt, cast, tokens_of(prompt, people, plain), "."))
    check_negative(cfg.negative_prompt, people, plain)
    return drawings, weighted_tokens(plain, cfg.negative_prompt, {})


@functools.lru_cache(maxsize=64)  # each is a copy of the whole vocabulary, and people share names
def worded(tokenizer: Tokenizer, token: str, n: int) -> Tokenizer:
    """A tokenizer with one more placeholder; see `Tokenizer.with_placeholder`."""
    return tokenizer.with_placeholder(token, n)


def placeholder_of(identity: Identity) -> text.Placeholder:
    """What stands for a person in prompts."""
    return text.Placeholder(identity.placeholder, identity.method.num_tokens)


def tokens_of(prompt: str, people: Mapping[str, text.Placeholder], plain: Tokenizer) -> Tokens:
    """The tokens of a prompt that shows one person as {}, or says by name whom of them it shows.

    The tokens of the first of those whom it shows follow the vocabulary, then the second's.

    Raises:
      TextError: it names nobody, or somebody else, or is far too long.
    """
    if is_for_each(prompt, list(people)) and len(people) == 1:
        (own,) = people.values()
        text.fill(prompt, own)
        tokenizer = worded(plain, own.token, own.n)
        return weighted_tokens(tokenizer, prompt, {"{}": own.text})
    # Whatever they are called in their files, here they need words of their own.
    words = {
        name: text.Placeholder(f"<sitter-{k}>", own.n)
        for k, (name, own) in enumerate(people.items())
    }
    _, names = text.fill_names(prompt, words)
    tokenizer = plain
    for name in names:
        tokenizer = worded(tokenizer, words[name].token, words[name].n)
    return weighted_tokens(tokenizer, prompt, {f"{{{name}}}": words[name].text for name in names})


def check_negative(negative: str, people: Mapping[str, text.Placeholder], plain: Tokenizer) -> None:
    """Raises ConfigError if a negative prompt names a person: pictures turn away from it."""
    for own in people.values():
        tokenizer = worded(plain, own.token, own.n)
        tokens = weighted_tokens(tokenizer, negative, {})
        names_them = re.search(rf"(?<!\w){re.escape(own.token)}(?!\w)", negative.lower())
        if names_them or (tokens.ids >= tokenizer.vocab_size).any():
            raise ConfigError(
                "the negative prompt says what pictures turn away from, and names nobody; leave "
                f"{own.token} out of it"
            )


def weighted_tokens(tokenizer: Tokenizer, prompt: str, words: Mapping[str, str]) -> Tokens:
    """The tokens of a prompt with weights, each of `words` replaced by what it stands for."""
    pieces = []
    for piece, weight in text.parse_weights(prompt):
        for field, word in words.items():
            piece = piece.replace(field, word)
        pieces.append((piece, weight))
    return tokenizer.chunks(pieces)


def padded(tokens: Tokens, empty: Tokens, count: int) -> Tokens:
    """A prompt with empty chunks at its end, so that it has `count` of them."""
    rest = count - len(tokens.ids)
    pairs = zip(tokens, empty, strict=True)
    ids, weights = (np.concatenate([own, *[none] * rest]) for own, none in pairs)
    return Tokens(ids, weights)


def is_for_each(prompt: str, names: Sequence[str]) -> bool:
    """Whether a prompt is drawn once for each of the people with these names; otherwise it says by
    name whom it shows."""
    return "{}" in prompt or (len(names) == 1 and f"{{{names[0]}}}" not in prompt)


def safe_name(name: str) -> str:
    """A person's name if it can be that of a folder, else a slug of it."""
    return name if re.fullmatch(r"[\w-]+", name, re.ASCII) else slug(name)
