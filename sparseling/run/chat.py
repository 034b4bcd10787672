"""A chat in the terminal: the answer streams in as it is made, reasoning dimmed; with a prompt or piped input, plain answers."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from ..align.chat import Message, parse_response
from ..align.conversations import prompt_ids
from ..data.tokenizer import StreamDecoder, Tokenizer
from ..errors import UserError, nearest
from .generate import PrefixCache, stream
from .load import stop_ids_of
from .open import Ready, ready
from .packed import Kind
from .sampler import Sampling
from .scheduler import Scheduler, stream_job
from .speculate import DRAFTS
from .terminal import Terminal, write
from .thinking import ThinkingSplitter

COMMANDS = {
    "/think": ("on|off", "with or without detailed thinking"),
    "/system": ("TEXT", "the system message; without TEXT there is none"),
    "/reset": ("", "forget the chat so far"),
    "/help": ("", "this list"),
    "/quit": ("", "leave (also Ctrl-D); Ctrl-C stops an answer"),
}
FORGOTTEN = "stopped before an answer; the question is forgotten"


@dataclass
class Chat:
    """A chat that is going on. `messages` are the turns so far; `scheduler` runs the native engine; without it the model runs in PyTorch,
    where `prefix` spares computing the turns again; `turn` varies the draws."""

    ready: Ready
    tokenizer: Tokenizer
    sampling: Sampling
    max_new_tokens: int
    thinking: bool = False
    system: str = ""
    messages: list[Message] = field(default_factory=list)
    prefix: PrefixCache = field(default_factory=PrefixCache)
    turn: int = 0
    scheduler: Scheduler | None = None


def chat(
    model: str | Path, thinking: bool = False, sampling: Sampling | None = None, system: str = "", prompt: str | None = None,
    max_new_tokens: int = 512, input_stream: TextIO | None = None, out: TextIO | None = None, err: TextIO | None = None,
    weights: Kind | None = None, context: int | None = None, drafts: int = DRAFTS,
) -> int:
    """Talk to the model of a folder or hub id, with `weights`, `context` and `drafts` as `ready` has them; returns the exit code 0.

    With `prompt`: its answer alone on `out`, then the end. Else from a terminal with commands (`/help`), or from any other input one
    message a line. Notes, and tokens/s after each answer, go to `err`. Raises `UserError` as `ready` does, and outside a terminal for a
    chat that does not fit the context.
    """
    source = sys.stdin if input_stream is None else input_stream
    out, err = sys.stdout if out is None else out, sys.stderr if err is None else err
    terminal = Terminal(out, err, interactive=prompt is None and source.isatty() and out.isatty())
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: {max_new_tokens} leaves no room for an answer; give 1 or more")
    loaded = ready(model, weights, context=context, drafts=drafts)
    state = Chat(loaded, loaded.tokenizer, sampling or Sampling(), max_new_tokens, thinking, system, scheduler=loaded.scheduler)
    if prompt is not None:
        answer(state, prompt, terminal)
        return 0
    if terminal.interactive:
        terminal.note(f"{model}: detailed thinking {'on' if thinking else 'off'}; /help lists the commands")
    for line in lines_of(source, terminal):
        text = line.strip()
        if re.match(r"/[a-z]+(\s|$)", line):
            if not obey(state, text, terminal):
                break
        elif text:
            reply(state, text, terminal)
    return 0


def lines_of(source: TextIO, terminal: Terminal) -> Iterator[str]:
    """The user's lines until the input ends. At a terminal with line editing, where Ctrl-C only clears the line."""
    if not terminal.interactive:
        try:
            yield from source
        except UnicodeDecodeError as error:
            raise UserError(f"input: not UTF-8 text ({error.reason}); convert it first") from None
        return
    if source is sys.stdin:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  importing it gives input() line editing and history
    while True:
        try:
            yield terminal.ask(source)
        except KeyboardInterrupt:
            terminal.note("\nCtrl-D or /quit leaves")
        except EOFError:
            write(terminal.out, "\n")
            return


def obey(state: Chat, line: str, terminal: Terminal) -> bool:
    """Carry out a `/command`; False when the chat is to end."""
    command, _, value = line.partition(" ")
    value = value.strip()
    if command == "/quit":
        return False
    if command == "/think" and value in ("on", "off"):
        state.thinking = value == "on"
        terminal.note(f"detailed thinking {value}")
    elif command == "/think":
        terminal.note(f"/think: '{value}' is neither on nor off; it is {'on' if state.thinking else 'off'}")
    elif command == "/system":
        state.system = value
        terminal.note("system message set" if value else "no system message")
    elif command == "/reset":
        state.messages.clear()
        terminal.note("the chat starts anew")
    elif command == "/help":
        terminal.note("\n".join(f"{name} {value:<{16 - len(name)}}{what}" for name, (value, what) in COMMANDS.items()))
    else:
        terminal.note(f"{command}: no such command; {nearest(command, COMMANDS)} (a message may begin with a space)")
    return True


def reply(state: Chat, text: str, terminal: Terminal) -> None:
    """`answer`; at a terminal the user's mistakes are told, Ctrl-C is obeyed, and the chat goes on."""
    if not terminal.interactive:
        answer(state, text, terminal)
        return
    try:
        answer(state, text, terminal)
    except UserError as error:
        terminal.note(str(error))
    except KeyboardInterrupt:
        terminal.note(FORGOTTEN)


def answer(state: Chat, text: str, terminal: Terminal) -> None:
    """Answer the user's `text` on the terminal and add both to the chat.

    Ctrl-C at a terminal stops the answer; what was said by then stays in the chat, unless there was no answer yet: the question is then
    forgotten. Raises `UserError` when the chat does not fit the context.
    """
    question = Message("user", text)
    system = [Message("system", state.system)] if state.system else []
    prompt = prompt_ids([*system, *state.messages, question], state.tokenizer, state.thinking)
    limit = state.ready.config.max_position_embeddings
    if len(prompt) >= limit:
        raise UserError(f"chat: its {len(prompt)} tokens leave no room in the model's context of {limit}; shorten the message, or start "
                        "anew with /reset")
    tokens, times, stopped = spoken_tokens(state, prompt, terminal)
    response = state.tokenizer.decode(tokens)
    reasoning, content = parse_response(response)
    if stopped and not content.strip():
        terminal.note(FORGOTTEN)
        return
    state.messages += [question, Message("assistant", content, reasoning)]
    state.turn += 1
    if not stopped and len(tokens) == min(state.max_new_tokens, limit - len(prompt)):
        cause = "max_new_tokens" if len(tokens) == state.max_new_tokens else "the model's context is full"
        terminal.note(f"cut off after {len(tokens)} tokens: {cause}")
    terminal.note(rate(len(tokens), times) + guessed(state) + (", stopped" if stopped else ""))


def spoken_tokens(state: Chat, prompt: list[int], terminal: Terminal) -> tuple[list[int], list[float], bool]:
    """Stream one answer to the terminal: its tokens, [start, first token, end] in seconds, and whether Ctrl-C stopped it."""
    decoder, splitter = StreamDecoder(state.tokenizer), ThinkingSplitter()
    tokens: list[int] = []
    times = [time.perf_counter()]
    stopped = False
    coming = coming_tokens(state, prompt)
    try:
        for token in coming:
            if not tokens:
                times.append(time.perf_counter())
            tokens.append(token)
            terminal.show(splitter.push(decoder.push(token)))
    except KeyboardInterrupt:
        if not terminal.interactive:
            raise
        stopped = True
        if state.scheduler is not None:  # interrupted anywhere: nothing of its accounts is worth trusting
            state.scheduler = Scheduler(state.scheduler.engine, speculator=state.scheduler.speculator)
    finally:
        coming.close()
        terminal.show(splitter.push(decoder.finish()) + splitter.finish())
        terminal.end_response()
    return tokens, [*times, time.perf_counter()], stopped


def coming_tokens(state: Chat, prompt: list[int]) -> Generator[int, None, None]:
    """The tokens of the next answer."""
    stop_ids = stop_ids_of(state.tokenizer)
    if state.scheduler is not None:
        return stream_job(state.scheduler, prompt, state.max_new_tokens, state.sampling, stop_ids, state.turn)
    assert state.ready.model is not None
    return stream(state.ready.model, prompt, state.max_new_tokens, state.sampling, stop_ids, state.prefix, state.turn)


def guessed(state: Chat) -> str:
    """How good the MTP layer's guesses have been, where it made some."""
    speculator = state.scheduler.speculator if state.scheduler is not None else None
    return f", {speculator.acceptance:.0%} of guesses right" if speculator is not None and speculator.proposed.any() else ""


def rate(tokens: int, times: list[float]) -> str:
    """How fast an answer came: tokens/s after the first token, and the wait for it."""
    if tokens < 2:
        return f"{tokens} token{'' if tokens == 1 else 's'} in {times[-1] - times[0]:.1f} s"
    start, first, end = times
    return f"{tokens} tokens, {(tokens - 1) / (end - first):.0f} tokens/s, the first after {first - start:.1f} s"
