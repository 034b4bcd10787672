"""Which window of which domain each training sample is: a pure function of (seed, sample index).

Nothing is counted or stored while training: any worker, rank or restarted run computes sample n alone and gets the same. The
domain of sample n comes from nested low-discrepancy sequences, so that the wanted shares hold in every few dozen samples; the
window comes from a keyed permutation of the domain's windows, so that each epoch of a domain visits each window once.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError, UserError, nearest

MOST_EPOCHS = 4  # repeated text is nearly as good as new text up to about four passes (Muennighoff et al. 2023, section 5)
_MASK = 2**64 - 1
_FRACTION_BITS = 48  # fractions are integers over 2^48: exact sums, the same on every machine
_ROUNDS = 8  # even, so that the two halves have their widths again at the end


@dataclass(frozen=True)
class Domain:
    """One domain: its `share` of all samples, its number of `windows`, and how many of its samples earlier stages drew."""

    name: str
    group: str
    share: float
    windows: int
    drawn_before: int = 0


@dataclass(frozen=True)
class Mixture:
    """The data order of one stage. Make one with `build_mixture`. `domains` stand group by group."""

    domains: tuple[Domain, ...]
    seed: int

    def sample(self, index: int) -> tuple[str, int]:
        """The domain of sample `index` (from 0) and the number of its window in that domain."""
        assert index >= 0
        for split in self._splits:
            before = split.taken(index)
            if split.taken(index + 1) > before:
                return self._sample_of_group(split.members, before)
            index -= before
        raise AssertionError("the last split takes everything")

    def _sample_of_group(self, members: tuple[_Split, ...], index: int) -> tuple[str, int]:
        for split in members:
            before = split.taken(index)
            if split.taken(index + 1) > before:
                domain = self.domains[split.domain]
                return domain.name, shuffled(domain.drawn_before + before, domain.windows, self.seed, domain.name)
            index -= before
        raise AssertionError("the last split takes everything")

    def counts(self, samples: int) -> dict[str, int]:
        """How many of the first `samples` samples fall in each domain; exact, without walking through them.

        Within two or three of `share * samples`. `drawn_before` is not counted in.
        """
        counts = {}
        for group in self._splits:
            in_group = group.taken(samples)
            samples -= in_group
            for member in group.members:
                counts[self.domains[member.domain].name] = member.taken(in_group)
                in_group -= member.taken(in_group)
        return counts

    def drawn(self, samples: int) -> dict[str, int]:
        """Samples of each domain drawn after `samples` of this stage, earlier stages included: the next stage's `drawn_before`."""
        counts = self.counts(samples)
        return {domain.name: domain.drawn_before + counts[domain.name] for domain in self.domains}

    def epochs(self, domain: str, samples: int) -> float:
        """How many times `domain` has been gone through after `samples` of this stage, earlier stages included."""
        windows = {entry.name: entry.windows for entry in self.domains}
        if domain not in windows:
            raise UserError(f"{domain}: no such domain in the mixture; {nearest(domain, windows)}")
        return self.drawn(samples)[domain] / windows[domain]

    def repeat_warnings(self, samples: int) -> list[str]:
        """A sentence for each domain that `samples` of this stage repeat more than four times."""
        epochs = {domain.name: self.epochs(domain.name, samples) for domain in self.domains}
        return [
            f"{name}: its text is repeated {times:.1f} times; beyond {MOST_EPOCHS} times it teaches little, add text or lower its share"
            for name, times in epochs.items() if times > MOST_EPOCHS
        ]  # fmt: skip

    @functools.cached_property
    def _splits(self) -> tuple[_Split, ...]:
        """The groups, each with its domains, as chains of splits: every one takes its part of what the ones before it left."""
        groups = dict.fromkeys(domain.group for domain in self.domains)
        shares = {group: [(n, d.share) for n, d in enumerate(self.domains) if d.group == group] for group in groups}
        totals = [sum(share for _, share in members) for members in shares.values()]
        splits = []
        for (group, members), part in zip(shares.items(), _parts(totals), strict=True):
            parts = _parts([share for _, share in members])
            inner = [_Split(part, self._offset(self.domains[n].name), domain=n) for (n, _), part in zip(members, parts, strict=True)]
            splits.append(_Split(part, self._offset(group + "/"), members=tuple(inner)))
        return tuple(splits)

    def _offset(self, name: str) -> int:
        return _key(self.seed, "split " + name, 0) >> (64 - _FRACTION_BITS)


@dataclass(frozen=True)
class _Split:
    """Takes `part` / 2^48 of the samples that reach it, evenly spread: sample i is taken when floor(i * part + offset) steps up."""

    part: int
    offset: int
    members: tuple[_Split, ...] = ()
    domain: int = -1

    def taken(self, samples: int) -> int:
        """How many of the first `samples` that reach this split it takes."""
        return (samples * self.part + self.offset) >> _FRACTION_BITS


def _parts(shares: list[float]) -> list[int]:
    """Each share as a fraction of what the ones before it leave; the last takes all that is left."""
    left = [math.fsum(shares[n:]) for n in range(len(shares))]
    return [round(share / rest * 2**_FRACTION_BITS) for share, rest in zip(shares[:-1], left, strict=False)] + [2**_FRACTION_BITS]


def build_mixture(
    groups: Mapping[str, Any], windows: Mapping[str, int], seed: int, drawn_before: Mapping[str, int] | None = None
) -> Mixture:
    """The mixture of one stage from its recipe, e.g. `{"general": {"share": 0.68, "domains": {"prose": 1}}, "reasoning": ...}`.

    The shares add up to 1 (Ling 2.0: 68% general and 32% reasoning, later 54% and 46%; L2 section 3.2.2); the weights of the
    domains within a group are relative. `windows`: windows of text in each domain (`batches.windows_of`). `drawn_before`:
    what earlier stages drew (`Mixture.drawn`), so that this stage goes on with windows not seen yet.
    Raises `UsageError` for a wrong recipe, `UserError` for a domain without text.
    """
    domains: list[Domain] = []
    shares = {name: _checked_group(name, group) for name, group in groups.items()}
    if abs(math.fsum(shares.values()) - 1) > 1e-6:
        raise UsageError(f"mixture: the shares of {', '.join(groups) or 'no group'} add up to {math.fsum(shares.values()):g}; make it 1")
    for group, share in shares.items():
        weights = {name: _number(f"mixture.{group}.domains.{name}", weight) for name, weight in groups[group]["domains"].items()}
        if share > 0 and not sum(weights.values()) > 0:
            raise UsageError(f"mixture.{group}.domains: no domain has a weight above 0; give one")
        for name, weight in weights.items():
            if share * weight == 0:
                continue
            if name in {domain.name for domain in domains}:
                raise UsageError(f"mixture.{group}.domains.{name}: also in another group; name it once")
            if name not in windows:
                raise UsageError(f"mixture.{group}.domains.{name}: there is no such domain in the data; {nearest(name, windows)}")
            if windows[name] < 1:
                raise UserError(f"mixture.{group}.domains.{name}: has not one full window of text; add text or take it out")
            part = share * weight / math.fsum(weights.values())
            domains.append(Domain(name, group, part, windows[name], (drawn_before or {}).get(name, 0)))
    return Mixture(tuple(domains), seed)


def _checked_group(name: str, group: Any) -> float:
    """The share of a group whose keys are right. Raises `UsageError`."""
    if not isinstance(group, Mapping) or not isinstance(group.get("domains"), Mapping) or "share" not in group:
        raise UsageError(f"mixture.{name}: needs `share` and `domains` (name: weight)")
    if unknown := set(group) - {"share", "domains"}:
        raise UsageError(f"mixture.{name}.{min(unknown)}: unknown key; {nearest(min(unknown), ('share', 'domains'))}")
    return _number(f"mixture.{name}.share", group["share"])


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise UsageError(f"{key}: is {value!r}; give a number, 0 or more")
    return float(value)


def shuffled(index: int, size: int, seed: int, name: str) -> int:
    """Visit `index` of an endless walk over `range(size)`: each epoch visits each number once, in an order of its own."""
    epoch, step = divmod(index, size)
    return permute(step, size, _key(seed, name, epoch))


def permute(value: int, size: int, key: int) -> int:
    """A bijection of `range(size)` chosen by `key`, computed for one value alone in constant memory.

    A Feistel network on the next power of two, applied again while it leads out of the range (cycle walking; Black and
    Rogaway 2002, section 3).
    """
    assert 0 <= value < size
    bits = max(6, (size - 1).bit_length())
    round_keys = _round_keys(key)
    while True:
        left_bits, right_bits = bits // 2, bits - bits // 2
        left, right = value >> right_bits, value & ((1 << right_bits) - 1)
        for round_key in round_keys:
            left, right = right, left ^ (_splitmix64(right ^ round_key) >> (64 - left_bits))
            left_bits, right_bits = right_bits, left_bits
        value = (left << right_bits) | right
        if value < size:
            return value


def _splitmix64(value: int) -> int:
    """A 64-bit mixing function: every output bit depends on every input bit (Steele, Lea and Flood 2014, figure 12)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


@functools.lru_cache(maxsize=1024)
def _round_keys(key: int) -> tuple[int, ...]:
    return tuple(_splitmix64(key + number) for number in range(_ROUNDS))


@functools.lru_cache(maxsize=1024)
def _key(seed: int, name: str, number: int) -> int:
    """64 bits from the seed, a name and a number; the same in every process."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}\0{number}".encode()).digest()[:8], "little")
