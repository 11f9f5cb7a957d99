"""The two errors that a main turns into one line and an exit code."""


class UsageError(ValueError):
    """Bad use: the message is one clear line saying what is wrong and what would be right.

    Mains print it and exit with 2.
    """


class TrainingError(RuntimeError):
    """The run cannot go on: one clear message; mains print it and exit with 1."""
