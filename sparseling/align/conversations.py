"""Conversations to token ids with an exact loss mask, and conversations from a user's JSON lines."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import UserError
from .chat import ROLES, Message, Segment, render_segments


class ChatTokenizer(Protocol):
    """What chat needs of a tokenizer. With `allow_special=False` special-token strings in the text are encoded as plain text."""

    def encode(self, text: str, allow_special: bool = False) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Conversation:
    """Messages and the thinking mode they are rendered in. `where`: file and line, for messages to the user."""

    messages: tuple[Message, ...]
    thinking: bool = False
    where: str = "messages"


@dataclass(frozen=True)
class TokenizedConversation:
    """`ids` [seq] and, for each, whether the loss counts the prediction of that token (`loss_mask` [seq] of 0 and 1)."""

    ids: list[int]
    loss_mask: list[int]


def tokenize_conversation(conversation: Conversation, tokenizer: ChatTokenizer) -> TokenizedConversation:
    """Token ids and loss mask of a conversation, for training.

    The ids before the last answer are those of `prompt_ids`: a mask never changes inside a token, and generation sees the very tokens
    that training saw. Text written by people never becomes a control token. Raises `UserError` when no token is trained.
    """
    ids: list[int] = []
    loss_mask: list[int] = []
    for segment in _joined(render_segments(conversation.messages, conversation.thinking)):
        tokens = tokenizer.encode(segment.text, allow_special=segment.control)
        ids += tokens
        loss_mask += [int(segment.trained)] * len(tokens)
    if not any(loss_mask):
        raise nothing_to_train(conversation)
    return TokenizedConversation(ids, loss_mask)


def nothing_to_train(conversation: Conversation) -> UserError:
    """The mistake of a conversation whose every answer is context only."""
    return UserError(f"{conversation.where}: no assistant text to train on; add an assistant message after the last question")


def check_conversations(path: str | Path) -> None:
    """Raise `UserError` for the first conversation of a file that cannot be trained on, or for none at all; needs no tokenizer."""
    found = False
    for conversation in read_conversations(path):
        found = True
        if not any(segment.trained for segment in render_segments(conversation.messages, conversation.thinking)):
            raise nothing_to_train(conversation)
    if not found:
        raise UserError(f'{path}: holds no conversation; write lines of {{"messages": [...]}}, or take it out of the recipe')


def prompt_ids(messages: Sequence[Message], tokenizer: ChatTokenizer, thinking: bool = False) -> list[int]:
    """Token ids of a chat up to where the model is to answer."""
    segments = _joined(render_segments(messages, thinking, add_generation_prompt=True))
    return [token for segment in segments for token in tokenizer.encode(segment.text, allow_special=segment.control)]


def read_conversations(path: str | Path) -> Iterator[Conversation]:
    """Conversations from JSON lines `{"messages": [{"role", "content", "reasoning_content"?}], "thinking"?: bool}`, in file order.

    `thinking` defaults to whether an assistant message has reasoning (in its own field or as `<think>...</think>`). Blank lines are
    passed over. Raises `UserError` naming file and line.
    """
    try:
        with open(path, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield _parse_line(line, f"{path}:{number}")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a file of JSON lines") from None


def _parse_line(line: bytes, where: str) -> Conversation:
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); mend or delete the line") from None
    listed = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(listed, list) or not listed:
        raise UserError(f'{where}: no "messages"; write {{"messages": [{{"role": "user", "content": "..."}}, ...]}}')
    messages = tuple(_parse_message(item, f"{where}: messages[{index}]") for index, item in enumerate(listed))
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        raise UserError(f"{where}: no assistant message, so nothing to train on; add one")
    thinking = value.get("thinking")
    if thinking is None:
        thinking = any(answer.reasoning_content or "</think>" in answer.content for answer in answers)
    if not isinstance(thinking, bool):
        raise UserError(f"{where}: thinking is {thinking!r}; write true or false")
    return Conversation(messages, thinking, where)


def _parse_message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise UserError(f'{where}: not an object; write {{"role": "user", "content": "..."}}')
    role, content, reasoning = item.get("role"), item.get("content"), item.get("reasoning_content")
    if role not in ROLES:
        raise UserError(f"{where}.role: {role!r} is no role; use one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise UserError(f"{where}.content: not a string; give the message's text")
    if reasoning is not None and not isinstance(reasoning, str):
        raise UserError(f"{where}.reasoning_content: not a string; give the reasoning's text or leave it out")
    try:
        (content + (reasoning or "")).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: holds half a surrogate pair, which is no text; mend the \\u escape") from None
    return Message(role, content, reasoning)


def _joined(segments: Sequence[Segment]) -> Iterator[Segment]:
    """Neighbours of one kind as one segment, so that they are tokenised as one text."""
    for (trained, control), group in itertools.groupby(segments, key=lambda segment: (segment.trained, segment.control)):
        yield Segment("".join(segment.text for segment in group), trained, control)
