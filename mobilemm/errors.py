"""The one exception for what a person can get wrong: shown as a single line, without a traceback."""


class MobileMMError(Exception):
    """Wrong input or usage. The message names the file and key concerned, and the way out.

    The command line prints it as `error: …` and ends with exit code 2.
    """


def one_line(message: object, most: int = 400) -> str:
    """A library's error as a part of ours: on one line, and not longer than a person reads."""
    text = " ".join(str(message).split()) or type(message).__name__
    return text if len(text) <= most else f"{text[:most]} …"
