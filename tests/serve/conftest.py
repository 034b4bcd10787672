"""A real server on a tiny model, in a thread of the tests' process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseling.config import preset
from sparseling.data.tokenizer import Tokenizer, train_tokenizer
from sparseling.model.transformer import LingForCausalLM
from sparseling.run.engine import Engine, why_not
from sparseling.run.source import source_of_model

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("llguidance")

import uvicorn

from sparseling.serve.app import create_app
from sparseling.serve.connection import GuardedProtocol
from sparseling.serve.run import Server, listen
from sparseling.serve.service import Service
from sparseling.serve.settings import Settings

CONFIG = preset("pico").replace(
    vocab_size=420, hidden_size=64, num_attention_heads=2, head_dim=32, moe_intermediate_size=32, num_key_value_heads=1,
    max_position_embeddings=1024, num_nextn_predict_layers=0,
)
TEXTS = ['detailed thinking on and off, SYSTEM HUMAN ASSISTANT <think>\nHow many?\n</think>\n\n {"name": "Größe", "arguments": {"a": 12}}']


@dataclass
class Running:
    """A server that listens at `url`."""

    url: str
    port: int
    service: Service
    app: Any
    server: Server

    def idle(self, seconds: float = 5.0) -> bool:
        """Whether no answer is left within the time, and all pages are free again."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            scheduler = self.service.thread.scheduler
            if not self.service.thread.active and not scheduler.busy and scheduler.pool.available == self.service.engine.pages:
                return True
            time.sleep(0.02)
        return False


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(TEXTS * 20, 400, Path(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> LingForCausalLM:
    """Random weights that say many different things."""
    if (reason := why_not(CONFIG)) is not None:
        pytest.skip(reason)
    model = LingForCausalLM(CONFIG.replace(eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.fixture(scope="session")
def start(model: LingForCausalLM, tokenizer: Tokenizer) -> Iterator[Callable[..., Running]]:
    """Starts servers with given settings; all end with the session."""
    started: list[tuple[Running, threading.Thread]] = []

    def begin(pages: int = 400, **settings: Any) -> Running:
        engine = Engine(source_of_model(model, "fp32"), pages, 1)
        service = Service(Settings(**{"name": "tiny", "max_streams": 8, "max_waiting": 30, **settings}), engine, tokenizer)
        app = create_app(service)
        listening = listen("127.0.0.1", 0)
        config = uvicorn.Config(app, http=GuardedProtocol, ws="none", log_level="warning", timeout_graceful_shutdown=2)
        server = Server(config, app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        port = listening.getsockname()[1]
        running = Running(f"http://127.0.0.1:{port}", port, service, app, server)
        started.append((running, thread))
        while not server.started:
            time.sleep(0.01)
        return running

    yield begin
    for running, thread in started:
        running.server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="session")
def running(start: Callable[..., Running]) -> Running:
    return start()
