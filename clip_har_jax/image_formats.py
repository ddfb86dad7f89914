"""The image formats that training, commands, service and app accept: one table.

Formats that can run programs (EPS) or hide their size (ICO) are left out. The first bytes of a file decide its format;
suffixes only decide which files of a folder are listed.
"""

import functools
from dataclasses import dataclass

HEIF_EXTRA = "pip install 'clip-har-jax[heif]'"


@dataclass(frozen=True)
class ImageFormat:
    """An image format.

    Attributes:
      name: Pillow's name.
      title: the common name.
      suffixes: of its files, in lower case, with the dot.
      media_type: for HTTP.
      further: what follows the first picture, "frames" or "pages"; an image with them is refused. Empty: previews or
        depth maps, which are ignored.
      install: the command that installs its decoder, if the main install lacks it.
    """

    name: str
    title: str
    suffixes: tuple[str, ...]
    media_type: str
    further: str = "frames"
    install: str = ""


IMAGE_FORMATS = (
    ImageFormat("JPEG", "JPEG", (".jpg", ".jpeg", ".jpe", ".jfif"), "image/jpeg"),
    ImageFormat("MPO", "JPEG", (".mpo",), "image/jpeg", further=""),  # a JPEG followed by a preview or depth map
    ImageFormat("PNG", "PNG", (".png",), "image/png"),
    ImageFormat("WEBP", "WebP", (".webp",), "image/webp"),
    ImageFormat("BMP", "BMP", (".bmp", ".dib"), "image/bmp"),
    ImageFormat("TIFF", "TIFF", (".tif", ".tiff"), "image/tiff", further="pages"),
    ImageFormat("GIF", "GIF", (".gif",), "image/gif"),
    ImageFormat("AVIF", "AVIF", (".avif",), "image/avif", install="pip install 'pillow>=11.3'"),
    ImageFormat("HEIF", "HEIC", (".heic", ".heif", ".hif"), "image/heic", further="", install=HEIF_EXTRA),
)
IMAGE_SUFFIXES = frozenset(suffix for one in IMAGE_FORMATS for suffix in one.suffixes)
ARITHMETIC_FRAMES = frozenset({0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF})  # markers of ITU T.81, table B.1
JPEG_FRAMES = ARITHMETIC_FRAMES | {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7}
_BY_NAME = {one.name: one for one in IMAGE_FORMATS}
_AVIF_BRANDS = (b"avif", b"avis")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


@functools.cache
def readable_formats() -> tuple[ImageFormat, ...]:
    """Return the formats that this process can decode; register HEIC's decoder with Pillow if it is installed."""
    from PIL import features

    missing = set()
    if not features.check("avif"):
        missing.add("AVIF")
    try:
        import pillow_heif
    except ImportError:
        missing.add("HEIF")
    else:
        pillow_heif.register_heif_opener(thumbnails=False)
    return tuple(one for one in IMAGE_FORMATS if one.name not in missing)


def format_titles() -> str:
    """Return the readable formats for a message: "JPEG, PNG ... or HEIC"."""
    titles = list(dict.fromkeys(one.title for one in readable_formats()))
    return f"{', '.join(titles[:-1])} or {titles[-1]}"


def missing_decoder(data: bytes) -> str | None:
    """Return the command that installs the decoder of an image; None: it is installed, or the format is unknown."""
    found = sniff(data)
    return found.install if found is not None and found not in readable_formats() else None


def sniff(data: bytes) -> ImageFormat | None:
    """Return the format by the first bytes of a file; None: not in the table."""
    name = None
    if data.startswith(b"\xff\xd8\xff"):
        name = "JPEG"
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        name = "PNG"
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        name = "WEBP"
    elif data.startswith((b"GIF87a", b"GIF89a")):
        name = "GIF"
    elif data.startswith(b"BM"):
        name = "BMP"
    elif data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        name = "TIFF"
    elif data[4:8] == b"ftyp":
        name = _sniff_heif(data)
    return None if name is None else _BY_NAME[name]


def _sniff_heif(data: bytes) -> str | None:
    """Return AVIF or HEIC, two codecs of one container, by the brands in its `ftyp` box."""
    size = min(int.from_bytes(data[:4], "big"), 256)
    brands = [data[8:12], *(data[start : start + 4] for start in range(16, size, 4))]
    if any(brand in _AVIF_BRANDS for brand in brands):
        return "AVIF"
    return "HEIF" if any(brand in _HEIF_BRANDS for brand in brands) else None


def format_of(name: str | None) -> ImageFormat | None:
    """Return the format of a Pillow name; None: not in the table."""
    return _BY_NAME.get(name or "")


def is_arithmetic_jpeg(data: bytes) -> bool:
    """Return whether the frame header of a JPEG says arithmetic coding, which many decoders lack."""
    at = 2
    while (at := data.find(b"\xff", at)) >= 0 and at + 4 <= len(data):
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker in JPEG_FRAMES:
            return marker in ARITHMETIC_FRAMES
        elif marker == 0xDA:  # start of scan: pixel data
            return False
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False
