"""What is said about a picture of the drawn world, and the prompts by which models are judged."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from idea_jax.mini import traits
from idea_jax.mini.traits import Scene

KINDS = {
    "background": traits.COLOURS,
    "shirt": traits.COLOURS,
    "hat": traits.HATS,
    "hat_colour": traits.COLOURS,
    "expression": traits.EXPRESSIONS,
    "style": traits.STYLES,
    "light": traits.LIGHTS,
    "framing": traits.FRAMINGS,
}
_MEDIA = {
    "photo": ("photo", "photo", "photo", "photograph"),
    "painting": ("painting", "painting", "oil painting"),
    "sketch": ("sketch", "sketch", "pencil drawing"),
    "cartoon": ("cartoon", "cartoon", "comic drawing"),
}
_ANY_MEDIUM = "picture image portrait illustration depiction rendering rendition".split()
_FILLERS = "clean dirty cool nice weird small large good".split()
_EXPRESSIONS = {
    "neutral": ("with a neutral face", "with a neutral expression", "looking neutral"),
    "smiling": ("smiling", "smiling", "with a smile", "who is smiling"),
    "sad": ("looking sad", "with a sad face", "with a sad expression", "who is sad"),
    "surprised": ("looking surprised", "with a surprised face", "who is surprised"),
}
_SHIRTS = ("wearing a {} shirt", "in a {} shirt", "with a {} shirt", "dressed in {}")
_HATS = ("wearing a {}", "with a {}", "in a {}", "wearing a {} on the head")
_BACKGROUNDS = (
    "on a {} background",
    "with a {} background",
    "in front of a {} background",
    "against a {} wall",
    "in front of a {} wall",
)
_PAIRS = ("{} and {}", "{} next to {}", "{} beside {}", "{} on the left and {} on the right")


class Prompt(NamedTuple):
    """A prompt with `{}` for the person, and what of the scene it asks for."""

    text: str
    asks: Mapping[str, str]


# By which personalised and named people are judged; two are held together by a comma or "and" in
# ways that captions never are.
PROMPTS = (
    Prompt("a photo of {} on a blue background", {"background": "blue"}),
    Prompt("a photo of {} wearing a red shirt", {"shirt": "red"}),
    Prompt("a photo of {} smiling", {"expression": "smiling"}),
    Prompt("a photo of {} looking surprised", {"expression": "surprised"}),
    Prompt("a photo of {} wearing a yellow hat", {"hat": "hat", "hat_colour": "yellow"}),
    Prompt("a photo of {} with a green beanie", {"hat": "beanie", "hat_colour": "green"}),
    Prompt("a cartoon of {}", {"style": "cartoon"}),
    Prompt("a sketch of {} with a sad face", {"style": "sketch", "expression": "sad"}),
    Prompt(
        "a painting of {} in a purple shirt on an orange background",
        {"style": "painting", "shirt": "purple", "background": "orange"},
    ),
    Prompt(
        "a photo of {} smiling, wearing a black cap and a white shirt",
        {"expression": "smiling", "hat": "cap", "hat_colour": "black", "shirt": "white"},
    ),
    Prompt(
        "a photo of {} with a neutral expression in front of a pink wall",
        {"expression": "neutral", "background": "pink"},
    ),
    Prompt(
        "a photo of {} in a green shirt against a white wall, surprised, with a blue hat",
        {
            "shirt": "green",
            "background": "white",
            "expression": "surprised",
            "hat": "hat",
            "hat_colour": "blue",
        },
    ),
)


def asked_for(text: str) -> dict[str, str] | None:
    """What a prompt in the words of the captions asks for, as `Prompt.asks`; None if it has others.

    A photo is what people are drawn on anyway, and nothing that is asked for.
    """
    said = re.findall("[a-z]+", text.lower())
    if not set(said) <= set(re.findall("[a-z]+", " ".join(words()))):
        return None
    found = {}
    for place, word in enumerate(said):
        before = said[place - 1] if place else ""
        field = {"wall": "background"}.get(word, word)
        if field in ("background", "shirt") and before in KINDS[field]:
            found[field] = before
        elif word in KINDS["hat"] and word != "none":
            found |= {"hat": word} | (
                {"hat_colour": before} if before in KINDS["hat_colour"] else {}
            )
        elif word in KINDS["expression"]:
            found["expression"] = word
        elif word in KINDS["style"] and word != "photo":
            found["style"] = word
    return found


def scene_words(scene: Scene) -> dict[str, str]:
    """Returns the names of the kinds of one scene."""
    return {field: KINDS[field][int(kind)] for field, kind in scene._asdict().items()}


def caption(rng: np.random.Generator, scene: Mapping[str, str], name: str) -> str:
    """Returns one of the many things to say about a picture: "... of {name} ...".

    Each part of the scene is mentioned or not, in any order. What is not mentioned may be anything:
    an unnamed style is any style. Light and framing are plain where nothing is said, nearly always.

    Args:
      scene: as `scene_words` returns it.
      name: full name or placeholder.
    """
    parts = _parts(rng, scene, 0.6)
    rng.shuffle(parts)
    start = _opening(rng, scene) + _subject(rng, name)
    before = int(rng.random() < 0.15 and bool(parts))
    text = start + _joined(rng, parts[before:])
    return f"{parts[0]}, {text}" if before else text


def pair_caption(
    rng: np.random.Generator,
    scenes: tuple[Mapping[str, str], Mapping[str, str]],
    names: tuple[str, str],
) -> str:
    """Returns one of the many things to say about a picture of two people."""
    people = []
    for scene, name in zip(scenes, names, strict=True):
        parts = [p for p in _parts(rng, scene, 0.3) if "background" not in p and "wall" not in p]
        people.append(" ".join([name, *parts[:1]]))
    text = _opening(rng, {**scenes[0], "framing": "plain"}) + one_of(rng, _PAIRS).format(*people)
    if rng.random() < 0.5:
        text += " " + _phrase(rng, _BACKGROUNDS, scenes[0]["background"])
    return text


def one_of(rng: np.random.Generator, texts: Sequence[str]) -> str:
    """Returns what rng.choice would, without making an array of the texts first."""
    return texts[rng.integers(len(texts))]


def words() -> list[str]:
    """Returns every text that captions are made of, for the vocabulary."""
    groups = (_MEDIA.values(), [_ANY_MEDIUM], [_FILLERS], _EXPRESSIONS.values(), KINDS.values())
    texts = [text for group in groups for texts in group for text in texts]
    texts += [*_SHIRTS, *_HATS, *_BACKGROUNDS, *_PAIRS, *(p.text for p in PROMPTS)]
    texts += ["a an the my one of face person without a hat bald close up dark bright cropped"]
    return texts


def _parts(rng: np.random.Generator, scene: Mapping[str, str], chance: float) -> list[str]:
    parts = []
    if rng.random() < chance:
        parts.append(_phrase(rng, _BACKGROUNDS, scene["background"]))
    if rng.random() < chance:
        parts.append(_phrase(rng, _SHIRTS, scene["shirt"]))
    if rng.random() < chance:
        parts.append(one_of(rng, _EXPRESSIONS[scene["expression"]]))
    if scene["hat"] == "none":
        if rng.random() < 0.4 * chance:
            parts.append("without a hat")
    elif rng.random() < 1.4 * chance:
        colour = f"{scene['hat_colour']} " if rng.random() < 0.85 else ""
        parts.append(_phrase(rng, _HATS, colour + scene["hat"]))
    return parts


def _opening(rng: np.random.Generator, scene: Mapping[str, str]) -> str:
    medium = one_of(rng, _MEDIA[scene["style"]] if rng.random() < 0.75 else _ANY_MEDIUM)
    adjectives = [
        scene[field]
        for field in ("light", "framing")
        if scene[field] != "plain" and rng.random() < 0.9
    ]
    if not adjectives and rng.random() < 0.05:
        adjectives = ["good"]
    article = one_of(rng, ["a", "a", "the"])
    return _an(" ".join([article, *adjectives, medium, "of "]))


def _subject(rng: np.random.Generator, name: str) -> str:
    form = rng.random()
    if form < 0.5:
        return name
    if form < 0.6:
        return f"{name} person"
    owner = one_of(rng, ["a", "the", "the", "my", "one"])
    filler = [one_of(rng, _FILLERS)] if rng.random() < 0.3 else []
    person = ["person"] if form < 0.85 else []
    return " ".join([owner, *filler, "face of", name, *person])


def _joined(rng: np.random.Generator, parts: list[str]) -> str:
    text = ""
    for i, part in enumerate(parts):
        last = i == len(parts) - 1 and i > 0
        text += " and " if last and rng.random() < 0.5 else one_of(rng, [" ", ", "])
        text += part
    return text


def _phrase(rng: np.random.Generator, forms: tuple[str, ...], what: str) -> str:
    return _an(one_of(rng, forms).format(what))


def _an(text: str) -> str:
    """Corrects "a orange" to "an orange"."""
    return " ".join(
        "an" if word == "a" and following[:1] in "aeiou" else word
        for word, following in zip(
            (*text.split(" "), ""), (*text.split(" ")[1:], "", ""), strict=True
        )
    )[:-1]
