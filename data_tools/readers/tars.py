"""Samples inside tar files, read in place without unpacking.

Implemented here because webdataset reads tars from the start; a reader needs members by key, in any order, in nested tars.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dpt.errors import UserError


@dataclass(frozen=True)
class TarMember:
    """A file inside a tar (or inside a tar in it)."""

    tar: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Return its bytes.

        Raises:
            ValueError: the tar ends before the member does.
        """
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) != self.size:
            raise ValueError(f"the tar ends within {self.name}")
        return content


def list_members(tar: Path) -> Iterator[TarMember]:
    """The regular files of a plain tar, in its order; nested tars are replaced by their own files.

    Raises:
        UserError: it is not a plain tar.
    """
    try:
        with tarfile.open(tar, "r:") as outer:
            for member in outer:
                if not member.isfile():
                    continue
                if not member.name.endswith(".tar"):
                    yield TarMember(tar, member.name, member.offset_data, member.size)
                    continue
                folder = member.name.removesuffix(".tar")
                with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
                    for nested in inner:
                        if nested.isfile():
                            yield TarMember(
                                tar, f"{folder}/{nested.name}", member.offset_data + nested.offset_data, nested.size
                            )
    except tarfile.TarError as error:
        raise UserError(f"{tar} is no plain tar ({error}); fetch it again, or unpack its compression.") from error
