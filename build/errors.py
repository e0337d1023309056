"""What a build says when it cannot go on."""


class BuildError(Exception):
    """A checkpoint, catalog entry or folder cannot be built; the message says what to change."""


class NotAdoptedError(BuildError):
    """A checkpoint comes as an exported graph, which the runtime that was asked for does not run."""
