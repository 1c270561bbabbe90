"""A server of bundles for the download's tests: it knows ranges, and breaks large files off once."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BROKEN_FROM = 1 << 20


@contextmanager
def serving(bundle: Path) -> Iterator[str]:
    """An address with `bundle`, `changed` (the same with another tokenizer) and `sent` (what was sent)."""
    broken: set[str] = set()
    sent = {"bytes": 0}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            kind, _, relative = self.path.lstrip("/").partition("/")
            file = bundle / relative
            if kind == "sent":
                return self.answer(json.dumps({**sent, "broken": len(broken)}).encode())
            if kind not in ("bundle", "changed") or ".." in relative or not file.is_file():
                return self.send_error(404)
            data = file.read_bytes()
            if kind == "changed":
                return self.answer(data.swapcase() if relative == "tokenizer.json" else data)
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(wanted[1]) if wanted else 0
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            stop = len(data)
            if stop >= BROKEN_FROM and relative not in broken:
                broken.add(relative)
                stop //= 2
            self.wfile.write(data[start:stop])
            sent["bytes"] += stop - start
            self.close_connection = True

        def answer(self, data: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
