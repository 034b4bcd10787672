"""What stands before every request: draining, keys, rates, sizes and times. Pure ASGI, so that streams pass through untouched."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from .errors import ApiError
from .metrics import Metrics
from .settings import Settings, key_hash

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
GUARDED = ("/v1/", "/metrics")  # need a key where there are keys
SLOW_READER_SECONDS = 30.0  # after the time of a request: the rest of an answer must be taken within it


class Buckets:
    """So many requests a minute for each caller, as many at once at most; a caller that was quiet for a minute is forgotten."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self.left: dict[str, tuple[float, float]] = {}                           # requests left, and when

    def take(self, caller: str, now: float) -> float:
        """0 when the request may pass, else the seconds until one may."""
        left, since = self.left.pop(caller, (float(self.per_minute), now))
        left = min(self.per_minute, left + (now - since) * self.per_minute / 60)
        allowed = left >= 1
        self.left[caller] = (left - allowed, now)                                # in the order of their last request
        while self.left and now - next(iter(self.left.values()))[1] > 60:
            del self.left[next(iter(self.left))]
        return 0.0 if allowed else (1 - left) * 60 / self.per_minute


class Limits:
    """Wraps an app. `draining`: new requests are refused; `active` are being answered."""

    def __init__(self, app: App, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self.buckets = Buckets(settings.requests_per_minute) if settings.requests_per_minute else None
        self.draining = False
        self.active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self.active += 1
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            async with asyncio.timeout(self.settings.request_seconds + SLOW_READER_SECONDS):
                await self.answer(scope, receive, watched)
        except ApiError as error:
            if not status:
                await error.response()(scope, receive, watched)
        except TimeoutError:
            if status:
                raise                                                            # in the middle of an answer: the connection is closed
            await ApiError(504, "the request took too long", code="timeout").response()(scope, receive, watched)
        finally:
            self.active -= 1
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status or "none")).inc()

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if self.draining and path.startswith("/v1/"):
            raise ApiError(503, "the server is shutting down; running answers are finished, new ones are not begun", code="draining",
                           retry_after=5)
        headers = {name.lower(): value for name, value in scope["headers"]}
        caller = self.caller_of(path, scope, headers)
        if self.buckets is not None and path.startswith("/v1/"):
            wait = self.buckets.take(caller, time.monotonic())
            if wait:
                raise ApiError(429, f"more than {self.buckets.per_minute} requests a minute; try again later", code="rate_limit_exceeded",
                               retry_after=max(1, round(wait + 0.5)))
        body = await self.body_of(receive, headers)
        if body is None:
            return                                                               # gone before it had said all
        await self.app(scope, replay(body, receive), send)

    def caller_of(self, path: str, scope: Scope, headers: dict[bytes, bytes]) -> str:
        """Who asks: the name of the key, or the address where there are no keys. Raises `ApiError` 401."""
        address = (scope.get("client") or ("unknown", 0))[0]
        if not self.settings.keys or not path.startswith(GUARDED):
            return str(address)
        scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        name = self.settings.keys.get(key_hash(key.strip())) if scheme.lower() == "bearer" else None
        if name is None:
            raise ApiError(401, "no such API key; send one as 'Authorization: Bearer KEY'", code="invalid_api_key")
        return name

    async def body_of(self, receive: Receive, headers: dict[bytes, bytes]) -> bytes | None:
        """The whole body, within its limits of size and time; None when the client left. Raises `ApiError` 408 or 413."""
        most = self.settings.max_body_bytes
        too_large = ApiError(413, f"the request is larger than {most} bytes; send less", code="request_too_large")
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > most:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise too_large
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(408, f"the request did not arrive within {self.settings.body_seconds:g} s", code="request_timeout") from None


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body first, then what else comes: the client leaving."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
