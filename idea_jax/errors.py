"""The base of all errors that are no mistake of the program."""

from typing import Any


class InputError(Exception):
    """A mistake of the input, the settings or the machine: told in one message, no traceback.

    Each error of the package has it as a base, beside that of Python's own which it is.

    Args:
      advice: the end of the message, for whoever types commands.

    Attributes:
      plain: the message without that end, as a server tells it to its clients.
    """

    def __init__(self, *about: Any, advice: str = ""):
        self.plain, self.advice = str(about[0]) if about else "", advice
        super().__init__(*([self.plain + advice] if advice else about))
