"""Numbers and text as a reader sees them: units, a sensible count of digits, and escaping that no content gets past."""

from __future__ import annotations

import html
import math
import re

MISSING = "–"
NARROW = "\u202f"  # no-break spaces between a figure and its unit
SPACE = "\u00a0"
_NOT_IN_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")
_SCALES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def escape(text: object) -> str:
    """Text that is safe between tags and inside quoted attributes; characters that no document may hold become U+FFFD."""
    return html.escape(_NOT_IN_XML.sub("\ufffd", str(text)), quote=True)


def clip(text: str, characters: int) -> str:
    """At most `characters` of `text`, with a note of how many were left out."""
    return text if len(text) <= characters else f"{text[:characters]} … ({len(text) - characters:,} more characters)"


def trimmed(value: float, digits: int, thousands: str = "") -> str:
    """Fixed point with at most `digits` decimals and no trailing zeros."""
    text = f"{value:{thousands}.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return text.lstrip("-") if text.strip("-0.") == "" else text


def count(value: float, significant: int = 3) -> str:
    """A quantity in short scale: 950, 12.5 k, 4.21 M, 16.3 B, 1 T."""
    if not math.isfinite(value):
        return MISSING
    for scale, letter in _SCALES:
        # 999,999 rounds to 1,000 k, which is 1 M.
        if abs(value) >= scale * (1 - 0.5 * 10**-significant):
            whole = len(str(int(abs(value) / scale)))
            return f"{trimmed(value / scale, max(0, significant - whole))}{SPACE}{letter}"
    return trimmed(value, 0 if float(value).is_integer() else significant)


def number(value: float, significant: int = 4) -> str:
    """A plain figure with `significant` digits: 2.137, 0.0312, 8.4e-05, 1,204."""
    if not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if exponent < -4 or exponent >= 9:
        mantissa, power = f"{value:.{max(0, significant - 1)}e}".split("e")
        return f"{trimmed(float(mantissa), significant)}e{int(power)}"
    return f"{value:,.{max(0, significant - 1 - exponent)}f}"


def signed(value: float, significant: int = 3) -> str:
    """Like `number`, with its sign: +0.021, −0.3."""
    text = number(abs(value), significant)
    return text if text in (MISSING, "0") else f"{'+' if value > 0 else '−'}{text}"


def bits(value: float) -> str:
    """Bits per byte, always three decimals so that a column of them lines up."""
    return f"{value:.3f}" if math.isfinite(value) else MISSING


def label(name: str) -> str:
    """A key of a JSON file as words: `two_digit_addition` is `two digit addition`."""
    return "order-2 byte model" if name == "order2" else name.replace("_", " ")


def percent(share: float, digits: int = 1) -> str:
    """A share of 1 as a percentage: 0.974 is 97.4 %."""
    return f"{share * 100:.{digits}f}{NARROW}%" if math.isfinite(share) else MISSING


def duration(seconds: float) -> str:
    """Time as people say it: 0.4 s, 42 s, 16 min 40 s, 3 h 05 min, 12 d 4 h."""
    if not math.isfinite(seconds) or seconds < 0:
        return MISSING
    if seconds < 59.5:
        return f"{trimmed(seconds, 1 if seconds < 10 else 0)}{SPACE}s"
    if seconds < 3599.5:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes}{SPACE}min" + (f"{SPACE}{rest:02d}{SPACE}s" if rest else "")
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60}{SPACE}h{SPACE}{minutes % 60:02d}{SPACE}min"
    hours = round(seconds / 3600)
    return f"{hours // 24:,}{SPACE}d{SPACE}{hours % 24}{SPACE}h"


def file_size(size_bytes: float) -> str:
    """Bytes in decimal units: 900 bytes, 1.2 kB, 38.4 MB."""
    if not math.isfinite(size_bytes):
        return MISSING
    if abs(size_bytes) < 1000:
        return f"{trimmed(size_bytes, 0)}{SPACE}bytes"
    return count(size_bytes).replace("B", "G") + "B"
