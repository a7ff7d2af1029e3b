"""The strict reading of a checkpoint's `config.json`."""

import logging
from functools import cache
from typing import Any

from idea_jax.errors import InputError

log = logging.getLogger(__name__)


class UnsupportedConfig(InputError, ValueError):
    """A `config.json` asks for something the networks here do not do, or is not understood."""


# The bookkeeping of diffusers' EMAModel, which it saves among a network's settings.
OF_AVERAGES = (
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
)

_REQUIRED = object()


@cache  # a run reads the configs of its checkpoint more than once
def say_once(notice: str) -> None:
    """Logs a notice, the first time it comes up in this process."""
    log.warning(notice)


def _has_type(value: Any, kind: type) -> bool:
    return type(value) is kind or (kind is float and type(value) is int)


class ConfigReader:
    """Reads one `config.json` key by key; `close` raises unless every key was accounted for.

    `values` is the file's dictionary, `where` names the file in the error. All problems are
    collected, so that one error lists them all.
    """

    def __init__(self, values: dict, where: str):
        self.where = where
        self.problems: list[str] = []
        self.notices: list[str] = []
        self._left = dict(values)

    def take(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        """Returns the value of a used key, which must have type `kind` (an int is a float too)."""
        value = self._left.pop(name, default)
        if value is _REQUIRED:
            self.problems.append(f"{name} is missing")
        elif not _has_type(value, kind):
            self.problems.append(f"{name} = {value!r}: expected one {kind.__name__}")
        else:
            return value
        return None

    def take_list(
        self, name: str, kind: type, levels: int | None = None, default: Any = _REQUIRED
    ) -> tuple | None:
        """Returns a tuple; one value stands for `levels` equal ones where `levels` is given."""
        value = self._left.pop(name, default)
        if value is _REQUIRED:
            self.problems.append(f"{name} is missing")
        elif levels is not None and _has_type(value, kind):
            return (value,) * levels
        elif not isinstance(value, list) or not all(_has_type(item, kind) for item in value):
            self.problems.append(f"{name} = {value!r}: expected a list of {kind.__name__}")
        elif levels is not None and len(value) != levels:
            self.problems.append(f"{name} has {len(value)} entries for {levels} levels")
        else:
            return tuple(value)
        return None

    def expect(self, name: str, *allowed: Any) -> None:
        """Accepts an absent key, or one whose value is among `allowed`."""
        value = self._left.pop(name, allowed[0])
        if value is None and any(choice is False for choice in allowed):
            return  # a switch that is null is off
        # In Python False == 0 and True == 1, but a file that says one does not mean the other.
        same = [value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed]
        if not any(same):
            options = " or ".join(repr(item) for item in allowed)
            self.problems.append(f"{name} = {value!r}: only {options} is supported")

    def ignore(self, *names: str) -> None:
        """Accepts keys that change nothing of what is computed here."""
        for name in names:
            self._left.pop(name, None)

    def refuse(self, condition: bool, problem: str) -> None:
        """Adds a problem if `condition` holds."""
        if condition:
            self.problems.append(problem)

    def close(self) -> None:
        """Says all notices, or raises `UnsupportedConfig` with all problems, if there are any.

        An unknown key is a problem, but for one that is null: that switches nothing on.
        """
        unknown = []
        for name, value in self._left.items():
            if value is None:
                self.notices.append(f"unknown key {name}, which is null, is ignored")
            else:
                unknown.append(f"{name} = {value!r}: unknown key")
        if problems := self.problems + unknown:
            listing = "".join(f"\n  {problem}" for problem in problems)
            raise UnsupportedConfig(
                f"{self.where} describes a network not supported here:{listing}"
            )
        for notice in self.notices:
            say_once(f"{self.where}: {notice}")
