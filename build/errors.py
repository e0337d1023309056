"""What a build says when it cannot go on."""


class BuildError(Exception):
    """A checkpoint, catalog entry or folder cannot be built; the message says what to change."""


class UnsupportedRuntimeError(BuildError):
    """The runtime that was asked for does not run this model; the message names those that do."""
