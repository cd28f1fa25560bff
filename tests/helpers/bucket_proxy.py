"""A server of buckets that can be told to fail: it stands between a real one and its clients."""

import contextlib
import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

HOPS = {"connection", "transfer-encoding", "content-length", "keep-alive", "host"}  # of one connection alone


class Proxy:
    """`mode` is "" (it passes everything on), "down" (503 to everything) or "read_only" (403 to what writes)."""

    def __init__(self, server: str, port: int):
        self.server, self.url, self.mode, self.refused = server, f"http://127.0.0.1:{port}", "", 0
        self.environment = {"STORAGE_EMULATOR_HOST": self.url, "TENSORSTORE_GCS_HTTP_URL": self.url}


@contextlib.contextmanager
def in_front_of(environment: dict[str, str]) -> Iterator[Proxy]:
    """Of what `bucket_servers.serving("gs")` gave."""
    server = _Server(("127.0.0.1", 0), _Handler)
    _Handler.proxy = proxy = Proxy(environment["STORAGE_EMULATOR_HOST"], server.server_address[1])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that is gone is none of ours; one that misses an answer says so itself."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        proxy, sent = self.proxy, self._body()
        status = 503 if proxy.mode == "down" else 403 if proxy.mode == "read_only" and self.command != "GET" else 0
        if status:
            proxy.refused += 1
            self._send(status, [("Content-Type", "application/json")], b'{"error": {"message": "not now"}}')
            return
        connection = http.client.HTTPConnection(urlsplit(proxy.server).netloc, timeout=60)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() not in HOPS}
            connection.request(self.command, self.path, sent, headers)
            answer = connection.getresponse()
            kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in HOPS]
            kept = [(name, value.replace(proxy.server, proxy.url)) for name, value in kept]  # where to upload to
            self._send(answer.status, kept, answer.read())
        finally:
            connection.close()

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _answer

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
