"""What the commands show a person: progress, tables and one batch in full.

Nothing here talks to a server except `watch`, which asks again and again until a batch has
ended. Text from outside is cleaned of control characters before it reaches the terminal.
"""

import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from itertools import pairwise
from math import ceil
from types import TracebackType
from typing import Any, Protocol, Self

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from penstock.client import (
    BatchObject,
    Client,
    CostObject,
    NoServer,
    ServerFailed,
    UpstreamState,
)
from penstock.model import FINAL

_FIRST_POLL_S = 0.1
_LAST_POLL_S = 2.0
_LINE_EVERY_S = 10.0
"""How often a line is printed at least where there is no terminal."""
_PATIENCE_S = 300.0
"""How long a server that answered once may be away while it is watched."""
_SHOWN_FAULTS = 10
_SHOWN_REASONS = 3
_REASON_CHARACTERS = 600
"""How much is shown of a reason: all that we say of a provider's batch."""
_MOST_REASONS = 10_000
"""With more, each line has its own, and none says much."""


class Tally(Protocol):
    """How the lines of a batch stand."""

    @property
    def total(self) -> int: ...
    @property
    def completed(self) -> int: ...
    @property
    def failed(self) -> int: ...


class Progressing(Protocol):
    """A batch as far as its progress goes: one of a server, or of `penstock run`."""

    @property
    def id(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def request_counts(self) -> Tally: ...


# Text


def clean(text: str) -> str:
    """`text` without characters that could steer a terminal."""
    return "".join(char if char.isprintable() else "�" for char in text)


def span(seconds: float) -> str:
    """A length of time in its two largest units, such as `3m 20s`."""
    whole = max(0, int(seconds))
    units = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
    for (name, size), (smaller, smaller_size) in pairwise(units):
        if whole >= size:
            rest = whole % size // smaller_size
            return (
                f"{whole // size}{name} {rest}{smaller}" if rest else f"{whole // size}{name}"
            )
    return f"{whole}s"


def moment(timestamp: float) -> str:
    """A Unix timestamp as local date and time."""
    return datetime.fromtimestamp(timestamp).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def is_final(batch: BatchObject) -> bool:
    """Whether nothing more will happen to the batch."""
    return batch.status in FINAL


def succeeded(batch: BatchObject) -> bool:
    """Whether the batch has run to its end and no line failed."""
    return batch.status == "completed" and batch.request_counts.failed == 0


def summary(batch: BatchObject) -> str:
    """How a batch ended, in one sentence."""
    counts = batch.request_counts
    took = "" if batch.ended_at is None else f" in {span(batch.ended_at - batch.created_at)}"
    if batch.status == "failed":
        faults = len(batch.errors.data) if batch.errors else 0
        return (
            f"Batch {batch.id} failed: its input file has faults ({faults} are told by "
            f"`penstock status {batch.id}`), and nothing was sent."
        )
    return (
        f"Batch {batch.id} {batch.status}{took}: {counts.completed:,} of {counts.total:,} "
        f"lines succeeded, {counts.failed:,} failed."
    )


class _Line(msgspec.Struct):
    """A line of an error file."""

    response: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


def failure_reasons(lines: Iterable[bytes]) -> list[str]:
    """Why lines failed, each reason once and with how many lines have it: the most frequent
    ones of an error file, in its words.

    Args:
        lines: Those of the error file. What is none is left aside.
    """
    seen: Counter[str] = Counter()
    for text in lines:
        with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            seen[_reason(msgspec.json.decode(text, type=_Line))] += 1
        if len(seen) > _MOST_REASONS:
            return []
    shown = [f"{count:,} × {reason}" for reason, count in seen.most_common(_SHOWN_REASONS)]
    more = len(seen) - len(shown)
    return [*shown, f"and {more:,} other reasons"] if more else shown


def _reason(line: _Line) -> str:
    error: Any = line.error
    code = error.get("code") if error else "unknown"
    if line.response is not None:
        code = f"HTTP {line.response.get('status_code')}"
        body = line.response.get("body")
        error = body.get("error", body) if isinstance(body, dict) else body  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    message: Any = error.get("message") if isinstance(error, dict) else error  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    told = clean(f"{code}: {message}")
    return told if len(told) <= _REASON_CHARACTERS else f"{told[:_REASON_CHARACTERS]}…"


# Watching


@dataclass(slots=True)
class Pace:
    """How fast a count grows, over the last half minute."""

    window_s: float = 30.0
    _samples: deque[tuple[float, int]] = field(default_factory=deque[tuple[float, int]])

    def add(self, now: float, done: int) -> None:
        """Note that `done` have been done at `now`, in seconds of any one clock."""
        self._samples.append((now, done))
        while len(self._samples) > 2 and self._samples[0][0] < now - self.window_s:
            self._samples.popleft()

    @property
    def per_second(self) -> float | None:
        """How many a second; None while too little is known."""
        if len(self._samples) < 2:
            return None
        (start, first), (end, last) = self._samples[0], self._samples[-1]
        return (last - first) / (end - start) if end > start else None

    def seconds_left(self, left: int) -> float | None:
        """How long `left` more will take; None if nothing moves or too little is known."""
        rate = self.per_second
        return left / rate if rate else None


def watch(client: Client, batch_id: str, console: Console) -> BatchObject:
    """Show how a batch gets on until it is final, and return it as it ended.

    A server that goes away is waited for, as it takes the batch up again when it is back.

    Raises:
        NoServer: The server does not answer at the first time, or for five minutes.
    """
    pace = Pace()
    delay, status, answered_at = _FIRST_POLL_S, "", None
    with display(console) as shown:
        while True:
            now = time.monotonic()
            try:
                batch = client.get_batch(batch_id)
            except (NoServer, ServerFailed) as error:
                if answered_at is None or now - answered_at > _PATIENCE_S:
                    raise
                shown.note(f"{error} Trying again.")
            else:
                answered_at = now
                if batch.status != status:
                    status, delay = batch.status, _FIRST_POLL_S
                if status == "in_progress":
                    pace.add(now, batch.request_counts.completed + batch.request_counts.failed)
                shown.show(batch, pace, now)
                if is_final(batch):
                    return batch
            time.sleep(delay)
            delay = min(_LAST_POLL_S, delay * 1.5)


def display(console: Console) -> "_Bar | _Lines":
    """Where a batch's progress is shown: a bar on a terminal, a line now and then elsewhere."""
    return _Bar(console) if console.is_interactive else _Lines(console)


def _figures(batch: Progressing, pace: Pace) -> list[str]:
    counts = batch.request_counts
    figures = [f"{counts.failed:,} failed"]
    if batch.status == "in_progress" and (rate := pace.per_second) is not None:
        figures.append(f"{rate:,.0f} lines/s" if rate >= 10 else f"{rate:.1f} lines/s")
        left = pace.seconds_left(counts.total - counts.completed - counts.failed)
        if left is not None:
            figures.append(f"{span(ceil(left))} left")
    return figures


class _Lines:
    """A plain line at the start, at each change of status and every ten seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = ""
        self._printed_at = float("-inf")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass

    def show(self, batch: Progressing, pace: Pace, now: float) -> None:
        if batch.status == self._status and now - self._printed_at < _LINE_EVERY_S:
            return
        self._status, self._printed_at = batch.status, now
        counts = batch.request_counts
        done = f"{counts.completed + counts.failed:,} of {counts.total:,} lines ended"
        self._print(f"{batch.id} {batch.status}: {', '.join([done, *_figures(batch, pace)])}")

    def note(self, text: str) -> None:
        now = time.monotonic()
        if now - self._printed_at >= _LINE_EVERY_S or self._status:
            self._status, self._printed_at = "", now
            self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(Text(clean(text)), soft_wrap=True)


class _Bar:
    """A bar that is redrawn in place and gone at the end."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[done]}", markup=False),
            TextColumn("{task.fields[figures]}", markup=False),
            console=console,
            transient=True,
            expand=True,
        )
        self._task: TaskID = self._progress.add_task("", total=None, done="", figures="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def show(self, batch: Progressing, pace: Pace, now: float) -> None:
        counts = batch.request_counts
        done = counts.completed + counts.failed
        self._progress.update(
            self._task,
            description=clean(batch.status),
            total=counts.total or None,
            completed=done,
            done=f"{done:,}/{counts.total:,}",
            figures=" · ".join(_figures(batch, pace)),
        )

    def note(self, text: str) -> None:
        self._progress.update(self._task, figures=clean(text))


def transfer_bar(console: Console, what: str, total: int | None) -> tuple[Progress, TaskID]:
    """A bar for bytes that go up or come down; to be entered, and shown on a terminal only."""
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f} %"),
        console=console,
        transient=True,
        expand=True,
        disable=not console.is_interactive,
    )
    return progress, progress.add_task(clean(what), total=total)


# Tables


def table(*columns: str) -> Table:
    """A table without lines; its first column is never shortened."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        made.add_column(column, no_wrap=index == 0, overflow="fold")
    return made


def add_row(to: Table, *cells: str, style: str | None = None) -> None:
    """Add a row of cells as they are, without markup."""
    to.add_row(*(Text(clean(cell)) for cell in cells), style=style)


def batches_table(batches: Iterable[BatchObject], *, now: float) -> Table:
    """Batches as a table, one a row."""
    made = table("ID", "STATUS", "JOB NAME", "DONE/FAILED/TOTAL", "AGE")
    for batch in batches:
        counts = batch.request_counts
        add_row(
            made,
            batch.id,
            batch.status,
            batch.job_name or "",
            f"{counts.completed}/{counts.failed}/{counts.total}",
            span(now - batch.created_at),
            style="red" if batch.status == "failed" or counts.failed else None,
        )
    return made


_AT_PROVIDER = {
    "waiting": "to be submitted",
    "submitting": "being submitted",
    "submitted": "at work there",
    "collecting": "being collected",
}
"""Where lines of a provider's batch stand, for a person."""
_REASONS = {
    "slow_start": "more follow while that brings more work done",
    "refusals": "it has refused requests or timed out",
    "engine_queue": "requests wait in the engine's queue",
    "latency": "more at a time would only take longer",
    "max_concurrency": "as many as max_concurrency allows",
    "share": "other workers have the rest of max_concurrency",
    "no_lease": "which part of it is this worker's is not known, for want of the database",
    "circuit_open": "it is down for some model, whose lines wait",
    "retry_after": "it asked to be left alone for a while",
    "rate_limit": "requests_per_minute or tokens_per_minute is reached",
}


def batch_view(
    batch: BatchObject,
    *,
    now: float,
    upstreams: Sequence[UpstreamState] = (),
    costs: Sequence[CostObject] = (),
    reasons: Sequence[str] = (),
) -> Table:
    """All that is worth knowing of one batch, of where its lines go while it runs, and why
    lines failed."""
    view = Table.grid(padding=(0, 2))
    view.add_column(no_wrap=True, style="bold")
    view.add_column(overflow="fold")

    def row(label: str, value: str | None) -> None:
        if value:
            view.add_row(label, Text(clean(value)))

    counts = batch.request_counts
    done = counts.completed + counts.failed
    percent = f" ({100 * done // counts.total} %)" if counts.total else ""
    row("Batch", batch.id)
    row("Status", f"{batch.status}{percent}")
    row("Job name", batch.job_name)
    row(
        "Lines",
        f"{counts.completed:,} completed, {counts.failed:,} failed, {counts.total:,} in all",
    )
    row("Endpoint", batch.endpoint)
    row("Model", batch.model)
    row("Created", f"{moment(batch.created_at)} ({span(now - batch.created_at)} ago)")
    row("Elapsed", span((batch.ended_at or now) - batch.created_at))
    row("Expires", _expiry(batch, now))
    row("Tokens", _tokens(batch))
    for label, text in _costs(costs):
        row(label, text)
    row("Input file", batch.input_file_id)
    row("Output file", batch.output_file_id)
    row("Error file", batch.error_file_id)
    metadata = batch.metadata or {}
    row("Metadata", ", ".join(f"{name}={value}" for name, value in metadata.items()))
    for label, text in _faults(batch):
        row(label, text)
    for index, reason in enumerate(reasons):
        row("Why lines failed" if index == 0 else "", reason)
    for state in upstreams:
        row(f"Upstream {clean(state.name)}", _upstream(state))
    return view


def _upstream(state: UpstreamState) -> str:
    """How many lines are in flight to an upstream, and what keeps more from being so."""
    if state.batches and not state.in_flight:
        return _batches(state)
    reasons = "; ".join(_REASONS.get(reason, reason) for reason in state.reasons)
    told = f"{state.in_flight:,} lines in flight, {state.limit:,} allowed now"
    if state.limit < state.most:
        told += f", {state.most:,} at most"
    return f"{told}: {reasons}" if reasons else told


def _batches(state: UpstreamState) -> str:
    """How many lines stand where at the upstream's own batch API."""
    told = (
        f"{count:,} lines {_AT_PROVIDER.get(status, status)}"
        for status, count in sorted(state.batches.items())
    )
    return f"its batch API: {', '.join(told)}"


def _expiry(batch: BatchObject, now: float) -> str | None:
    if batch.expires_at is None or is_final(batch):
        return None
    left = span(batch.expires_at - now)
    return f"{moment(batch.expires_at)} (in {left}; window {batch.completion_window})"


def _tokens(batch: BatchObject) -> str | None:
    usage = batch.usage
    if usage is None or not usage.total_tokens:
        return None
    cached = usage.input_tokens_details.cached_tokens
    reasoning = usage.output_tokens_details.reasoning_tokens
    return (
        f"{usage.input_tokens:,} in ({cached:,} cached), "
        f"{usage.output_tokens:,} out ({reasoning:,} reasoning), {usage.total_tokens:,} in all"
    )


def tokens(count: int) -> str:
    """A number of tokens, short: `950`, `12.3 k` or `2.1 M`."""
    if count < 10_000:
        return f"{count:,} tokens"
    return f"{count / 1e6:,.1f} M tokens" if count >= 1e6 else f"{count / 1e3:.1f} k tokens"


def dollars(amount: Decimal, *beside: Decimal | None) -> str:
    """An amount in cents; less than ten of them with two digits that count.

    Args:
        beside: What it is compared with: all have as many digits as the smallest needs.
    """
    digits = [1 - each.adjusted() for each in (amount, *beside) if each]
    return f"{amount:,.{max([2, *digits])}f}"


def _costs(costs: Sequence[CostObject]) -> Iterable[tuple[str, str]]:
    """What jobs at providers cost, and lines one by one where that is known, or beside those.
    With a server of one's own, prices are of no concern."""
    has_jobs = any(cost.mode == "native" for cost in costs)
    for cost in costs:
        if has_jobs or cost.cost is not None:
            label = f"At {cost.upstream}" if cost.mode == "native" else "Line by line"
            yield clean(label), _cost(cost)


def _cost(cost: CostObject) -> str:
    lines = f"{cost.requests:,} lines"
    is_running = cost.status == "running"
    if is_running and cost.mode == "native":
        return f"{lines}, not ended yet"
    if cost.usage is None:
        return f"{lines}; what they took is not known"
    of_model = f" of {cost.model}" if cost.model else ""
    so_far = " so far" if is_running else ""
    told = f"{lines}{of_model}{so_far}, {tokens(cost.usage.total_tokens)}, {_price(cost)}"
    beside = [f"by {cost.source}"] if cost.source else []
    if cost.mode == "native" and cost.line_cost is not None:
        beside.insert(0, f"line by line: {dollars(cost.line_cost, cost.cost)}")
    return told + (f" ({'; '.join(beside)})" if beside else "")


def _price(cost: CostObject) -> str:
    if cost.cost is None:
        why = _why_unknown(cost)
        return f"price unknown: {why}" if why else "price unknown"
    least = "at least " if cost.at_least else ""
    return f"{least}US$ {dollars(cost.cost, cost.line_cost)}"


def _why_unknown(cost: CostObject) -> str | None:
    """Why a price is not known; None if that is not known either."""
    if cost.line_cost is not None:
        return "no discount of batches known"
    if cost.usage and not cost.usage.total_tokens:
        return "answers told of no tokens"
    if cost.model is None:
        return "lines of several models"
    return "no price of this model" if cost.upstream else None


def _faults(batch: BatchObject) -> Iterable[tuple[str, str]]:
    faults = batch.errors.data if batch.errors else []
    for index, fault in enumerate(faults[:_SHOWN_FAULTS]):
        place = "" if fault.line is None else f"line {fault.line}: "
        param = f" ({fault.param})" if fault.param else ""
        code = f"{fault.code}{param}: " if fault.code else ""
        yield "Faults" if index == 0 else "", f"{place}{code}{fault.message}"
    if len(faults) > _SHOWN_FAULTS:
        yield "", f"and {len(faults) - _SHOWN_FAULTS:,} more; --json shows them."
