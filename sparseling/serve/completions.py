"""POST /v1/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from .answer import Answer, Delta
from .errors import ApiError
from .plan import Plan, routing_of, rule_of, sampling_of, stop_strings_of
from .protocol import CompletionRequest
from .service import Answers, Service, aside_if_large

DEFAULT_TOKENS = 16  # as the OpenAI API has it


class Completion:
    """One request on its way: made, then `begin`, then either `whole` or `chunks`."""

    def __init__(self, service: Service, request: CompletionRequest) -> None:
        self.service, self.request = service, request
        self.head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()),
                     "model": service.settings.name}
        self.answers: Answers
        self.offsets: list[int]

    async def begin(self) -> None:
        """Check the request and submit its answers. Raises `ApiError`."""
        request, service = self.request, self.service
        service.check_model(request.model)
        if request.echo and request.logprobs is not None:
            raise ApiError(400, "echo: log-probabilities of a prompt are not computed; leave out echo or logprobs", "echo")
        sampling, stops, rule, n = sampling_of(request), stop_strings_of(request), rule_of(request), service.choices(request)
        prompts = prompts_of(request.prompt)
        if len(prompts) * n > service.thread.most:
            raise ApiError(400, f"prompt: {len(prompts) * n} answers are more than this server may hold; ask for fewer", "prompt")
        ids = await aside_if_large(sum(map(len, prompts)), lambda: [self.ids_of(prompt) for prompt in prompts])
        plans = [Plan(prompt, request.max_tokens or DEFAULT_TOKENS, sampling, service.stop_ids, stops, n, request.logprobs,
                      routing_of(request), rule) for prompt in ids]
        self.answers = await service.answers(plans, request, False, False)
        self.offsets = [len(self.echo_of(answer)) for answer in self.answers.answers]

    def ids_of(self, prompt: str | list[int]) -> list[int]:
        """Special tokens may be written out: a completion is the place for whole templates."""
        return self.service.tokenizer.encode(prompt, allow_special=True) if isinstance(prompt, str) else prompt

    def echo_of(self, answer: Answer) -> str:
        return self.service.tokenizer.decode(answer.plan.prompt, skip_special=False) if self.request.echo else ""

    async def whole(self) -> dict[str, Any]:
        """The reply when all is there."""
        deltas = [Delta() for _ in self.answers.answers]
        async for batch in self.answers.deltas():
            for number, delta in batch:
                deltas[number].add(delta)
        choices = []
        for number, (answer, delta) in enumerate(zip(self.answers.answers, deltas, strict=True)):
            delta.content = self.echo_of(answer) + delta.content
            choices.append({**self.choice(number, delta, answer.finish), **self.experts(answer)})
        return {**self.head, "choices": choices, "usage": self.answers.usage()}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The reply piece by piece."""
        if self.request.echo:
            for number, answer in enumerate(self.answers.answers):
                yield {**self.head, "choices": [self.choice(number, Delta(content=self.echo_of(answer)), None)]}
        async for batch in self.answers.deltas():
            for number, delta in batch:
                answer = self.answers.answers[number]
                if delta or answer.finish is not None:
                    choice = self.choice(number, delta, answer.finish)
                    yield {**self.head, "choices": [{**choice, **(self.experts(answer) if answer.finish else {})}]}
        if self.request.stream_options is not None and self.request.stream_options.include_usage:
            yield {**self.head, "choices": [], "usage": self.answers.usage()}

    def choice(self, number: int, delta: Delta, finish: str | None) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": number, "text": delta.content, "logprobs": None, "finish_reason": finish}
        if self.request.logprobs is not None:
            choice["logprobs"] = self.logprobs(number, delta.logprobs)
        if self.request.routing:
            choice["routing"] = delta.routing
        return choice

    def logprobs(self, number: int, entries: list[dict[str, Any]]) -> dict[str, Any]:
        """In the form that completions have: lists, one place a token."""
        offsets = []
        for entry in entries:
            offsets.append(self.offsets[number])
            self.offsets[number] += len(entry["token"])
        return {
            "tokens": [entry["token"] for entry in entries], "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries],
            "text_offset": offsets,
        }

    def experts(self, answer: Answer) -> dict[str, Any]:
        return {"routed_experts": answer.routed_experts()} if self.request.return_routed_experts else {}


def prompts_of(prompt: str | list[int] | list[str | list[int]]) -> list[str | list[int]]:
    """One or several prompts, as text or token ids."""
    if isinstance(prompt, str):
        return [prompt]
    return [prompt] if isinstance(prompt[0], int) else prompt
