from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from mobilemm.errors import MobileMMError
from mobilemm.export.bundle import BundleWriter, lock_folder
from mobilemm.export.hub import pull, push
from mobilemm.runtime.bundle import open_bundle
from tests.runtime.tiny_bundle import rehash, tiny_manifest, write_parts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with BundleWriter(tmp_path / "tiny-onnx") as writer:
        write_parts(writer.folder)
        return writer.finish(tiny_manifest()).folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def rename_model(folder: Path, name: str) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"name": "tiny"', f'"name": "{name}"'))
    rehash(folder)


# --- folders ----------------------------------------------------------------------------------------------


def test_to_a_drive_and_back(folder: Path, tmp_path: Path) -> None:
    drive = tmp_path / "drive" / "demo"
    assert push(folder, str(drive)) == str(drive)
    assert contents(drive) == contents(folder)
    assert contents(pull(drive, tmp_path / "back").folder) == contents(folder)
    assert sorted(os.listdir(tmp_path / "drive")) == ["demo"]


def test_an_update_copies_only_what_differs(folder: Path, tmp_path: Path) -> None:
    there = pull(folder, tmp_path / "there").folder
    before = {path: (there / path).stat().st_ino for path in contents(there)}
    rename_model(folder, "second")
    (folder / "tokenizer.json").write_text("{}")
    rehash(folder)
    assert pull(folder, there).manifest.model.name == "second"
    same = {path for path, inode in before.items() if (there / path).stat().st_ino == inode}
    assert set(before) - same == {"manifest.json", "manifest.json.sha256", "tokenizer.json"}
    assert contents(there) == contents(folder)


def test_a_damaged_copy_is_repaired(folder: Path, tmp_path: Path) -> None:
    there = pull(folder, tmp_path / "there").folder
    data = bytearray((there / "parts" / "decoder.onnx.data").read_bytes())
    data[7] ^= 8
    (there / "parts" / "decoder.onnx.data").write_bytes(data)
    (there / "tokenizer.json").unlink()
    assert contents(pull(folder, there).folder) == contents(folder)


@pytest.mark.parametrize("other", [False, True], ids=["right", "of another version"])
def test_an_interrupted_copy_goes_on(folder: Path, tmp_path: Path, other: bool) -> None:
    staging = tmp_path / ".there.pulling"
    (staging / "parts").mkdir(parents=True)
    whole = (folder / "parts" / "decoder.onnx.data").read_bytes()
    (staging / "parts" / "decoder.onnx.data").write_bytes(bytes(1000) if other else whole[:1000])
    (staging / "parts" / "of_an_older_bundle.onnx").write_bytes(b"x")
    (staging / "tokenizer.json").symlink_to("/etc/passwd")
    assert contents(pull(folder, tmp_path / "there").folder) == contents(folder)
    assert not staging.exists()


def test_what_was_copied_before_a_failure_is_kept(folder: Path, tmp_path: Path) -> None:
    data = folder / "tokenizer.json"
    content = data.read_bytes()
    data.unlink()
    with pytest.raises(MobileMMError, match=r"tokenizer\.json: is missing"):
        pull(folder, tmp_path / "there")
    assert not (tmp_path / "there").exists()
    kept = tmp_path / ".there.pulling" / "parts" / "vision.onnx"
    inode = kept.stat().st_ino
    data.write_bytes(content)
    pull(folder, tmp_path / "there")
    assert (tmp_path / "there" / "parts" / "vision.onnx").stat().st_ino == inode


def test_what_is_no_bundle_is_neither_sent_nor_overwritten(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("precious")
    with pytest.raises(MobileMMError, match="is no bundle that could be replaced"):
        push(folder, str(home))
    with pytest.raises(MobileMMError, match="is no bundle"):
        push(home, str(tmp_path / "there"))
    (folder / "tokenizer.json").write_text("{ }")
    with pytest.raises(MobileMMError, match=r"tokenizer\.json: has 3 bytes"):
        push(folder, str(tmp_path / "there"))
    assert not (tmp_path / "there").exists()
    with pytest.raises(MobileMMError, match="there is no such folder"):
        pull(tmp_path / "nowhere", tmp_path / "there")


def test_hostile_sources_leave_nothing_at_the_destination(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s")
    (folder / "golden" / "image.png").unlink()
    (folder / "golden" / "image.png").symlink_to(secret)
    with pytest.raises(MobileMMError, match=r"image\.png: is a link"):
        pull(folder, tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_two_pulls_to_one_place_do_not_mix(folder: Path, tmp_path: Path) -> None:
    staging = tmp_path / ".there.pulling"
    staging.mkdir()
    lock = lock_folder(staging)
    assert lock is not None
    with pytest.raises(MobileMMError, match="another process is pulling to it"):
        pull(folder, tmp_path / "there")
    os.close(lock)
    pull(folder, tmp_path / "there")


def test_nothing_is_published_by_a_slip(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        MobileMMError, match=r"Write hub:drvie/demo to publish the bundle, \./drvie/demo for a"
    ):
        push(folder, "drvie/demo")
    with pytest.raises(MobileMMError, match="is the bundle itself"):
        push(folder, str(folder))
    for wrong in ("hub:demo", "hub:", "hub:a/b/c", "hub:../x", "hub:a/b c"):
        with pytest.raises(MobileMMError, match="is no name of a hub repository"):
            push(folder, wrong)


# --- the hub ----------------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """The part of the hub's HTTP interface that its own client uses for models, in memory."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.files: dict[str, bytes] = {}
        self.lfs: dict[str, bytes] = {}
        self.stored_as_lfs: set[str] = set()
        self.uploaded: list[str] = []
        self.fetched: list[str] = []
        self.commits: list[list[str]] = []
        self.private = False
        self.failing: set[str] = set()

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", **(headers or {})}
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server, self.path.split("?")[0]
        if found := re.fullmatch(r"/owner/demo/resolve/[0-9a-f]{40}/(.+)", path):
            name = found[1]
            if name not in hub.files or name in hub.failing:
                self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
                return
            if self.command == "GET":
                hub.fetched.append(name)
            data = hub.files[name]
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": hub.sha}
            self.answer(data, headers=headers)
        elif re.fullmatch(r"/api/models/owner/demo(/revision/.+)?", path):
            siblings = [
                {
                    "rfilename": name,
                    "size": len(data),
                    "blobId": hashlib.sha1(data).hexdigest(),
                    "lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
                    if name in hub.stored_as_lfs
                    else None,
                }
                for name, data in hub.files.items()
            ]
            self.answer({"id": "owner/demo", "sha": hub.sha, "siblings": siblings})
        else:
            self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def do_PUT(self) -> None:
        data = self.body()
        self.server.lfs[hashlib.sha256(data).hexdigest()] = data
        self.server.uploaded.append(self.path.removeprefix("/lfs/"))
        self.answer({})

    def do_POST(self) -> None:
        hub, body = self.server, self.body()
        if self.path == "/api/repos/create":
            wanted = json.loads(body)  # one or the other, by the client's version
            hub.private = wanted.get("private") is True or wanted.get("visibility") == "private"
            self.answer({"url": f"{hub.url}/owner/demo"})
        elif self.path == "/api/validate-yaml":
            self.answer({"warnings": [], "errors": []})
        elif "/preupload/" in self.path:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if ".onnx" in file["path"] else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                found
                if found["oid"] in hub.lfs
                else {**found, "actions": {"upload": {"href": f"{hub.url}/lfs/{found['oid']}"}}}
                for found in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.lfs[value["oid"]]
                    hub.stored_as_lfs.add(value["path"])
                elif line["key"] == "deletedFile":
                    del hub.files[value["path"]]
            hub.commits.append([f"{line['key']} {line['value'].get('path', '')}" for line in lines[1:]])
            url = f"{hub.url}/owner/demo/commit/{hub.sha}"
            self.answer({"commitUrl": url, "commitOid": hub.sha, "pullRequestUrl": None})
        else:
            self.answer({"error": "?"}, 404)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_to_the_hub_and_back(folder: Path, tmp_path: Path, hub: Hub) -> None:
    hub.files[".gitattributes"] = b"*.onnx filter=lfs"
    hub.files["of_an_older_bundle.bin"] = b"x"
    assert push(folder, "hub:owner/demo", private=True) == f"{hub.url}/owner/demo"
    assert hub.private
    assert len(hub.commits) == 1
    assert {name: data for name, data in hub.files.items() if name != ".gitattributes"} == contents(folder)
    there = pull("hub:owner/demo", tmp_path / "there")
    assert contents(there.folder) == contents(folder)
    assert ".cache" not in os.listdir(there.folder)


def test_a_second_push_sends_only_what_differs(folder: Path, hub: Hub) -> None:
    push(folder, "hub:owner/demo")
    sent = len(hub.uploaded)
    assert sent == 4  # the .onnx files and the decoder's data
    rename_model(folder, "second")
    push(folder, "hub:owner/demo")
    assert len(hub.uploaded) == sent
    assert not any(".onnx" in operation for operation in hub.commits[1])
    assert json.loads(hub.files["manifest.json"])["model"]["name"] == "second"


def test_an_interrupted_pull_fetches_only_what_is_missing(folder: Path, tmp_path: Path, hub: Hub) -> None:
    push(folder, "hub:owner/demo")
    hub.failing = {"tokenizer.json"}
    with pytest.raises(
        MobileMMError, match="hub:owner/demo: the hub could not be reached or refused"
    ) as error:
        pull("owner/demo", tmp_path / "there")
    assert str(error.value).isprintable()
    assert not (tmp_path / "there").exists()
    hub.failing, hub.fetched = set(), []
    pull("owner/demo", tmp_path / "there")
    assert hub.fetched == ["tokenizer.json"]
    shutil.rmtree(tmp_path / "cache")
    hub.fetched = []
    pull("owner/demo", tmp_path / "there")
    assert hub.fetched == ["manifest.json"]


def test_a_repository_that_is_not_what_its_manifest_says(folder: Path, tmp_path: Path, hub: Hub) -> None:
    push(folder, "hub:owner/demo")
    whole = dict(hub.files)
    hub.files["parts/vision.onnx"] += b"x"
    with pytest.raises(MobileMMError, match=r"parts/vision\.onnx is not the file that the manifest lists"):
        pull("hub:owner/demo", tmp_path / "there")
    assert "parts/vision.onnx" not in hub.fetched
    hub.files = {**whole, "tokenizer.json": b"y" * len(whole["tokenizer.json"])}
    with pytest.raises(MobileMMError, match=r"tokenizer\.json: did not arrive as the source's manifest says"):
        pull("hub:owner/demo", tmp_path / "there")
    hub.files = {
        **whole,
        "manifest.json": whole["manifest.json"].replace(b"tokenizer.json", b"../../../evil.j"),
    }
    with pytest.raises(MobileMMError, match=r"is no plain path inside the bundle"):
        pull("hub:owner/demo", tmp_path / "there")
    hub.files = {**whole, "manifest.json": b" " * (2**24 + 1)}
    with pytest.raises(MobileMMError, match=r"manifest\.json: 16,777,217 bytes are too many"):
        pull("hub:owner/demo", tmp_path / "there")
    assert not (tmp_path / "there").exists()
    hub.files = whole
    assert open_bundle(pull("hub:owner/demo", tmp_path / "there").folder)


def test_a_repository_that_is_not_there(tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(MobileMMError, match=r"hub:owner/other: .*hf auth login") as error:
        pull("hub:owner/other", tmp_path / "there")
    assert "\n" not in str(error.value)
