"""Keys, rates, sizes, places, and what hostile or unlucky clients do: the server answers or hangs up, and goes on."""

from __future__ import annotations

import contextlib
import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sparseling.errors import UserError
from sparseling.serve import connection, service
from sparseling.serve.limits import Buckets
from sparseling.serve.settings import key_hash, read_keys

from .conftest import Running

CHAT = {"messages": [{"role": "user", "content": "How many?"}], "max_tokens": 4}


def endless(running: Running) -> dict[str, Any]:
    """A completion that goes on as long as the context lets it: it may not say a stop token."""
    return {"prompt": "How many?", "max_tokens": 900, "logit_bias": bias_of(running)}


def bias_of(running: Running) -> dict[str, float]:
    """Of stop tokens, so that none is said."""
    return {str(token): -100 for token in running.service.stop_ids}


def post(running: Running, path: str, body: Any, **headers: str) -> tuple[int, Any, Any]:
    """(status, JSON, headers) of one request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(running.url + path, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, json.loads(reply.read()), reply.headers
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), error.headers


def get(running: Running, path: str, **headers: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(running.url + path, headers=headers), timeout=30) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@contextlib.contextmanager
def raw(running: Running, data: bytes) -> Iterator[socket.socket]:
    """A connection that sent these bytes."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as plain:
        plain.sendall(data)
        yield plain


def request_of(body: dict[str, Any], path: str = "/v1/completions") -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def read_all(plain: socket.socket) -> bytes:
    """All that comes until the server hangs up."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := plain.recv(65536):
            parts.append(part)
    return b"".join(parts)


def well(running: Running) -> bool:
    """Whether the server is as before: idle, all pages free, and answering."""
    return running.idle() and post(running, "/v1/chat/completions", CHAT)[0] == 200


def test_keys_open_what_is_guarded(start: Callable[..., Running]) -> None:
    running = start(keys={key_hash("secret"): "phone"})
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}, {"Authorization": "Basic secret"}):
        status, body, answered = post(running, "/v1/chat/completions", CHAT, **headers)
        assert status == 401 and body["error"]["code"] == "invalid_api_key" and answered["WWW-Authenticate"] == "Bearer"
    assert get(running, "/v1/models")[0] == 401 and get(running, "/metrics")[0] == 401 and get(running, "/health")[0] == 200
    assert post(running, "/v1/chat/completions", CHAT, Authorization="Bearer secret")[0] == 200
    assert get(running, "/metrics", Authorization="bearer secret")[0] == 200


def test_files_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# mine\nabc\n\nphone: d:e \n")
    assert read_keys(path) == {key_hash("abc"): "key-2", key_hash("e"): "phone: d"}
    for empty in ("phone:", "phone: \nabc", "phone: schlüssel"):
        path.write_text(empty)
        with pytest.raises(UserError, match=":1: holds no key"):
            read_keys(path)
    path.write_text("\n#\n")
    for wrong in (path, tmp_path / "missing", tmp_path):
        with pytest.raises(UserError, match="; "):
            read_keys(wrong)


def test_a_bucket_gives_its_rate_and_forgets_the_quiet() -> None:
    buckets = Buckets(60)
    assert [buckets.take("a", 0.0) for _ in range(61)] == [0.0] * 60 + [1.0] and buckets.take("b", 0.0) == 0
    assert buckets.take("a", 0.5) == 0.5 and buckets.take("a", 1.5) == 0 and buckets.take("a", 1.5) > 0
    assert sum(buckets.take("a", 2 + n / 10) == 0 for n in range(1000)) == pytest.approx(100, abs=2)
    buckets.take("c", 1000.0)
    assert list(buckets.left) == ["c"]


def test_too_many_requests_are_told_when_to_come_again(start: Callable[..., Running]) -> None:
    running = start(requests_per_minute=3)
    replies = [post(running, "/v1/chat/completions", CHAT) for _ in range(5)]
    assert [status for status, _, _ in replies] == [200, 200, 200, 429, 429]
    assert 1 <= int(replies[4][2]["Retry-After"]) <= 21 and replies[4][1]["error"]["code"] == "rate_limit_exceeded"
    assert get(running, "/health")[0] == 200


def test_more_than_may_wait_get_429_and_nothing_is_lost(start: Callable[..., Running]) -> None:
    running = start(max_streams=2, max_waiting=3)
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(raw(running, request_of({**endless(running), "stream": True}))) for _ in range(5)]
        assert all(stream.recv(12) == b"HTTP/1.1 200" for stream in streams)
        while len(running.service.thread.active) < 5:
            time.sleep(0.01)
        status, body, headers = post(running, "/v1/chat/completions", CHAT)
        assert status == 429 and body["error"]["code"] == "overloaded" and int(headers["Retry-After"]) >= 1
        assert post(running, "/v1/completions", {**endless(running), "n": 6})[0] in (400, 429)
    assert well(running)


def test_sizes_are_limited_whether_declared_or_not(start: Callable[..., Running]) -> None:
    running = start(max_body_bytes=1000, body_seconds=1.0)
    large = {"messages": [{"role": "user", "content": "x" * 1000}]}
    assert post(running, "/v1/chat/completions", large)[0] == 413
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    with raw(running, head + b"200\r\n" + b"x" * 512 + b"\r\n200\r\n" + b"x" * 512 + b"\r\n") as plain:
        assert plain.recv(12) == b"HTTP/1.1 413"
    declared = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999999\r\n\r\n"
    with raw(running, declared) as plain:
        assert plain.recv(12) in (b"HTTP/1.1 413", b"HTTP/1.1 400")
    with raw(running, head + b"5\r\n{\"mes\r\n") as plain:                         # and then nothing more
        assert plain.recv(12) == b"HTTP/1.1 408"
    assert well(running)


def test_an_answer_that_takes_too_long_is_stopped(start: Callable[..., Running]) -> None:
    running = start(request_seconds=0.05)
    status, body, _ = post(running, "/v1/completions", {**endless(running), "prompt": "x " * 400})
    assert status == 504 and body["error"]["code"] == "timeout"
    with raw(running, request_of({**endless(running), "stream": True})) as plain:
        plain.settimeout(10)
        data = b""
        while b"[DONE]" not in data:
            data += plain.recv(65536)
    assert b'"code":"timeout"' in data and running.idle()


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b'"x"', b"[" * 100_000, b'{"messages": "x"}', b'{"messages": [{"role": "user"}], "n": "x"}',
    b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
    b'{"messages": [{"role": "user", "content": "a"}], "seed": 1e99}',
    b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e400}', b'{"messages": [{"role": "user", "content": 7}]}',
    b'{"messages": [{"role": "user", "content": "a"}], "model": "\\ud800"}', b'{"prompt": []}', b'{"prompt": [-1]}',
    b'{"prompt": [99999]}',
    b'{"prompt": [[]]}', b'{"prompt": "x", "suffix": 3, "logprobs": 99}', b'{"input": []}', b'{"input": ""}', b'{"prompt": ""}',
    b'{"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://x/y"}}}}',
    b'{"prompt": "x", "regex": "(a{1000}){1000}"}', b'{"prompt": "x", "regex": "\\ud800"}',
])  # fmt: skip
def test_malformed_requests_are_refused_in_words(running: Running, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings"):
        status, reply, _ = post(running, path, body)
        assert 400 <= status < 500 and reply["error"]["message"], (path, reply)


def test_prompts_that_are_too_long_hold_up_nobody(running: Running) -> None:
    text = "How many? " * 200_000
    for path, body in (("/v1/completions", {"prompt": text}), ("/v1/embeddings", {"input": [text]}),
                       ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], "tools": [{"function": {"name": "f"}}]})):
        status, reply, _ = post(running, path, body)
        assert status == 400 and reply["error"]["code"] == "context_length_exceeded"


def test_more_routing_than_memory_should_hold_is_refused(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MOST_SHOWN", 10 * len(running.service.view.layers) * running.service.config.num_experts_per_tok)
    for body, status in (({"max_tokens": 10}, 200), ({"max_tokens": 11}, 400), ({"max_tokens": 2**30}, 400),
                         ({"max_tokens": 4, "n": 3}, 400), ({"max_tokens": 10, "routing": "all"}, 400),
                         ({"max_tokens": 20, "routing": None}, 200)):
        assert post(running, "/v1/completions", {"prompt": "How many?", "routing": True, **body})[0] == status
    body = {"messages": CHAT["messages"], "routing": True, "logit_bias": bias_of(running)}
    status, reply, _ = post(running, "/v1/chat/completions", body)
    assert status == 200 and reply["usage"]["completion_tokens"] == 10 and reply["choices"][0]["finish_reason"] == "length"


def test_half_a_character_is_text_like_any_other(running: Running) -> None:
    content = b'{"messages": [{"role": "user", "content": "a\\ud800b"}], "max_tokens": 3}'
    assert post(running, "/v1/chat/completions", content)[0] == 200
    assert post(running, "/v1/embeddings", b'{"input": "a\\udfffb"}')[0] == 200


def test_other_ways_and_methods(running: Running) -> None:
    assert get(running, "/v1/nothing")[0] == 404 and get(running, "/v1/completions")[0] == 405
    assert json.loads(get(running, "/v1/models/none")[1])["error"]["code"] == "model_not_found"
    assert get(running, "/openapi.json")[0] == 200 and get(running, "/docs")[0] == 404
    assert post(running, "/v1/chat/completions", json.dumps(CHAT).encode(), **{"Content-Type": "text/plain"})[0] in (400, 415, 422)


def test_a_client_that_leaves_frees_its_pages(running: Running) -> None:
    long = endless(running)
    for body in (long, {**long, "stream": True}, {**long, "stream": True, "n": 4}, {**long, "n": 3}):
        for wait in (False, True):
            with raw(running, request_of(body)) as plain:
                if wait and body.get("stream"):
                    assert plain.recv(100)
                while wait and not running.service.thread.active:
                    time.sleep(0.005)
            assert running.idle(2)
    assert well(running)


def test_half_closed_slow_and_broken_connections_do_no_harm(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.5)
    monkeypatch.setattr(connection, "MOST_HEADER_BYTES", 20_000)
    with raw(running, request_of({**endless(running), "max_tokens": 5})) as plain:            # the client says no more, but listens
        plain.shutdown(socket.SHUT_WR)
        read_all(plain)
    for data in (b"", b"GET / HT", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"):
        with raw(running, data) as plain:
            assert read_all(plain) == b""
    with raw(running, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n") as plain:    # the second head comes letter by letter, for ever
        assert plain.recv(12) == b"HTTP/1.1 200"
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < started + 5:
                plain.sendall(b"G" if time.monotonic() < started + 0.05 else b"E")
                time.sleep(0.1)
        assert time.monotonic() < started + 3
    with raw(running, b"GET /health HTTP/1.1\r\n") as plain:
        with contextlib.suppress(ConnectionError):
            for n in range(2000):
                plain.sendall(b"X-%d: %s\r\n" % (n, b"y" * 100))
        assert read_all(plain)[:12] in (b"HTTP/1.1 400", b"")
    for data in (b"\x00\x01\x02\x03\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
                 b"\x16\x03\x01\x02\x00"):
        with raw(running, data) as plain:
            assert read_all(plain)[:12] in (b"HTTP/1.1 400", b"")
    with raw(running, request_of({**endless(running), "max_tokens": 3}) * 5) as plain:        # five in one packet
        plain.settimeout(5)
        data = b""
        while data.count(b"HTTP/1.1 200") < 5:
            data += plain.recv(65536)
    assert well(running)


def test_a_client_that_does_not_read_holds_up_nobody(running: Running) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(6):
            plain = stack.enter_context(raw(running, request_of({**endless(running), "stream": True, "logprobs": 20, "routing": "all"})))
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        assert post(running, "/v1/chat/completions", CHAT)[0] == 200
    assert well(running)


def test_an_engine_that_fails_costs_its_answers_and_no_more(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(type(running.service.thread.scheduler), "read", fail)
        status, body, _ = post(running, "/v1/chat/completions", CHAT)
        assert status == 500 and "MemoryError" in body["error"]["message"]
    assert well(running) and running.service.metrics.engine_failures._value.get() >= 1


def test_figures_of_the_server(running: Running) -> None:
    post(running, "/v1/completions", {"prompt": "How", "max_tokens": 7})
    text = get(running, "/metrics")[1].decode()
    for line in ('sparseling_requests_total{path="/v1/completions",status="200"}', "sparseling_answer_tokens_total",
                 "sparseling_pages 400.0",
                 "sparseling_between_tokens_seconds_bucket", "process_resident_memory_bytes", "sparseling_active 0.0"):
        assert line in text
