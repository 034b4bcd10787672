"""The load generator: it counts what it should, and sees what is lost or mixed."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from sparseling.bench.serve import bench_serve, load, percentiles, requests_of, resident_bytes, send, serve_table
from sparseling.errors import UserError


class Echo(BaseHTTPRequestHandler):
    """Streams words that depend on the seed; misbehaves as `fault` says, from request number `DIFFERENT` on."""

    fault = ""
    seen = 0
    lock = threading.Lock()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with Echo.lock:
            Echo.seen += 1
            fault = Echo.fault if Echo.seen > 40 and Echo.seen % 2 else ""
        seed = body["seed"] + (fault == "mixed")
        words = [f"{seed}-{n} " for n in range(seed % 3 + 2 - (fault == "lost"))]
        self.send_response(500 if fault == "refused" else 200)
        self.end_headers()
        for word in words:
            self.event({"choices": [{"text": word}]})
        if fault == "error":
            self.event({"error": {"message": "broken"}})
        self.event({"choices": [], "usage": {"completion_tokens": len(words)}})
        if fault != "cut":
            self.wfile.write(b"data: [DONE]\n\n")

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": [{"id": "echo"}]}')

    def event(self, value: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    Echo.seen, Echo.fault = 0, ""
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("fault", ["", "mixed", "lost", "error", "cut", "refused"])
def test_every_fault_is_seen_and_counted(url: str, fault: str) -> None:
    Echo.fault = fault
    result = bench_serve(None, url, 4, 0.7, "bf16", 1)
    assert result["requests"] > 4 and result["tokens_per_second"] > 0 and result["memory_mib"] is None
    assert (result["failed"] > 0) == (fault in ("error", "cut", "refused")) and (result["different"] > 0) == (fault in ("mixed", "lost"))
    assert bool(result["examples"]) == bool(fault) and f"failed                  {result['failed']}" in serve_table(result)
    json.dumps(result)


def test_a_server_that_fails_alone_is_not_loaded() -> None:
    with pytest.raises(UserError, match="no server answers there"):
        bench_serve(None, "http://127.0.0.1:9", 1, 1.0, "bf16", 1)
    with pytest.raises(UserError, match="a request alone failed"):
        asyncio.run(load("http://127.0.0.1:9", requests_of("x"), 1, 1.0, None))
    assert asyncio.run(send("http://127.0.0.1:9", requests_of("x")[0])).failure


def test_requests_are_the_same_every_time_and_differ_in_kind() -> None:
    made = requests_of("m")
    assert made == requests_of("m") and len({json.dumps(request.body) for request in made}) == len(made)
    assert {request.path for request in made} == {"/v1/completions", "/v1/chat/completions"}
    assert {request.body["temperature"] for request in made} == {0, 0.7, 1.0}


def test_percentiles_and_memory() -> None:
    assert percentiles([float(n) for n in range(100, 0, -1)]) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
    assert percentiles([3.0]) == {"p50": 3.0, "p95": 3.0, "p99": 3.0} and percentiles([])["p50"] is None
    assert resident_bytes(os.getpid()) > 10 << 20 and resident_bytes(None) == 0 == resident_bytes(2**30)
