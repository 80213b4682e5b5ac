"""The one error that a wrong input ends in."""


class InputError(SystemExit):
    """A wrong input: its message is one line that says what is wrong, in which file or flag, and what to do.

    It is a ``SystemExit``, so every ns-* command prints the line and ends with exit code 1, without a traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(f"infnerf: {' '.join(message.split())}")
