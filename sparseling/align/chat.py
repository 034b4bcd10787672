"""The Ling 2.0 chat format: messages to text and back, with the two thinking modes.

The format itself is `chat_template.jinja`, which also travels in the tokenizer folder. `render_segments` says which part of the
rendered text is trained and which part is control tokens; joined, its segments are the rendered text, and every call checks that.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.sandbox

from ..errors import UserError

ROLES = ("system", "user", "assistant", "tool")
ROLE_END = "<|role_end|>"
THINKING_ON, THINKING_OFF = "detailed thinking on", "detailed thinking off"


@dataclass(frozen=True)
class Message:
    """One turn. `role` is one of `ROLES`; `reasoning_content` is the thinking that led to an assistant's `content`."""

    role: str
    content: str
    reasoning_content: str | None = None


class Segment(NamedTuple):
    """A piece of rendered chat. `trained`: the loss counts it. `control`: special-token strings in it are meant as special tokens."""

    text: str
    trained: bool
    control: bool


def chat_template() -> str:
    """The chat template's Jinja text, for `tokenizer_config.json`."""
    return Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


def apply_template(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    enable_thinking: bool = False,
    add_generation_prompt: bool = False,
    template: str | None = None,
) -> str:
    """Render messages in the dict form of chat APIs, as `apply_chat_template` of Hugging Face does; `template` defaults to ours."""
    compiled = _compiled(chat_template() if template is None else template)
    return compiled.render(
        messages=list(messages), tools=tools, enable_thinking=enable_thinking, add_generation_prompt=add_generation_prompt
    )


def render(messages: Sequence[Message], thinking: bool = False, add_generation_prompt: bool = False) -> str:
    """The chat as the model sees it.

    `thinking` chooses the mode, unless the first system message names a mode itself. With thinking off no think block is rendered.
    Raises `UserError` for an empty chat or an unknown role.
    """
    turns = _normalised(messages, thinking)
    dicts = [{"role": turn.role, "content": turn.content, "reasoning_content": turn.reasoning_content} for turn in turns]
    return apply_template(dicts, enable_thinking=thinking, add_generation_prompt=add_generation_prompt)


def render_segments(messages: Sequence[Message], thinking: bool = False, add_generation_prompt: bool = False) -> list[Segment]:
    """`render` in segments: trained are the assistants' texts with their `<|role_end|>`, and nothing else.

    An assistant turn whose reasoning the format drops (it stands before the last question) is context only: the model wrote that
    answer after thinking, so it must not learn to write it without. Raises as `render` does.
    """
    turns = _normalised(messages, thinking)
    last_query = max((index for index, turn in enumerate(turns) if _asks(turn)), default=len(turns) - 1)
    segments = [_control("<role>SYSTEM</role>"), _text(_system_text(turns, thinking)), _control(ROLE_END)]
    for index, turn in enumerate(turns):
        if turn.role == "user":
            segments += [_control("<role>HUMAN</role>"), _text(turn.content), _control(ROLE_END)]
        elif turn.role == "system" and index > 0:
            segments += [_control("<role>SYSTEM</role>"), _text(turn.content), _control(ROLE_END)]
        elif turn.role == "assistant":
            text, trained = turn.content, True
            if turn.reasoning_content and index > last_query:
                text = "\n<think>\n" + turn.reasoning_content.strip("\n") + "\n</think>\n\n" + turn.content.lstrip("\n")
            elif turn.reasoning_content:
                trained = False
            segments += [_control("<role>ASSISTANT</role>"), Segment(text, trained, False), Segment(ROLE_END, trained, True)]
        elif turn.role == "tool":
            first = index == 0 or turns[index - 1].role != "tool"
            last = index == len(turns) - 1 or turns[index + 1].role != "tool"
            segments += [_control("<role>OBSERVATION</role>")] if first else []
            segments += [_text("\n"), _control("<tool_response>"), _text(f"\n{turn.content}\n"), _control("</tool_response>")]
            segments += [_control(ROLE_END)] if last else []
    if add_generation_prompt:
        segments.append(_control("<role>ASSISTANT</role>"))
    segments = [segment for segment in segments if segment.text]
    assert "".join(segment.text for segment in segments) == render(messages, thinking, add_generation_prompt)
    return segments


def parse_response(text: str) -> tuple[str | None, str]:
    """(reasoning, answer) of an assistant's text, which may end at `<|role_end|>`.

    Reasoning is None when the model did not think. Thinking that never closed leaves an empty answer: it was cut off.
    """
    text = text.split(ROLE_END, 1)[0]
    thought, closed, answer = text.partition("</think>")
    opened = thought.lstrip().startswith("<think>")
    if not opened and not closed:
        return None, text
    reasoning = thought.lstrip().removeprefix("<think>").strip("\n")
    return reasoning, answer.lstrip("\n") if closed else ""


def _normalised(messages: Sequence[Message], thinking: bool) -> list[Message]:
    """The messages with reasoning in its own field ('' for none); with thinking off every assistant's reasoning is left out."""
    if not messages:
        raise UserError("messages: the chat is empty; give at least one message")
    for index, message in enumerate(messages):
        if message.role not in ROLES:
            raise UserError(f"messages[{index}].role: '{message.role}' is no role; use one of {', '.join(ROLES)}")
    first = messages[0].content if messages[0].role == "system" else ""
    turns = [_split_reasoning(message) for message in messages]
    return turns if thinking_on(first, thinking) else [replace(turn, reasoning_content="") for turn in turns]


def thinking_on(system: str, thinking: bool) -> bool:
    """Whether a chat whose first system message says `system` ('' without one) thinks: it may name the mode itself."""
    return THINKING_ON in system or (thinking and THINKING_OFF not in system)


def _split_reasoning(message: Message) -> Message:
    """An assistant's reasoning taken out of its content, where it was written there as `<think>...</think>`."""
    if message.role != "assistant":
        return replace(message, reasoning_content="")
    if message.reasoning_content is not None or "</think>" not in message.content:
        return replace(message, reasoning_content=message.reasoning_content or "")
    reasoning = message.content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
    return replace(message, content=message.content.split("</think>")[-1].lstrip("\n"), reasoning_content=reasoning)


def _system_text(turns: Sequence[Message], thinking: bool) -> str:
    mode = THINKING_ON if thinking else THINKING_OFF
    if turns[0].role != "system":
        return mode
    text = turns[0].content
    return text if THINKING_ON in text or THINKING_OFF in text else f"{text}\n{mode}"


def _asks(turn: Message) -> bool:
    """Whether this is a user's question, and not a tool's response wrapped as a user message."""
    wrapped = turn.content.startswith("<tool_response>") and turn.content.endswith("</tool_response>")
    return turn.role == "user" and not wrapped


def _control(text: str) -> Segment:
    return Segment(text, trained=False, control=True)


def _text(text: str) -> Segment:
    return Segment(text, trained=False, control=False)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    """A compiled template under the rules that Hugging Face uses: sandboxed, blocks trimmed, JSON unescaped with its key order."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment.from_string(template)
