"""Text to token ids and back: byte-level BPE with the pre-tokeniser and the special tokens of Ling 2.0.

A tokenizer is a folder that Hugging Face loads as well: `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`.
Token ids are defined by Hugging Face `tokenizers`. Corpora are encoded through `tiktoken`, several times faster, for the
vocabularies for which both are proved to give the same ids (`ranks_are_exact`).
"""

from __future__ import annotations

import codecs
import importlib.resources
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, nearest
from ..files import read_json, sha256_of_file, write_aside, write_json
from ..progress import say

# The public pre-tokeniser: single digits, and every newline is a piece of its own.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
END_OF_TEXT = "<|endoftext|>"  # ends every document; also the padding
ROLE_END = "<|role_end|>"  # ends every chat turn
# In the public order. The tool tokens are added but not special: decoding keeps them even when it skips special tokens.
TOOL_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
ADDED_TOKENS = ("<|startoftext|>", END_OF_TEXT, "[CLS]", "[gMASK]", ROLE_END, *TOOL_TOKENS, "<role>", "</role>")
NAMED_TOKENS = {
    "bos_token": "<|startoftext|>",
    "cls_token": "[CLS]",
    "eos_token": ROLE_END,
    "gmask_token": "[gMASK]",
    "pad_token": END_OF_TEXT,
}
SMALLEST_VOCABULARY = 256 + len(ADDED_TOKENS)
# tiktoken's regular expression engine runs out of stack somewhere above 300,000 white-space characters in a row.
_LONG_WHITE_SPACE = re.compile(r"(?:\A|\S)\s{50000}")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A loaded tokenizer folder. Make one with `Tokenizer.load`.

    `vocab_size` counts all ids, added tokens included; `sha256` is the hash of `tokenizer.json`, by which token shards know
    their tokenizer. `eos_id` ends a chat turn, `end_of_text_id` ends a document, `pad_id` fills up rows.
    """

    folder: Path
    sha256: str
    vocab_size: int
    eos_id: int
    pad_id: int
    end_of_text_id: int
    chat_template: str | None
    added_tokens: dict[str, int]
    special_ids: frozenset[int]
    _with_added: Any = field(repr=False)
    _plain: Any = field(repr=False)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read a tokenizer folder, ours or a public Ling one. Raises `UserError` for a missing or damaged file."""
        import tokenizers

        folder = Path(folder)
        path = folder / "tokenizer.json"
        definition = read_json(path)
        config_path = folder / "tokenizer_config.json"
        config = read_json(config_path) if config_path.exists() else {}
        try:
            with_added = tokenizers.Tokenizer.from_str(json.dumps(definition))
            # Without added tokens: the strings `<role>` or `<tool_call>` in a text are then nothing but text.
            plain = tokenizers.Tokenizer.from_str(json.dumps({**definition, "added_tokens": [], "post_processor": None}))
            added = {token["content"]: int(token["id"]) for token in definition["added_tokens"]}
            special = frozenset(int(token["id"]) for token in definition["added_tokens"] if token["special"])
            highest = max(*definition["model"]["vocab"].values(), *added.values())
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{path}: not a tokenizer file ({error}); restore it or train the tokenizer again") from None

        def required(key: str) -> int:
            token = config.get(key) or NAMED_TOKENS[key]
            token = token["content"] if isinstance(token, dict) else token
            if token not in added:
                raise UserError(f"{path}: has no token '{token}' ({key}); {nearest(token, added)}")
            return added[token]

        if END_OF_TEXT not in added:
            raise UserError(f"{path}: has no token '{END_OF_TEXT}', which ends every document; use a Ling 2.0 tokenizer")
        return cls(
            folder=folder, sha256=sha256_of_file(path), vocab_size=highest + 1, eos_id=required("eos_token"), pad_id=required("pad_token"),
            end_of_text_id=added[END_OF_TEXT], chat_template=config.get("chat_template"), added_tokens=added, special_ids=special,
            _with_added=with_added, _plain=plain,
        )

    def id_of(self, token: str) -> int:
        """The id of an added token such as `<|role_end|>`. Raises `UserError` for one that this tokenizer does not have."""
        if token not in self.added_tokens:
            raise UserError(f"{self.folder}: the tokenizer has no token '{token}'; {nearest(token, self.added_tokens)}")
        return self.added_tokens[token]

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Token ids of `text`. Special-token strings in it are plain text unless `allow_special`."""
        if allow_special:
            return self._with_added.encode(_valid_unicode(text), add_special_tokens=False).ids
        return self.encode_batch([text], threads=1)[0]

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """Token ids of many texts, the fast path for corpora; special-token strings are plain text.

        The ids are those of Hugging Face `tokenizers`, also where `tiktoken` makes them. `threads`: default all cores.
        """
        texts = [_valid_unicode(text) for text in texts]
        if self.fast_encoding is None or any(len(text) >= 50_000 and _LONG_WHITE_SPACE.search(text) for text in texts):
            return [encoding.ids for encoding in self._plain.encode_batch_fast(texts, add_special_tokens=False)]
        texts = [self._normalise(text) for text in texts]
        threads = threads or os.cpu_count() or 1
        if threads == 1 or len(texts) == 1:
            return [self.fast_encoding.encode_ordinary(text) for text in texts]
        return self.fast_encoding.encode_ordinary_batch(texts, num_threads=threads)

    def _normalise(self, text: str) -> str:
        normaliser = self._plain.normalizer
        return text if text.isascii() or normaliser is None else normaliser.normalize_str(text)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; broken UTF-8 becomes U+FFFD. Ids above the vocabulary (padded rows of a model) are nothing."""
        return b"".join(self.bytes_of(token_id, skip_special) for token_id in ids).decode("utf-8", "replace")

    def bytes_of(self, token_id: int, skip_special: bool = True) -> bytes:
        """The UTF-8 bytes that one token stands for; not always whole characters."""
        if not 0 <= token_id < self.vocab_size or (skip_special and token_id in self.special_ids):
            return b""
        return self._bytes_by_id[token_id]

    @cached_property
    def _bytes_by_id(self) -> list[bytes]:
        table = [b""] * self.vocab_size
        for token, token_id in self._plain.get_vocab(with_added_tokens=False).items():
            table[token_id] = _to_bytes(token)
        for token, token_id in self.added_tokens.items():
            table[token_id] = token.encode()
        return table

    @cached_property
    def text_bytes_per_id(self) -> np.ndarray:
        """[vocab_size] int64: UTF-8 bytes of text that each token stands for, 0 for special tokens. For bits per byte."""
        return np.array([len(self.bytes_of(token_id)) for token_id in range(self.vocab_size)], dtype=np.int64)

    @cached_property
    def fast_encoding(self) -> Any | None:
        """The `tiktoken` encoding with the same ids as `tokenizers`, or None where equality is not certain."""
        import tiktoken

        definition = json.loads(self._plain.to_str())
        pattern = _split_pattern(definition)
        if pattern is None or not ranks_are_exact(self._plain, definition["model"]):
            return None
        ranks = {_to_bytes(token): rank for token, rank in definition["model"]["vocab"].items()}
        return tiktoken.Encoding(self.sha256, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


class StreamDecoder:
    """Decodes a growing sequence token by token; text comes out as soon as its characters are whole."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that became complete with this token; may be empty."""
        return self._decoder.decode(self._tokenizer.bytes_of(token_id, self._skip_special))

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that was cut off, else nothing."""
        return self._decoder.decode(b"", final=True)


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | Path, chat_template: str | None = None) -> Tokenizer:
    """Train a byte-level BPE on `texts`, write it to `folder` and return it. The same texts give the same bytes.

    `vocab_size` counts all rows, the added tokens included. A small corpus may not hold enough pairs: the vocabulary is then
    smaller (and said to be so), never larger. `chat_template`: Jinja text, default the project's own.
    Raises `UserError` when `vocab_size` cannot even hold the bytes and the added tokens.
    """
    import tokenizers

    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(f"vocab_size: {vocab_size} is below the smallest possible {SMALLEST_VOCABULARY} (256 bytes and the added tokens)")
    if chat_template is None:
        chat_template = importlib.resources.files("sparseling.align").joinpath("chat_template.jinja").read_text(encoding="utf-8")
    model = untrained_pipeline()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - len(ADDED_TOKENS), initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    say(f"training a vocabulary of {vocab_size:,} tokens")
    model.train_from_iterator((_valid_unicode(text) for text in texts), trainer)
    for token in ADDED_TOKENS:  # one by one: ids follow the order
        model.add_tokens([tokenizers.AddedToken(token, special=token not in TOOL_TOKENS, normalized=False)])
    folder = Path(folder)
    write_json(folder / "special_tokens_map.json", NAMED_TOKENS)
    write_json(folder / "tokenizer_config.json", {
        "add_bos_token": False, "add_eos_token": False, **NAMED_TOKENS, "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": chat_template,
    })  # fmt: skip
    with write_aside(folder / "tokenizer.json") as stream:
        stream.write(model.to_str(pretty=True))
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size < vocab_size:
        say(f"{folder}: the texts gave {tokenizer.vocab_size:,} tokens only, not {vocab_size:,}; the model's other rows stay unused")
    return tokenizer


def ranks_are_exact(plain: Any, model: dict[str, Any]) -> bool:
    """Whether merging by vocabulary rank (`tiktoken`) provably gives the ids of merging by the list of merges (`tokenizers`).

    It does if (1) after the 256 bytes each id is made by one merge and ids follow the order of merges, and (2) each token,
    encoded alone, gives itself. Why: suppose tokens x, y stand side by side at some moment and the string xy is a token made by another
    merge. What happened inside the span xy happens as well when xy is encoded alone, so that encoding would pass through
    [x, y] and end there, against (2). So both methods see the same candidate pairs in the same order.
    The public Ling vocabulary fails (2) for about a thousand tokens.
    """
    vocabulary = model["vocab"]
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if len(merges) + 256 != len(vocabulary) or any(vocabulary.get(a + b) != 256 + n for n, (a, b) in enumerate(merges)):
        return False
    return all([piece.id for piece in plain.model.tokenize(token)] == [rank] for token, rank in vocabulary.items())


def untrained_pipeline() -> Any:
    """The public pipeline around an empty BPE model."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _split_pattern(definition: dict[str, Any]) -> str | None:
    """The regular expression of a pipeline like ours (NFC, isolated split, byte level), None for any other pipeline."""
    expected = json.loads(untrained_pipeline().to_str())
    steps = (definition.get("pre_tokenizer") or {}).get("pretokenizers") or [{}]
    pattern = steps[0].get("pattern", {}).get("Regex")
    expected["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    same = all(definition.get(key) == expected[key] for key in ("normalizer", "pre_tokenizer"))
    settings = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    simple = not any(definition["model"].get(key) for key in settings)
    return pattern if same and simple and isinstance(pattern, str) else None


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-in of each byte in byte-level BPE files (GPT-2): printable Latin-1 as is, the others from U+0100 up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _to_bytes(token: str) -> bytes:
    """The bytes of a vocabulary entry; an entry outside the alphabet stands for its own UTF-8, as in `tokenizers`."""
    try:
        return bytes(map(_BYTE_OF.__getitem__, token))
    except KeyError:
        return token.encode()


def _valid_unicode(text: str) -> str:
    """`text` with lone surrogates, which no UTF-8 can hold, joined to pairs or replaced by U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
