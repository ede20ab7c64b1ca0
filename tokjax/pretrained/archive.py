"""Members of a zip archive: those that are stored as they are get mapped, compressed ones are unpacked when asked for.

Checksums of mapped members are not computed: that would read the whole file, and torch can write archives without.
"""

from collections.abc import Iterator
from pathlib import Path
import zipfile
import zlib

import numpy as np

from tokjax.errors import UserError
from tokjax.pretrained.stored import map_bytes

_DAMAGE = (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError, ValueError)

# Torch and numpy hardly compress weights; what shrinks more is made to fill the memory.
_RATIO, _SMALL = 64, 1 << 20


class Archive:
    """A zip archive, opened for reading.

    Args:
        path: of the archive.

    Raises:
        UserError: it is truncated or damaged; so do all methods.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                self._members = {member.filename: member for member in archive.infolist()}
        except _DAMAGE as error:
            raise UserError(f"{path} is not a whole zip archive, perhaps cut off: {error}") from error
        self._bytes = map_bytes(path)

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def size(self, name: str) -> int:
        """Bytes of a member, unpacked."""
        return self._members[name].file_size

    def read(self, name: str, most: int | None = None) -> np.ndarray:
        """The bytes of a member, uint8 [size], or the first `most` of them."""
        member = self._members[name]
        length = member.file_size if most is None else min(most, member.file_size)
        if member.compress_type == zipfile.ZIP_STORED and not member.flag_bits & 1:
            start = self._start(member)
            found = self._bytes[start : start + length]
        else:
            if member.file_size > _RATIO * member.compress_size + _SMALL:
                raise UserError(
                    f"{self.path}: {name} unpacks to {member.file_size} bytes, which is no file of weights."
                )
            try:
                with zipfile.ZipFile(self.path) as archive, archive.open(member) as file:
                    found = np.frombuffer(file.read(length), np.uint8)
            except _DAMAGE as error:
                raise UserError(f"{self.path}: {name} cannot be unpacked: {error}") from error
        if len(found) != length:
            raise UserError(f"{self.path}: {name} is cut off.")
        return found

    def _start(self, member: zipfile.ZipInfo) -> int:
        """Where the bytes of a stored member begin: behind its local header, whose two last fields vary in length."""
        header = self._bytes[member.header_offset :][:30].tobytes()
        if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
            raise UserError(f"{self.path}: {member.filename} is not where the archive's directory says.")
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return member.header_offset + 30 + lengths
