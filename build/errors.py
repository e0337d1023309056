"""What a build says when it cannot go on."""


class BuildError(Exception):
    """A checkpoint, catalog entry or folder cannot be built; the message says what to change."""


class NotPackedError(BuildError):
    """A checkpoint's graph is not one on packed tokens, and the runtime that was asked for runs no other."""
