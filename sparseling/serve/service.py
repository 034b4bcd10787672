"""What all endpoints share: the model's names and limits, the engine's thread, and one request run to its end."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..config import ModelConfig
from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..run.constraint import Vocabulary
from ..run.engine import Engine
from ..run.load import stop_ids_of
from ..run.sampler import NOT_FINITE
from ..run.scheduler import Scheduler
from ..run.speculate import DRAFTS, speculator_for
from .answer import Answer, Delta
from .engine_thread import EngineThread, Event
from .errors import ApiError
from .metrics import Metrics
from .plan import Plan
from .protocol import GenerationRequest
from .routing import RoutingView, moe_layers, routing_shown_from
from .settings import Settings

T = TypeVar("T")
MOST_SHOWN = 2_000_000  # choices of an expert in one reply: some 200 MB while it is made
LARGE_CHARACTERS = 20_000  # prompts above are tokenised beside the event loop


@dataclass
class Service:
    """One served model."""

    settings: Settings
    engine: Engine
    tokenizer: Tokenizer
    drafts: int = DRAFTS
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        scheduler = Scheduler(self.engine, most_jobs=self.settings.max_streams, count_experts=True,
                              speculator=speculator_for(self.engine, self.drafts))
        self.thread = EngineThread(scheduler, self.settings.max_waiting, self.metrics)
        self.view = RoutingView(self.engine)
        self.stop_ids = stop_ids_of(self.tokenizer)
        self.context = min(self.engine.max_positions, self.engine.pages * 16)
        self._vocabulary: Vocabulary | None = None
        self._lock = threading.Lock()
        self.metrics.watch("sparseling_pages_free", "Pages of the KV cache that can be given.",
                           lambda: float(self.thread.scheduler.pool.available))
        self.metrics.watch("sparseling_pages", "Pages of the KV cache.", lambda: float(self.engine.pages))
        if (speculator := scheduler.speculator) is not None:
            self.metrics.watch("sparseling_guesses", "Tokens that the MTP layer guessed.", lambda: float(speculator.proposed.sum()))
            self.metrics.watch("sparseling_guesses_right", "Of these, the right ones.", lambda: float(speculator.accepted.sum()))

    @property
    def config(self) -> ModelConfig:
        return self.engine.config

    def vocabulary(self) -> Vocabulary:
        """The tokenizer for grammars, made at the first use."""
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = Vocabulary(self.tokenizer, self.config.vocab_size, self.stop_ids)
            return self._vocabulary

    def model_card(self) -> dict[str, Any]:
        """The model as /v1/models lists it."""
        config = self.config
        return {
            "id": self.settings.name, "object": "model", "created": 0, "owned_by": "sparseling", "context_length": self.context,
            "num_hidden_layers": config.num_hidden_layers, "num_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok, "n_group": config.groups[0], "moe_layers": moe_layers(config),
            "thinking": self.settings.think,
        }

    def check_model(self, model: str | None) -> None:
        """Raises `ApiError` 404 for another model than this."""
        if model is not None and model != self.settings.name:
            raise ApiError(404, f"model: '{model}' is not here; this server has '{self.settings.name}'", "model", "model_not_found")

    def choices(self, request: GenerationRequest) -> int:
        """How many answers are wanted. Raises `ApiError` above the limit."""
        n = request.n or 1
        if n > self.settings.max_choices:
            raise ApiError(400, f"n: {n} is above {self.settings.max_choices}; ask for fewer", "n")
        return n

    def check_prompt(self, plan: Plan) -> None:
        """Raises `ApiError` for what the engine would refuse."""
        try:
            self.thread.scheduler.checked(plan.prompt, plan.max_tokens, plan.sampling)
        except UserError as error:
            key = str(error).partition(":")[0]
            too_long = "context" in str(error)
            raise ApiError(400, str(error), key, "context_length_exceeded" if too_long else None) from None

    def default_tokens(self, request: GenerationRequest, prompt_tokens: int) -> int:
        """The longest answer of a request that does not say: the context, or as much as routing may be shown of."""
        if not request.routing:
            return self.context
        shown = MOST_SHOWN // max(1, len(self.view.layers) * self.config.num_experts_per_tok * (request.n or 1))
        return max(1, min(self.context, shown - (prompt_tokens if request.routing == "all" else 0)))

    def check_routing(self, plans: list[Plan], request: GenerationRequest) -> None:
        """Raises `ApiError` for more routing than memory should hold as JSON."""
        read = sum(plan.choices * (min(plan.max_tokens, self.context) + (len(plan.prompt) if request.routing == "all" else 0))
                   for plan in plans)
        chosen = read * len(self.view.layers) * self.config.num_experts_per_tok
        if chosen > MOST_SHOWN:
            raise ApiError(400, f"routing: {read} tokens choose experts {chosen} times, more than {MOST_SHOWN} to show; ask for fewer "
                                "tokens (max_tokens), or for return_routed_experts instead", "routing")

    async def answers(self, plans: list[Plan], request: GenerationRequest, split: bool, tools: bool) -> Answers:
        """Begin all choices of all plans (a plan's choices stand together). Raises `ApiError`."""
        for plan in plans:
            self.check_prompt(plan)
        if request.routing:
            self.check_routing(plans, request)
        constraints = [[None] * plan.choices if plan.rule is None else await asyncio.to_thread(plan.constraints, self.vocabulary)
                       for plan in plans]
        jobs = [job for plan, bound in zip(plans, constraints, strict=True) for job in plan.jobs(bound)]
        view, keep = (self.view if request.routing else None), bool(request.return_routed_experts)
        answers = [Answer(plan, self.tokenizer, split, tools, view, routing_shown_from(request.routing, len(plan.prompt)), keep)
                   for plan in plans for _ in range(plan.choices)]
        self.metrics.prompt_tokens.inc(sum(len(plan.prompt) for plan in plans))
        return Answers(self, answers, jobs)


async def aside_if_large(characters: int, function: Callable[[], T]) -> T:
    """The result of `function`, in another thread where it takes long enough to hold up others."""
    return await asyncio.to_thread(function) if characters > LARGE_CHARACTERS else function()


class Answers:
    """The answers of one request on their way. They are begun when `__init__` returns."""

    def __init__(self, service: Service, answers: list[Answer], jobs: list[Callable[[Scheduler], Any]]) -> None:
        self.service, self.answers = service, answers
        self.streams = service.thread.submit(jobs)

    async def deltas(self) -> AsyncGenerator[list[tuple[int, Delta]]]:
        """What came, joined by choice. Raises `ApiError` when an answer fails; whatever is not over at the end is cancelled."""
        deadline = asyncio.get_running_loop().time() + self.service.settings.request_seconds
        async with contextlib.aclosing(self.service.thread.events(self.streams, deadline)) as batches:
            async for batch in batches:
                yield self.joined(batch)
        self.service.metrics.cached_tokens.inc(self.cached_tokens)

    def joined(self, batch: list[Event]) -> list[tuple[int, Delta]]:
        joined: dict[int, Delta] = {}
        for number, event in batch:
            answer = self.answers[number]
            if isinstance(event, ApiError):
                raise event
            if event.finish == "failed":
                raise ApiError(500 if event.job.failure == NOT_FINITE else 400, event.job.failure, code="answer_failed")
            if answer.finish is None:
                joined.setdefault(number, Delta()).add(answer.push(event))
                if answer.stopped:
                    self.service.thread.cancel(self.streams[number])
        return list(joined.items())

    def close(self) -> None:
        """Give up what is not over."""
        for stream in self.streams:
            self.service.thread.cancel(stream)

    @property
    def cached_tokens(self) -> int:
        return sum(stream.job.cached_tokens for stream in self.streams if stream.job is not None)

    def usage(self) -> dict[str, Any]:
        """Tokens so far. The prompt of several choices counts once."""
        prompts = {id(answer.plan): answer.plan for answer in self.answers}
        prompt = sum(len(plan.prompt) for plan in prompts.values())
        completion = sum(len(answer.tokens) for answer in self.answers)
        firsts = {id(answer.plan): stream for answer, stream in reversed(list(zip(self.answers, self.streams, strict=True)))}
        cached = sum(stream.job.cached_tokens for stream in firsts.values() if stream.job is not None)
        return {
            "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": sum(answer.reasoning_tokens for answer in self.answers)},
        }
