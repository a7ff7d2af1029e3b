"""The base of all errors that are no mistake of the program."""


class InputError(Exception):
    """A mistake of the input, the settings or the machine: told in one message, no traceback.

    Each error of the package has it as a base, beside that of Python's own which it is.
    """
