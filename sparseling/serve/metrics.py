"""What the server counts, in Prometheus' text format."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """All figures of one server, in a registry of its own: two servers in a process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("sparseling_requests", "Requests by path and status.", ["path", "status"], registry=self.registry)
        self.prompt_tokens = Counter("sparseling_prompt_tokens", "Tokens of prompts.", registry=self.registry)
        self.cached_tokens = Counter("sparseling_cached_tokens", "Tokens of prompts that were not computed anew.", registry=self.registry)
        self.answer_tokens = Counter("sparseling_answer_tokens", "Tokens of answers.", registry=self.registry)
        self.answers = Counter("sparseling_answers", "Answers that ended, cancelled ones too.", registry=self.registry)
        self.cancelled = Counter("sparseling_cancelled", "Answers given up: disconnected, stopped by a stop string or timed out.",
                                 registry=self.registry)
        self.engine_failures = Counter("sparseling_engine_failures", "Steps that failed.", registry=self.registry)
        self.active = Gauge("sparseling_active", "Answers being computed or waiting.", registry=self.registry)
        self.first_token = Histogram("sparseling_first_token_seconds", "Time to the first token.", buckets=SECONDS, registry=self.registry)
        self.between_tokens = Histogram("sparseling_between_tokens_seconds", "Time between tokens of an answer.", buckets=SECONDS,
                                        registry=self.registry)
        self.ends: deque[float] = deque(maxlen=32)
        ProcessCollector(registry=self.registry)

    def watch(self, name: str, about: str, value: Callable[[], float]) -> None:
        """A gauge that is asked when it is read."""
        Gauge(name, about, registry=self.registry).set_function(value)

    def ended(self, tokens: int) -> None:
        """An answer of so many tokens is over."""
        self.answers.inc()
        self.answer_tokens.inc(tokens)
        self.ends.append(time.monotonic())

    def seconds_per_answer(self) -> float:
        """Of the last answers, one after the other."""
        if len(self.ends) < 2:
            return 1.0
        return (time.monotonic() - self.ends[0]) / len(self.ends)

    def text(self) -> bytes:
        return generate_latest(self.registry)
