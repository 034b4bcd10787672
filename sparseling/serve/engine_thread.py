"""The one thread that owns the engine: it steps the scheduler, takes jobs from a queue, and hands what came to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from ..errors import UserError
from ..run.job import Job, Progress
from ..run.scheduler import Scheduler
from .errors import ApiError
from .metrics import Metrics

Event = tuple[int, Progress | ApiError]  # of the job with this number in its request


@dataclass(eq=False)
class Stream:
    """One job as the event loop sees it: its events go to `target` under `number`. `job` is there from the first event on."""

    number: int
    target: asyncio.Queue[Event]
    make: Callable[[Scheduler], Job]
    job: Job | None = None
    over: bool = False
    last: float = field(default_factory=time.perf_counter)
    tokens: int = 0


class EngineThread:
    """Started once, stopped once. `submit`, `cancel` and `events` are for the event loop; nothing else touches the scheduler."""

    def __init__(self, scheduler: Scheduler, max_waiting: int, metrics: Metrics) -> None:
        self.scheduler, self.metrics = scheduler, metrics
        self.most = scheduler.most_jobs + max_waiting
        self.commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.streams: dict[Job, Stream] = {}   # of the engine's thread
        self.active: set[Stream] = set()       # of the event loop
        self.thread = threading.Thread(target=self.work, name="engine", daemon=True)
        self.loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Begin; the running event loop gets the events."""
        self.loop = asyncio.get_running_loop()
        self.thread.start()

    def stop(self) -> None:
        """End after the step that is being computed; jobs that are not over end as they are."""
        self.commands.put(None)
        self.thread.join()

    def submit(self, jobs: list[Callable[[Scheduler], Job]]) -> list[Stream]:
        """Give jobs to the engine, all or none. Raises `ApiError` 429 when too many wait already, 503 when the engine has ended."""
        if self.thread.ident is not None and not self.thread.is_alive():
            raise ApiError(503, "the engine has ended; the server has to be started again", code="stopping")
        if len(self.active) + len(jobs) > self.most:
            raise ApiError(429, f"{len(self.active)} answers are being computed or waiting; try again soon", code="overloaded",
                           retry_after=self.retry_after())
        target: asyncio.Queue[Event] = asyncio.Queue()
        streams = [Stream(number, target, make) for number, make in enumerate(jobs)]
        self.active.update(streams)
        self.metrics.active.set(len(self.active))
        for stream in streams:
            self.commands.put(lambda stream=stream: self.begin(stream))  # type: ignore[misc]
        return streams

    def retry_after(self) -> int:
        """Seconds until a place may be free: a guess from how fast answers end."""
        return max(1, min(60, round(self.metrics.seconds_per_answer() * len(self.active) / self.scheduler.most_jobs)))

    def cancel(self, stream: Stream) -> None:
        """The answer is not wanted any more."""
        if not stream.over:
            self.close(stream)
            self.metrics.cancelled.inc()
            self.commands.put(lambda: self.give_up(stream))

    async def events(self, streams: list[Stream], deadline: float) -> AsyncGenerator[list[Event]]:
        """What comes until all streams are over, as much at a time as there is; an `ApiError` 504 at `deadline` (loop time). Streams that
        are not over at the end are cancelled, however it comes."""
        target = streams[0].target
        late = ApiError(504, "the answer took too long and was stopped; ask for fewer tokens, or try when there is less to do",
                        code="timeout")
        timer = asyncio.get_running_loop().call_at(deadline, target.put_nowait, (0, late))
        try:
            while not all(stream.over for stream in streams) or not target.empty():
                batch = [await target.get()]
                while not target.empty():
                    batch.append(target.get_nowait())
                yield batch
        finally:
            timer.cancel()
            for stream in streams:
                self.cancel(stream)

    # In the engine's thread.

    def work(self) -> None:
        while True:
            try:
                while True:
                    command = self.commands.get(block=not self.scheduler.busy)
                    if command is None:
                        self.fail_all(ApiError(503, "the server is stopping", code="stopping"))
                        return
                    command()
            except queue.Empty:
                pass
            try:
                came = self.scheduler.step()
            except Exception as error:  # nothing of the scheduler's accounts is worth trusting then
                self.metrics.engine_failures.inc()
                self.renew()
                self.fail_all(ApiError(500, f"the engine failed ({type(error).__name__}: {error}); the next request starts afresh"))
                continue
            self.deliver([(self.streams[progress.job], progress) for progress in came if progress.job in self.streams])
            for progress in came:
                if progress.finish is not None:
                    self.streams.pop(progress.job, None)

    def begin(self, stream: Stream) -> None:
        if stream.over:
            return
        try:
            stream.job = stream.make(self.scheduler)
            self.streams[stream.job] = stream
        except UserError as error:
            self.deliver([(stream, ApiError(400, str(error)))])
        except Exception as error:
            self.deliver([(stream, ApiError(500, f"the job could not be begun ({type(error).__name__}: {error})"))])

    def give_up(self, stream: Stream) -> None:
        if stream.job is not None and self.streams.pop(stream.job, None) is not None:
            self.scheduler.cancel(stream.job)

    def renew(self) -> None:
        old = self.scheduler
        self.scheduler = Scheduler(old.engine, old.prefill_tokens, old.most_jobs, old.count_experts, old.speculator)
        self.scheduler.expert_counts, self.scheduler.tokens_read = old.expert_counts, old.tokens_read

    def fail_all(self, error: ApiError) -> None:
        self.deliver([(stream, error) for stream in self.streams.values()])
        self.streams.clear()

    def deliver(self, came: list[tuple[Stream, Progress | ApiError]]) -> None:
        if came and self.loop is not None:
            with contextlib.suppress(RuntimeError):                              # the loop has ended: nobody is there to hear
                self.loop.call_soon_threadsafe(self.receive, came)

    # In the event loop's.

    def receive(self, came: list[tuple[Stream, Progress | ApiError]]) -> None:
        now = time.perf_counter()
        for stream, event in came:
            if stream.over:
                continue
            stream.target.put_nowait((stream.number, event))
            if isinstance(event, ApiError) or event.finish is not None:
                self.close(stream)
            if isinstance(event, Progress) and event.token is not None:
                (self.metrics.between_tokens if stream.tokens else self.metrics.first_token).observe(now - stream.last)
                stream.tokens, stream.last = stream.tokens + 1, now

    def close(self, stream: Stream) -> None:
        stream.over = True
        self.active.discard(stream)
        self.metrics.active.set(len(self.active))
        self.metrics.ended(stream.tokens)
