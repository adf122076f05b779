"""Downloads against a scripted server on this machine: breaks, wrong ranges, errors, checksums; zenodo's API and the hub's.

Truth: the bytes the server holds and their checksums from hashlib; the server counts what was asked of it.
"""

import hashlib
import http.server
import io
import json
import threading
import zipfile

import pytest

from data_prep import fetch as module
from data_prep.fetch import FetchError, digest, download, fetch

DATA = bytes(range(256)) * 4096                                           # 1 MB
PARQUET = b"PAR1" + bytes(3000)


class Server(http.server.BaseHTTPRequestHandler):
    """script[path]: list of functions, one a request, the last one again and again; asked: [(path, Range)]."""

    script, asked = {}, []

    def do_GET(self):
        steps = self.script.get(self.path)
        self.asked.append((self.path, self.headers.get("Range")))
        (steps.pop(0) if steps and len(steps) > 1 else steps[0] if steps else missing)(self)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass

    def answer(self, body=b"", code=200, cut=None, **headers):
        self.send_response(code)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True


def missing(s):
    s.answer(b"no", 404)


def whole(s):
    s.answer(DATA, ETag='"v1"')


def cut(at, etag='"v1"'):
    return lambda s: s.answer(DATA, cut=at, ETag=etag)


def ranged(stop=None):
    """What a server should do: the rest from the asked byte on, if the file is the same; else all of it."""
    def step(s):
        start = int(s.headers["Range"].split("=")[1].rstrip("-")) if s.headers.get("Range") else 0
        if start and s.headers.get("If-Range") == '"v1"':
            s.answer(DATA[start:], 206, stop, ETag='"v1"', Content_Range=f"bytes {start}-{len(DATA) - 1}/{len(DATA)}")
        else:
            s.answer(DATA, 200, stop, ETag='"v1"')
    return step


@pytest.fixture
def server():
    Server.script, Server.asked = {}, []
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    thread.join()
    running.server_close()


def get(server, path, steps, out, **more):
    Server.script[f"/{path}"] = steps
    download(f"{server}/{path}", out, pause=0.001, timeout=5, **more)
    assert out.read_bytes() == DATA and not list(out.parent.glob("*.part*"))


def test_broken_connections_go_on_where_they_broke(server, tmp_path):
    get(server, "f", [cut(100_000), ranged(200_000), ranged()], tmp_path / "f", checksum=f"md5:{hashlib.md5(DATA).hexdigest()}")
    assert Server.asked == [("/f", None), ("/f", "bytes=100000-"), ("/f", "bytes=300000-")]


def test_a_call_that_was_killed_goes_on(server, tmp_path):
    Server.script["/f"] = [cut(100_000)]
    with pytest.raises(FetchError, match=r"f.part, run the command again"):
        download(f"{server}/f", tmp_path / "f", tries=1, pause=0.001)
    assert (tmp_path / "f.part").stat().st_size == 100_000 and not (tmp_path / "f").exists()
    Server.asked.clear()
    get(server, "f", [ranged()], tmp_path / "f")
    assert Server.asked == [("/f", "bytes=100000-")]


@pytest.mark.parametrize("second", [
    lambda s: s.answer(DATA, ETag='"v2"'),                                # another file by now: all of it comes
    lambda s: s.answer(DATA[7:], 206, Content_Range=f"bytes 7-{len(DATA) - 1}/{len(DATA)}"),    # another range than asked for
    lambda s: s.answer(b"", 416, Content_Range="bytes */5")])
def test_what_does_not_fit_starts_anew(server, tmp_path, second):
    (tmp_path / "f.part").write_bytes(b"old" * 1000)
    (tmp_path / "f.part.etag").write_text('"v0"')
    get(server, "f", [second, whole], tmp_path / "f")
    assert Server.asked[0] == ("/f", "bytes=3000-")


def test_without_an_etag_nothing_is_glued(server, tmp_path):
    (tmp_path / "f.part").write_bytes(b"of another day")
    get(server, "f", [lambda s: s.answer(DATA)], tmp_path / "f")
    assert Server.asked == [("/f", None)]


def test_errors_of_the_server(server, tmp_path):
    busy = lambda code: lambda s: s.answer(b"", code, Retry_After="0")
    get(server, "f", [busy(503), busy(429), busy(500), whole], tmp_path / "f")
    for code, tries in ((404, 1), (403, 1), (503, 3)):
        Server.script["/g"], Server.asked[:] = [busy(code)], []
        with pytest.raises(FetchError, match=f"HTTP {code}"):
            download(f"{server}/g", tmp_path / "g", tries=3, pause=0.001)
        assert len(Server.asked) == tries and not (tmp_path / "g").exists()
    Server.script["/h"] = [lambda s: s.answer(b"<html>sign in</html>", Content_Type="text/html; charset=utf-8")]
    with pytest.raises(FetchError, match="a web page came instead of h.zip: a form"):
        download(f"{server}/h", tmp_path / "h.zip")
    for url in ("file:///etc/passwd", "ftp://x/y"):
        with pytest.raises(FetchError, match="only http"):
            download(url, tmp_path / "p")


def test_a_wrong_file_is_removed(server, tmp_path):
    Server.script["/f"] = [whole]
    with pytest.raises(FetchError, match="sha256 is not the published 00ff; it was removed"):
        download(f"{server}/f", tmp_path / "f", checksum="sha256:00ff")
    assert not list(tmp_path.glob("f*"))


def test_a_place_that_cannot_be_written(server, tmp_path):
    Server.script["/f"] = [whole]
    (tmp_path / "f.part").mkdir()
    with pytest.raises(FetchError, match="f.part: Is a directory; mend that"):
        download(f"{server}/f", tmp_path / "f")


def test_digest_as_git_names_a_file(tmp_path):
    (tmp_path / "f").write_bytes(b"what is up, doc?")                      # the example of the Pro Git book, chapter 10.2
    assert digest(tmp_path / "f", "sha1-git") == "bd9dbf5aae1a3862dd1526723246b20206e5fc37"
    assert digest(tmp_path / "f", "sha256") == hashlib.sha256(b"what is up, doc?").hexdigest()


# ---------------------------------------------------------------- whole sets

def zipped(**files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            archive.writestr(name.replace("_", "/", 1) + ".txt", data)
    return out.getvalue()


def test_a_set_from_zenodo(server, tmp_path, monkeypatch, capsys):
    body = zipped(a_one="1", a_two="2")
    listing = {"files": [{"key": "s.zip", "checksum": f"md5:{hashlib.md5(body).hexdigest()}", "links": {"self": f"{server}/s.zip"}},
                         {"key": "other.zip", "checksum": "md5:0", "links": {"self": f"{server}/other.zip"}}]}
    Server.script = {"/api/records/77": [lambda s: s.answer(json.dumps(listing).encode())], "/s.zip": [lambda s: s.answer(body)]}
    monkeypatch.setattr(module, "ZENODO", server)
    monkeypatch.setitem(module.SOURCES, "set", {"licence": "CC0", "get": [{"zenodo": "77", "names": ["s*.zip"]},
                                                                         {"by hand": "ask at the desk"}]})
    assert fetch("set", tmp_path / "raw") == []
    assert (tmp_path / "raw" / "a" / "one.txt").read_text() == "1" and "ask at the desk" in capsys.readouterr().out
    noted = json.loads((tmp_path / "raw" / "fetched.json").read_text())
    assert noted["s.zip"]["checksum"] == listing["files"][0]["checksum"] and noted["s.zip"]["bytes"] == len(body)
    Server.asked.clear()
    fetch("set", tmp_path / "raw")
    assert [p for p, _ in Server.asked] == ["/api/records/77"]              # not fetched, not unpacked again
    (tmp_path / "raw" / "by_hand.zip").write_bytes(zipped(b_three="3") + b"")
    fetch("set", tmp_path / "raw")
    assert (tmp_path / "raw" / "b" / "three.txt").read_text() == "3"        # what was put there by hand is unpacked too
    (tmp_path / "raw" / "broken.zip").write_bytes(b"<html>")
    assert "broken.zip: damaged" in fetch("set", tmp_path / "raw")[0]
    listing["files"].pop(0)
    with pytest.raises(FetchError, match=r"no file named s\*.zip; it has \['other.zip'\]"):
        fetch("set", tmp_path / "raw")


@pytest.fixture
def hub(server, monkeypatch):
    """The hub's protocol: listing with sizes and checksums, HEAD and GET of files at a commit."""
    commit, files = "a" * 40, {"data/train-0.parquet": PARQUET, "README.md": b"# set\n", "data/x.bin": b"x"}
    siblings = [{"rfilename": n, "size": len(d), "blobId": hashlib.sha1(b"blob %d\0" % len(d) + d).hexdigest(),
                 **({"lfs": {"sha256": hashlib.sha256(d).hexdigest(), "size": len(d), "pointerSize": 9}} if "parquet" in n else {})}
                for n, d in files.items()]
    info = json.dumps({"id": "o/set", "sha": commit, "siblings": siblings}).encode()
    Server.script["/api/datasets/o/set?blobs=true"] = [lambda s: s.answer(info, Content_Type="application/json")]
    for name, data in files.items():
        Server.script[f"/datasets/o/set/resolve/{commit}/{name}"] = [lambda s, data=data: s.answer(
            data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=commit)]
    monkeypatch.setattr(module, "HUB", server)
    monkeypatch.setitem(module.SOURCES, "set", {"licence": "MIT", "get": [{"hub": "o/set", "names": ["data/*.parquet", "*.md"]}]})
    return f"/datasets/o/set/resolve/{commit}/data/train-0.parquet"


def test_a_set_from_the_hub(hub, tmp_path):
    assert fetch("set", tmp_path / "raw") == []
    assert (tmp_path / "raw" / "data" / "train-0.parquet").read_bytes() == PARQUET
    assert (tmp_path / "raw" / "README.md").is_file() and not (tmp_path / "raw" / "data" / "x.bin").exists()
    Server.asked.clear()
    fetch("set", tmp_path / "raw")
    assert [p for p, _ in Server.asked] == ["/api/datasets/o/set?blobs=true"]


def test_the_hub_hands_out_another_file(hub, tmp_path):
    Server.script[hub] = [lambda s: s.answer(PARQUET[:-1] + b"!", ETag='"e"', X_Repo_Commit="a" * 40)]
    with pytest.raises(FetchError, match="sha256 is not the published"):
        fetch("set", tmp_path / "raw")
    assert not (tmp_path / "raw" / "data" / "train-0.parquet").exists()


def test_a_gated_set_of_the_hub(hub, tmp_path):
    Server.script["/api/datasets/o/set?blobs=true"] = [lambda s: s.answer(b"{}", 403, X_Error_Code="GatedRepo")]
    with pytest.raises(FetchError, match="Accept its terms at https://huggingface.co/datasets/o/set, then `hf auth login`"):
        fetch("set", tmp_path / "raw")


def test_every_set_says_how_to_get_it():
    for name, s in module.SOURCES.items():
        assert set(s) == {"use", "size", "licence", "gate", "files", "get"} and s["get"], name
        for step in s["get"]:
            assert set(step) in ({"hub", "names"}, {"zenodo", "names"}, {"url"}, {"url", "md5"}, {"by hand"}), (name, step)
