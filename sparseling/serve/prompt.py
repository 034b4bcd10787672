"""From the messages of a chat to the tokens that the model reads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from ..align.chat import Message, apply_template, thinking_on
from ..align.conversations import prompt_ids
from ..data.tokenizer import Tokenizer
from .errors import ApiError
from .protocol import ChatMessage, ContentPart, Tool

PRIVATE_USE = range(0xE000, 0xF900)  # characters that mean nothing by themselves


def chat_prompt(messages: Sequence[ChatMessage], tools: Sequence[Tool], thinking: bool, tokenizer: Tokenizer) -> tuple[list[int], bool]:
    """The prompt's token ids and whether it turns detailed thinking on: the first system message may name a mode itself.

    What people and tools wrote never becomes a control token. Raises `ApiError` for what is not text.
    """
    turns = [as_template_takes(message, f"messages[{number}]") for number, message in enumerate(messages)]
    first = turns[0]["content"] if turns[0]["role"] == "system" else ""
    mode = thinking_on(first, thinking)
    if not tools and not any(turn.get("tool_calls") for turn in turns):
        plain = [Message(turn["role"], turn["content"], turn["reasoning_content"]) for turn in turns]
        return prompt_ids(plain, tokenizer, thinking), mode
    if not mode:
        turns = [{**turn, "reasoning_content": ""} for turn in turns]
    described = [{"type": "function", "function": tool.function.model_dump(exclude_none=True)} for tool in tools]
    mark = unused_character([turns, described])
    control = re.compile("|".join(re.escape(token) for token in sorted(tokenizer.added_tokens, key=len, reverse=True)))
    text = apply_template(marked(turns, control, mark), marked(described, control, mark), thinking, True)
    return encoded(text, control, mark, tokenizer), mode


def as_template_takes(message: ChatMessage, where: str) -> dict[str, Any]:
    turn: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role, "content": text_of(message.content, f"{where}.content"),
        "reasoning_content": message.reasoning_content,
    }
    if message.role == "assistant" and message.tool_calls:
        turn["tool_calls"] = [{"function": call.function.model_dump()} for call in message.tool_calls]
    return turn


def text_of(content: str | list[ContentPart] | None, where: str) -> str:
    """The text of a message's content."""
    if content is None or isinstance(content, str):
        return content or ""
    for number, part in enumerate(content):
        if part.type != "text" or part.text is None:
            raise ApiError(400, f"{where}[{number}]: the model reads text only; send parts of type 'text'", f"{where}[{number}]")
    return "".join(part.text or "" for part in content)


def strings_of(value: Any) -> Iterator[str]:
    """All strings of nested lists and objects, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings_of(key)
            yield from strings_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings_of(item)


def unused_character(value: Any) -> str:
    """A character that stands in no string of `value`."""
    used = set().union(*map(set, strings_of(value)))
    free = next((chr(code) for code in PRIVATE_USE if chr(code) not in used), None)
    if free is None:
        raise ApiError(400, "messages: use every private character of Unicode; leave one out", "messages")
    return free


def marked(value: Any, control: re.Pattern[str], mark: str) -> Any:
    """`value` with `mark` after the first letter of every control token that somebody wrote: none is left that is not the template's."""
    if isinstance(value, str):
        return control.sub(lambda match: match[0][0] + mark + match[0][1:], value)
    if isinstance(value, dict):
        return {marked(key, control, mark): marked(item, control, mark) for key, item in value.items()}
    return [marked(item, control, mark) for item in value] if isinstance(value, list) else value


def encoded(text: str, control: re.Pattern[str], mark: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a rendered chat: control tokens where they stand, all else as plain text without the marks."""
    ids: list[int] = []
    end = 0
    for match in control.finditer(text):
        ids += tokenizer.encode(text[end:match.start()].replace(mark, ""))
        ids.append(tokenizer.added_tokens[match[0]])
        end = match.end()
    return ids + tokenizer.encode(text[end:].replace(mark, ""))
