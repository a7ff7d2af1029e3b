"""What may stand in the file of a shared ID-Enhancer: what is wrong with one, in words.

A file may come from anybody. Nothing is believed that can be seen from its tensors, what is as
large as no real one is refused before it costs anything, and no text that is shown can be anything
but a text.
"""

import functools
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from idea_jax import pytrees
from idea_jax.method import shared
from idea_jax.method.modules import FACE_WIDTH, IDAdapter
from idea_jax.models import sd

# Far above what Stable Diffusion 2.1's needs, far below harm.
LIMITS = {"dim": 8192, "num_tokens": 75, "width": 65_536, "kv_rank": 1024}
LARGEST = 1e4  # beta, and the numbers of a basis, at most; real ones are about 1
BASES = ("basis", *(f"basis/{of}" for of in sd.ENCODERS))  # which files without one do not hold
UNSHOWN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # letters that make a terminal say what nobody has said
JOINERS = "\u200c\u200d"  # of the same kind, and part of words in many scripts
LISTED = 20  # an error that lists hundreds of tensors hides the interesting ones

# What `about` holds at least.
ABOUT = {
    "base_model": str,
    "revision": str | None,
    "base_weights": str,
    "face_model": str,
    "people": int,
    "pictures": int,
    "steps": int,
    "sources": list,
    "licence": str,
    "versions": dict,
}


def wrong_config(config: shared.EnhancerConfig) -> list[str]:
    """What cannot be in a config."""
    problems = []
    if config.kind not in shared.KINDS:
        problems.append(f"its kind is {config.kind!r}, expected {', '.join(shared.KINDS)}")
    for name, most in LIMITS.items():
        value = getattr(config, name)
        if type(value) is not int or not 1 <= value <= most:
            problems.append(f"its {name} is {value!r}, expected 1 to {most}")
    for name, most in {"dim_2": LIMITS["dim"], "basis": shared.LARGEST_BASIS}.items():
        value = getattr(config, name)
        if type(value) is not int or not 0 <= value <= most:
            problems.append(f"its {name} is {value!r}, expected 0 to {most}")
    for name in ("dim", "dim_2"):
        if not problems and getattr(config, name) % 8:
            problems.append(f"its {name} is {getattr(config, name)}, expected a multiple of 8")
    if type(config.beta) not in (int, float) or not 0 <= config.beta <= LARGEST:
        problems.append(f"its beta is {config.beta!r:.80}, expected 0 to {LARGEST:g}")
    if type(config.skip) is not bool:
        problems.append(f"its skip is {config.skip!r}, expected true or false")
    return problems


def wrong_about(about: Any) -> list[str]:
    """What is missing in `about`, or of another type, or should not be shown or kept."""
    if not isinstance(about, dict):
        return ["it does not say how it was made"]
    problems = [
        f"it does not say its {name}, or says {about.get(name)!r:.80}"
        for name, kind in ABOUT.items()
        if name not in about or not isinstance(about[name], kind)
    ]
    for name in ("people", "pictures", "steps"):
        if not problems and (type(about[name]) is not int or about[name] < 0):
            problems.append(f"its {name} is {about[name]!r:.80}, expected 0 or more")
    if not problems and not all(isinstance(source, str) for source in about["sources"]):
        problems.append(f"its sources are {about['sources']!r:.80}, expected a list of texts")
    for text in texts(about):
        if is_path(text):
            problems.append(f"about has a path: {text!r:.80}")
        elif any(unicodedata.category(x) in UNSHOWN and x not in JOINERS for x in text):
            problems.append(f"about has a text that is more than a line: {text!r:.80}")
    for name in ("base_weights", "face_model"):
        if not problems and not re.fullmatch(r"[0-9a-f]{64}", about[name]):
            problems.append(f"its {name} is no SHA-256: {about[name]!r:.80}")
    return problems


def wrong_tensors(config: shared.EnhancerConfig, tensors: dict[str, np.ndarray]) -> list[str]:
    """What is missing, too much, of another shape, not finite, or as no real one is."""
    names = tensors.get("names/clip_l" if config.dim_2 else "names")
    count = len(names) if names is not None and names.ndim else 0
    deltas = {name: value for name, value in tensors.items() if name.startswith("kv/")}
    want, got = expected(config, count), {k: v.shape for k, v in tensors.items() if k not in deltas}
    problems = [f"{name} is missing" for name in want if name not in got]
    problems += [f"{name} is unexpected" for name in got if name not in want]
    problems += [
        f"{name} is {got[name]}, expected {want[name]}"
        for name in want
        if name in got and got[name] != want[name]
    ]
    if (count > 0) != (config.kind == "names"):
        problems.append(f"it has {count} names, and is of kind {config.kind}")
    problems += wrong_deltas(config, {name: value.shape for name, value in deltas.items()})
    problems += [
        f"{name} is not finite"
        for name, value in tensors.items()
        if not np.isfinite(value.astype(np.float32)).all()
    ]
    scales = [value for name, value in tensors.items() if name.partition("/")[0] == "scale"]
    if not problems and not all(scale > 0 for scale in scales):
        problems.append(f"its scale is {min(scales)}, expected more than 0")
    for name in [name for name in BASES if name in tensors and not problems]:
        largest = float(np.abs(tensors[name].astype(np.float32)).max(initial=0))
        if not 0 < largest <= LARGEST:
            problems.append(
                f"the largest number of {name} is {largest:g}, expected above 0 and {LARGEST:g} at "
                "most"
            )
    return problems


def expected(config: shared.EnhancerConfig, names: int) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that follow from the config and the number of names."""
    N = config.num_tokens

    def fresh(D, key):
        known = jnp.zeros((names, N, D))
        network = config.network(D).init(key, jnp.zeros(FACE_WIDTH), jnp.zeros((N, D)), known)
        adapter = IDAdapter(D, config.beta).init(key, jnp.zeros((1, 1, D)), jnp.zeros((N, 2 * D)))
        return {
            "enhancer": network["params"],
            "adapter": adapter["params"],
            "start": jnp.zeros((N, D)),
            "scale": jnp.zeros(()),
            "names": known,
            **({"basis": jnp.zeros((config.basis, N, D))} if config.basis else {}),
        }

    found: dict[str, tuple[int, ...]] = {}
    for D, of in zip(config.widths, sd.ENCODERS, strict=False):
        tree = jax.eval_shape(functools.partial(fresh, D), jax.random.key(0))
        for name, leaf in pytrees.flatten(tree).items():
            part, slash, rest = name.partition("/")
            found[f"{part}/{of}{slash}{rest}" if config.dim_2 else name] = leaf.shape
    return found


def wrong_deltas(config: shared.EnhancerConfig, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with K/V deltas as far as their config tells; `check` compares with a UNet."""
    D, rank = sum(config.widths), config.kv_rank
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        layer, _, part = name.rpartition("/")
        if not re.fullmatch(r"kv(/(?!(?:down|up)/)\w+)+/(down|up)", name, re.ASCII):
            return [f"{name!r:.80} is unexpected"]
        layers.setdefault(layer, {})[part] = shape
    if not layers:
        return ["kv is missing"]
    return [
        f"{layer} is {parts}, expected down [{D}, {rank}] and up [{rank}, width]"
        for layer, parts in layers.items()
        if parts.get("down") != (D, rank) or len(parts.get("up", ())) != 2 or parts["up"][0] != rank
    ]


def texts(values: Any) -> Iterator[str]:
    """All texts in nested dicts and lists."""
    if isinstance(values, dict):
        values = [*values.keys(), *values.values()]
    if isinstance(values, str):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from texts(value)


def is_path(text: str) -> bool:
    """Whether a text is an absolute path, which would tell where somebody keeps files."""
    return bool(re.match(r"[/~\\]|[A-Za-z]:\\", text))


def listed(problems: list[str]) -> str:
    more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
    return "; ".join(problems[:LISTED]) + more
