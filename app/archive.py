"""Pictures in a zip that a stranger made."""

import io
import stat
import zipfile
from pathlib import PurePosixPath

import parts
from service import Trouble

MAX_PICTURES = 500
SUFFIXES = tuple(f".{kind}" for kind in parts.KINDS)


def unpack(name: str, content: bytes) -> list[tuple[str, bytes]]:
    """Return the pictures in a zip, by their place in it. Nothing is written anywhere, so that no path in it can harm.

    Raises:
      Trouble: no zip, a protected one, or too much in it.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = [entry for entry in archive.infolist() if _is_picture(entry)]
            if len(entries) > MAX_PICTURES:
                raise Trouble(f"{name} holds {len(entries)} pictures; {MAX_PICTURES} or fewer can be done at once.")
            return [(entry.filename, _read(archive, entry)) for entry in entries]
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError) as error:
        raise Trouble(f"{name} is a damaged zip, or none. Make it again and try once more.") from error
    except RuntimeError as error:  # how zipfile says that a password is needed
        raise Trouble(f"{name} is protected by a password. Make one without.") from error


def _is_picture(entry: zipfile.ZipInfo) -> bool:
    path = PurePosixPath(entry.filename.replace("\\", "/"))
    hidden = any(part.startswith((".", "__MACOSX")) and part != ".." for part in path.parts)
    link = stat.S_ISLNK(entry.external_attr >> 16)
    return not entry.is_dir() and not hidden and not link and path.suffix.lower() in SUFFIXES


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    with archive.open(entry) as file:
        return file.read(parts.MAX_IMAGE_BYTES + 1)  # one more than is allowed, whatever the header claims
