"""Versions of what writes files, and what a run would change in the settings of an earlier one."""

import functools
import importlib.metadata
import platform

from idea_jax import __version__

# In a checkpoint, beside the settings of its run: with what it was written.
VERSIONS, ORBAX = "versions", "orbax-checkpoint"


def versions() -> dict[str, str]:
    """Versions of what decides the numbers of a run."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "transformers", "pillow")
    found = {name: installed(name) for name in packages}
    return {"idea_jax": __version__, "python": platform.python_version(), **found}


@functools.cache
def installed(package: str) -> str:
    """The version of a package; each picture tells it, and reading it takes half a millisecond."""
    return importlib.metadata.version(package)


def marks_of(fingerprint: dict) -> dict:
    """A run's fingerprint with the versions of what writes it, which may be others when the run is
    gone on with: see `difference`."""
    return fingerprint | {VERSIONS: versions() | {ORBAX: importlib.metadata.version(ORBAX)}}


def difference(before: dict, now: dict) -> str:
    """What a run would change in the settings of an earlier one, and which versions differ then;
    empty if no setting does.

    Args:
      before: as `marks_of` gave it, perhaps long ago.
      now: the fingerprint.
    """

    def said(value):  # a fingerprint has None for a default, and for what does not apply
        return "not given" if value is None else value

    changed = [
        f"{k}: {said(before.get(k))} -> {said(v)}" for k, v in now.items() if before.get(k) != v
    ]
    return ", ".join(changed) + other_versions(before) if changed else ""


def other_versions(before: dict) -> str:
    """Words on what is of another version now than when `marks_of` was called; empty if nothing is,
    or if it is not known."""
    now = marks_of({})[VERSIONS]
    there = before.get(VERSIONS)
    there = there if isinstance(there, dict) else {}
    others = [f"{k} {v} (now {now[k]})" for k, v in there.items() if now.get(k, v) != v]
    return f"; it was written with {', '.join(others)}" if others else ""
