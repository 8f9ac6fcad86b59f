"""A bucket of Google Cloud Storage on this machine, as far as TensorStore asks one: `with bucket() as objects:`.

What it knows: read (ranges too), write, delete, list, and the generation of an object, which a write or a delete may
be bound to. Objects live in a dict, which a test may look into and damage.
"""

from __future__ import annotations

import contextlib
import http.server
import itertools
import json
import threading
import time
import urllib.parse
from collections.abc import Iterator
from typing import NamedTuple

_PAGE = 100  # names that a listing gives at once


class Object(NamedTuple):
    data: bytes
    generation: int


class Objects(dict[str, Object]):
    """By "BUCKET/NAME"."""

    def __init__(self) -> None:
        self.lock, self.generations, self.asked = threading.Lock(), itertools.count(1), list[str]()
        self.url, self.seconds = "", 0.0  # before each answer to a GET

    def put(self, name: str, data: bytes) -> Object:
        self[name] = Object(data, next(self.generations))
        return self[name]


@contextlib.contextmanager
def bucket() -> Iterator[Objects]:
    objects = Objects()

    class Handler(_Handler):
        held = objects

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 128  # TensorStore opens many connections at once

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    objects.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield objects
    finally:
        server.shutdown()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    held: Objects
    protocol_version, wbufsize, disable_nagle_algorithm = "HTTP/1.1", -1, True  # an answer is one packet

    def do_GET(self) -> None:
        time.sleep(self.held.seconds)
        name, asked = self._name()
        if name.endswith("/"):
            return self._list(name, asked)
        found = self.held.get(name)
        if found is None:
            return self._answer(404)
        if asked.get("ifGenerationNotMatch") == str(found.generation):
            return self._answer(304)
        if asked.get("ifGenerationMatch", str(found.generation)) != str(found.generation):
            return self._answer(412)
        headers = {"x-goog-generation": str(found.generation)}
        if asked.get("alt") != "media":
            return self._json({"name": name.partition("/")[2], "generation": str(found.generation)})
        if not (span := self.headers.get("Range")):
            return self._answer(200, found.data, headers)
        first, _, last = span.removeprefix("bytes=").partition("-")
        size = len(found.data)
        begin = int(first) if first else max(0, size - int(last))
        end = min(size, int(last) + 1) if first and last else size
        if begin >= end:
            return self._answer(416, b"", headers | {"Content-Range": f"bytes */{size}"})
        self._answer(206, found.data[begin:end], headers | {"Content-Range": f"bytes {begin}-{end - 1}/{size}"})

    def do_POST(self) -> None:
        name, asked = self._name()
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.held.lock:
            name += asked["name"]
            if (wanted := asked.get("ifGenerationMatch")) is not None and wanted != self._generation(name):
                return self._answer(412)
            made = self.held.put(name, data)
        self._json({"name": asked["name"], "generation": str(made.generation)})

    def do_DELETE(self) -> None:
        name, asked = self._name()
        with self.held.lock:
            if (wanted := asked.get("ifGenerationMatch")) is not None and wanted != self._generation(name):
                return self._answer(412)
            found = self.held.pop(name, None)
        self._answer(404 if found is None else 204)

    def _list(self, place: str, asked: dict[str, str]) -> None:
        names = sorted(name.removeprefix(place) for name in list(self.held) if name.startswith(place))
        low, high = asked.get("startOffset", ""), asked.get("endOffset")
        names = [n for n in names if n.startswith(asked.get("prefix", "")) and n >= low and (not high or n < high)]
        names = [name for name in names if name > asked.get("pageToken", "")]
        page = {"items": [{"name": name} for name in names[:_PAGE]]}
        self._json(page | ({"nextPageToken": names[_PAGE - 1]} if names[_PAGE:] else {}))

    def _name(self) -> tuple[str, dict[str, str]]:
        """ "BUCKET/NAME" ("BUCKET/" of a listing and an upload), and what else is asked."""
        url = urllib.parse.urlsplit(self.path)
        self.held.asked.append(f"{self.command} {self.path}")
        _, _, rest = url.path.partition("/b/")
        place, _, name = rest.partition("/o")
        return f"{place}/{urllib.parse.unquote(name.removeprefix('/'))}", dict(urllib.parse.parse_qsl(url.query))

    def _generation(self, name: str) -> str:
        found = self.held.get(name)
        return "0" if found is None else str(found.generation)

    def _json(self, value: dict) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, code: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass
