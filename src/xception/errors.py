"""The errors a caller can meet. Each message is one line: what was expected, and what came.

`assert` is kept for our own bugs. All kinds are `ValueError`s, so that callers who know nothing of this
package still catch wrong input with the standard word.
"""

from __future__ import annotations


class XceptionError(ValueError):
    """Wrong input of any kind; the command line turns it into one line and exit status 2."""


class ConfigError(XceptionError):
    """An unknown name, or a setting out of its range."""


class MissingPackageError(ConfigError):
    """Something needs a package that is not installed; the message says how to get it."""


class DataError(XceptionError):
    """A data source that cannot be used: missing, empty, malformed, or too many bad images."""


class ImageError(DataError):
    """One image that cannot be decoded, or that is over the limits; the message does not name the file."""


class WeightsError(XceptionError):
    """A weights file or checkpoint that is missing, damaged, or does not fit the model."""


class TrainingError(XceptionError):
    """Training that cannot go on, such as a loss that stays non-finite."""
