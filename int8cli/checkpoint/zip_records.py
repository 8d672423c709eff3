"""The directory of a zip archive as torch.save writes it: uncompressed records, all below one directory.

Owns what is required of an archive, at least as much as torch's own reader requires (PKWARE's APPNOTE, 4.3): the whole
directory is used, every record begins where the directory says, and no two overlap. Limits how much is read. Knows no
record's meaning.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO

from int8cli.checkpoint.disk import GET_IT_AGAIN
from int8cli.errors import CorruptShardError

LOCAL_MAGIC = b"PK\x03\x04"
_ENTRY_MAGIC, _END_MAGIC = b"PK\x01\x02", b"PK\x05\x06"
_END64_MAGIC, _LOCATOR_MAGIC = b"PK\x06\x06", b"PK\x06\x07"
_LOCAL = struct.Struct("<4s5H3I2H")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")
_TAIL_BYTES = _END.size + 0xFFFF + _LOCATOR.size
_DIRECTORY_LIMIT_BYTES = 1 << 25  # about 100 bytes a record
_PLAIN_FLAGS = 0x8 | 0x800  # sizes follow the data, names are UTF-8; the others mean encryption and patches (4.4.4)
_DIRECTORY_ATTRIBUTE = 0x10
_ZIP64_FIELD = 1
# These are read together with their local headers, since going back is expensive over HTTP: the pickle up to this size,
# and small records.
_PICKLE = "data.pkl"
_EARLY_PICKLE_BYTES = 1 << 22
_WORD_BYTES = 64


@dataclass(frozen=True, slots=True)
class ZipRecord:
    """A record. `name` is without the archive's directory; the bytes are `size_bytes` from `offset_bytes` on.

    `is_stored`: the record is neither compressed nor encrypted.
    """

    name: str
    offset_bytes: int
    size_bytes: int
    crc32: int
    is_stored: bool


@dataclass(frozen=True, slots=True)
class _Entry:
    """The directory's entry for a record. `raw_name` is its full name."""

    raw_name: bytes
    header_offset: int
    size_bytes: int
    crc32: int
    is_stored: bool


@dataclass(frozen=True, slots=True)
class _Directory:
    offset_bytes: int
    size_bytes: int
    entries: int


class ZipRecords:
    """The records of an archive of `file_bytes` bytes, by name. Raises CorruptShardError for a damaged one."""

    def __init__(self, file: BinaryIO, file_name: str, file_bytes: int) -> None:
        self._file, self._file_name, self._file_bytes = file, file_name, file_bytes
        self._read_early: dict[str, bytes] = {}
        directory = self._directory()
        entries = list(self._entries(directory))
        self.by_name = {record.name: record for record in self._placed(entries, directory.offset_bytes)}
        if len(self.by_name) != len(entries):
            names = sorted(entry.raw_name for entry in entries)
            twice = next(name for name, after in pairwise(names) if name == after)
            raise CorruptShardError(f"{file_name}: the archive has two records named {_shown(twice)}")

    def require_stored(self) -> None:
        """Raise CorruptShardError if a record is compressed or encrypted."""
        packed = next((record.name for record in self.by_name.values() if not record.is_stored), None)
        if packed is not None:
            raise CorruptShardError(
                f"{self._file_name}: the record {packed!r:.120} is compressed or encrypted; torch.save does neither",
                hint="Unpack the archive and pack it again without compression, or save the model again.",
            )

    def read(self, name: str, limit_bytes: int) -> bytes:
        """A record's bytes. Raises CorruptShardError if it is larger than the limit or its checksum is wrong."""
        record = self.by_name[name]
        if record.size_bytes > limit_bytes:
            raise CorruptShardError(
                f"{self._file_name}: the record {name!r} has {record.size_bytes:,} bytes, more than it can need"
            )
        data = self._read_early.pop(name, None) or self._bytes(record.offset_bytes, record.size_bytes)
        # torch.save writes zeros in place of all checksums after torch.serialization.set_crc32_options(False).
        if record.crc32 and zlib.crc32(data) != record.crc32:
            raise CorruptShardError(
                f"{self._file_name}: the checksum of the record {name!r} is wrong", hint=GET_IT_AGAIN
            )
        return data

    def _directory(self) -> _Directory:
        start = max(0, self._file_bytes - _TAIL_BYTES)
        tail = self._bytes(start, self._file_bytes - start)
        at = tail.rfind(_END_MAGIC)
        if at < 0 or len(tail) - at < _END.size:
            raise self._broken("it has no directory at its end")
        _, disk, first_disk, entries_here, entries, size, offset, comment = _END.unpack_from(tail, at)
        if disk or first_disk or entries_here != entries or at + _END.size + comment != len(tail):
            raise self._broken("the end of its directory is damaged")
        found, end = _Directory(offset, size, entries), start + at
        locator = tail[at - _LOCATOR.size : at] if at >= _LOCATOR.size else b""
        if locator.startswith(_LOCATOR_MAGIC):
            found, end = self._directory64(found, locator, end - _LOCATOR.size)
        if found.offset_bytes + found.size_bytes != end or found.size_bytes < found.entries * _ENTRY.size:
            raise self._broken("its directory is not where its end record says")
        if found.size_bytes > _DIRECTORY_LIMIT_BYTES:
            raise self._broken(f"its directory has {found.size_bytes:,} bytes, more than any checkpoint needs")
        return found

    def _directory64(self, short: _Directory, locator: bytes, locator_offset: int) -> tuple[_Directory, int]:
        """The directory by the 64-bit end record, which must agree with the short one, and that record's place."""
        _, disk, end, disks = _LOCATOR.unpack(locator)
        if disk or disks != 1 or end + _END64.size > locator_offset:
            raise self._broken("the locator of its directory is damaged")
        magic, size, _, _, disk, first_disk, entries_here, entries, directory_bytes, offset = _END64.unpack(
            self._bytes(end, _END64.size)
        )
        whole = magic == _END64_MAGIC and end + 12 + size == locator_offset
        if not whole or disk or first_disk or entries_here != entries:
            raise self._broken("the end of its directory is damaged")
        found = _Directory(offset, directory_bytes, entries)
        if short != _Directory(min(offset, 0xFFFFFFFF), min(directory_bytes, 0xFFFFFFFF), min(entries, 0xFFFF)):
            raise self._broken("the two ends of its directory differ")
        return found, end

    def _entries(self, directory: _Directory) -> Iterator[_Entry]:
        data = self._bytes(directory.offset_bytes, directory.size_bytes)
        at = 0
        for _ in range(directory.entries):
            if len(data) - at < _ENTRY.size:
                raise self._broken("its directory is cut off")
            entry, at = self._entry(data, at)
            yield entry
        if at != len(data):
            raise self._broken("its directory has more than its entries")

    def _entry(self, data: bytes, at: int) -> tuple[_Entry, int]:
        fields = _ENTRY.unpack_from(data, at)
        magic, _, _, flags, method, _, _, crc32, packed, size = fields[:10]
        name_bytes, extra_bytes, comment_bytes, disk, _, attributes, offset = fields[10:]
        begin = at + _ENTRY.size
        name, extra = data[begin : begin + name_bytes], data[begin + name_bytes : begin + name_bytes + extra_bytes]
        after = begin + name_bytes + extra_bytes + comment_bytes
        is_directory = attributes & _DIRECTORY_ATTRIBUTE and size  # torch would read nothing
        if magic != _ENTRY_MAGIC or after > len(data) or disk or is_directory:
            raise self._broken("an entry of its directory is damaged")
        size, packed, offset = self._wide(extra, size, packed, offset)
        is_stored = not method and not flags & ~_PLAIN_FLAGS and size == packed
        return _Entry(name, offset, packed, crc32, is_stored), after

    def _wide(self, extra: bytes, *short: int) -> Iterator[int]:
        """Sizes and offset. Those that need 64 bits are in an extra field (4.5.3)."""
        wide, at = b"", 0
        while len(extra) - at >= 4:
            tag, length = struct.unpack_from("<2H", extra, at)
            if tag == _ZIP64_FIELD:
                wide = extra[at + 4 : at + 4 + length]
            at += 4 + length
        for value in short:
            if value == 0xFFFFFFFF:
                if len(wide) < 8:
                    raise self._broken("an entry of its directory is damaged")
                value, wide = int.from_bytes(wide[:8], "little"), wide[8:]
            yield value

    def _placed(self, entries: list[_Entry], end_of_records: int) -> Iterator[ZipRecord]:
        """Each record with its place, in file order. Checks that all are in one directory and none overlap."""
        end, before = 0, b""
        for entry in sorted(entries, key=lambda entry: entry.header_offset):
            if entry.header_offset < end:
                raise CorruptShardError(
                    f"{self._file_name}: the record {_shown(entry.raw_name)} overlaps {_shown(before)}"
                )
            begin = entry.header_offset + self._local_header_bytes(entry, end_of_records)
            end, before = begin + entry.size_bytes, entry.raw_name
            if end > end_of_records:
                raise CorruptShardError(
                    f"{self._file_name}: the record {_shown(entry.raw_name)} ends at byte {end:,}, the records end at "
                    f"{end_of_records:,}",
                    hint=GET_IT_AGAIN,
                )
            directory, _, name = entry.raw_name.partition(b"/")
            if b"/" not in entry.raw_name or directory != entries[0].raw_name.partition(b"/")[0]:
                raise self._broken(f"the record {_shown(entry.raw_name)} is not in the directory of the others")
            record = ZipRecord(self._decoded(name), begin, entry.size_bytes, entry.crc32, entry.is_stored)
            if record.size_bytes <= (_EARLY_PICKLE_BYTES if record.name == _PICKLE else _WORD_BYTES):
                self._read_early[record.name] = self._bytes(begin, record.size_bytes)
            yield record

    def _local_header_bytes(self, entry: _Entry, end_of_records: int) -> int:
        """The length of the header in front of a record's data. Raises CorruptShardError if the header is not there."""
        length = _LOCAL.size + len(entry.raw_name)
        header = b""
        if entry.header_offset + length <= end_of_records:
            header = self._bytes(entry.header_offset, length)
        if not header.startswith(LOCAL_MAGIC) or header[_LOCAL.size :] != entry.raw_name:
            raise self._displaced(entry)
        _, _, flags, method, *_, name_bytes, extra_bytes = _LOCAL.unpack_from(header)
        if name_bytes != len(entry.raw_name) or (entry.is_stored and (method or flags & ~_PLAIN_FLAGS)):
            raise self._displaced(entry)
        return length + int(extra_bytes)

    def _displaced(self, entry: _Entry) -> CorruptShardError:
        return CorruptShardError(
            f"{self._file_name}: the record {_shown(entry.raw_name)} does not begin at byte {entry.header_offset:,}, "
            "where the archive's directory says",
            hint=GET_IT_AGAIN,
        )

    def _decoded(self, name: bytes) -> str:
        try:
            return name.decode()
        except UnicodeDecodeError as error:
            raise self._broken(f"the name {_shown(name)} is not UTF-8") from error

    def _bytes(self, offset_bytes: int, count: int) -> bytes:
        self._file.seek(offset_bytes)
        data = self._file.read(count)
        if len(data) != count:
            raise self._broken("it is truncated")
        return data

    def _broken(self, why: str) -> CorruptShardError:
        return CorruptShardError(f"{self._file_name}: damaged zip archive: {why}", hint=GET_IT_AGAIN)


def _shown(name: bytes) -> str:
    return f"{name.decode(errors='backslashreplace')!r:.120}"
