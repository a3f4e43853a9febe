"""The one exception that users are meant to see."""


class UserError(ValueError):
    """Bad input: one sentence that names the file or field and says how to mend it.

    Commands print it without a stack trace and end with exit code 2.
    """
