"""Bad input: the one exception that users are meant to see, and how a command ends on it."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input: one sentence that names the file or field and says how to mend it.

    Commands print it without a stack trace and end with exit code 2.
    """


@contextmanager
def reported(command: str) -> Iterator[None]:
    """Turn a UserError into one line on stderr (from rank 0 alone) and exit code 2."""
    try:
        yield
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{command}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
