"""A stand-in for Google Cloud Storage: what its JSON API does for gcsfs and tensorstore, with objects in memory."""

import base64
import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

GENERATIONS = itertools.count(1000)
PAGE = 50  # entries of a listing that are sent at once


@dataclasses.dataclass
class Stored:
    """An object, as one generation of it."""

    content: bytes
    generation: int
    metageneration: int = 1


@dataclasses.dataclass
class Bucket:
    """Objects by name, and what this test does to them.

    Attributes:
      forbidden: what it answers to whoever writes: a status; 0 lets him. closed: to whoever asks for anything.
    """

    name: str
    objects: dict[str, Stored] = dataclasses.field(default_factory=dict)
    forbidden: int = 0
    closed: int = 0

    @property
    def url(self) -> str:
        return f"gs://{self.name}"

    def put(self, name: str, content: bytes) -> Stored:
        self.objects[name] = found = Stored(content, next(GENERATIONS))
        return found

    def put_tree(self, folder: Path, prefix: str) -> None:
        """A local folder, under this name."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def get_tree(self, name: str, folder: Path) -> Path:
        """A copy here of one of its folders."""
        for path, content in self.contents(f"{name}/").items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        return folder / name

    def names(self, prefix: str = "") -> list[str]:
        return sorted(name for name in list(self.objects) if name.startswith(prefix))

    def contents(self, prefix: str = "") -> dict[str, bytes]:
        return {name: self.objects[name].content for name in self.names(prefix)}

    def read(self, name: str) -> bytes:
        return self.objects[name].content


class FakeStore:
    """Buckets, and a server of their objects for the time of `serving`.

    Attributes:
      requests: method and path of all that were answered.
      before: called with each of them before it is answered.
    """

    def __init__(self):
        self.buckets: dict[str, Bucket] = {}
        self.requests: list[str] = []
        self.before: Callable[[str], object] = lambda _: None
        self.guard = threading.RLock()
        self.uploads: dict[str, tuple[Bucket, str, dict[str, str], bytearray]] = {}

    def new_bucket(self) -> Bucket:
        name = f"bucket{len(self.buckets)}"
        self.buckets[name] = Bucket(name)
        return self.buckets[name]

    @contextlib.contextmanager
    def serving(self) -> Iterator[str]:
        """The address of a server that lasts for the block."""
        server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": self}))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that does not wait for its answer is none of our business."""


class _Refused(Exception):
    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    store: FakeStore
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, values: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._answer(status, json.dumps(values).encode(), headers)

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        asked = f"{self.command} {unquote(url.path)}"
        self.store.before(asked)
        with self.store.guard:
            self.store.requests.append(asked)
            try:
                self._route(url.path, query, body)
            except _Refused as refused:
                self._json({"error": {"code": refused.status, "message": str(refused)}}, refused.status)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _handle

    def _route(self, path: str, query: dict[str, str], body: bytes) -> None:
        if found := re.fullmatch(r"/resumable/(\w+)", path):
            return self._resume(found[1], body)
        found = re.fullmatch(r"(/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/([^/]+)(/.+)?)?)?", path)
        bucket = self.store.buckets.get(unquote(found[2])) if found else None
        if found is None or bucket is None:
            raise _Refused(404, "The specified bucket does not exist.")
        how, name, rest = found[1], unquote(found[3] or ""), found[4] or ""
        refused = bucket.closed or (self.command != "GET" and bucket.forbidden)
        if refused:
            raise _Refused(refused, "the caller does not have storage.objects access to the bucket.")
        if how == "/upload":
            return self._upload(bucket, query, body)
        if rest:
            other = re.fullmatch(r"/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+)", rest)
            assert other is not None, rest
            goal = self.store.buckets[unquote(other[1])]
            self._write(goal, unquote(other[2]), query, self._object(bucket, name).content, rewritten=True)
        elif name:
            self._one(bucket, name, query)
        elif path.endswith("/o"):
            self._list(bucket, query)
        else:
            self._json({"kind": "storage#bucket", "name": bucket.name})

    def _object(self, bucket: Bucket, name: str) -> Stored:
        if name not in bucket.objects:
            raise _Refused(404, f"No such object: {bucket.name}/{name}")
        return bucket.objects[name]

    def _check(self, found: Stored | None, query: dict[str, str]) -> None:
        now = found.generation if found else 0
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != now:
            raise _Refused(412, "At least one of the pre-conditions you specified did not hold.")
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == now:
            raise _Refused(304, "not modified")

    def _one(self, bucket: Bucket, name: str, query: dict[str, str]) -> None:
        found = self._object(bucket, name)
        self._check(found, query)
        if self.command == "DELETE":
            del bucket.objects[name]
            self._answer(204)
        elif self.command == "PATCH":
            found.metageneration += 1
            self._json(self._about(bucket, name, found))
        elif query.get("alt") == "media":
            self._send(found)
        else:
            self._json(self._about(bucket, name, found))

    def _send(self, found: Stored) -> None:
        content = found.content
        headers = {
            "x-goog-generation": str(found.generation), "ETag": str(found.generation),
            "x-goog-hash": f"md5={_md5(content)}", "Content-Type": "application/octet-stream",
        }  # fmt: skip
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self._answer(200, content, headers)
        first = int(asked[1]) if asked[1] else max(0, len(content) - int(asked[2]))
        last = min(int(asked[2] or len(content)), len(content) - 1) if asked[1] else len(content) - 1
        if first > last:
            raise _Refused(416, "range not satisfiable")
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._answer(206, content[first : last + 1], headers)

    def _about(self, bucket: Bucket, name: str, found: Stored) -> dict[str, str]:
        return {
            "kind": "storage#object", "bucket": bucket.name, "name": name, "size": str(len(found.content)),
            "generation": str(found.generation), "metageneration": str(found.metageneration),
            "md5Hash": _md5(found.content), "etag": f"{found.generation}/{found.metageneration}",
            "updated": "2026-01-01T00:00:00.000Z", "timeCreated": "2026-01-01T00:00:00.000Z",
        }  # fmt: skip

    def _list(self, bucket: Bucket, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        first, last = query.get("startOffset", ""), query.get("endOffset")
        found: dict[str, dict[str, str] | None] = {}  # by name; None is a folder
        for name in bucket.names(prefix):
            if name < first or (last and name >= last):
                continue
            head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            if cut:
                found[prefix + head + cut] = None
            else:
                found[name] = self._about(bucket, name, bucket.objects[name])
        start, most = int(query.get("pageToken", 0)), min(int(query.get("maxResults", PAGE)), PAGE)
        page = list(found.items())[start : start + most]
        values: dict[str, object] = {"items": [about for _, about in page if about]}
        if folders := [name for name, about in page if about is None]:
            values["prefixes"] = folders
        if start + most < len(found):
            values["nextPageToken"] = str(start + most)
        self._json(values)

    def _upload(self, bucket: Bucket, query: dict[str, str], body: bytes) -> None:
        kind = query["uploadType"]
        if kind == "media":
            self._write(bucket, query["name"], query, body)
        elif kind == "multipart":
            boundary = re.search('boundary="?([^";]+)', self.headers["Content-Type"])
            assert boundary is not None
            mark = b"--" + boundary[1].encode()
            line = b"\r\n" if body.startswith(mark + b"\r\n") else b"\n"  # content may end with either, or a half of it
            _, *parts, _ = (line + body).split(line + mark)
            about, content = (part.partition(line + line)[2] for part in parts)
            self._write(bucket, json.loads(about)["name"], query, content)
        else:
            name = query.get("name") or json.loads(body or b"{}")["name"]
            number = f"u{len(self.store.uploads)}"
            self.store.uploads[number] = (bucket, name, query, bytearray())
            host = self.headers["Host"]
            self._json({}, headers={"Location": f"http://{host}/resumable/{number}"})

    def _resume(self, number: str, body: bytes) -> None:
        bucket, name, query, content = self.store.uploads[number]
        content += body
        size = self.headers.get("Content-Range", "bytes */*").rpartition("/")[2]
        if size == "*" or len(content) < int(size):
            self._answer(308, headers={"Range": f"bytes=0-{len(content) - 1}"} if content else {})
        else:
            self._write(bucket, name, query, bytes(content))

    def _write(self, bucket: Bucket, name: str, query: dict[str, str], content: bytes, rewritten: bool = False) -> None:
        self._check(bucket.objects.get(name), query)
        about = self._about(bucket, name, bucket.put(name, content))
        answer = {"done": True, "resource": about, "objectSize": about["size"]} if rewritten else about
        self._json(answer, headers={"x-goog-generation": about["generation"]})


def _md5(content: bytes) -> str:
    return base64.b64encode(hashlib.md5(content).digest()).decode()
