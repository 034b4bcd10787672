"""Tool calls in the public format: found in a growing text, and as a grammar that makes the model write them.

    <tool_call>
    {"name": "weather", "arguments": {"city": "Köln"}}
    </tool_call>
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..run.constraint import json_rule
from ..run.text import partial_ending

OPEN, CLOSE = "<tool_call>", "</tool_call>"
WHITE = " \t\r\n"
STRING_OR_CLOSE = re.compile(r'"[^"\\]*+(?:\\(?:.|\Z)[^"\\]*+)*+(?P<end>"|\Z)|' + CLOSE, re.DOTALL)


class Call(NamedTuple):
    """A call: `arguments` is JSON text of an object."""

    name: str
    arguments: str


class ToolSplitter:
    """Takes the calls out of a growing text, wherever they stand, also in a think block that was never closed.

    A call comes when its block is whole; text between comes at once, less the line breaks that set calls off (one is left between text
    before and after). A block that holds no call is text like any other. How the text was cut makes no difference.
    """

    def __init__(self) -> None:
        self.held = ""
        self.after_call = self.said = False

    def push(self, text: str) -> list[str | Call]:
        """What became certain with `text`, in order."""
        self.held += text
        return self.take(final=False)

    def finish(self) -> list[str | Call]:
        """What is left when no more comes. A block whose end is missing counts if its call is whole."""
        return self.take(final=True)

    def take(self, final: bool) -> list[str | Call]:
        pieces: list[str | Call] = []
        while self.held:
            start = self.held.find(OPEN)
            if start < 0:
                certain = len(self.held) if final else len(self.held) - partial_ending(self.held, OPEN)
                pieces += self.text(self.held[:certain], self.held[certain:], "\n" if not final else "")
                break
            inside = self.held[start + len(OPEN):]
            end = end_of_block(inside)
            if end is None and not final:
                pieces += self.text(self.held[:start], self.held[start:], "\n")
                break
            calls = parse_calls(inside if end is None else inside[:end])
            if calls is None:                                                    # the tag is text; what follows is looked at anew
                before = start + len(OPEN)
                pieces += self.text(self.held[:before], self.held[before:], "")
                continue
            pieces += [*self.text(self.held[:start].rstrip("\n"), "", ""), *calls]
            self.held, self.after_call = "" if end is None else inside[end + len(CLOSE):], True
        return pieces

    def text(self, text: str, rest: str, hold: str) -> list[str | Call]:
        """Text that is certain, less line breaks after a call; those of `hold` at its end wait: a call may follow them."""
        if self.after_call:
            text = text.lstrip("\n")
            self.after_call = not text
            text = "\n" + text if text and self.said else text
        shown = text.rstrip(hold) if hold else text
        self.held = text[len(shown):] + rest
        self.said = self.said or bool(shown)
        return [shown] if shown else []


def end_of_block(inside: str) -> int | None:
    """Where the closing tag of a block stands: the first one that is not within a JSON string."""
    if CLOSE not in inside:
        return None
    for match in STRING_OR_CLOSE.finditer(inside):
        if match[0] == CLOSE:
            return match.start()
        if match["end"] == "":                                                   # a string that still goes on
            return None
    return None


def parse_calls(text: str) -> list[Call] | None:
    """The calls of a block: one JSON object, several, or a list of them; None for anything else."""
    decoder = json.JSONDecoder(parse_constant=refuse)
    values: list[Any] = []
    position = 0
    try:
        while text[position:].strip(WHITE):
            position += len(text[position:]) - len(text[position:].lstrip(WHITE + ","))
            value, position = decoder.raw_decode(text, position)
            values += value if isinstance(value, list) else [value]
        calls = [call_of(value) for value in values]
    except (ValueError, RecursionError):
        return None
    return calls or None


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def call_of(value: Any) -> Call:
    """Raises `ValueError` for what is no call."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        raise ValueError("no name")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments, parse_constant=refuse) if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError("arguments are no object")
    return Call(value["name"], json.dumps(arguments, ensure_ascii=False))


def calls_rule(tools: Sequence[Mapping[str, Any]], several: bool) -> str:
    """A grammar rule: one call, or with `several` one or more, of the functions in `tools` (`{"name", "parameters"}`)."""
    schemas = [{
        "type": "object", "properties": {"name": {"const": tool["name"]}, "arguments": tool.get("parameters") or {"type": "object"}},
        "required": ["name", "arguments"], "additionalProperties": False,
    } for tool in tools]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return ('call ("\\n" call)*' if several else "call") + f'\ncall: "{OPEN}\\n" {json_rule(schema)} "\\n{CLOSE}"'
