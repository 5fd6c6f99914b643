"""The one error that a script shows as a single line. Importing it costs nothing."""


class UserError(Exception):
    """A mistake of the user or a fault in their files: a script prints it in one line and exits with code 2."""


def one_line(message: object) -> str:
    """Write an error or a text as one line of printable characters."""
    return printable(" ".join(str(message).split()))


def printable(text: str) -> str:
    """Write all that is not printable, line breaks too, as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
