"""Unpack archives of strangers: .zip, .tar (also gz, bz2, xz) and single .gz files. Needs PIL; may be copied alone.

`extract` writes what is harmless below one folder and tells what it left out; nothing is written anywhere else.
Left out and named, while the rest goes on: absolute names, `..`, backslashes, NUL bytes, names that are not UTF-8,
links, devices, encrypted or damaged members, second members of one name, images of more pixels than training opens.
Reading ends, and what came before stays: when the contents outgrow the archive (a decompression bomb) or it is cut off.
"""
import bz2
import gzip
import lzma
import os
import stat
import tarfile
import warnings
import zipfile
import zlib
from pathlib import Path

from PIL import Image

SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp"}
CHUNK = 1 << 20
# Images and slides hardly shrink, tables shrink to a tenth, deflate can do 1:1032: 200 lets everything honest through.
FLOOR, RATIO = 100 << 20, 200
DAMAGED = (OSError, EOFError, ValueError, OverflowError, RuntimeError, NotImplementedError, zlib.error, lzma.LZMAError,
           tarfile.TarError, zipfile.BadZipFile)


class Bomb(Exception):
    """The contents are larger than an archive of this size can honestly hold."""


def safe_name(name):
    """A name from a stranger's file -> clean relative POSIX path; ValueError says why it is none.

    >>> safe_name("./a//b.png")
    'a/b.png'
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError("no name")
    if "\0" in name:
        raise ValueError("a NUL byte in the name")
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("the name is not UTF-8") from error
    if any(ord(c) < 32 or ord(c) == 127 for c in name):
        raise ValueError("a control character in the name")
    if "\\" in name or name.startswith("/") or name[1:2] == ":":
        raise ValueError("an absolute path or a backslash")
    parts = [p for p in name.split("/") if p not in ("", ".")]
    if ".." in parts or not parts:
        raise ValueError("it leads out of the folder")
    if max(len(p.encode()) for p in parts) > 255 or len(name.encode()) > 1024:
        raise ValueError("the name is too long")
    return "/".join(parts)


def finder(root):
    """Folder -> function from a name in a stranger's table to the file's path, or None if it is not there.

    Looked for as written, below images/, then anywhere below root by its file name: archives unpack into folders that
    tables do not mention. ValueError: an unsafe name, or several files of this name.
    """
    names = {}

    def find(name):
        clean = safe_name(name)
        for path in (os.path.join(root, clean), os.path.join(root, "images", clean)):
            if os.path.isfile(path):
                return path
        if not names:
            for folder, _, files in os.walk(root):
                for file in files:
                    names.setdefault(file, []).append(os.path.join(folder, file))
        found = [p for p in names.get(os.path.basename(clean), []) if p.endswith(f"/{clean}")]
        found = found or names.get(os.path.basename(clean), [])
        if len(found) > 1:
            raise ValueError(f"{len(found)} files of this name")
        return found[0] if found else None
    return find


def image_problem(file, max_pixels=80_000_000):
    """Header of an image file (path or open file) -> what is wrong with its size, or None. Nothing is decoded.

    The limits are those of nanopatho.image.open_image, which does the full check when the data is validated.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                width, height = image.size
    except Image.DecompressionBombError as error:
        return f"an image with too many pixels ({error})"
    except (OSError, SyntaxError, ValueError, OverflowError):            # no image PIL knows: told by validate, if used
        return None
    if width * height > max_pixels or max(width, height) > 200 * min(width, height):
        return f"an image of {width} x {height} pixels: more than {max_pixels:,}, or a stripe over 200:1"
    return None


class Limited:
    """A readable file that refuses to go past `budget` bytes, or to hand out more than 4 MB at once.

    tarfile reads a long name or a PAX header in one go, whatever size it claims: that is where the second rule bites.
    """

    def __init__(self, file, budget):
        self.file, self.budget = file, budget

    def read(self, n=-1):
        if not 0 <= n <= 4 * CHUNK or self.file.tell() + n > self.budget + 4 * CHUNK:
            raise Bomb
        return self.file.read(n)

    def seek(self, at, whence=0):
        if whence or at > self.budget + 4 * CHUNK:
            raise Bomb
        return self.file.seek(at)

    def tell(self):
        return self.file.tell()


def members(path, budget):
    """-> generator of (name as written, why it must be left out or None, function that opens it)."""
    name = path.name.lower()
    if name.endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.orig_filename.endswith("/"):
                    continue
                link = stat.S_ISLNK(info.external_attr >> 16)
                why = "a link" if link else "encrypted" if info.flag_bits & 1 else None
                yield info.orig_filename, why, lambda: archive.open(info)
    elif name.endswith((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")):
        opener = {".tar": open, ".bz2": bz2.open, ".xz": lzma.open}.get(Path(name).suffix, gzip.open)
        with opener(path, "rb") as raw, tarfile.open(fileobj=Limited(raw, budget), mode="r:") as archive:
            for info in archive:
                archive.members = []                                     # or a million headers would stay in memory
                why = "a link" if info.issym() or info.islnk() else None if info.isreg() else "a device or pipe"
                if not info.isdir():
                    yield info.name, why, lambda: archive.extractfile(info)
    elif name.endswith(".gz"):
        yield path.name[:-3], None, lambda: gzip.open(path, "rb")
    else:
        raise ValueError(f"{path}: not a .zip, .tar, .tar.gz, .tgz, .tar.bz2, .tar.xz or .gz file")


def extract(path, out, *, budget=None):
    """Unpack `path` below the folder `out` -> (names written, list of problems as text).

    budget: bytes that may be written; as given by FLOOR and RATIO if None. A file that exists is replaced.
    """
    path, out, written, problems, seen = Path(path), Path(out), [], [], set()
    budget = budget or max(FLOOR, RATIO * path.stat().st_size)
    left, part = budget, out / ".part"
    out.mkdir(parents=True, exist_ok=True)
    try:
        for name, why, opened in members(path, budget):
            try:
                if why:
                    raise ValueError(why)
                clean = safe_name(name)
                if clean.lower() in seen:                                # any case: on a Mac one overwrites the other
                    raise ValueError("a second member of this name")
                with opened() as source, open(part, "wb") as target:
                    while block := source.read(CHUNK):
                        left -= len(block)
                        if left < 0:
                            raise Bomb
                        target.write(block)
                wrong = image_problem(part) if Path(clean).suffix.lower() in SUFFIXES else None
                if wrong:
                    raise ValueError(wrong)
                (out / clean).parent.mkdir(parents=True, exist_ok=True)
                os.replace(part, out / clean)
                seen.add(clean.lower())
                written.append(clean)
            except DAMAGED as error:
                if isinstance(error, OSError) and error.errno == 28:
                    raise OSError(28, f"no space left in {out}; free some, then run the command again") from error
                problems.append(f"{path}: {name[:120]!r} left out: {error or type(error).__name__}")
    except Bomb:
        problems.append(f"{path}: unpacks to more than {budget:,} bytes, too much for its size: a decompression bomb? "
                        f"Stopped after {len(written)} files")
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno == 28:
            raise
        problems.append(f"{path}: damaged or cut off ({error or type(error).__name__}) after {len(written)} files; "
                        f"remove it and fetch it again")
    finally:
        part.unlink(missing_ok=True)
    return written, problems
