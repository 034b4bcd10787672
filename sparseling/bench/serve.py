"""Load on a server: many streams at once for a while, every text compared with the same request alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import UserError
from ..progress import Bar, bar, say

DIFFERENT = 32  # requests, each sent again and again
STREAM_SECONDS = 300.0  # before a stream counts as failed
WORDS = ["add", "sort", "reverse", "the", "largest", "of", "three", "numbers", "letters", "what", "is", "how", "many", "and", "then",
         "river", "town", "house", "light", "water", "small"]


@dataclass(frozen=True)
class Request:
    """One of the requests: where it goes and what it says."""

    path: str
    body: dict[str, Any]


@dataclass
class Reply:
    """What came of one: text, tokens, seconds to the first piece and between pieces; `failure` says why it is not whole."""

    text: str = ""
    tokens: int = 0
    first_seconds: float | None = None
    gaps: list[float] = field(default_factory=list)
    failure: str = ""


@dataclass
class Tally:
    """Replies under load, by what became of them."""

    requests: int = 0
    tokens: int = 0
    failures: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


def requests_of(model: str, seed: int = 0) -> list[Request]:
    """Chats with and without thinking, and texts to continue, of different lengths and sampling; the same for every call."""
    rng = random.Random(seed)
    made = []
    for number in range(DIFFERENT):
        words = " ".join(rng.choices(WORDS, k=rng.choice([3, 8, 20, 60])))
        body: dict[str, Any] = {
            "model": model, "seed": number, "max_tokens": rng.choice([16, 48, 96]), "temperature": rng.choice([0, 0.7, 1.0]),
            "stream": True, "stream_options": {"include_usage": True},
        }
        if number % 2:
            made.append(Request("/v1/completions", {**body, "prompt": words}))
        else:
            messages = [{"role": "user", "content": f"What is {rng.randrange(10, 99)} + {rng.randrange(10, 99)}? {words}"}]
            made.append(Request("/v1/chat/completions", {**body, "messages": messages, "enable_thinking": number % 4 == 0}))
    return made


async def send(url: str, request: Request) -> Reply:
    """Stream one request over a connection of its own."""
    reply = Reply()
    try:
        async with asyncio.timeout(STREAM_SECONDS):
            await receive(url, request, reply)
    except (OSError, ValueError, TimeoutError, asyncio.IncompleteReadError) as error:
        reply.failure = f"{type(error).__name__}: {error}"
    return reply


async def receive(url: str, request: Request, reply: Reply) -> None:
    place = urlsplit(url)
    data = json.dumps(request.body).encode()
    started = last = time.perf_counter()
    reader, writer = await asyncio.open_connection(place.hostname, place.port or 80)
    try:
        head = f"POST {request.path} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        writer.write(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        status = (await reader.readline()).split(b" ")
        if len(status) < 2 or status[1] != b"200":
            raise ValueError(f"status {b' '.join(status[1:2]).decode() or 'none'}: {(await reader.read(300)).decode(errors='replace')}")
        done = False
        while line := await reader.readline():                                   # chunk sizes and headers pass by
            if line.startswith(b"data: [DONE]"):
                done = True
            elif line.startswith(b"data: "):
                event = json.loads(line[6:])
                piece = text_of(event, reply)
                if piece:
                    now = time.perf_counter()
                    if reply.first_seconds is None:
                        reply.first_seconds = now - started
                    else:
                        reply.gaps.append(now - last)
                    last, reply.text = now, reply.text + piece
        if not done:
            raise ValueError("the stream ended in the middle")
    finally:
        writer.close()


def text_of(event: dict[str, Any], reply: Reply) -> str:
    """The text of an event, thoughts and all; usage goes to the reply. Raises `ValueError` for an error."""
    if "error" in event:
        raise ValueError(event["error"]["message"])
    if event.get("usage"):
        reply.tokens = event["usage"]["completion_tokens"]
    text = ""
    for choice in event["choices"]:
        delta = choice.get("delta", {})
        text += (delta.get("reasoning_content") or "") + (delta.get("content") or "") + (choice.get("text") or "")
    return text


async def load(url: str, requests: list[Request], streams: int, seconds: float, process: int | None) -> dict[str, Any]:
    """Every request alone, then `streams` at once for `seconds`; what began in time is finished."""
    alone = []
    with bar("each request alone", len(requests)) as line:
        for request in requests:
            alone.append(await send(url, request))
            line.advance()
    for reply in alone:
        if reply.failure:
            raise UserError(f"{url}: a request alone failed ({reply.failure}); see to the server first")
    tally, memory = Tally(), [resident_bytes(process)]
    started = time.perf_counter()
    with bar(f"{streams} streams at once", seconds) as line:
        watch = asyncio.create_task(watch_memory(process, memory, line))
        await asyncio.gather(*(keep_asking(url, requests, alone, tally, number, started + seconds) for number in range(streams)))
        watch.cancel()
    wall = time.perf_counter() - started
    memory.append(resident_bytes(process))
    return {
        "streams": streams, "seconds": wall, "requests": tally.requests, "failed": len(tally.failures), "different": len(tally.different),
        "tokens": tally.tokens, "tokens_per_second": tally.tokens / wall,
        "first_token_seconds": percentiles(tally.first_seconds), "between_pieces_seconds": percentiles(tally.gaps),
        "alone_between_pieces_seconds": percentiles([gap for reply in alone for gap in reply.gaps]),
        "memory_mib": None if process is None else [round(value / 2**20, 1) for value in memory],
        "examples": [*tally.failures[:5], *tally.different[:5]],
    }


async def keep_asking(url: str, requests: list[Request], alone: list[Reply], tally: Tally, number: int, until: float) -> None:
    """One stream after the other."""
    rng = random.Random(number)
    while time.perf_counter() < until:
        which = rng.randrange(len(requests))
        reply = await send(url, requests[which])
        tally.requests += 1
        tally.tokens += reply.tokens
        if reply.failure:
            tally.failures.append(reply.failure)
            await asyncio.sleep(0.5)
        elif (reply.text, reply.tokens) != (alone[which].text, alone[which].tokens):
            tally.different.append(f"request {which}: {reply.text!r} ({reply.tokens} tokens), alone {alone[which].text!r} "
                                   f"({alone[which].tokens})")
        if reply.first_seconds is not None:
            tally.first_seconds.append(reply.first_seconds)
        tally.gaps += reply.gaps


async def watch_memory(process: int | None, memory: list[int], line: Bar) -> None:
    while True:
        await asyncio.sleep(1)
        line.advance(1)
        memory.append(resident_bytes(process))


def resident_bytes(process: int | None) -> int:
    """Memory that a process holds; 0 where that cannot be known."""
    with contextlib.suppress(OSError, TypeError, IndexError):
        return int(re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())[0]) * 1024
    return 0


def percentiles(values: list[float]) -> dict[str, float | None]:
    """p50, p95, p99: the value that so many are not above."""
    ordered = sorted(values)
    return {f"p{share}": ordered[max(0, math.ceil(share / 100 * len(ordered)) - 1)] if ordered else None for share in (50, 95, 99)}


@contextlib.contextmanager
def started_server(model: str, weights: str, threads: int, streams: int) -> Iterator[tuple[str, int]]:
    """A server of our own while it is needed: its address and process number. Raises `UserError` when it does not start."""
    command = [sys.executable, "-m", "sparseling.cli", "serve", model, "--port", "0", "--weights", weights, "--threads", str(threads),
               "--max-streams", str(streams)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = []
    try:
        for line in process.stderr:
            said.append(line.strip())
            if match := re.search(r"on (http://\S+:\d+) ", line):
                yield match[1], process.pid
                return
        raise UserError(f"serve: did not start ({' '.join(said)[-300:]}); try the same with: sparseling serve {model}")
    finally:
        process.terminate()
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def bench_serve(model: str | None, url: str | None, streams: int, seconds: float, weights: str, threads: int) -> dict[str, Any]:
    """Load on the server at `url`, or on one of our own with `model`. Raises `UserError` where there is none."""
    if url is not None:
        return asyncio.run(load(url, requests_of(name_at(url)), streams, seconds, None))
    assert model is not None
    with started_server(model, weights, threads, streams) as (own, process):
        say(f"serving {model} ({weights}) at {own}")
        return {"weights": weights, "threads": threads, **asyncio.run(load(own, requests_of(name_at(own)), streams, seconds, process))}


def name_at(url: str) -> str:
    """The name of the model that a server has. Raises `UserError` where there is no server."""
    from urllib.request import urlopen

    try:
        with urlopen(f"{url.rstrip('/')}/v1/models", timeout=10) as reply:
            return str(json.loads(reply.read())["data"][0]["id"])
    except (OSError, ValueError, LookupError) as error:
        raise UserError(f"{url}: no server answers there ({error}); give one such as http://127.0.0.1:8000") from None


def serve_table(result: dict[str, Any]) -> str:
    """The result for people."""
    def milliseconds(found: dict[str, float | None]) -> str:
        return ", ".join(f"{name} {value * 1000:.1f} ms" for name, value in found.items() if value is not None) or "none"

    lines = [
        f"streams at once         {result['streams']}", f"requests                {result['requests']:,} in {result['seconds']:.1f} s",
        f"failed                  {result['failed']}", f"different from alone    {result['different']}",
        f"tokens/s                {result['tokens_per_second']:,.0f}",
        f"time to first token     {milliseconds(result['first_token_seconds'])}",
        f"between pieces          {milliseconds(result['between_pieces_seconds'])}",
        f"between pieces, alone   {milliseconds(result['alone_between_pieces_seconds'])}",
    ]
    if (memory := result["memory_mib"]) is not None:
        lines.append(f"memory of the server    {memory[0]:.0f} MiB before, {max(memory):.0f} at most, {memory[-1]:.0f} after")
    return "\n".join([*lines, *result["examples"]])
