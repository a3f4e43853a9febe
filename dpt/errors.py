"""Bad input: the one exception that users are meant to see, and how it ends a command."""

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_PASSWORD = re.compile(r"(?<=://)([^/\s:@\"']*):([^/\s\"']+)@")
HIDDEN = "***"
"""Replacement for passwords in addresses that are written anywhere."""


def hide_passwords(text: str) -> str:
    """Replace the password in every address in the text, such as http://USER:PASSWORD@HOST, by `HIDDEN`."""
    return _PASSWORD.sub(rf"\1:{HIDDEN}@", text)


class UserError(ValueError):
    """Bad input: one sentence that names the file or field and says how to fix it.

    Commands print it without a stack trace and end with exit code 2.
    """


@contextmanager
def naming(source: object) -> Iterator[None]:
    """Prefix a UserError with the file, folder or weights that it is about, unless it begins with them."""
    try:
        yield
    except UserError as error:
        sentence = str(error)
        raise UserError(sentence if sentence.startswith(str(source)) else f"{source}: {sentence}") from error


_DISKS = {errno.ENOSPC, errno.EDQUOT}
_FILES = _DISKS | {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EFBIG,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EIO,
    errno.ENOTEMPTY,
    errno.EBUSY,
    errno.EINVAL,
}
"""Problems with files that users name: their paths, rights and disks."""


def file_problem(error: OSError) -> str:
    """Describe, in a sentence, a problem with a file or folder that a command uses; empty for errors of other kinds."""
    if error.errno not in _FILES or (error.filename is None and error.errno not in _DISKS):
        return ""
    reason = (error.strerror or str(error)).lower()
    if error.filename is None:
        return f"a file cannot be written ({reason}); make room."
    which = error.filename2 or error.filename  # for a move, the target
    name = os.fsdecode(which) if isinstance(which, bytes) else str(which)
    name = name if len(name) <= 200 else f"{name[:197]}..."
    fix = "make room" if error.errno in _DISKS else "check the path and the rights to it"
    return f"{name}: cannot be read or written ({reason}); {fix}."


@contextmanager
def reported(command: str, *, by_rank: bool = False) -> Iterator[None]:
    """Turn a UserError, or an OSError about a file, into one line on stderr and exit code 2.

    The one place where file errors become sentences: commands open and write files without checks. A UserError is that of all
    ranks, so only rank 0 reports it, unless ranks fail independently (`by_rank`). An interrupt (Ctrl-C) ends with exit code
    130, without a stack trace.
    """
    try:
        yield
    except UserError as error:
        if by_rank or os.environ.get("RANK", "0") == "0":
            print(f"{command}: error: {hide_passwords(str(error))}", file=sys.stderr, flush=True)
        sys.exit(2)
    except OSError as error:
        if not (problem := file_problem(error)):
            raise
        print(f"{command}: error: {problem}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{command}: interrupted.", file=sys.stderr, flush=True)
        sys.exit(130)
