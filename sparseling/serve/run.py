"""`sparseling serve`: load the model, listen, and leave in good order."""

from __future__ import annotations

import asyncio
import resource
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn

from ..config import ModelConfig
from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..progress import say
from ..run.engine import PAGE, Engine
from ..run.load import tokenizer_and_config
from ..run.open import source_for
from ..run.packed import Kind
from ..run.scheduler import pages_for
from ..run.speculate import DRAFTS
from .app import create_app
from .connection import MOST_CONNECTIONS, GuardedProtocol
from .limits import Limits
from .service import Service
from .settings import Settings


@dataclass(frozen=True)
class EngineOptions:
    """How a model is held, as `open_engine` has it; `cache_gb`: GiB at most for keys and values."""

    weights: Kind | None = None
    threads: int = 1
    context: int | None = None
    cache_gb: float = 2.0
    drafts: int = DRAFTS


def open_model(folder: str, options: EngineOptions, most_jobs: int) -> tuple[Engine, Tokenizer]:
    """A model on the engine, with its tokenizer. Raises `UserError`."""
    tokenizer, _ = tokenizer_and_config(Path(folder))
    source, warning = source_for(folder, options.weights, options.context, mtp=options.drafts > 0)
    if warning:
        say(warning)
    return Engine(source, pages_wanted(source.config, source.kind, options.cache_gb, most_jobs), options.threads), tokenizer


def pages_wanted(config: ModelConfig, kind: Kind, cache_gb: float, most_jobs: int) -> int:
    """Pages for all answers at full length, or as many as the memory for them holds. Raises `UserError` when not even one answer fits."""
    context, layers = config.max_position_embeddings, config.num_hidden_layers + min(1, config.num_nextn_predict_layers)
    page_bytes = 2 * layers * config.num_key_value_heads * config.head_dim * PAGE * (4 if kind == "fp32" else 2)
    affordable = int(cache_gb * 2**30) // page_bytes
    if affordable < pages_for(context) + 1:
        needed = (pages_for(context) + 1) * page_bytes / 2**30
        raise UserError(f"--cache-gb: {cache_gb:g} GiB hold less than one context of {context} tokens, which takes {needed:.2f}; "
                        "give more, or a smaller --context")
    return min(affordable, most_jobs * pages_for(context) + 1)


class Server(uvicorn.Server):
    """Drains at the first signal: running answers are finished, new ones refused with 503, then the process ends with 0. A second signal
    ends it at once."""

    def __init__(self, config: uvicorn.Config, limits: Limits) -> None:
        super().__init__(config)
        self.limits = limits
        self.drain_task: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.limits.draining or not self.started:
            self.should_exit = self.force_exit = True
            return
        self.limits.draining = True
        say(f"{signal.Signals(sig).name}: finishing {self.limits.active} requests; once more to stop at once")

    async def on_tick(self, counter: int) -> bool:
        if self.limits.draining and self.drain_task is None:
            self.drain_task = asyncio.create_task(self.drain())
        return await super().on_tick(counter)

    async def drain(self) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + self.limits.settings.drain_seconds
        quiet = 0
        while loop.time() < end and quiet < 3:                                   # what was on its way when the signal came has come
            quiet = quiet + 1 if self.limits.active == 0 else 0
            await asyncio.sleep(0.1)
        self.should_exit = True


def serve(folder: str, options: EngineOptions, settings: Settings, host: str = "127.0.0.1", port: int = 8000) -> int:
    """Serve a model until a signal comes; returns the exit code 0. Raises `UserError` for a model or port that cannot be used."""
    allow_connections()
    listening = listen(host, port)
    engine, tokenizer = open_model(folder, options, settings.max_streams)
    limits = create_app(Service(settings, engine, tokenizer, options.drafts))
    config = uvicorn.Config(limits, http=GuardedProtocol, ws="none", log_level="warning", access_log=False, timeout_keep_alive=30,
                            timeout_graceful_shutdown=5, server_header=False, backlog=2048)
    place, number = listening.getsockname()[:2]
    say(f"{settings.name} on http://{f'[{place}]' if ':' in place else place}:{number} ({engine.kind}, "
        f"{engine.weight_bytes / 2**20:.0f} MiB of weights, {engine.pages} pages of {PAGE} tokens, {settings.max_streams} answers at once)")
    Server(config, limits).run(sockets=[listening])
    return 0


def allow_connections() -> None:
    """Ask the system for room for `MOST_CONNECTIONS`; some allow 1024 open files unless asked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_CONNECTIONS + 256
    wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises `UserError` where that cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise UserError(f"{host}:{port}: cannot be listened at ({error.strerror}); choose another --port or --host") from None
    return listening
