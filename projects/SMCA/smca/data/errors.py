"""The error of data sets."""

from smca.errors import UserError


class DatasetError(UserError):
    """A data set that cannot be used as it is.

    The message names the file (and the image or annotation) and says what to do about it.
    """
