"""The page against `sparseling serve` itself, on a tiny model with random weights: it writes anything, broken characters included."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseling.checkpoint.hf import save_model
from sparseling.config import preset
from sparseling.data.tokenizer import train_tokenizer
from sparseling.model.transformer import LingForCausalLM

from .driving import ask, counts_of, opened, plain, table_of
from .fake_server import Fake, Shape

pytestmark = pytest.mark.skipif(importlib.util.find_spec("sparseling.serve.app") is None, reason="this tree has no server")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("fastapi", reason="the server needs pip install 'sparseling[serve]'")
    command = [sys.executable, "-m", "sparseling.cli", "serve", str(tiny_model(tmp_path_factory.mktemp("tiny"))), "--port", "0",
               "--threads", "1", "--weights", "fp32"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            yield found[0]
            break
    else:
        pytest.fail(said)
    process.terminate()
    process.wait(30)
    process.stdout.close()


def tiny_model(folder: Path) -> Path:
    tokenizer = train_tokenizer(["detailed thinking on and off, SYSTEM HUMAN ASSISTANT\nHow many? Größe 数 ünï"] * 20, 320,
                                folder / "tokenizer")
    config = preset("pico").replace(hidden_size=64, num_attention_heads=2, head_dim=32, moe_intermediate_size=32, num_key_value_heads=1,
                                    vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    generator = torch.Generator().manual_seed(3)
    model = LingForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3, generator=generator)
    save_model(model, config, folder / "model", tokenizer_folder=folder / "tokenizer")
    return folder / "model"


def ask_directly(url: str, request: dict[str, Any]) -> dict[str, Any]:
    data = json.dumps({**request, "stream": False}).encode()
    call = urllib.request.Request(f"{url}/v1/chat/completions", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(call, timeout=30) as reply:
        return json.load(reply)["choices"][0]


def test_the_page_shows_what_the_server_says(browser: Any, url: str) -> None:
    pages = opened(browser, Fake(url=url))
    page = next(pages)
    page.click("#open-settings")
    page.fill("#max-tokens", "60")
    page.fill("#seed", "11")
    page.click("#settings button[type=submit]")
    requests: list[dict[str, Any]] = []
    page.on("request", lambda request: requests.append(json.loads(request.post_data)) if request.method == "POST" else None)
    ask(page, "How many? 数", thinking=True)
    choice = ask_directly(url, requests[0])
    assert plain(page, "content") == (choice["message"]["content"] or "")
    assert plain(page, "reasoning") == (choice["message"].get("reasoning_content") or "")
    routing = choice["routing"]
    assert len(routing) > 10
    card = page.evaluate("fetch('/v1/models').then((reply) => reply.json())")["data"][0]
    shape = Shape(tuple(card["moe_layers"]), card["num_experts"], card["num_experts_per_tok"], card["n_group"])
    page.click(".answer >> text=Experts")
    page.click("#map-view details summary")
    counts = counts_of(routing, shape)
    assert table_of(page, "#map-view") == [[f"Layer {layer}", *map(str, counts[layer])] for layer in shape.layers]
    shown = page.locator(".token").evaluate_all("tokens => tokens.map(token => token.textContent)")
    assert len(shown) in (len(routing), len(routing) + 1)  # the last token may never have been read
    page.click("#tab-load")
    page.wait_for_selector("#load-view table")
    assert page.locator("#load-view tbody tr").count() == len(shape.layers)
    next(pages, None)
