"""A model hub on this machine, as much of one as huggingface_hub needs to fetch a repository at a commit."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REVISION = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(folder: Path, refuse: tuple[int, str] | None = None, token: str | None = None, broken: str | None = None):
    """Serve a folder as the repository `owner/model`; gives the endpoint and the paths of all requests.

    Args:
        folder: what the repository holds.
        refuse: status and X-Error-Code to answer every request with.
        token: refuse requests without this one, as a gated repository does.
        broken: name of a file that breaks off in the middle.
    """
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, status: int, body: bytes = b"", length: int | None = None, **headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = self.path.split("?")[0]
            requests.append(f"{self.command} {path}")
            if refuse:
                return self.answer(refuse[0], X_Error_Code=refuse[1], X_Error_Message="not for you")
            if token and self.headers.get("Authorization") != f"Bearer {token}":
                return self.answer(401, X_Error_Code="GatedRepo", X_Error_Message="ask first")
            if path.startswith("/api/models/owner/model/tree/"):
                return self.answer(200, json.dumps(self.tree()).encode(), Content_Type="application/json")
            name = path.removeprefix(f"/owner/model/resolve/{REVISION}/")
            if not (folder / name).is_file():
                return self.answer(404, X_Error_Code="EntryNotFound")
            content = (folder / name).read_bytes()
            whole = len(content)
            if self.command == "GET" and name == broken:
                content, self.close_connection = content[: whole // 2], True
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            return self.answer(200, content, whole, ETag=etag, X_Repo_Commit=REVISION, Accept_Ranges="bytes")

        do_HEAD = do_GET

        def tree(self):
            return [
                {
                    "type": "file",
                    "path": path.relative_to(folder).as_posix(),
                    "size": path.stat().st_size,
                    "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                }
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            ]

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
