"""The exception for bad input (one line and exit code 2 on the command line), and the warning about checkpoints."""


class InputError(ValueError):
    """A value given by the user is wrong; the message names the value and the fix."""


class CheckpointWarning(UserWarning):
    """A checkpoint loads, but holds something that its user should know of."""


class Interrupted(Exception):  # noqa: N818 (no error: the user asked for it)
    """Ctrl-C in a job that keeps what it has done; the message says what that is."""
