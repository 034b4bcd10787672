"""How many threads a step is worth: all of them, or one where the others are kept from running.

Threads wait for each other several times a layer. Where another program has taken a core, each wait lasts until the system gives it back: a
small model's step then takes a hundred times as long on two threads as on one. What is computed is the same bit for bit.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

FEW_ROWS = 64        # steps of more have so much to do between waits that all threads are always worth it
SAMPLES = 5          # steps that are remembered of each way
PROBE_SHARE = 1 / 30 # of the time may go into trying the other way


@dataclass
class Ways:
    """Seconds of recent steps of about so many rows, by the number of threads; `since` the other way was tried."""

    recent: dict[int, deque[float]] = field(default_factory=dict)
    since: float = 0.0


class ThreadChoice:
    """Chooses between `most` threads and one for each step, by what recent steps took. Numbers of rows between the same powers of two
    share what is known."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.ways: dict[int, Ways] = {}

    def choose(self, rows: int) -> int:
        """Threads for a step of so many rows."""
        if self.most == 1 or rows > FEW_ROWS:
            return self.most
        ways = self.ways.setdefault(rows.bit_length(), Ways())
        untried = [threads for threads in (self.most, 1) if len(ways.recent.get(threads, ())) < SAMPLES // 2 + 1]
        if untried:
            return untried[0]
        seconds = {threads: statistics.median(recent) for threads, recent in ways.recent.items()}
        best = min(seconds, key=seconds.__getitem__)
        other = self.most if best == 1 else 1
        return other if ways.since * PROBE_SHARE >= seconds[other] else best

    def learn(self, rows: int, threads: int, seconds: float) -> None:
        """What a step took."""
        if self.most == 1 or rows > FEW_ROWS:
            return
        ways = self.ways.setdefault(rows.bit_length(), Ways())
        before = {way: statistics.median(recent) for way, recent in ways.recent.items()}
        ways.recent.setdefault(threads, deque(maxlen=SAMPLES)).append(seconds)
        slower = bool(before) and threads in before and before[threads] > min(before.values())
        ways.since = 0.0 if slower else ways.since + seconds
