"""The one kind of error that a user can put right."""


class UserError(Exception):
    """Something the user can put right; its text is the one line that says how."""

    exit_code = 2

    def __init__(self, text: str) -> None:
        # one line that steers no terminal, whatever the name of a file holds
        super().__init__("".join(char if char.isprintable() else ascii(char)[1:-1] for char in text))
