"""What can go wrong, by kind.

Every error prior_hub raises on purpose is a `PriorHubError`; the kind says which room refused, the message says what was
found, where, how much of it, and what to do. Errors of the libraries underneath (a full disk while saving, a Trainer misuse)
pass through unchanged.
"""

from __future__ import annotations

__all__ = [
    "PriorAccessError",
    "PriorConnectionError",
    "PriorFormatError",
    "PriorHubError",
    "PriorMatchError",
    "PriorMetadataError",
    "PriorNotFoundError",
    "PriorNumericsError",
    "PriorStorageError",
    "PriorWarning",
]


class PriorHubError(Exception):
    """Base class of every error raised by prior_hub."""


class PriorFormatError(PriorHubError, ValueError):
    """A prior on disk or a configuration that is not format 1.0: truncated, altered, hostile or too new."""


class PriorMatchError(PriorHubError, ValueError):
    """The names or shapes of a prior and a model do not fit together."""


class PriorMetadataError(PriorHubError, ValueError):
    """What a prior's card must tell a reader (licence, base model, data set, results) is missing or not in the Hub's form."""


class PriorNumericsError(PriorHubError, ArithmeticError):
    """Values that are no Gaussian: NaN, infinities, variances that are not positive."""


class PriorNotFoundError(PriorHubError, FileNotFoundError):
    """No prior under that folder, repository, revision or sub-folder."""


class PriorAccessError(PriorHubError, PermissionError):
    """The Hub knows the repository but refuses: a wrong token, no permission, terms not accepted."""


class PriorConnectionError(PriorHubError, ConnectionError):
    """The Hub could not be reached, or answered with a failure of its own."""


class PriorStorageError(PriorHubError, OSError):
    """The disk under the cache or under a push said no: full, read-only, not permitted. `errno` and `filename` are its own."""


class PriorWarning(UserWarning):
    """Something works, but probably not as meant; the message names what to change."""
