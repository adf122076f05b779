"""Hostile and damaged archives: nothing leaves the folder, what is refused is named, the rest goes on.

Truth: what was put into the archive by tarfile and zipfile themselves, byte for byte, and a listing of the whole test folder.
"""

import gzip
import io
import struct
import tarfile
import zipfile
import zlib

import pytest
from PIL import Image

from data_prep import archives
from data_prep.archives import extract, finder, safe_name


def png(size=(40, 30), colour=(200, 120, 170)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def huge_png(width, height):
    """A PNG whose header claims a size that its few bytes do not hold."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b""))


def make_tar(path, members, mode="w:gz"):
    """members: list of (name, bytes) or TarInfo."""
    with tarfile.open(path, mode) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def make_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name) if isinstance(name, str) else name, data, zipfile.ZIP_DEFLATED)
    return path


def everything(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


GOOD = [("a/one.png", png()), ("a/two.txt", b"two"), ("table.csv", b"=1+1,x\n" * 9)]


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tgz", "tar.bz2", "tar.xz"])
def test_honest_archives_come_out_byte_for_byte(tmp_path, kind):
    path = tmp_path / f"set.{kind}"
    if kind == "zip":
        make_zip(path, GOOD)
    else:
        make_tar(path, GOOD, {"tar": "w", "tar.bz2": "w:bz2", "tar.xz": "w:xz"}.get(kind, "w:gz"))
    written, problems = extract(path, tmp_path / "out")
    assert problems == [] and written == [name for name, _ in GOOD]
    assert everything(tmp_path / "out") == dict(GOOD)


def test_a_single_gz(tmp_path):
    (tmp_path / "labels.h5.gz").write_bytes(gzip.compress(b"data" * 1000))
    assert extract(tmp_path / "labels.h5.gz", tmp_path / "out") == (["labels.h5"], [])
    assert everything(tmp_path / "out") == {"labels.h5": b"data" * 1000}
    with pytest.raises(ValueError, match="set.rar: not a .zip"):
        (tmp_path / "set.rar").write_bytes(b"Rar!")
        list(archives.members(tmp_path / "set.rar", 1))


BAD_NAMES = ["../up.txt", "a/../../up.txt", "/etc/passwd.txt", "C:/win.txt", "..\\up.txt", "a\tb.txt", "x" * 300 + ".txt",
             "nul\0.txt", "bad\udcff.txt"]


def test_names_that_lead_elsewhere(tmp_path):
    zipped = make_zip(tmp_path / "z.zip", [(n, b"x") for n in BAD_NAMES if "\udcff" not in n and "\0" not in n] + GOOD)
    data = zipped.read_bytes().replace(b"a\tb.txt", b"a\0b.txt")           # zipfile itself cuts a name at its NUL byte
    zipped.write_bytes(data)
    tarred = make_tar(tmp_path / "t.tar.gz", [(n, b"x") for n in BAD_NAMES if "\0" not in n] + GOOD)
    (tmp_path / "in").mkdir()
    for path, n in ((zipped, 7), (tarred, 8)):
        before = set(everything(tmp_path))
        written, problems = extract(path, tmp_path / "in" / path.stem)
        assert written == [name for name, _ in GOOD] and len(problems) == n
        assert {p for p in set(everything(tmp_path)) - before} == {f"in/{path.stem}/{name}" for name, _ in GOOD}
        assert all(str(path) in p and "left out" in p for p in problems)
    told = "\n".join(extract(zipped, tmp_path / "again")[1])
    for why in ("NUL byte", "leads out", "absolute path", "too long"):
        assert why in told
    for name in BAD_NAMES + ["", ".", "a/..", None, 7]:
        with pytest.raises(ValueError):
            safe_name(name)
    assert safe_name("./a//b (1) [0, 1].png") == "a/b (1) [0, 1].png"


def test_links_and_devices(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    members = []
    for kind, name in ((tarfile.SYMTYPE, "link"), (tarfile.LNKTYPE, "hard"), (tarfile.FIFOTYPE, "pipe"), (tarfile.CHRTYPE, "dev")):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, str(secret)
        members.append(info)
    make_tar(tmp_path / "l.tar", [*members, ("link/inside.txt", b"through a link"), *GOOD], "w")
    written, problems = extract(tmp_path / "l.tar", tmp_path / "out")
    assert written == ["link/inside.txt", *(n for n, _ in GOOD)] and len(problems) == 4     # no link: a plain folder
    assert sum("a link" in p for p in problems) == 2 and sum("device or pipe" in p for p in problems) == 2
    link = zipfile.ZipInfo("link.txt")
    link.external_attr = 0o120777 << 16
    assert "a link" in extract(make_zip(tmp_path / "l.zip", [(link, b"/etc/passwd")]), tmp_path / "z")[1][0]
    assert not any(p.is_symlink() for p in tmp_path.rglob("*")) and secret.read_text() == "secret"


def test_bombs_end_at_the_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "FLOOR", 1 << 20)
    zeros = b"\0" * (12 << 20)
    for path in (make_zip(tmp_path / "b.zip", [*GOOD, ("b.bin", zeros), ("late.txt", b"x")]),
                 make_tar(tmp_path / "b.tar.gz", [*GOOD, ("b.bin", zeros), ("late.txt", b"x")])):
        written, problems = extract(path, tmp_path / path.name[:-3])
        assert written == [n for n, _ in GOOD] and len(problems) == 1 and "bomb" in problems[0] and "after 3 files" in problems[0]
        budget = max(1 << 20, 200 * path.stat().st_size)
        assert sum(map(len, everything(tmp_path / path.name[:-3]).values())) < budget < len(zeros)
    many = make_zip(tmp_path / "m.zip", [(f"{i}.bin", zeros[:1 << 19]) for i in range(200)])
    written, problems = extract(many, tmp_path / "many")
    assert 0 < len(written) < 200 and "bomb" in problems[-1]


def test_a_tar_header_that_claims_a_giant_name(tmp_path):
    """The long-name header of GNU tar is read in one go, whatever size it claims."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 3 << 30
    with gzip.open(tmp_path / "n.tar.gz", "wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT) + b"a" * (20 << 20))
    written, problems = extract(tmp_path / "n.tar.gz", tmp_path / "out")
    assert written == [] and len(problems) == 1 and everything(tmp_path / "out") == {}


def test_images_too_large_to_open(tmp_path):
    bad = [("wide.png", huge_png(1_000_000, 1)), ("square.png", huge_png(11_000, 11_000)), ("many.png", huge_png(100_000, 100_000))]
    written, problems = extract(make_zip(tmp_path / "i.zip", [*bad, *GOOD]), tmp_path / "out")
    assert written == [n for n, _ in GOOD] and len(problems) == 3
    assert "1000000 x 1 pixels" in problems[0] and "11000 x 11000" in problems[1] and "pixels" in problems[2]


def test_damage_is_told_and_what_came_before_stays(tmp_path):
    noise = [(f"{i}.bin", zlib.compress(str(i).encode() * 9) * 500) for i in range(40)]
    whole = make_tar(tmp_path / "w.tar.gz", noise).read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[:len(whole) // 2])
    written, problems = extract(tmp_path / "cut.tar.gz", tmp_path / "out")
    assert 0 < len(written) < 40 and "cut off" in problems[-1] and "fetch it again" in problems[-1]
    assert everything(tmp_path / "out") == {n: d for n, d in noise if n in written}
    (tmp_path / "no.zip").write_bytes(b"<html>please log in</html>")
    assert "damaged or cut off" in extract(tmp_path / "no.zip", tmp_path / "no")[1][0]
    path = make_zip(tmp_path / "crc.zip", [("a.txt", b"a" * 999), ("b.txt", b"b")])
    data = bytearray(path.read_bytes())
    data[40] ^= 0xFF                                                      # inside the deflated bytes of the first member
    path.write_bytes(data)
    written, problems = extract(path, tmp_path / "crc")
    assert written == ["b.txt"] and len(problems) == 1 and "a.txt" in problems[0]
    twice = make_tar(tmp_path / "d.tar", [("A.txt", b"1"), ("a.txt", b"2"), ("A.txt", b"3")], "w")
    assert extract(twice, tmp_path / "d")[0] == ["A.txt"] and everything(tmp_path / "d") == {"A.txt": b"1"}


def test_finder(tmp_path):
    for name in ("a.jpg", "images/b.jpg", "x/y/c.jpg", "x/d.jpg", "z/d.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    find = finder(tmp_path)
    for name, there in (("a.jpg", "a.jpg"), ("b.jpg", "images/b.jpg"), ("c.jpg", "x/y/c.jpg"), ("other/c.jpg", "x/y/c.jpg"),
                        ("y/c.jpg", "x/y/c.jpg")):
        assert find(name) == str(tmp_path / there)
    assert find("e.jpg") is None
    with pytest.raises(ValueError, match="2 files"):
        find("d.jpg")
    with pytest.raises(ValueError, match="leads out"):
        find("../a.jpg")
