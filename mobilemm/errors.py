"""The one exception for what a person can get wrong: shown as a single line, without a traceback."""


class MobileMMError(Exception):
    """Wrong input or usage. The message names the file and key concerned, and the way out.

    The command line prints it as `error: …` and ends with exit code 2.
    """
