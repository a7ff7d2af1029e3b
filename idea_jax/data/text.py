"""The words of prompts: placeholders, training texts, weights, files of names and prompts."""

import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

# Long enough for any name, short enough for file names and table cells that repeat it.
from idea_jax.errors import InputError

MAX_PLACEHOLDER_LENGTH = 64
_PHOTO_TEMPLATES = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a rendition of the {}",
    "a photo of the clean {}",
    "a rendition of a {}",
    "a photo of a nice {}",
    "a good photo of a {}",
    "a photo of the nice {}",
    "a photo of the small {}",
    "a photo of the weird {}",
    "a photo of the large {}",
    "a photo of a cool {}",
    "a photo of a small {}",
)


# The "ImageNet small" templates as ID-EA and Cross Initialization draw from them: three rounds of
# the 27 of textual inversion, the later two with another word for each leading "a photo of". The 12
# templates that begin in another way are in every round, and so are drawn three times as often.
# Source: lyuPang/CrossInitialization, textual_inversion_dataset.py (diffusers has the first round).
TEMPLATES = tuple(
    template.replace("a photo of", f"{medium} of")
    for medium in ("a photo", "an illustration", "a depiction")
    for template in _PHOTO_TEMPLATES
)


class TextError(InputError, ValueError):
    """A prompt, placeholder, names file or tokenizer that cannot be used as it is."""


@dataclass(frozen=True)
class Placeholder:
    """The name that a person has in prompts: `n` new tokens `{token}_v0 .. {token}_v{n-1}`.

    Raises: TextError, if the token is not as `normalise_placeholder` returns it, or n < 1.
    """

    token: str
    n: int

    def __post_init__(self):
        token, notice = normalise_placeholder(self.token)
        if notice:
            raise TextError(f"{notice}; pass {token!r}")
        if self.n < 1:
            raise TextError(f"a placeholder needs at least one token, got n = {self.n}")

    @property
    def tokens(self) -> tuple[str, ...]:
        return tuple(f"{self.token}_v{i}" for i in range(self.n))

    @property
    def text(self) -> str:
        """What stands for `{}` in a prompt: all tokens, space-separated."""
        return " ".join(self.tokens)


def normalise_placeholder(token: str) -> tuple[str, str | None]:
    """Returns the token as the tokenizer will see it (lower case), and a notice if that differs.

    Raises: TextError for an empty or overlong token, and for one with white space, braces or
    characters that cannot be printed.
    """
    name = unicodedata.normalize("NFC", token).lower()
    if not name:
        raise TextError("the placeholder token is empty; use one such as <person>")
    if len(name) > MAX_PLACEHOLDER_LENGTH:
        raise TextError(
            f"the placeholder token has {len(name)} characters, at most {MAX_PLACEHOLDER_LENGTH} "
            f"are allowed: {name[:20]!r}..."
        )
    bad = sorted({c for c in name if c.isspace() or c in "{}" or not c.isprintable()})
    if bad:
        raise TextError(
            f"the placeholder token {token!r} contains {', '.join(map(repr, bad))}; use printable "
            "characters without spaces and braces, such as <person>"
        )
    if name == token:
        return name, None
    return name, f"the placeholder token {token!r} becomes {name!r}, as in the tokenizer"


def fill(prompt: str, placeholder: Placeholder) -> str:
    """Returns the prompt with every `{}` replaced by the tokens of the placeholder.

    Raises: TextError, if there is no `{}`, or any other brace.
    """
    fields = re.findall(r"\{[^{}]*\}|[{}]", prompt)
    others = [field for field in fields if field != "{}"]
    if others:
        raise TextError(
            f"the prompt {prompt!r} contains {', '.join(map(repr, others))}: only {{}}, which "
            "stands for the person, has a meaning; remove other braces"
        )
    if not fields:
        raise TextError(
            f"the prompt {prompt!r} does not mention the person: write {{}} where they belong, "
            "as in 'a photo of {} on the beach'"
        )
    return prompt.replace("{}", placeholder.text)


def fill_names(prompt: str, people: Mapping[str, Placeholder]) -> tuple[str, list[str]]:
    """Returns the prompt with every `{NAME}` replaced, and its names, as `people` orders them.

    Raises: TextError, if there is no `{NAME}`, or one of nobody.
    """
    fields = re.findall(r"\{[^{}]*\}|[{}]", prompt)
    known = {f"{{{name}}}": name for name in people}
    others = [field for field in fields if field not in known]
    if others or not fields:
        found = ", ".join(map(repr, others)) or "no name"
        raise TextError(
            f"the prompt {prompt!r} contains {found}; write {' or '.join(known)} where these "
            "people belong, all in one picture, or {} to draw each of them alone"
        )
    for field, name in known.items():
        prompt = prompt.replace(field, people[name].text)
    return prompt, [name for field, name in known.items() if field in fields]


# One mark of a prompt's weights, or a stretch of text without any. What is in braces stands for a
# person and is never cut; a backslash takes the meaning from a bracket.
_MARK = re.compile(
    r"""
      \\(?P<literal>[()\[\]\\])
    | (?P<open>[(\[])
    | :\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*(?P<weighted>\))
    | (?P<close>[)\]])(?P<after>\++|-{2,})?(?![\w+-])
    | (?P<shut>[)\]])
    | (?P<word>[^\s()\[\]{}\\,:;+]*?[^\s()\[\]{}\\,:;+-])(?P<marks>\++|-{2,})(?![\w+-])
    | (?P<text>\{[^{}]*\}|[^()\[\]{}\\:\s,;]+|\s+|.)
    """,
    re.VERBOSE | re.DOTALL,
)

MAX_WEIGHT = 100


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """Returns the stretches of a prompt with their weights, as AUTOMATIC1111 and compel write them.

    `(words)` weighs 1.1, `(words:1.3)` 1.3 and `[words]` 1/1.1; brackets within brackets multiply.
    `word++` and `(words)++` weigh 1.1 for each plus, `word--` and `(words)--` 0.9 for each minus,
    of which there are at least two. `\\(` is a bracket of the text. A bracket that is never closed
    reaches to the end, one that was never opened is text, and so is all within braces.

    Raises: TextError, for a weight beyond `MAX_WEIGHT`.
    """
    pieces: list[list] = []
    round_: list[int] = []
    square: list[int] = []  # at which piece each open bracket begins

    def scale(start: int, factor: float) -> None:
        for piece in pieces[start:]:
            piece[1] *= factor

    for mark in _MARK.finditer(prompt):
        value = mark[0]
        if mark["open"]:
            (round_ if value == "(" else square).append(len(pieces))
        elif mark["weighted"] and round_:
            scale(round_.pop(), float(mark["weight"]))
        elif (mark["close"] or mark["shut"]) and (round_ if value[0] == ")" else square):
            start = (round_ if value[0] == ")" else square).pop()
            after = mark["after"]
            if after and value[0] == ")":
                scale(start, _factor(after))
            else:
                scale(start, 1.1 if value[0] == ")" else 1 / 1.1)
                if after:
                    pieces.append([after, 1.0])
        elif mark["word"]:
            pieces.append([mark["word"], _factor(mark["marks"])])
        elif mark["literal"]:
            pieces.append([mark["literal"], 1.0])
        else:
            pieces.append([value, 1.0])
    for start in round_:
        scale(start, 1.1)
    for start in square:
        scale(start, 1 / 1.1)
    if any(abs(weight) > MAX_WEIGHT for _, weight in pieces):
        raise TextError(
            f"the prompt {prompt[:60]!r} has a weight beyond {MAX_WEIGHT}; a picture bears about "
            "0.5 to 1.5"
        )
    merged: list[list] = []
    for text, weight in pieces:
        if merged and math.isclose(merged[-1][1], weight):
            merged[-1][0] += text
        else:
            merged.append([text, weight])
    return [(text, weight) for text, weight in merged] or [("", 1.0)]


def _factor(marks: str) -> float:
    """What a row of plus or minus signs behind a word multiplies its weight by."""
    return (1.1 if marks[0] == "+" else 0.9) ** len(marks)


def training_prompts(placeholder: Placeholder) -> list[str]:
    """Returns the 81 training texts, such as `a photo of the face of <x>_v0 <x>_v1 person`.

    A training step draws one of them uniformly; 12 of the texts occur three times.
    """
    return [t.replace("{}", f"face of {placeholder.text} person") for t in TEMPLATES]


def read_names(path: str | Path) -> list[str]:
    """Returns the names in a UTF-8 text file, one per line; skips blank lines and # comments.

    Raises: TextError, if the file cannot be read or holds no name.
    """
    return _lines(path, "name")


def read_prompts(path: Path) -> list[str]:
    """Returns the prompts in a UTF-8 text file, one per line; skips blank lines and # comments.

    Raises: TextError, if the file cannot be read or holds no prompt.
    """
    return _lines(path, "prompt")


def _lines(path: str | Path, what: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TextError(f"the {what}s file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TextError(f"the {what}s file {path} is not a UTF-8 text file: {error}") from error
    lines = [line.strip() for line in text.splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise TextError(f"the {what}s file {path} holds no {what}; expected one per line")
    return found


def shipped_names() -> list[str]:
    """Returns the names of widely known people that come with the package."""
    with resources.as_file(resources.files("idea_jax.data") / "names.txt") as path:
        return read_names(path)
