"""Downloads that can be stopped and go on: by URL, from zenodo, from the Hugging Face hub; steps by hand are printed.

Every file is checked against the published checksum where there is one (zenodo: md5; hub: sha256, git's sha1 for small
files) and noted in OUT/fetched.json, so that a second call skips it. Archives are unpacked by archives.extract. Terms
and forms are accepted by a person in the browser, never here; a token is what `hf auth login` stored.
"""
import fnmatch
import hashlib
import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from tqdm import tqdm

from data_prep.archives import extract, safe_name
from data_prep.sources import SOURCES
from nanopatho.data import DataError

ZENODO, HUB = "https://zenodo.org", None                                  # None: where huggingface_hub points by itself
PACKED = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".gz")


class FetchError(DataError):
    """What could not be fetched, and what to do."""


def digest(path, kind):
    """md5, sha256, or sha1-git (git's name of a file's content) of a file -> hexadecimal text."""
    value = hashlib.new(kind.removesuffix("-git"))
    if kind.endswith("-git"):
        value.update(b"blob %d\0" % os.path.getsize(path))
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value.update(block)
    return value.hexdigest()


def verify(path, checksum):
    """checksum "kind:hex" or "" -> None; a wrong file is removed and told."""
    kind, _, wanted = checksum.partition(":")
    if checksum and digest(path, kind) != wanted:
        os.remove(path)
        raise FetchError(f"{path}: its {kind} is not the published {wanted}; it was removed, run the command again")


def download(url, path, *, checksum="", tries=6, pause=1.0, timeout=60):
    """URL -> file. Goes on where a call stopped (Range, guarded by the server's ETag), tries 429 and 5xx again.

    The file appears under its name only when complete and checked; until then it is PATH.part.
    """
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise FetchError(f"{url}: only http and https are fetched")
    path, part, tag = Path(path), Path(f"{path}.part"), Path(f"{path}.part.etag")
    path.parent.mkdir(parents=True, exist_ok=True)
    failures, done = 0, False
    while not done:
        have = part.stat().st_size if part.is_file() else 0
        try:
            done = attempt(url, part, tag, have, path.name, timeout)
            error = "the connection ended early"
        except urllib.error.HTTPError as failed:
            error, wait = f"HTTP {failed.code} {failed.reason}", failed.headers.get("Retry-After", "")
            if failed.code == 416:                                        # what we have is no beginning of that file
                part.unlink(missing_ok=True)
            elif failed.code != 429 and failed.code < 500:
                raise FetchError(f"{url}: {error}; a form or a login? See `python -m data_prep list`") from failed
            elif wait.isdigit():
                time.sleep(min(int(wait), 300))
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as failed:
            error = str(failed) or type(failed).__name__
        except OSError as failed:                                         # the disk, not the network
            raise FetchError(f"{part}: {failed.strerror}; mend that, then run the command again") from failed
        if not done:
            moved = (part.stat().st_size if part.is_file() else 0) > have
            failures = 0 if moved else failures + 1                      # a bad line may break off as often as it will
            if failures >= tries:
                raise FetchError(f"{url}: {error}, {tries} times; what is there stays in {part}, run the command again")
            time.sleep(pause * 2 ** failures)
    tag.unlink(missing_ok=True)
    verify(part, checksum)
    os.replace(part, path)


def attempt(url, part, tag, have, title, timeout):
    """One request that adds to `part` -> whether the file is complete."""
    headers = {"User-Agent": "nanopatho-data-prep", "Accept-Encoding": "identity"}
    if have and tag.is_file():                                            # else it may be another file by now
        headers |= {"Range": f"bytes={have}-", "If-Range": tag.read_text()}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout) as answer:
        goes_on = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if answer.status == 206 and not goes_on:                          # a part nobody asked for
            part.unlink(missing_ok=True)
            return False
        have = have if goes_on else 0
        if "text/html" in answer.headers.get("Content-Type", "") and not title.endswith(".html"):
            raise FetchError(f"{url}: a web page came instead of {title}: a form or a login stands in between, "
                             "see `python -m data_prep list`")
        etag, length = answer.headers.get("ETag", "W/"), answer.headers.get("Content-Length")
        same = etag if not etag.startswith("W/") else answer.headers.get("Last-Modified", "")   # a weak one is no proof
        tag.write_text(same) if same else tag.unlink(missing_ok=True)
        total = have + int(length) if length else None
        with open(part, "ab" if goes_on else "wb") as file, \
                tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=title[-40:]) as bar:
            while block := answer.read(1 << 18):
                file.write(block)
                bar.update(len(block))
    return total is None or part.stat().st_size == total


def from_hub(repo, names, out):
    """Matching files of a hub data set -> list of (name, checksum); huggingface_hub resumes by itself."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
    try:
        from httpx import HTTPError                                      # what huggingface_hub 1.x speaks with
    except ImportError:
        HTTPError = OSError
    try:
        info, got = HfApi(endpoint=HUB).dataset_info(repo, files_metadata=True), []
        for file in info.siblings:
            if not any(fnmatch.fnmatch(file.rfilename, pattern) for pattern in names):
                continue
            name = safe_name(file.rfilename)
            checksum = f"sha256:{file.lfs.sha256}" if file.lfs else f"sha1-git:{file.blob_id}" if file.blob_id else ""
            if not noted(out, name, checksum):
                hf_hub_download(repo, name, repo_type="dataset", revision=info.sha, local_dir=out, endpoint=HUB)
                verify(out / name, checksum)
                note(out, name, checksum, f"hub:{repo}@{info.sha}")
            got.append((name, checksum))
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise FetchError(f"{repo}: not open to you. Accept its terms at https://huggingface.co/datasets/{repo}, then "
                         f"`hf auth login`, then run the command again") from error
    except (HfHubHTTPError, HTTPError, OSError) as error:
        raise FetchError(f"{repo}: {error}; run the command again, it goes on where it stopped") from error
    if not got:
        raise FetchError(f"{repo}: holds no {', '.join(names)}; look at https://huggingface.co/datasets/{repo}")
    return got


def notes(out):
    path = Path(out) / "fetched.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def note(out, name, checksum, source, **more):
    """Add what is known of a file to OUT/fetched.json."""
    entry = {name: {"bytes": os.path.getsize(Path(out) / name), "checksum": checksum, "from": source, **more}}
    part = Path(out) / "fetched.json.part"
    part.write_text(json.dumps({**notes(out), **entry}, indent=1, sort_keys=True))
    os.replace(part, Path(out) / "fetched.json")


def noted(out, name, checksum):
    """Is the file there, whole and the one that is published now?"""
    entry, path = notes(out).get(name), Path(out) / name
    return bool(entry and path.is_file() and path.stat().st_size == entry["bytes"] and entry["checksum"] == checksum)


def fetch(name, out):
    """What can be had of a set without a form, unpacked into `out` -> list of problems; other steps are printed."""
    out, problems = Path(out), []
    out.mkdir(parents=True, exist_ok=True)
    for step in SOURCES[name]["get"]:
        if "by hand" in step:
            print(f"by hand: {step['by hand']}\n         (licence: {SOURCES[name]['licence']}; fetch again to unpack)")
            continue
        if "hub" in step:
            from_hub(step["hub"], step["names"], out)
            continue
        files = [(step["url"].rpartition("/")[2], step["url"], f"md5:{step['md5']}" if "md5" in step else "")] \
            if "url" in step else zenodo_files(step["zenodo"], step["names"], out)
        for file, url, checksum in files:
            if not noted(out, file, checksum):
                download(url, out / file, checksum=checksum)
                note(out, file, checksum, url)
    for file in sorted(p for p in out.iterdir() if p.name.lower().endswith(PACKED)):
        entry = notes(out).get(file.name, {})
        if entry.get("unpacked") != file.stat().st_size:                  # also what was put here by hand
            written, wrong = extract(file, out)
            print(f"{file}: {len(written)} files" + (f", {len(wrong)} problems" if wrong else ""))
            problems += wrong
            if written:
                note(out, file.name, entry.get("checksum", ""), entry.get("from", "by hand"),
                     unpacked=file.stat().st_size)
    if problems:
        (out / "unpack_problems.txt").write_text("\n".join(problems) + "\n", encoding="utf-8", errors="replace")
    return problems


def zenodo_files(record, names, out):
    """Record number and patterns -> list of (name, url, "md5:…") as zenodo's API tells them."""
    listing = Path(out) / f"zenodo-{record}.json"
    download(f"{ZENODO}/api/records/{record}", listing)
    files = json.loads(listing.read_text()).get("files", [])
    found = [(safe_name(f["key"]), f["links"]["self"], f["checksum"]) for f in files
             if any(fnmatch.fnmatch(f["key"], pattern) for pattern in names)]
    if not found:
        there = [f["key"] for f in files]
        raise FetchError(f"zenodo record {record}: no file named {', '.join(names)}; it has {there}")
    return found
