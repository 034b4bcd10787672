"""A small corpus and a tokenizer trained on it, for the tests of tokens, shards and batches."""

from __future__ import annotations

import random
from pathlib import Path

from sparseling.data.tokenizer import Tokenizer, train_tokenizer

HARD_TEXTS = [
    "", " ", "\n", "   \n\n\t x", "Hello, world! 12345 it's", "It'S we'LL they'Ve I'M 'tis ''s '\u017f",
    "caf\u00e9 cafe\u0301 \u212b \u1e9b\u0323", "\ud55c\uad6d\uc5b4 \u1112\u1161\u11ab", "日本語のテキスト。数字１２３ ٣٤٥ Ⅷ ½",
    "😀👩‍👩‍👧‍👦🇫🇷 👍🏽 e\u200d\u200c\ufeffx", "עברית ÄÖÜ ß ẞ ŉ ﬁ ﬀ", "\u0301\u0302 combining first",
    "a\r\nb\rc\n\r\n  d\u2028e\u0085f\u00a0g\u3000h",
    "def f(x):\n\treturn x**2  # ok\n\n\n    if x: pass\n", "<role>HUMAN</role>hi<|role_end|><|endoftext|><tool_call>[CLS]",
    "\x00\x01\x7f\ufffd\uffff", "=" * 300 + "." * 77,
    "https://example.org/a?b=c&d=%20#e", "3.14159e-10 1,000,000 0x1F", "naïve—“quotes” … ‘x’", "word " * 200,
]  # fmt: skip


def corpus(seed: int = 7, documents: int = 200) -> list[str]:
    """Documents of made-up words with a skewed distribution, digits, punctuation, lines and some hard text."""
    source = random.Random(seed)
    words = ["".join(source.choices("etaoinshrdlucmwy", k=source.randint(1, 8))) for _ in range(300)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    texts = []
    for number in range(documents):
        picked = source.choices(words, weights, k=source.randint(5, 120))
        joined = "".join(word + source.choice([" ", " ", " ", ", ", ". ", "\n", "\n\n", " 42 ", "'s ", " é ", "😀"]) for word in picked)
        texts.append(joined + (HARD_TEXTS[number % len(HARD_TEXTS)] if number % 5 == 0 else "") or "x")
    return texts


def hostile_texts(seed: int, count: int) -> list[str]:
    """Random bytes decoded, random code points, and hard texts glued together at random."""
    source = random.Random(seed)
    texts = []
    for number in range(count):
        if number % 3 == 0:
            texts.append(source.randbytes(source.randint(0, 300)).decode("utf-8", "replace"))
        elif number % 3 == 1:
            ranges = source.choices([(0, 0x300), (0, 0xD800), (0xE000, 0x110000)], k=80)
            texts.append("".join(chr(source.randrange(*points)) for points in ranges))
        else:
            texts.append("".join(source.choices([*HARD_TEXTS, "'", " ", "\n", "e", "s", "\u0301", "7"], k=6)))
    return texts


def small_tokenizer(folder: Path, vocab_size: int = 600) -> Tokenizer:
    """A tokenizer of `vocab_size` ids trained on `corpus()`."""
    return train_tokenizer(corpus(), vocab_size, folder, chat_template="{{ messages }}")
