"""A server on loopback that speaks as much of the Hugging Face hub's protocol as its client asks for.

    with HubServer() as hub:
        hub.push("model", "acme/tiny", {"config.json": b"{}"})
        subprocess.run(command, env=hub.environment(home))
"""

import hashlib
import io
import json
import os
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow
import pyarrow.parquet

LARGE = (".safetensors", ".parquet", ".bin")  # stored beside git, and reached by a redirect
PLURALS = {"models": "model", "datasets": "dataset"}
Files = Mapping[str, bytes]


class HubServer:
    """Use it in a `with`. `requests` lists what was asked, as "GET /path".

    `gated` and `private`: names whose files, or all of which, ask for the token "good". `short`: paths of which half is
    sent and the whole announced.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.short: set[str] = set()
        self.commits: dict[tuple[str, str], dict[str, Files]] = {}
        self.refs: dict[tuple[str, str], dict[str, str]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def push(self, kind: str, name: str, files: Files, *, ref: str = "main") -> str:
        """A new commit of a model or dataset with these files, which `ref` is from now on."""
        commits = self.commits.setdefault((kind, name), {})
        commit = hashlib.sha1(f"{kind} {name} {len(commits)}".encode()).hexdigest()
        commits[commit] = dict(files)
        self.refs.setdefault((kind, name), {})[ref] = commit
        return commit

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Of a process that takes this server for the hub, and keeps its cache in `home`."""
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        return inherited | ours | more

    def asked_for(self, ending: str) -> list[str]:
        """The requests for files of this ending."""
        return [line for line in self.requests if "/resolve/" in line and line.endswith(ending)]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {unquote(path)}")
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if parts[0] == "large":
            return self._file(self._large(parts[1]), etag=parts[1])
        api = parts[0] == "api"
        parts = parts[1:] if api else parts
        kind = PLURALS.get(parts[0], "model")
        parts = parts[1:] if parts[0] in PLURALS else parts
        name, (verb, revision, *inside) = "/".join(parts[:2]), [*parts[2:], "", ""][: max(2, len(parts) - 2)]
        given = self.headers.get("Authorization")
        token = given == "Bearer good"
        if given and not token:
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        repository = (kind, name)
        if repository not in self.hub.commits or (name in self.hub.private and not token):
            return self._refuse(404 if token else 401, "RepoNotFound" if token else "", "Invalid username or password.")
        commit = self.hub.refs[repository].get(revision or "main", revision)
        if commit not in self.hub.commits[repository]:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = self.hub.commits[repository][commit]
        if api:
            return self._json({"id": name, "sha": commit} if verb in ("", "revision") else _tree(files), commit)
        if name in self.hub.gated and not token:
            return self._refuse(401, "GatedRepo", f"Access to {kind} {name} is restricted.")
        file = "/".join(inside)
        if file not in files:
            return self._refuse(404, "EntryNotFound", "Entry not found", commit)
        self._resolve(file, files[file], commit)

    def _resolve(self, path: str, content: bytes, commit: str) -> None:
        if not path.endswith(LARGE):
            return self._file(content, etag=_oid(content), commit=commit, short=path in self.hub.short)
        digest = hashlib.sha256(content).hexdigest()
        self.send_response(302)
        short = "-short" if path in self.hub.short else ""
        self.send_header("Location", f"http://localhost:{self.hub.port}/large/{digest}{short}")  # on another host
        self.send_header("X-Repo-Commit", commit)
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("X-Linked-ETag", f'"{digest}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _large(self, digest: str) -> bytes:
        digest, _, short = digest.partition("-")
        files = (f for commits in self.hub.commits.values() for files in commits.values() for f in files.values())
        content = next(content for content in files if hashlib.sha256(content).hexdigest() == digest)
        return content[: len(content) // 2] if short else content

    def _file(self, content: bytes, *, etag: str, commit: str = "", short: bool = False) -> None:
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        announced = content
        if short and self.command == "GET":
            announced = content[: len(content) // 2]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(announced) - 1}/{len(announced)}")
        self._send(announced[start:], {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    def _json(self, value: Any, commit: str) -> None:
        self.send_response(200)
        self._send(json.dumps(value).encode(), {"Content-Type": "application/json", "X-Repo-Commit": commit})

    def _refuse(self, status: int, code: str, message: str, commit: str = "") -> None:
        self.send_response(status)
        self._send(b"{}", {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit})

    def _send(self, content: bytes, headers: Mapping[str, str]) -> None:
        for key, value in headers.items():
            if value:
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _tree(files: Files) -> list[dict[str, Any]]:
    """What /tree/REVISION?recursive=true lists: folders too."""
    folders = sorted({path.rpartition("/")[0] for path in files} - {""})
    tree: list[dict[str, Any]] = [{"type": "directory", "path": f, "size": 0, "oid": _oid(f.encode())} for f in folders]
    for path, content in files.items():
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
        if path.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        tree.append(entry)
    return tree


def parquet(*answers: int) -> bytes:
    """A file of one question for each answer."""
    rows = [{"prompt": f"{answer}+0=", "answer": str(answer)} for answer in answers]
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()
