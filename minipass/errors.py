"""The one exception for mistakes of the user: scripts turn it into one sentence and exit status 2."""


class InputError(ValueError):
    """Something the user gave is wrong; the message is one sentence that says what and what is allowed."""
