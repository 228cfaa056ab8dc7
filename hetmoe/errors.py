"""The one exception type for bad input, shown by the command line as a single line with exit code 2."""


class InputError(ValueError):
    """A value given by the user is wrong; the message names the value and the fix."""
