"""Connections that say nothing, or too much, before there is a request."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADER_SECONDS = 20.0
MOST_HEADER_BYTES = 64 << 10
MOST_CONNECTIONS = 4096


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol; a connection on which the head of a request does not come in time, or is too long, is closed."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.head_bytes = 0
        self.head_timer: asyncio.TimerHandle | None = self.loop.call_later(HEADER_SECONDS, self.head_overdue)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.head_over()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.reads_head:
            self.head_bytes += len(data)
            if self.head_timer is None:                                          # from the first byte on, however many follow
                self.head_timer = self.loop.call_later(HEADER_SECONDS, self.head_overdue)
        super().data_received(data)
        if self.reads_head and self.head_bytes > MOST_HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of the request is too long.")

    def on_headers_complete(self) -> None:
        self.head_over()
        super().on_headers_complete()

    @property
    def reads_head(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def head_over(self) -> None:
        self.head_bytes = 0
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None

    def head_overdue(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.close()
