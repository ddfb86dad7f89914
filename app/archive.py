"""Pictures in an uploaded zip, within limits that are checked before anything is unpacked.

Nothing is written to disk, so names in the archive can do no harm, and only one picture is in memory at a time.
"""

import io
import stat
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import overload

from app.client import Trouble
from serving.schemas import Limits

MAX_PICTURES = 500
MAX_PICTURE_BYTES = 10_000_000
MAX_TOTAL_BYTES = 1_000_000_000  # of all pictures, unpacked
MAX_RATIO = 200  # ratio of unpacked to packed size; about 1 for photographs, up to 100 for flat drawings
HARMLESS_BYTES = 50_000_000  # unpacked; the ratio isn't checked below this size
MAX_DEPTH = 16  # levels of nested folders
MAX_DIRECTORY_BYTES = 2_000_000  # size of the list of entries, which zipfile reads as a whole
SYSTEM_NAMES = ("__macosx", "@eadir", "#recycle", "$recycle.bin", "thumbs.db", "ehthumbs.db", "desktop.ini")
OTHER_ARCHIVES = {  # by their first bytes
    b"7z\xbc\xaf": "7z",
    b"Rar!": "rar",
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
EVERY_SERVICE = tuple(f".{suffix}" for kind in Limits().image_formats for suffix in kind.suffixes)
END = struct.Struct("<4s4H2LH")  # end record of a zip: signature, disks, counts, size and offset of the list, comment
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # other methods can need gigabytes to unpack
# zipfile raises NotImplementedError for unknown compression methods and for versions of the format it can't read.
ERRORS = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, OSError, ValueError)


class Pictures(Sequence[tuple[str, bytes]]):
    """The pictures of an archive, each read when it is asked for; at most MAX_PICTURE_BYTES + 1 of its bytes.

    Attributes:
      left_out: the number of other files, by suffix.
    """

    def __init__(self, archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo], left_out: Mapping[str, int]):
        self._archive, self._entries, self.left_out = archive, entries, left_out

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> tuple[str, bytes]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[str, bytes]]: ...
    def __getitem__(self, index: int | slice) -> tuple[str, bytes] | list[tuple[str, bytes]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        entry = self._entries[index]
        with self._archive.open(entry) as file:
            return entry.filename, file.read(MAX_PICTURE_BYTES + 1)


def unpack(name: str, content: bytes, suffixes: tuple[str, ...] = ()) -> Pictures:
    """Return the pictures in a zip by their paths, after reading all of it once.

    Args:
      name: of the archive, for messages.
      content: its bytes.
      suffixes: of pictures, in lower case; empty: those that every service reads.

    Raises:
      Trouble: not a zip, damaged, protected by a password, with unsafe names or links, or too large.
    """
    _check_directory(name, content)
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
        entries = [entry for entry in archive.infolist() if not _is_junk(entry)]
        for entry in entries:
            _check_entry(name, entry)
        files = [entry for entry in entries if not entry.is_dir()]
        pictures = [entry for entry in files if _suffix(entry) in (suffixes or EVERY_SERVICE)]
        left_out = Counter(_suffix(entry) or "no suffix" for entry in files) - Counter(map(_suffix, pictures))
        _check_amount(name, pictures)
        for entry in pictures:
            _read_through(archive, entry)
    except ERRORS as error:
        raise Trouble(f"{name} is a damaged zip, or none. Make it again and try once more.") from error
    return Pictures(archive, pictures, left_out)


def _check_directory(name: str, content: bytes) -> None:
    """Refuse other archives, and a list of entries that is too long."""
    if kind := next((kind for start, kind in OTHER_ARCHIVES.items() if content.startswith(start)), None):
        raise Trouble(f"{name} is a {kind} archive, not a zip. Put the pictures into a zip and try once more.")
    tail = content[-(END.size + 65_536) :]
    start = len(tail) - END.size
    if tail[-END.size : -18] != b"PK\x05\x06" or tail[-2:] != b"\0\0":  # like zipfile's search
        start = tail.rfind(b"PK\x05\x06")
    if start < 0 or start + END.size > len(tail):
        raise Trouble(f"{name} is a damaged zip, or none. Make it again and try once more.")
    size = END.unpack_from(tail, start)[5]
    large_format = tail[max(0, start - 20) : start].startswith(b"PK\x06\x07")  # Zip64, whose list can have any size
    if size > MAX_DIRECTORY_BYTES or large_format:
        raise Trouble(f"{name} holds too many files. Put the pictures alone into a zip, {MAX_PICTURES} or fewer.")


def _path(entry: zipfile.ZipInfo) -> PurePosixPath:
    return PurePosixPath(entry.filename.replace("\\", "/"))


def _suffix(entry: zipfile.ZipInfo) -> str:
    return _path(entry).suffix.lower()


def _is_junk(entry: zipfile.ZipInfo) -> bool:
    """Return whether an entry was added by a system: hidden files, thumbnails, macOS's folder."""
    parts = _path(entry).parts
    return any((part.startswith(".") and part != "..") or part.casefold() in SYSTEM_NAMES for part in parts)


def _check_entry(name: str, entry: zipfile.ZipInfo) -> None:
    path, kind = _path(entry), stat.S_IFMT(entry.external_attr >> 16)
    if path.is_absolute() or ".." in path.parts or any(":" in part for part in path.parts[:1]):
        raise Trouble(f"{name} holds a file whose name leads out of the zip. Make it again from one folder.")
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise Trouble(f"{name} holds a link or a device. Make it again with the pictures themselves.")
    if len(path.parts) > MAX_DEPTH:
        raise Trouble(f"{name} holds folders in one another, over {MAX_DEPTH} deep. Put the pictures into one folder.")
    if entry.flag_bits & 1:
        raise Trouble(f"{name} is protected by a password. Make one without.")
    if entry.compress_type not in COMPRESSIONS:
        raise Trouble(f"{name} is compressed in a way that isn't read here. Make an ordinary zip.")


def _check_amount(name: str, pictures: list[zipfile.ZipInfo]) -> None:
    if len(pictures) > MAX_PICTURES:
        raise Trouble(f"{name} holds {len(pictures)} pictures; {MAX_PICTURES} or fewer can be done at once.")
    # zipfile never unpacks more of an entry than the size in its list, so these sums are reliable.
    unpacked, packed = sum(one.file_size for one in pictures), sum(one.compress_size for one in pictures)
    if unpacked > MAX_TOTAL_BYTES or (unpacked > HARMLESS_BYTES and unpacked > MAX_RATIO * packed):
        raise Trouble(
            f"{name} would unpack to {unpacked / 1e6:.0f} MB, more than is taken. Send fewer pictures at once."
        )


def _read_through(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    """Read an entry to its end, to verify its checksum; read one that is too large only to the limit."""
    left = MAX_PICTURE_BYTES + 1
    with archive.open(entry) as file:
        while left > 0 and (part := file.read(min(left, 1 << 20))):
            left -= len(part)
