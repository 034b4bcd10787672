"""One answer as it grows: tokens to reasoning, content and tool calls, with log-probabilities and routing beside them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ..data.tokenizer import StreamDecoder, Tokenizer
from ..run.job import Progress, RoutingRows
from ..run.text import AnswerText
from ..run.thinking import ThinkingSplitter
from .plan import Plan
from .routing import RoutingView, routed_experts
from .tools import Call, ToolSplitter

Part = Literal["reasoning", "content"]


@dataclass
class Delta:
    """What some tokens brought."""

    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    routing: list[dict[str, Any]] = field(default_factory=list)

    def add(self, other: Delta) -> None:
        self.reasoning += other.reasoning
        self.content += other.content
        self.calls += other.calls
        self.logprobs += other.logprobs
        self.routing += other.routing

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.calls or self.logprobs or self.routing)


class Answer:
    """`split`: whether thoughts are told from the answer; `tools`: whether calls are taken out; `view` where routing is shown, from place
    `show_from` on. `finish` is there when it is over, and `stopped` once a stop string was met: nothing is to be pushed then."""

    def __init__(self, plan: Plan, tokenizer: Tokenizer, split: bool, tools: bool, view: RoutingView | None = None,
                 show_from: int = 0, keep_rows: bool = False) -> None:
        self.plan, self.tokenizer, self.view, self.show_from, self.keep_rows = plan, tokenizer, view, show_from, keep_rows
        self.decoder, self.text = StreamDecoder(tokenizer), AnswerText(plan.stop_strings)
        self.thinking = ThinkingSplitter() if split else None
        self.watch = ThinkingSplitter() if split else None                       # sees the text at once: says which part a token is
        self.calls = ToolSplitter() if tools else None
        self.tokens: list[int] = []
        self.parts: list[Part] = []
        self.decoded = self.shown = 0                                            # characters that were decoded, and given or withheld
        self.waiting: deque[tuple[int, dict[str, Any]]] = deque()                # log-probabilities by the place where their text ends
        self.unsorted: deque[dict[str, Any]] = deque()                           # routing of tokens whose part is not certain yet
        self.expert_ids: list[np.ndarray] = []                                   # [tokens, layers, k] of all tokens read
        self.finish: Literal["stop", "length", "tool_calls"] | None = None
        self.called = False

    @property
    def stopped(self) -> bool:
        return self.text.stopped

    @property
    def reasoning_tokens(self) -> int:
        return self.parts.count("reasoning")

    def push(self, progress: Progress) -> Delta:
        """What one step of the engine brought."""
        delta = Delta()
        if progress.token is not None:
            raw = self.decoder.push(progress.token)
            self.tokens.append(progress.token)
            self.sort_part(raw)
            self.decoded += len(raw)
            if progress.logprob is not None:
                self.waiting.append((self.decoded, self.logprob_entry(progress)))
            self.show(self.text.take(raw), delta)
        if progress.routing is not None:
            self.route(progress.routing)
        if progress.finish in ("stop", "length") and not self.stopped:
            self.show(self.text.take(self.decoder.finish()) + self.text.finish(), delta)
        if progress.finish in ("stop", "length") or self.stopped:
            self.end(delta)
            self.finish = "length" if progress.finish == "length" and not self.stopped else "tool_calls" if self.called else "stop"
        delta.logprobs += self.certain_logprobs()
        delta.routing += self.certain_routing()
        return delta

    def show(self, text: str, delta: Delta) -> None:
        """Text that is certain on its way through calls and thoughts."""
        self.shown += len(text)
        for piece in self.calls.push(text) if self.calls is not None else [text]:
            self.sort_piece(piece, delta)

    def end(self, delta: Delta) -> None:
        """What the splitters still hold."""
        for piece in self.calls.finish() if self.calls is not None else []:
            self.sort_piece(piece, delta)
        for kind, text in self.thinking.finish() if self.thinking is not None else []:
            self.add_text(kind, text, delta)
        if self.watch is not None:
            self.watch.finish()
        self.parts += ["content"] * (len(self.tokens) - len(self.parts))

    def sort_piece(self, piece: str | Call, delta: Delta) -> None:
        if isinstance(piece, Call):
            delta.calls.append(piece)
            self.called = True
        elif self.thinking is None:
            delta.content += piece
        else:
            for kind, text in self.thinking.push(piece):
                self.add_text(kind, text, delta)

    def add_text(self, kind: str, text: str, delta: Delta) -> None:
        if kind == "thought":
            delta.reasoning += text
        else:
            delta.content += text

    def sort_part(self, raw: str) -> None:
        """Say of all tokens whether they are thought, as soon as it is certain."""
        if self.watch is None:
            self.parts.append("content")
            return
        self.watch.push(raw)
        if self.watch.state != "start":
            part: Part = "content" if self.watch.state == "answer" else "reasoning"
            self.parts += [part] * (len(self.tokens) - len(self.parts))

    def logprob_entry(self, progress: Progress) -> dict[str, Any]:
        """As the chat API gives it."""
        assert progress.token is not None and progress.logprob is not None
        top = [self.token_entry(token, logprob) for token, logprob in progress.top_logprobs]
        return {**self.token_entry(progress.token, progress.logprob), "top_logprobs": top}

    def token_entry(self, token: int, logprob: float) -> dict[str, Any]:
        spelled = self.tokenizer.bytes_of(token, skip_special=False)
        return {"token": spelled.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(spelled)}

    def certain_logprobs(self) -> list[dict[str, Any]]:
        """Of the tokens whose whole text was given."""
        certain = []
        while self.waiting and (self.waiting[0][0] <= self.shown):
            certain.append(self.waiting.popleft()[1])
        return certain

    def route(self, rows: RoutingRows) -> None:
        if self.keep_rows:
            self.expert_ids.append(rows.expert_ids)
        if self.view is not None:
            entries = self.view.entries(rows, self.token_at, self.text_of_token)
            self.unsorted += [entry for entry in entries if entry["index"] >= self.show_from]

    def token_at(self, place: int) -> int:
        prompt = self.plan.prompt
        return prompt[place] if place < len(prompt) else self.tokens[place - len(prompt)]

    def text_of_token(self, token: int) -> str:
        return self.tokenizer.bytes_of(token, skip_special=False).decode("utf-8", "replace")

    def certain_routing(self) -> list[dict[str, Any]]:
        """Routing of the tokens whose part is known, in order."""
        certain = []
        while self.unsorted:
            place = self.unsorted[0]["index"] - len(self.plan.prompt)
            if place >= len(self.parts):
                break
            entry = self.unsorted.popleft()
            entry["part"] = self.parts[place] if place >= 0 else "prompt"
            certain.append(entry)
        return certain

    def routed_experts(self) -> str:
        """Experts of all tokens read."""
        return routed_experts(self.expert_ids)
