"""What an evaluation found, as one page and as a Markdown table."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from idea_jax.data.images import ImageError
from idea_jax.evaluation import page as parts
from idea_jax.evaluation.looking import thumbnail
from idea_jax.evaluation.page import Point, escape, interval, number, words
from idea_jax.evaluation.scoring import ALL, SCORES, ScoredPicture, is_judged

SIDE = 112  # of a picture in the page, in pixels
PEOPLE, PROMPTS, LISTED = 24, 16, 200  # shown at most; a page of thousands opens nowhere
MANY = 6  # methods: of more, the table has the differences to the first alone
HEADS = {
    "identity": "identity, faces found",
    "identity_zero": "identity, misses as 0",
    "detected": "faces found",
    "held_out": "identity, held-out photos",
    "copy_paste": "copy-paste",
    "prompt_score": "prompt (CLIP)",
    "image_score": "image (CLIP)",
    "diversity": "diversity",
}
FORMS = {"detected": ".1%"}


def page(
    rows: Sequence[ScoredPicture],
    shown: tuple[Sequence[Path], Mapping[str, Sequence[Path]]] | None,
    summary: dict,
    about: dict,
) -> str:
    """Returns the report as HTML that needs no other file.

    Args:
      shown: paths of the pictures, in the order of rows, and the photos of each person; None for a
        page without any.
      summary: of `scoring.summarise`, with `seconds` by method.
      about: settings and versions, in dictionaries.
    """
    headline = summary["headline"]
    warning = (
        "This page holds photos of people and shows pictures that a model made; do not pass it on "
        "without their consent."
        if shown
        else "This page shows nobody: photos and pictures were left out."
    )
    body = [
        "<h1>Does it keep the face, and does it follow the prompt?</h1>",
        f"<p>Mode <b>{escape(summary['mode'])}</b>; first number: {escape(HEADS[headline])}. "
        "Means over people with 95% bootstrap intervals, but for prompts of the group style, which "
        "stand apart: recognisers are brittle on drawings. Floor: other people's photos. Ceiling: "
        f"pairs of true photos of one person. {warning}</p>",
        "<h2>Methods</h2>",
        methods(summary),
        "<h2>Identity against prompt</h2>",
        plot(summary),
        "<h2>Differences on the same people</h2>",
        differences(summary),
        "<h2>By group of prompts</h2>",
        groups(summary),
        "<h2>People, the worst first</h2>",
        people(summary),
        "<h2>Pictures</h2>" + grids(rows, *shown, summary) if shown else "",
        "<h2>What could not be scored</h2>",
        unscored(rows, summary),
        "<h2>What ran</h2>",
    ]
    for name, values in about.items():
        lines = parts.table(["what", "value"], _lines(values), name)
        body.append(f"<h3>{escape(name)}</h3>{lines}")
    return parts.document("Evaluation", "\n".join(body))


def intervals(values: Mapping, order: Sequence[str], sign: str = "") -> list[str]:
    """The cells of some scores, in order."""
    return [interval(values[score], sign + FORMS.get(score, ".3f")) for score in order]


def _lines(values: Mapping) -> list[list[str]]:
    return [[words(name), words(value)] for name, value in values.items()]


def methods(summary: dict) -> str:
    """A row a method, then floor and ceiling."""
    order = _order(summary)
    rows = []
    for name, found in summary["methods"].items():
        seconds = summary["seconds"].get(name, {})
        rows.append(
            [
                words(name),
                *intervals(found[ALL], order),
                number(found[ALL]["pictures"], "d"),
                number(_ratio(seconds, "training", "learned"), ".1f"),
                number(_ratio(seconds, "drawing", "drawn"), ".2f"),
            ]
        )
    for name in ("floor", "ceiling"):
        cells = [
            interval(summary[name]) if score in (summary["headline"], "identity") else number(None)
            for score in order
        ]
        rows.append([words(name), *cells, *[number(None)] * 3])
    heads = ["method", *(HEADS[score] for score in order), "pictures", "seconds to learn a person"]
    return parts.table([*heads, "seconds to draw a picture"], rows, "methods")


def _order(summary: dict) -> list[str]:
    """The scores with the mode's first number in front."""
    first = summary["headline"]
    return [first, *(score for score in SCORES if score != first)]


def _ratio(values: Mapping[str, float], above: str, below: str) -> float | None:
    return values[above] / values[below] if values.get(below) else None


def plot(summary: dict) -> str:
    """Identity against prompt, with floor and ceiling."""
    first, points = summary["headline"], []
    for name, found in summary["methods"].items():
        x, y = found[ALL]["prompt_score"], found[ALL][first]
        if x is None or y is None:
            continue
        dots = [
            (own["prompt_score"], own[first])
            for own in summary["people"][name].values()
            if own["prompt_score"] is not None and own[first] is not None
        ]
        spread = ("mean", "low", "high")
        points.append(Point(name, tuple(x[k] for k in spread), tuple(y[k] for k in spread), dots))
    if not points:
        return "<p>No method has both scores, so there is no plot.</p>"
    bounds = {
        name: summary[name]["mean"] if summary[name] else None for name in ("ceiling", "floor")
    }
    return parts.scatter(points, (HEADS["prompt_score"], HEADS[first]), bounds)


def differences(summary: dict) -> str:
    """A row for each two methods."""
    if not summary["differences"]:
        return "<p>There is one method.</p>"
    order = _order(summary)
    rows = [
        [
            words(" - ".join(found["methods"])),
            *intervals(found, order, "+"),
        ]
        for found in summary["differences"]
    ]
    return parts.table(["methods", *(HEADS[score] for score in order)], rows, "differences")


def groups(summary: dict) -> str:
    """A row for each method and group."""
    order = _order(summary)
    rows = [
        [
            words(name),
            words(group),
            *intervals(values, order),
            number(values["pictures"], "d"),
        ]
        for name, found in summary["methods"].items()
        for group, values in found.items()
        if group != ALL
    ]
    heads = ["method", "group", *(HEADS[score] for score in order), "pictures"]
    return parts.table(heads, rows, "groups")


def worst_first(summary: dict) -> list[tuple[str, str]]:
    """(method, person), from the lowest first number to the highest, then those who have none."""
    found = [(name, who) for name, people in summary["people"].items() for who in people]

    def value(pair):
        own = summary["people"][pair[0]][pair[1]][summary["headline"]]
        return (own is None, own or 0.0)

    return sorted(found, key=value)


def people(summary: dict) -> str:
    """A row for each method and person."""
    order = _order(summary)
    rows = []
    for name, who in worst_first(summary):
        own = summary["people"][name][who]
        rows.append(
            [
                words(who),
                words(name),
                *[number(own[score], FORMS.get(score, ".3f")) for score in order],
                number(summary["floors"].get(who)),
                number(summary["ceilings"].get(who)),
            ]
        )
    heads = ["person", "method", *(HEADS[score] for score in order), "floor", "ceiling"]
    return parts.table(heads, rows, "people")


def grids(
    rows: Sequence[ScoredPicture],
    paths: Sequence[Path],
    photos: Mapping[str, Sequence[Path]],
    summary: dict,
) -> str:
    """Of each person a photo, and the first picture of each prompt; the worst people first."""
    pairs = worst_first(summary)
    found = []
    if len(pairs) > PEOPLE:
        found.append(f"<p>The {PEOPLE} worst of {len(pairs)}.</p>")
    own_rows: dict[tuple[str, str], dict[str, tuple[ScoredPicture, Path]]] = {}
    for row, path in zip(rows, paths, strict=True):
        own_rows.setdefault((row.method, row.person), {}).setdefault(row.prompt, (row, path))
    for method, who in pairs[:PEOPLE]:
        figures = [figure(path, "photo", False) for path in list(photos.get(who, ()))[:1]]
        own = list(own_rows.get((method, who), {}).values())
        for row, path in own[:PROMPTS]:
            value = row.identity
            said = "no face" if value is None else f"{value:.2f}"
            figures.append(figure(path, f"{row.prompt}: {said}", True))
        left = len(own) - PROMPTS
        more = f"<p class=dim>and {left} more prompts</p>" if left > 0 else ""
        found.append(f"<h3>{escape(who)}, {escape(method)}</h3>{''.join(figures)}{more}")
    return "".join(found) or "<p>There is no picture.</p>"


def figure(path: Path, caption: str, is_generated: bool) -> str:
    """A picture of a file; words where it cannot be read."""
    try:
        return parts.picture(thumbnail(path, SIDE), caption, is_generated=is_generated)
    except (ImageError, OSError):
        text = f"{caption}: it cannot be read"
        return f"<figure><figcaption>{escape(text)}</figcaption></figure>"


def unscored(rows: Sequence[ScoredPicture], summary: dict) -> str:
    """What went wrong, one line each."""
    lines = [
        [words(p["method"]), words(p["person"]), words(p["what"]), words(p["why"])]
        for p in summary["problems"]
    ]
    lines += [
        [words(row.method), words(row.person), words(row.picture), words(row.error)]
        for row in rows
        if row.error is not None
    ]
    missed = [row for row in rows if row.faces == 0 and is_judged(row)]
    said = f"<p>{len(missed)} pictures have no face on them; they count in the numbers above.</p>"
    if len(lines) > LISTED:
        said += f"<p>The first {LISTED} of {len(lines)}; rows.csv has all.</p>"
    return said + parts.table(["method", "person", "what", "why"], lines[:LISTED], "problems")


def markdown(summary: dict, about: dict) -> str:
    """The tables of methods and differences as a document, with what they were measured with.

    Args:
      summary, about: as of `page`.
    """

    def said(estimate, form):
        if estimate is None:
            return ""
        text = f"{estimate['mean']:{form}}"
        if estimate["low"] is not None:
            text += f" ({estimate['low']:{form}} to {estimate['high']:{form}})"
        return text

    def plain(name):
        return str(name).replace("|", "\\|").replace("\n", " ")

    order = _order(summary)
    scores = [s for s in order if any(m[ALL][s] for m in summary["methods"].values())]
    settings, people = about["settings"], len(summary["floors"])
    model = settings.get("pretrained_model_name_or_path", "pictures that were there already")
    lines = [
        "# Results",
        "",
        f"{people} people, {plain(model)}, mode {summary['mode']}. Means over people with 95% "
        "bootstrap intervals; prompts of",
        "the group style stand apart, in the report. [evaluation.md](evaluation.md) has the "
        "formulas.",
        "",
        f"| | {' | '.join(HEADS[s] for s in scores)} | seconds to learn a person |",
        f"|---|{'---|' * (len(scores) + 1)}",
    ]
    for name, found in summary["methods"].items():
        cells = [said(found[ALL][s], FORMS.get(s, ".3f")) for s in scores]
        seconds = _ratio(summary["seconds"].get(name, {}), "training", "learned")
        last = "" if seconds is None else f"{seconds:.1f}"
        lines.append(f"| {plain(name)} | {' | '.join(cells)} | {last} |")
    for name in ("floor", "ceiling"):
        cells = [said(summary[name], ".3f") if s == summary["headline"] else "" for s in scores]
        lines.append(f"| {name} | {' | '.join(cells)} | |")
    if summary["differences"]:
        lines += ["", "## Differences on the same people", ""]
        lines.append(f"| | {' | '.join(HEADS[s] for s in scores)} |")
        lines.append(f"|---|{'---|' * len(scores)}")
        # Of many methods, those to the first: the page has all of them.
        first = next(iter(summary["methods"])) if len(summary["methods"]) > MANY else None
        for found in summary["differences"]:
            if first not in (None, *found["methods"]):
                continue
            cells = [said(found[s], f"+{FORMS.get(s, '.3f')}") for s in scores]
            lines.append(f"| {plain(' - '.join(found['methods']))} | {' | '.join(cells)} |")
    lines += ["", "## What ran", ""]
    lines += [f"* {plain(name)}: {plain(value)}" for name, value in settings.items()]
    lines += [f"* {plain(name)}: {plain(value)}" for name, value in about["models"].items()]
    lines += [f"* {plain(name)}: {plain(value)}" for name, value in about["machine"].items()]
    lines.append("* " + ", ".join(f"{name} {value}" for name, value in about["versions"].items()))
    return "\n".join(lines) + "\n"
