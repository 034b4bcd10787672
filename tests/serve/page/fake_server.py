"""A server without a model that speaks the interface of `sparseling serve`: seeded routing, scripted answers, delays and faults.

What an answer is depends on a word in the question: `hostile` (markup, emoji, right-to-left, combining characters cut over tokens), `break`
(an error in the middle), `drop` (the connection ends), `busy` (429), `refuse` (400), `cut` (too long), `long N` (N tokens),
`slow` (until it is stopped); else a sum.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import json
import random
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from sparseling.run.thinking import ThinkingSplitter

PAGE = Path(__file__).parents[3] / "sparseling" / "serve" / "page"
KINDS = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HOSTILE = ["<img src=x", " onerror=\"document.title='owned'\">",
           "<script>", "alert(1)", "</script>", " &amp; ", b"\xf0\x9f", b"\x98\x80", " e",
           "\u0301", " שלום", " עולם", " 数", "学", "\n", "\n", "javascript:", "\u202e", "end", " ", "\u2028", "<b>bold</b>"]


@dataclass(frozen=True)
class Shape:
    layers: tuple[int, ...] = (1, 2, 3)
    experts: int = 16
    per_token: int = 4
    groups: int = 4
    kept_groups: int = 2


@dataclass
class Fake:
    """A running fake: what it was asked (`requests`) and what routing it sent to each (`sent`)."""

    shape: Shape = field(default_factory=Shape)
    api_key: str | None = None
    delay_s: float = 0.0
    requests: list[dict[str, Any]] = field(default_factory=list)
    sent: list[list[dict[str, Any]]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    aborted: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""


@contextlib.contextmanager
def serving(fake: Fake) -> Iterator[Fake]:
    """The fake on a free port of this machine until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"fake": fake}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()


def tokens_of(question: str, thinking: bool) -> list[str | bytes]:
    """The tokens of the answer to a question, tags of the reasoning included."""
    if "hostile" in question:
        content: list[str | bytes] = [*HOSTILE]
    elif number := re.search(r"long (\d+)", question):
        content = [f" word{place}" if place % 12 else f"\nline{place}" for place in range(int(number[1]))]
    elif "slow" in question:
        content = [f" and {place}" for place in range(10_000)]
    else:
        content = ["The", " answer", " is", " ", "8", "5", ".", " I", " am", " quite", " sure", " of", " it", "."]
    words = ["7", " plus", " 8", " is", " 15", ",", " carry", " 1", ";", " 4", " plus", " 3", " plus", " 1", " is", " 8", "."]
    thought: list[str | bytes] = ["<think>", "\n", *words, "\n", "</think>", "\n", "\n"]
    return [*(thought if thinking else []), *content]


@functools.cache
def bias_of(layer: int, experts: int) -> list[float]:
    rng = random.Random(f"bias {layer}")
    return [round(rng.uniform(-0.05, 0.05), 4) for _ in range(experts)]


@functools.lru_cache(maxsize=4096)
def routing_of(token: int, seed: str, shape: Shape) -> list[dict[str, Any]]:
    """Routing as the model would choose it: scores, a bias, the best groups, the best experts in them, weights of the scores."""
    layers = []
    for layer in shape.layers:
        rng, taste = random.Random(f"{seed} {token} {layer}"), random.Random(f"taste {seed[:5]} {layer}")
        scores = [round(min(0.99, rng.random() ** 3 * (0.3 + taste.random() ** 2)), 4) for _ in range(shape.experts)]
        biased = [round(score + shift, 4) for score, shift in zip(scores, bias_of(layer, shape.experts), strict=True)]
        size = shape.experts // shape.groups
        value = [sum(sorted(biased[group * size:(group + 1) * size])[-2:]) for group in range(shape.groups)]
        kept = sorted(sorted(range(shape.groups), key=lambda group: -value[group])[:shape.kept_groups])
        eligible = [expert for expert in range(shape.experts) if expert // size in kept]
        chosen = sorted(eligible, key=lambda expert: -biased[expert])[:shape.per_token]
        total = sum(scores[expert] for expert in chosen) + 1e-20
        layers.append({"layer": layer, "experts": chosen, "weights": [round(2.5 * scores[expert] / total, 4) for expert in chosen],
                       "scores": [scores[expert] for expert in chosen], "biased": [biased[expert] for expert in chosen], "groups": kept})
    return layers


def load_of(layer: int, shape: Shape) -> list[int]:
    rng = random.Random(f"load {layer}")
    return [rng.randrange(50, 400) for _ in range(shape.experts)]


class Handler(BaseHTTPRequestHandler):
    fake: Fake

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.fake.paths.append(path)
        if path == "/" or path.startswith("/page/"):
            return self.file(PAGE / ("index.html" if path == "/" else path.removeprefix("/page/")))
        if not self.allowed():
            return None
        shape = self.fake.shape
        facts = {"num_experts": shape.experts, "num_experts_per_tok": shape.per_token, "n_group": shape.groups}
        if path == "/v1/models":
            model = {"id": "laptop", "object": "model", "context_length": 4096, "num_hidden_layers": len(shape.layers) + 1, **facts,
                     "moe_layers": list(shape.layers), "thinking": False}
            return self.reply(200, {"object": "list", "data": [model]})
        if path == "/v1/experts/load":
            layers = [{"layer": layer, "tokens": 1000, "counts": load_of(layer, shape)} for layer in shape.layers]
            return self.reply(200, {**facts, "layers": layers})
        return self.refuse(404, f"{path}: no such page")

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return None
        entries: list[dict[str, Any]] = []
        with self.fake.lock:
            self.fake.requests.append(request)
            self.fake.sent.append(entries)
        question = request["messages"][-1]["content"]
        if "busy" in question:
            return self.refuse(429, "Too many requests wait", {"Retry-After": "7"})
        if "refuse" in question:
            return self.refuse(400, "temperature: 9 is above 2; give 0 to 2")
        return self.stream(question, request["chat_template_kwargs"]["enable_thinking"], entries)

    def allowed(self) -> bool:
        if self.fake.api_key is None or self.headers.get("Authorization") == f"Bearer {self.fake.api_key}":
            return True
        self.refuse(401, "The API key is missing or not known")
        return False

    def file(self, path: Path) -> None:
        if not path.is_file():
            return self.reply(404, {})
        self.send(200, path.read_bytes(), KINDS[path.suffix])
        return None

    def refuse(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        self.reply(status, {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}, headers)

    def reply(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(body).encode(), "application/json", headers or {})

    def send(self, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def stream(self, question: str, thinking: bool, entries: list[dict[str, Any]]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for event in self.events(question, thinking, entries):
                self.write(event)
                time.sleep(self.fake.delay_s)
        except (BrokenPipeError, ConnectionResetError):
            self.fake.aborted.set()

    def write(self, event: dict[str, Any] | str) -> None:
        """Pieces that end anywhere, also inside a character."""
        data = b": ping\r\n\r\ndata: " + (event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)).encode() + b"\r\n\r\n"
        rng = random.Random(len(data))
        while data:
            size = rng.choice((1, 3, 7, 50, 5000, 5000))
            self.wfile.write(data[:size])
            self.wfile.flush()
            data = data[size:]

    def events(self, question: str, thinking: bool, entries: list[dict[str, Any]]) -> Iterator[dict[str, Any] | str]:
        decoder, splitter = codecs.getincrementaldecoder("utf-8")("replace"), ThinkingSplitter()
        tokens = tokens_of(question, thinking)
        reasoning, late = thinking, None
        closing = tokens.index("</think>") if thinking else 0
        yield chunk({"role": "assistant", "content": ""})
        for place, token in enumerate(tokens):
            spelled = token.encode() if isinstance(token, str) else token
            delta = delta_of(splitter.push(decoder.decode(spelled)))
            reasoning = reasoning and (place <= closing or token == "\n")  # the line breaks after the tag as well
            yield chunk(delta, [late] if late else None)
            late = {"index": 20 + place, "part": "reasoning" if reasoning else "content", "token": 300 + place % 50,
                    "text": spelled.decode("utf-8", "replace"),
                    "layers": routing_of(300 + place % 50, f"{thinking} {place % 3}", self.fake.shape)}
            entries.append(late)
            if place == 5 and "break" in question:
                yield {"error": {"message": "The engine ran out of pages", "type": "server_error", "param": None, "code": None}}
                return
            if place == 5 and "drop" in question:
                return
        yield chunk(delta_of(splitter.finish()), None if "cut" in question else [late], "length" if "cut" in question else "stop")
        if "cut" in question:
            entries.pop()
        yield {"choices": [], "usage": {"prompt_tokens": 20, "completion_tokens": len(tokens), "total_tokens": 20 + len(tokens)}}
        yield "[DONE]"


def delta_of(pieces: list[Any]) -> dict[str, str]:
    names = {"thought": "reasoning_content", "answer": "content"}
    delta: dict[str, str] = {}
    for piece in pieces:
        delta[names[piece.kind]] = delta.get(names[piece.kind], "") + piece.text
    return delta


def chunk(delta: dict[str, str], routing: list[Any] | None = None, finish: str | None = None) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": finish}
    if routing:
        choice["routing"] = routing
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "laptop", "choices": [choice]}
