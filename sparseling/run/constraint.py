"""Answers that keep to a grammar: a JSON schema, a regular expression, or a Lark grammar, by the library `llguidance`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data.tokenizer import Tokenizer
from ..errors import UserError

MOST_GRAMMAR_CHARACTERS = 200_000
# JSON as people write it: one optional space after a comma or colon. Free white space would let a weak model write nothing else.
JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
THINKING = r'''start: opened thought /\n*/ answer
opened: /\s*<think>/
thought[suffix="</think>"]: /(?s:.*)/
'''


class Vocabulary:
    """A tokenizer as the library sees it: made once (a second for a large one), used by all constraints. `size`: tokens of the model."""

    def __init__(self, tokenizer: Tokenizer, size: int, stop_ids: Sequence[int]) -> None:
        """Raises `UserError` where the library is not installed."""
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError:
            raise UserError("constraint: needs the library llguidance; install it with pip install 'sparseling[serve]'") from None
        self.tokenizer, self.size = tokenizer, size
        self.eos_token_id, self.bos_token_id = stop_ids[0], None
        self.tokens = [self.bytes_of(token) for token in range(size)]
        self.special_token_ids = [token for token in range(size) if token in tokenizer.special_ids or token >= tokenizer.vocab_size]
        self.library = LLTokenizer(TokenizerWrapper(self), n_vocab=size, eos_token=list(stop_ids))

    def bytes_of(self, token: int) -> bytes:
        """Text of a token; special ones, and rows that the tokenizer does not know, are no text."""
        if token in self.tokenizer.special_ids or token >= self.tokenizer.vocab_size:
            return b"\xff<|special_%d|>" % token
        return self.tokenizer.bytes_of(token)

    def __call__(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)


class Grammar:
    """A grammar at work on one answer."""

    def __init__(self, vocabulary: Vocabulary, answer: str, thinking: bool = False) -> None:
        """`answer`: what `json_rule` and the like give. With `thinking` it is kept to after a think block, in which anything may stand.

        Raises `UserError` for a grammar that cannot be used.
        """
        from llguidance import LLMatcher

        if len(answer) > MOST_GRAMMAR_CHARACTERS:
            raise UserError(f"constraint: has {len(answer)} characters; give at most {MOST_GRAMMAR_CHARACTERS}")
        text = (THINKING if thinking else "start: answer\n") + f"answer: {answer}\n"
        self.matcher = LLMatcher(vocabulary.library, LLMatcher.grammar_from_lark(text), log_level=0)
        if self.matcher.is_error():
            raise UserError(f"constraint: cannot be used ({first_line(self.matcher.get_error())}); simplify or mend it")
        self.size = vocabulary.size
        self.bits = np.zeros(-(-vocabulary.size // 32), dtype=np.int32)

    def allowed(self) -> np.ndarray:
        """[vocab] bool; none at all after an error of the library, such as a grammar that grew too large."""
        if not self.matcher.is_error():
            self.matcher.unsafe_compute_mask_ptr(self.bits.ctypes.data, self.bits.nbytes)
        if self.matcher.is_error():
            return np.zeros(self.size, dtype=bool)
        return np.unpackbits(self.bits.view(np.uint8), count=self.size, bitorder="little").view(bool)

    def push(self, token: int) -> None:
        """Go on by a token that was allowed."""
        self.matcher.consume_token(token)


def json_rule(schema: dict[str, Any] | bool) -> str:
    """JSON text that keeps to a schema."""
    return "%json " + json.dumps({**schema, "x-guidance": JSON_OPTIONS} if isinstance(schema, dict) else schema)


def regex_rule(regex: str) -> str:
    """Text that a regular expression matches as a whole (the syntax of Rust's regex crate, without look-around; digits are 0 to 9).

    Raises `UserError` for half a surrogate pair, which is no text.
    """
    from llguidance import regex_to_lark

    try:
        return f"/{regex_to_lark(regex, 'd')}/"
    except UnicodeEncodeError:
        raise UserError("constraint: holds half a surrogate pair, which is no text; mend the \\u escape") from None


def first_line(text: str) -> str:
    """The first line of a message of the library, short."""
    return (text.strip().splitlines() or ["no reason given"])[0][:200]
