"""The tokenizer: public ids, exact fast path, lossless decoding, deterministic training, plain special strings."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import tiktoken
import tokenizers

from sparseling.data import tokenizer as module
from sparseling.data.tokenizer import ADDED_TOKENS, StreamDecoder, Tokenizer, train_tokenizer
from sparseling.errors import UserError

from .small_corpus import HARD_TEXTS, corpus, hostile_texts, small_tokenizer

PUBLIC = Path(__file__).parents[3] / "shared" / "reference" / "ling-2.0-sft.tokenizer.json.gz"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if not PUBLIC.exists():
        pytest.skip("the public tokenizer is not beside the checkout")
    folder = tmp_path_factory.mktemp("public")
    (folder / "tokenizer.json").write_bytes(gzip.decompress(PUBLIC.read_bytes()))
    return Tokenizer.load(folder)


def slow_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids by Hugging Face `tokenizers` alone, from the file, with the added tokens taken out of it."""
    definition = json.loads((tokenizer.folder / "tokenizer.json").read_text(encoding="utf-8"))
    definition["added_tokens"] = []
    return tokenizers.Tokenizer.from_str(json.dumps(definition)).encode(text, add_special_tokens=False).ids


def test_public_tokenizer_gives_the_published_ids(public: Tokenizer) -> None:
    turn = "<role>SYSTEM</role>detailed thinking off<|role_end|><role>HUMAN</role>"
    expected = [157151, 90827, 157152, 14136, 5381, 6350, 928, 156895, 157151, 39, 116171, 157152]
    assert public.encode(turn, allow_special=True) == expected
    assert public.encode("Hello, world! 12345 it's") == [14455, 11, 1931, 0, 220, 16, 17, 18, 19, 20, 403, 698]
    assert public.encode("<role>ASSISTANT</role>", allow_special=True) == [157151, 8469, 7342, 5468, 157152]
    assert public.vocab_size == 157153
    assert (public.end_of_text_id, public.pad_id, public.eos_id, public.id_of("</role>")) == (156892, 156892, 156895, 157152)
    assert public.decode(expected, skip_special=False) == turn
    assert public.decode(public.encode("<think>")[:1]) == "<"  # not a token of its own


def test_public_vocabulary_takes_the_slow_path_because_ranks_are_not_exact(public: Tokenizer) -> None:
    assert public.fast_encoding is None
    vocabulary = public._plain.get_vocab(with_added_tokens=False)
    ranks = {module._to_bytes(token): rank for token, rank in vocabulary.items()}
    naive = tiktoken.Encoding("naive", pat_str=module.SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    assert naive.encode_ordinary("tiv") != public.encode("tiv")  # the fast path would be wrong
    for text in HARD_TEXTS[:14]:
        assert public.decode(public.encode(text)) == unicodedata.normalize("NFC", text)


def test_special_tokens_follow_the_vocabulary_in_the_public_order(small: Tokenizer) -> None:
    first = small.vocab_size - len(ADDED_TOKENS)
    assert [small.id_of(token) for token in ADDED_TOKENS] == list(range(first, small.vocab_size))
    assert small.decode([small.id_of(token) for token in ADDED_TOKENS]) == "<tool_call></tool_call><tool_response></tool_response>"
    assert small.decode([small.id_of(token) for token in ADDED_TOKENS], skip_special=False) == "".join(ADDED_TOKENS)
    assert small.encode("!") == [0]  # the 256 bytes come first, in the order of their printable stand-ins
    assert small.eos_id == small.id_of("<|role_end|>") and small.pad_id == small.end_of_text_id == small.id_of("<|endoftext|>")
    with pytest.raises(UserError, match="did you mean '<role>'"):
        small.id_of("<roles>")


def test_special_strings_in_plain_text_stay_text(small: Tokenizer) -> None:
    text = "a<|endoftext|>b<role>c<tool_call>d[CLS]"
    plain = small.encode(text)
    assert max(plain) < small.vocab_size - len(ADDED_TOKENS) and small.decode(plain) == text
    marked = small.encode(text, allow_special=True)
    added = [small.decode([token], skip_special=False) for token in marked if token >= small.vocab_size - len(ADDED_TOKENS)]
    assert added == ["<|endoftext|>", "<role>", "<tool_call>", "[CLS]"]


def test_fast_ids_equal_those_of_tokenizers(small: Tokenizer) -> None:
    assert small.fast_encoding is not None
    texts = HARD_TEXTS + corpus(seed=99, documents=60) + hostile_texts(seed=3, count=300)
    batch = small.encode_batch(texts, threads=2)
    definition = json.loads((small.folder / "tokenizer.json").read_text(encoding="utf-8")) | {"added_tokens": []}
    slow = tokenizers.Tokenizer.from_str(json.dumps(definition))
    for text, ids in zip(texts, batch, strict=True):
        assert ids == slow.encode(text, add_special_tokens=False).ids == small.encode(text)


def test_both_regular_expression_engines_split_alike_at_every_character() -> None:
    """With tokens `a`+byte, `!`+byte, space+byte, ... the ids show whether a character joined its left neighbour's piece."""
    letters = {byte: letter for letter, byte in module._BYTE_OF.items()}
    order = sorted(range(256), key=lambda byte: letters[byte])
    vocabulary = {letters[byte]: rank for rank, byte in enumerate(order)}
    merges = [[letters[left], letters[byte]] for left in b"a! '\n" for byte in range(256)]
    vocabulary |= {left + right: 256 + number for number, (left, right) in enumerate(merges)}
    definition = json.loads(module.untrained_pipeline().to_str())
    definition["model"] |= {"vocab": vocabulary, "merges": merges}
    slow = tokenizers.Tokenizer.from_str(json.dumps(definition))
    ranks = {module._to_bytes(token): rank for token, rank in vocabulary.items()}
    fast = tiktoken.Encoding("pairs", pat_str=module.SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    points = [*range(0x3100), *range(0x3100, 0xD800, 13), *range(0xE000, 0x20000, 13), *range(0x20000, 0x110000, 997)]
    characters = [chr(point) for point in points]
    for start in range(0, len(characters), 500):
        text = "".join(f"a{c}!{c} {c}\n{c}'{c}  {c}\n" for c in characters[start : start + 500])
        text = slow.normalizer.normalize_str(text)
        assert slow.encode(text).ids == fast.encode_ordinary(text), hex(ord(characters[start]))


def test_ranks_that_are_not_exact_are_found_out() -> None:
    """A vocabulary in which merging by rank differs: `abc` is made from `ab`+`c`, but `b`+`c` merges first."""
    plain = tokenizers.Tokenizer(tokenizers.models.BPE())
    letters = sorted(module._BYTE_OF, key=ord)
    for merges, exact in (([("b", "c"), ("a", "b"), ("ab", "c")], False), ([("a", "b"), ("b", "c"), ("ab", "c")], True)):
        vocabulary = {letter: rank for rank, letter in enumerate(letters)} | {a + b: 256 + n for n, (a, b) in enumerate(merges)}
        plain.model = tokenizers.models.BPE(vocab=vocabulary, merges=merges)
        assert module.ranks_are_exact(plain, {"vocab": vocabulary, "merges": merges}) is exact
    shuffled = vocabulary | {"ab": 257, "bc": 256}
    assert not module.ranks_are_exact(plain, {"vocab": shuffled, "merges": merges})


def test_decoding_gives_back_the_text_in_nfc(small: Tokenizer) -> None:
    for text in HARD_TEXTS + hostile_texts(seed=5, count=90):
        if all(unicodedata.category(character) != "Cn" for character in text):  # composition of the unassigned differs by Unicode version
            assert small.decode(small.encode(text)) == unicodedata.normalize("NFC", text)


def test_decoding_equals_that_of_tokenizers_on_random_ids(small: Tokenizer) -> None:
    import random

    source = random.Random(11)
    slow = tokenizers.Tokenizer.from_file(str(small.folder / "tokenizer.json"))
    for skip_special in (True, False):
        for _ in range(100):
            ids = [source.randrange(small.vocab_size) for _ in range(30)]
            assert small.decode(ids, skip_special) == slow.decode(ids, skip_special_tokens=skip_special)


def test_stream_decoding_never_shows_half_a_character_and_adds_up(small: Tokenizer) -> None:
    import random

    for text in [text for text in HARD_TEXTS if "\ufffd" not in text]:
        decoder, ids = StreamDecoder(small), small.encode(text)
        pieces = [decoder.push(token) for token in ids]
        assert not any("\ufffd" in piece for piece in pieces) and decoder.finish() == ""
        assert "".join(pieces) == small.decode(ids)
    source = random.Random(2)
    for _ in range(200):
        ids = [source.choice([source.randrange(small.vocab_size), source.randrange(94, 256)]) for _ in range(12)]
        decoder = StreamDecoder(small, skip_special=False)
        assert "".join(decoder.push(token) for token in ids) + decoder.finish() == small.decode(ids, skip_special=False)


def test_ids_beyond_the_vocabulary_decode_to_nothing(small: Tokenizer) -> None:
    assert small.decode([small.vocab_size, 10**9, -1, *small.encode("ok")]) == "ok"


def test_text_bytes_per_id_adds_up_to_the_text(small: Tokenizer) -> None:
    for text in HARD_TEXTS:
        ids = small.encode(text)
        assert small.text_bytes_per_id[ids].sum() == len(unicodedata.normalize("NFC", text).encode())
    assert small.text_bytes_per_id[small.end_of_text_id] == 0


def test_lone_surrogates_and_huge_white_space_do_not_break_encoding(small: Tokenizer) -> None:
    assert small.decode(small.encode("a\ud800b")) == "a\ufffdb"
    assert small.decode(small.encode("\ud83d\ude00")) == "😀"
    assert small.decode(small.encode("\udc00", allow_special=True)) == "\ufffd"
    text = "x" + " " * 600_000 + "y"  # tiktoken alone panics here
    assert small.decode(small.encode(text)) == text


def test_training_is_deterministic_across_processes(tmp_path: Path, small: Tokenizer) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\nfrom small_corpus import small_tokenizer\nsmall_tokenizer(Path(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path)], check=True, capture_output=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / name).read_bytes() == (small.folder / name).read_bytes(), name
    assert Tokenizer.load(tmp_path).sha256 == small.sha256


def test_vocabulary_size_is_kept_or_smaller_never_larger(tmp_path: Path) -> None:
    assert train_tokenizer(corpus(), 300, tmp_path / "a", "x").vocab_size == 300
    tiny = train_tokenizer(["ab ab ab"], 5000, tmp_path / "b", "x")
    assert 256 + len(ADDED_TOKENS) < tiny.vocab_size < 300
    assert tiny.decode(tiny.encode("anything 日")) == "anything 日"
    nothing = train_tokenizer([], 267, tmp_path / "c", "x")
    assert nothing.vocab_size == 267 and nothing.decode(nothing.encode("é😀")) == "é😀"
    with pytest.raises(UserError, match="vocab_size: 266 is below"):
        train_tokenizer([], 266, tmp_path / "d", "x")


def test_config_files_name_the_tokens_and_hold_the_project_template(tmp_path: Path) -> None:
    trained = train_tokenizer(["a"], 267, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = (Path(module.__file__).parents[1] / "align" / "chat_template.jinja").read_text(encoding="utf-8")
    assert config["chat_template"] == trained.chat_template == template
    assert (config["eos_token"], config["pad_token"]) == ("<|role_end|>", "<|endoftext|>")
    assert json.loads((tmp_path / "special_tokens_map.json").read_text())["bos_token"] == "<|startoftext|>"


def test_hugging_face_loads_the_folder(small: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(small.folder)
    assert loaded.encode("Hello 12<role>", add_special_tokens=False) == small.encode("Hello 12<role>", allow_special=True)
    assert (loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (small.eos_id, small.pad_id, small.vocab_size)


def test_missing_or_damaged_files_are_user_errors(tmp_path: Path, small: Tokenizer) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        Tokenizer.load(tmp_path)
    whole = (small.folder / "tokenizer.json").read_text(encoding="utf-8")
    without_end = json.loads(whole)
    without_end["added_tokens"] = [token for token in without_end["added_tokens"] if token["content"] != "<|endoftext|>"]
    for damaged in (whole[: len(whole) // 2], "", "[]", "{}", "null", whole.replace('"BPE"', '"BPX"'), json.dumps(without_end)):
        path.write_text(damaged, encoding="utf-8")
        with pytest.raises(UserError, match=r"tokenizer\.json"):
            Tokenizer.load(tmp_path)
    path.write_text(whole, encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|nowhere|>"}')
    with pytest.raises(UserError, match="nowhere"):
        Tokenizer.load(tmp_path)
