"""Named ways to draw and to average: those of the literature, with their pitfalls, and our own."""

from collections.abc import Sequence
from dataclasses import dataclass

from idea_jax.evaluation import metrics


@dataclass(frozen=True)
class Mode:
    """How people are drawn and how their scores are averaged.

    Attributes:
      prompts: the set that is drawn unless another is named.
      pictures: of each prompt; steps, guidance, negative_prompt, seed: of their drawing, by DDIM.
      headline: the identity that the mode reports first, `identity` or `identity_zero`.
      averaging: "people" (pictures to prompts to people, all of whom count alike), "prompts" (every
        prompt of everybody counts alike) or "pictures" (every picture does).
      person, other: what stands for `{}` and `{other}` in the text that CLIP reads.
      clip: the CLIP that it is defined with.
      counts_source: in the detect rate, the photo counts as one more picture of each prompt.
      drops_zero: a prompt whose mean identity is no more than 1e-6 is left out.
    """

    name: str
    prompts: str
    pictures: int
    steps: int
    guidance: float
    negative_prompt: str
    seed: int
    headline: str
    averaging: str
    person: str = "a person"
    other: str = "another person"
    clip: str = "openai/clip-vit-large-patch14"
    counts_source: bool = False
    drops_zero: bool = False


MODES = {
    mode.name: mode
    for mode in (
        Mode(
            name="strict",
            prompts="celeb_basis",
            pictures=4,
            steps=50,
            guidance=7.5,
            negative_prompt="",
            seed=0,
            headline="identity_zero",
            averaging="people",
        ),
        Mode(
            name="celeb_basis",
            prompts="celeb_basis",
            pictures=8,
            steps=50,
            guidance=10.0,
            # In our own words: the published one is a long list of the same kind.
            negative_prompt="blurred face, overexposed, malformed hands, extra fingers",
            seed=42,
            headline="identity",
            averaging="prompts",
            other="a ks person",
            clip="openai/clip-vit-base-patch32",
            counts_source=True,
            drops_zero=True,
        ),
        Mode(
            name="fastcomposer",
            prompts="fastcomposer",
            pictures=4,
            steps=50,
            guidance=5.0,
            negative_prompt="",
            seed=0,
            headline="identity_zero",
            averaging="pictures",
        ),
    )
}


def prompt_value(
    mode: Mode, score: str, values: Sequence[float | None]
) -> tuple[float | None, float]:
    """Returns the value of one prompt of one person, and how many pictures it is over.

    Args:
      score: its name; of `identity_zero` and `detected` the values are those of the identity.
      values: of each picture that could be read; None where the score has none.
    """
    if score == "detected":
        hits = [value is not None for value in values]
        source = [True] * (mode.counts_source and bool(hits))
        return metrics.share([*hits, *source]), len(hits) + len(source)
    if score == "identity_zero":
        values = [value or 0.0 for value in values]
    there = [value for value in values if value is not None]
    middle = metrics.mean(there)
    if score == "identity" and mode.drops_zero and middle is not None and middle <= 1e-6:
        return None, 0
    return middle, len(there)


def of_person(mode: Mode, prompts: Sequence[tuple[float | None, float]]) -> tuple[float, float]:
    """Returns what one person adds to a mean as the mode takes it: a sum, and what it is over.

    Args:
      prompts: value and number of pictures of each prompt, as `prompt_value` returns them.
    """
    there = [(value, count) for value, count in prompts if value is not None]
    if not there:
        return 0.0, 0.0
    if mode.averaging == "pictures":
        return sum(value * count for value, count in there), sum(count for _, count in there)
    total = sum(value for value, _ in there)
    return (total, len(there)) if mode.averaging == "prompts" else (total / len(there), 1)
