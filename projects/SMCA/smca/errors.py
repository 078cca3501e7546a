import sys


class UserError(ValueError):
    """
    Something that the user can put right. The message is one sentence that names the file or
    the config key and says what to do; command lines print it without a traceback.
    """


class ConfigError(UserError):
    """A config or an override that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or that does not fit the model."""


class NonFiniteError(UserError, FloatingPointError):
    """The loss or the gradient became nan or infinite."""


def exit_code(command, *args):
    """
    Run a command line's work.

    Returns:
        int: what `command` returns, or 1 after a :class:`UserError`, which is printed.
    """
    try:
        return command(*args)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
