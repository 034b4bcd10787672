"""The verb `serve` on the command line. Nothing here imports torch or the web framework: starting the program must stay fast."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..arguments import above_zero, natural, port, positive
from ..errors import UserError

EXAMPLE = "sparseling serve runs/laptop --port 8000"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of `serve`."""
    parser.add_argument("model", metavar="MODEL", help="run folder, model folder, or hub id")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine only)")
    parser.add_argument("--port", type=port, default=8000, help="port to listen at, 0 = any free one (default 8000)")
    parser.add_argument("--name", help="the model's name in the API (default: the folder's)")
    parser.add_argument("--weights", choices=["fp32", "bf16", "int8", "int4"],
                        help="pack the weights so (default: as a packed folder is; fp32 for small models, else as stored)")
    parser.add_argument("--threads", type=positive, default=os.cpu_count() or 1, metavar="N", help="CPU threads (default: all)")
    parser.add_argument("--context", type=positive, metavar="TOKENS",
                        help="longest prompt and answer together; beyond the model's own by YaRN (default: its own)")
    parser.add_argument("--drafts", type=natural, default=3, metavar="N",
                        help="tokens that an MTP layer may guess at once, where that is faster; 0 = none (default 3)")
    parser.add_argument("--cache-gb", type=above_zero, default=2.0, metavar="GB", help="memory for keys and values, GiB (default 2)")
    parser.add_argument("--think", action="store_true", help="detailed thinking on where a request does not say")
    parser.add_argument("--max-streams", type=positive, default=64, metavar="N", help="answers computed at once (default 64)")
    parser.add_argument("--max-waiting", type=positive, default=256, metavar="N",
                        help="answers that may wait; more get 429 with Retry-After (default 256)")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys that may use the server, one a line: KEY or NAME: KEY")
    parser.add_argument("--rate-limit", type=positive, metavar="N", help="requests a minute for each key, or address (default: any number)")
    parser.add_argument("--max-body-mb", type=above_zero, default=4.0, metavar="MB", help="largest request, MiB (default 4)")
    parser.add_argument("--request-timeout", type=above_zero, default=600.0, metavar="SECONDS", help="longest answer (default 600)")
    parser.add_argument("--drain-timeout", type=above_zero, default=300.0, metavar="SECONDS",
                        help="after SIGTERM running answers may take so long (default 300)")


def serve_verb(options: argparse.Namespace) -> int:
    try:
        import fastapi  # noqa: F401
        import httptools  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"serve: needs {error.name}; install it with pip install -c constraints.txt -e '.[serve]'") from None
    import torch

    from ..info import model_folder
    from .run import EngineOptions, serve
    from .settings import Settings, read_keys

    torch.set_num_threads(options.threads)
    folder = model_folder(options.model)
    settings = Settings(
        name=options.name or name_of(options.model), max_streams=options.max_streams, max_waiting=options.max_waiting, think=options.think,
        keys=read_keys(options.api_key_file) if options.api_key_file else {}, requests_per_minute=options.rate_limit,
        max_body_bytes=int(options.max_body_mb * 2**20), request_seconds=options.request_timeout, drain_seconds=options.drain_timeout,
    )
    engine = EngineOptions(options.weights, options.threads, options.context, options.cache_gb, options.drafts)
    return serve(str(folder), engine, settings, options.host, options.port)


def name_of(model: str) -> str:
    """The folder's name; of the public form OWNER/NAME the whole."""
    return Path(model).resolve().name if Path(model).exists() else model
