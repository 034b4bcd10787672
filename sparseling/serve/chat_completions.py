"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from .answer import Answer, Delta
from .errors import ApiError
from .plan import Plan, routing_of, rule_of, sampling_of, stop_strings_of
from .prompt import chat_prompt
from .protocol import ChatRequest, NamedTool, Tool
from .service import Answers, Service, aside_if_large
from .tools import Call, calls_rule


class Chat:
    """One chat request on its way: made, then `begin`, then either `whole` or `chunks`."""

    def __init__(self, service: Service, request: ChatRequest) -> None:
        self.service, self.request = service, request
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": service.settings.name}
        self.answers: Answers

    async def begin(self) -> None:
        """Check the request and submit its answers. Raises `ApiError`."""
        self.service.check_model(self.request.model)
        size = len(str(self.request.model_dump()))
        plan, tools = await aside_if_large(size, lambda: plan_of(self.service, self.request))
        self.answers = await self.service.answers([plan], self.request, True, tools)

    async def whole(self) -> dict[str, Any]:
        """The reply when all is there."""
        deltas = [Delta() for _ in self.answers.answers]
        async for batch in self.answers.deltas():
            for number, delta in batch:
                deltas[number].add(delta)
        choices = [self.choice(number, answer, delta)
                   for number, (answer, delta) in enumerate(zip(self.answers.answers, deltas, strict=True))]
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": self.answers.usage()}

    def choice(self, number: int, answer: Answer, delta: Delta) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": delta.content or (None if delta.calls else "")}
        if delta.reasoning:
            message["reasoning_content"] = delta.reasoning
        if delta.calls:
            message["tool_calls"] = [call_entry(call) for call in delta.calls]
        choice = {"index": number, "message": message, "logprobs": None, "finish_reason": answer.finish}
        return {**choice, **self.extras(answer, delta), **self.experts(answer)}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The reply piece by piece."""
        calls = [0] * len(self.answers.answers)
        for number in range(len(calls)):
            yield self.chunk(number, {"role": "assistant", "content": ""}, None)
        async for batch in self.answers.deltas():
            for number, delta in batch:
                answer = self.answers.answers[number]
                if delta:
                    yield self.chunk(number, fields(delta, calls[number]), None, self.extras(answer, delta))
                    calls[number] += len(delta.calls)
                if answer.finish is not None:
                    yield self.chunk(number, {}, answer.finish, self.experts(answer))
        if self.request.stream_options is not None and self.request.stream_options.include_usage:
            yield {**self.head, "object": "chat.completion.chunk", "choices": [], "usage": self.answers.usage()}

    def chunk(self, number: int, delta: dict[str, Any], finish: str | None, extras: dict[str, Any] | None = None) -> dict[str, Any]:
        choice = {"index": number, "delta": delta, "logprobs": None, "finish_reason": finish, **(extras or {})}
        return {**self.head, "object": "chat.completion.chunk", "choices": [choice]}

    def extras(self, answer: Answer, delta: Delta) -> dict[str, Any]:
        """Log-probabilities and routing, where they were asked for."""
        extras: dict[str, Any] = {}
        if answer.plan.top_logprobs is not None:
            extras["logprobs"] = {"content": delta.logprobs, "refusal": None}
        if self.request.routing:
            extras["routing"] = delta.routing
        return extras

    def experts(self, answer: Answer) -> dict[str, Any]:
        return {"routed_experts": answer.routed_experts()} if self.request.return_routed_experts else {}


def fields(delta: Delta, calls_before: int) -> dict[str, Any]:
    """The `delta` of a chunk."""
    made: dict[str, Any] = {}
    if delta.reasoning:
        made["reasoning_content"] = delta.reasoning
    if delta.content:
        made["content"] = delta.content
    if delta.calls:
        made["tool_calls"] = [{"index": calls_before + n, **call_entry(call)} for n, call in enumerate(delta.calls)]
    return made


def call_entry(call: Call) -> dict[str, Any]:
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {"name": call.name, "arguments": call.arguments}}



def plan_of(service: Service, request: ChatRequest) -> tuple[Plan, bool]:
    """The checked request, and whether tool calls are to be found in the answer. Raises `ApiError`."""
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs: true", "top_logprobs")
    tools = tools_of(request)
    template = request.chat_template_kwargs.enable_thinking if request.chat_template_kwargs is not None else None
    wanted = request.enable_thinking if request.enable_thinking is not None else template
    prompt, thinking = chat_prompt(request.messages, tools, service.settings.think if wanted is None else wanted, service.tokenizer)
    rule = answer_rule(request, tools)
    limit = request.max_completion_tokens or request.max_tokens or service.default_tokens(request, len(prompt))
    plan = Plan(prompt, limit, sampling_of(request), service.stop_ids, stop_strings_of(request), service.choices(request),
                (request.top_logprobs or 0) if request.logprobs else None, routing_of(request), rule, thinking)
    return plan, bool(tools)


def tools_of(request: ChatRequest) -> list[Tool]:
    """The tools that may be called. Raises `ApiError` for a choice that is not among them."""
    tools, choice = request.tools or [], request.tool_choice
    if choice == "none":
        return []
    if choice == "required" and not tools:
        raise ApiError(400, "tool_choice: is 'required', but there are no tools", "tool_choice")
    if isinstance(choice, NamedTool) and choice.function.name not in {tool.function.name for tool in tools}:
        raise ApiError(400, f"tool_choice: there is no tool '{choice.function.name}'", "tool_choice")
    return tools


def answer_rule(request: ChatRequest, tools: list[Tool]) -> str | None:
    """The grammar of the answer: calls where they are required, else what `response_format` says, or a call instead."""
    choice = request.tool_choice
    functions = [{"name": tool.function.name, "parameters": tool.function.parameters} for tool in tools]
    several = request.parallel_tool_calls is not False
    if choice == "required":
        return calls_rule(functions, several)
    if isinstance(choice, NamedTool):
        return calls_rule([function for function in functions if function["name"] == choice.function.name][:1], several)
    rule = rule_of(request)
    if rule is None or not functions:
        return rule
    calls, _, call = calls_rule(functions, several).partition("\n")
    return f"said | {calls}\nsaid: {rule}\n{call}"
