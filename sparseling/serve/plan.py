"""What a request asks of the engine: sampling, limits and grammar, checked before anything is computed."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..errors import UserError
from ..run.constraint import Grammar, Vocabulary, json_rule, regex_rule
from ..run.job import Constraint, Job, RoutingOf
from ..run.sampler import Sampling
from ..run.scheduler import Scheduler
from .errors import ApiError
from .protocol import GenerationRequest, ResponseFormat

DEFAULTS = Sampling()


@dataclass(frozen=True)
class Plan:
    """A checked request. `rule`: the grammar rule of the answer; with `thinking` a thought comes before, which no grammar binds."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    stop_ids: tuple[int, ...]
    stop_strings: tuple[str, ...] = ()
    choices: int = 1
    top_logprobs: int | None = None
    routing: RoutingOf = "nothing"
    rule: str | None = None
    thinking: bool = False

    def jobs(self, constraints: Sequence[Constraint | None], first_sequence: int = 0) -> list[Callable[[Scheduler], Job]]:
        """One for each choice; the draws of choice n are those of sequence `first_sequence` + n."""
        return [partial(self.submit, sequence=first_sequence + number, constraint=constraint)
                for number, constraint in enumerate(constraints)]

    def submit(self, scheduler: Scheduler, sequence: int, constraint: Constraint | None) -> Job:
        return scheduler.submit(self.prompt, self.max_tokens, self.sampling, self.stop_ids, sequence, self.top_logprobs, self.routing,
                                constraint)

    def constraints(self, vocabulary: Callable[[], Vocabulary]) -> list[Constraint | None]:
        """The grammar at work, once for each choice. Takes time: not for the event loop. Raises `ApiError` for one that cannot be used."""
        assert self.rule is not None
        try:
            return [Grammar(vocabulary(), self.rule, self.thinking) for _ in range(self.choices)]
        except UserError as error:
            raise ApiError(400, str(error), "response_format") from None


def sampling_of(request: GenerationRequest) -> Sampling:
    """Published defaults where a request does not say; no seed means another one every time. Raises `ApiError`."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    given = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
    seed = secrets.randbits(31) if request.seed is None else request.seed % 2**64
    try:
        bias = tuple((int(token), value) for token, value in (request.logit_bias or {}).items())
    except ValueError:
        raise ApiError(400, "logit_bias: has a key that is no token id; give token ids", "logit_bias") from None
    try:
        return replace(DEFAULTS, seed=seed, logit_bias=bias, **given)
    except UserError as error:
        raise ApiError(400, str(error), str(error).partition(":")[0]) from None


def stop_strings_of(request: GenerationRequest) -> tuple[str, ...]:
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    return tuple(stop for stop in stops if stop)


def rule_of(request: GenerationRequest) -> str | None:
    """The grammar rule that `response_format` or `regex` asks for."""
    form = request.response_format or ResponseFormat(type="text")
    regex = request.regex if request.regex is not None else form.regex if form.type == "regex" else None
    if regex is not None:
        if form.type not in ("text", "regex"):
            raise ApiError(400, "regex: stands beside a response_format; give one of them", "regex")
        try:
            return regex_rule(regex)
        except UserError as error:
            raise ApiError(400, str(error), "regex") from None
    if form.type == "regex":
        raise ApiError(400, "response_format.regex: is missing", "response_format")
    if form.type == "json_object":
        return json_rule({"type": "object"})
    if form.type == "json_schema":
        schema: Any = form.json_schema.schema_ if form.json_schema is not None else None
        if schema is None:
            raise ApiError(400, "response_format.json_schema.schema: is missing", "response_format")
        return json_rule(schema)
    return None


def routing_of(request: GenerationRequest) -> RoutingOf:
    """What the engine has to report."""
    if request.return_routed_experts or request.routing == "all":
        return "all"
    return "answer" if request.routing else "nothing"
