"""Who lives in the drawn world: people with names, and people whom no network has ever seen.

A name is two words. The first decides one half of what a face looks like, the second the other
half (`traits.Identity`), so that any first name with any last name is a person.
"""

import functools
from collections.abc import Callable

import numpy as np

from idea_jax.mini.traits import CODE_SIZE, Traits, identity_from_code

NAMES = 1000  # first names, and as many last names
# People without a name, by use.
SPLITS = ("recognition", "scoring", "enhancer", "validation", "test")
_SEED = 2507

# Every start goes with every end, so that a vocabulary in which each name is one token stays small.
_FIRST_STARTS = """
    al an ar bel bri cal cor da del el em fa fi gal gwen ha il jo ju ka
    kel la li lu ma mel mi mo na nel or pa per ro sal sel ta ul vi zo
"""
_FIRST_ENDS = "ba bel bin da dan dia dor fin lan lia lin mar mia mon na ner nia ra ric ron sa sin"
_FIRST_ENDS += " tha vin wyn"
_LAST_STARTS = """
    ash bar beck bor bran car chad crom dal dun ed fair far gar gold hal har hol kirk lang
    lin mal mor nor oak pem quin red rid row sten stan thorn up wal wes whit win yar yew
"""
_LAST_ENDS = "berg borne bury by combe croft dale den field ford ham hurst land ley lock man mere"
_LAST_ENDS += " more ridge son stead ton well wick wood"


@functools.cache
def first_names() -> tuple[str, ...]:
    """Returns NAMES different first names, lower case; the i-th has the i-th code."""
    return _joined("first names", _FIRST_STARTS, _FIRST_ENDS)


@functools.cache
def last_names() -> tuple[str, ...]:
    """Returns NAMES different last names, lower case, none of which is a first name."""
    return _joined("last names", _LAST_STARTS, _LAST_ENDS)


def full_name(first: int, last: int) -> str:
    """Returns the name of a person, as it stands in captions: "Mira Torley"."""
    return f"{first_names()[first].title()} {last_names()[last].title()}"


def named_people() -> list[str]:
    """Returns the NAMES people of the names file: the i-th first with the i-th last name."""
    return [full_name(i, i) for i in range(NAMES)]


@functools.cache
def name_codes() -> np.ndarray:
    """Returns float32[2, NAMES, CODE_SIZE] in [0, 1): what first and last names say."""
    return _rng("name codes").random((2, NAMES, CODE_SIZE), np.float32)


def named(first: np.ndarray, last: np.ndarray) -> Traits:
    """Returns the people with these names: leaves of shape [...] for indices int[...]."""
    codes = name_codes()
    return identities(np.stack([codes[0, first], codes[1, last]], axis=-2))


def unnamed(split: str, count: int) -> Traits:
    """Returns the first `count` people without a name of a split: leaves of shape [count].

    Raises: ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: expected one of {', '.join(SPLITS)}")
    return identities(_rng(f"people for {split}").random((count, 2, CODE_SIZE), np.float32))


def identities(codes: np.ndarray) -> Traits:
    """Returns the people of codes float32[..., 2, CODE_SIZE]: leaves of shape [...]."""
    leading = codes.shape[:-2]
    flat = _identities()(codes.reshape(-1, 2, CODE_SIZE))
    return Traits(*(np.asarray(leaf).reshape(leading) for leaf in flat))


@functools.cache
def _identities() -> Callable:
    """Kept, so that it is compiled once for each number of people."""
    import jax

    return jax.jit(jax.vmap(identity_from_code))


def name_parts() -> list[str]:
    """Returns the parts that names are joined of, for the vocabulary."""
    return [
        *_FIRST_ENDS.split(),
        *_LAST_ENDS.split(),
        *_FIRST_STARTS.split(),
        *_LAST_STARTS.split(),
    ]


def _joined(what: str, starts: str, ends: str) -> tuple[str, ...]:
    names = [start + end for start in starts.split() for end in ends.split()]
    return tuple(str(name) for name in _rng(what).permutation(names))


def _rng(what: str) -> np.random.Generator:
    return np.random.default_rng([_SEED, *what.encode()])
