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
