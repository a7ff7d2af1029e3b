"""Which prompts people are evaluated with: sets that come with the package, and files."""

import re
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from idea_jax.data import text
from idea_jax.data.text import TextError

SETS = ("celeb_basis", "fastcomposer", "mini")
STYLE = "style"  # the group that is reported apart
SEVERAL = ("with a celebrity", "two people")  # groups whose pictures show more than one face
OTHER = "{other}"
OWN = "prompts"  # the group of a file without headings


class Asked(NamedTuple):
    """A prompt with `{}` for the person, perhaps `{other}` for another one, and its group."""

    text: str
    group: str

    @property
    def shows_several(self) -> bool:
        """Whether more than one face is to be seen: the person's need not be the largest."""
        return self.group in SEVERAL or OTHER in self.text


def read(name_or_path: str) -> list[Asked]:
    """Returns the prompts of a set by its name, or of a file: one a line, `#` begins a comment, and
    a line in square brackets begins a group.

    Raises:
      TextError: the file cannot be read or holds no prompt; a prompt does not mention the person,
        has other braces than `{}` and `{other}`, or is there twice.
    """
    if name_or_path in SETS:
        folder = resources.files("idea_jax.evaluation") / "prompts"
        with resources.as_file(folder / f"{name_or_path}.txt") as path:
            lines = text.read_prompts(path)
    else:
        path = Path(name_or_path)
        if not path.exists():
            raise TextError(
                f"--prompts {name_or_path} is neither a file nor one of the sets {', '.join(SETS)}"
            )
        lines = text.read_prompts(path)
    found, group = [], OWN
    for line in lines:
        heading = re.fullmatch(r"\[([^\[\]]+)\]", line)
        if heading:
            group = heading[1].strip()
            # These say how a prompt is scored: nobody should lose that by a capital letter.
            group = group.lower() if group.lower() in (STYLE, *SEVERAL) else group
            continue
        text.fill(line.replace(OTHER, ""), text.Placeholder("<person>", 1))
        found.append(Asked(line, group))
    texts = [prompt.text for prompt in found]
    twice = sorted({prompt for prompt in texts if texts.count(prompt) > 1})
    if twice or not found:
        raise TextError(
            f"{path} has a prompt twice: {twice[0]!r}"
            if twice
            else f"{path} holds groups and no prompt"
        )
    return found


def group_of(prompts: list[Asked], prompt: str) -> Asked:
    """Returns the prompt of a set with a text; one of the group `prompts` if the set has none."""
    return next((asked for asked in prompts if asked.text == prompt), Asked(prompt, OWN))
