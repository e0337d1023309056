"""How a backfill ends that cannot go on."""


class BackfillError(Exception):
    """The message is one sentence that says what is wrong, where, and what to change."""
