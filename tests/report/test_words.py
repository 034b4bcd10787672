"""Numbers as a reader sees them, and escaping."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseling.report.words import MISSING, bits, clip, count, duration, escape, file_size, number, percent, signed


def plain(text: str) -> str:
    return text.replace("\u00a0", " ").replace("\u202f", " ")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (950, "950"), (999.6, "1 k"), (12_500, "12.5 k"), (999_999, "1 M"),
        (4_213_760, "4.21 M"), (16.3e9, "16.3 B"), (1e12, "1 T"), (-2_500_000, "-2.5 M"),
    ],
)
def test_count(value: float, text: str) -> None:
    assert plain(count(value)) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (0.44, "0.4 s"), (42.2, "42 s"), (59.7, "1 min"), (1000, "16 min 40 s"),
        (3599.7, "1 h 00 min"), (11_100, "3 h 05 min"), (1_051_200, "12 d 4 h"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert plain(duration(seconds)) == text


@pytest.mark.parametrize(
    ("value", "text"), [(2.13749, "2.137"), (0.03123, "0.03123"), (0, "0"), (-0.5, "-0.5000"), (8.4e-7, "8.4e-7"), (1204.2, "1,204")]
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


def test_other_units() -> None:
    assert plain(percent(0.9741)) == "97.4 %" and bits(2) == "2.000"
    assert (signed(0.0214), signed(-2), signed(0)) == ("+0.0214", "−2.00", "0")
    assert [plain(file_size(size)) for size in (999, 38.4e6, 2e9)] == ["999 bytes", "38.4 MB", "2 GB"]


@pytest.mark.parametrize("words", [count, duration, number, percent, signed, bits, file_size])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_is_a_dash(words, value) -> None:
    assert words(value) == MISSING


@given(st.floats(-1e20, 1e20))
def test_count_reads_back(value: float) -> None:
    text = plain(count(value)).split()
    scale = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[text[1]] if len(text) == 2 else 1
    assert math.isclose(float(text[0]) * scale, value, rel_tol=6e-3, abs_tol=6e-4)


@given(st.text("<>&\"'/ab]\n\t\x00\x1b\x85\ud800\ufffe é漢", max_size=40))
def test_escaped_text_is_well_formed_and_reads_back(text: str) -> None:
    root = ElementTree.fromstring(f'<p title="{escape(text)}">{escape(text)}</p>')
    readable = "".join(root.itertext()).replace("\ufffd", "")
    assert len(root) == 0
    assert set(readable) <= set(text) | {"\n"}


def test_escape_replaces_what_no_document_may_hold() -> None:
    assert escape("a\x00b\ud800c\x1b[0m") == "a\ufffdb\ufffdc\ufffd[0m"
    escape("\ud83d \ude00").encode("utf-8")


def test_clip_says_how_much_is_left_out() -> None:
    assert clip("abc", 3) == "abc"
    assert clip("x" * 2500, 1000) == "x" * 1000 + " … (1,500 more characters)"
