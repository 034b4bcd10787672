"""POST /v1/embeddings: the mean of a text's final hidden states, scaled to length 1."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import numpy as np

from ..run.sampler import GREEDY
from .completions import prompts_of
from .engine_thread import Event
from .errors import ApiError
from .plan import Plan
from .protocol import EmbeddingRequest
from .service import Service, aside_if_large


async def embeddings(service: Service, request: EmbeddingRequest) -> dict[str, Any]:
    """The reply. Raises `ApiError`."""
    service.check_model(request.model)
    if request.dimensions not in (None, service.config.hidden_size):
        raise ApiError(400, f"dimensions: the model has {service.config.hidden_size}; leave it out", "dimensions")
    texts = prompts_of(request.input)
    prompts = await aside_if_large(sum(map(len, texts)), lambda: [
        service.tokenizer.encode(text) if isinstance(text, str) else text for text in texts])
    for ids in prompts:
        service.check_prompt(Plan(ids, 1, GREEDY, ()))
    service.metrics.prompt_tokens.inc(sum(map(len, prompts)))
    found: list[np.ndarray] = []
    part = max(1, service.thread.scheduler.most_jobs // 2)                       # others come in between
    for start in range(0, len(prompts), part):
        found += await computed(service, prompts[start:start + part])
    data = [{"object": "embedding", "index": number, "embedding": as_wanted(vector, request.encoding_format)}
            for number, vector in enumerate(found)]
    tokens = sum(map(len, prompts))
    return {"object": "list", "data": data, "model": service.settings.name, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}


async def computed(service: Service, prompts: list[list[int]]) -> list[np.ndarray]:
    """Unit vectors [hidden] fp64 of some prompts."""
    streams = service.thread.submit([partial(lambda scheduler, ids: scheduler.submit_embedding(ids), ids=ids) for ids in prompts])
    deadline = asyncio.get_running_loop().time() + service.settings.request_seconds
    vectors: dict[int, np.ndarray] = {}
    async with contextlib.aclosing(service.thread.events(streams, deadline)) as batches:
        async for number, event in flat(batches):
            if isinstance(event, ApiError):
                raise event
            if event.finish is not None:
                assert event.job.hidden_sum is not None
                mean = event.job.hidden_sum / len(prompts[number])
                vectors[number] = mean / max(float(np.linalg.norm(mean)), 1e-12)
    return [vectors[number] for number in range(len(prompts))]


async def flat(batches: AsyncIterator[list[Event]]) -> AsyncIterator[Event]:
    async for batch in batches:
        for event in batch:
            yield event


def as_wanted(vector: np.ndarray, form: str | None) -> list[float] | str:
    """A list of numbers, or base64 of little-endian float32."""
    single = vector.astype("<f4")
    return base64.b64encode(single.tobytes()).decode() if form == "base64" else [float(value) for value in single]
