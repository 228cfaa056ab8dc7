"""The exception for bad input (one line and exit code 2 on the command line), and the warning about checkpoints."""


class InputError(ValueError):
    """A value given by the user is wrong; the message names the value and the fix."""


class CheckpointWarning(UserWarning):
    """A checkpoint loads, but holds something that its user should know of."""
