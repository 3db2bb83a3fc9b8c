"""The errors that end a run with a message instead of a traceback."""


class InputError(ValueError):
    """The configuration or an input is wrong (exit code 2).

    The message names the key or argument, its value and the rule.
    """


class Unreachable(InputError):
    """More is to go than can go; a smaller ratio would do."""


class RunError(RuntimeError):
    """A run failed although its configuration was right (exit code 1)."""
