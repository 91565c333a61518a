"""A trace as a waterfall on a terminal: what called what, when, for how long, and what went wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mesh.v1 import trace_pb2 as pb
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mesh_cli.output import count, printable, seconds

_BARS, _LEAST_BARS = 48, 16
"""Columns of the bars where there is room, and where there is little: then names go without their packages."""
_LINES = {"utf": ("│ ", "├ ", "└ ", "█", "◆"), "ascii": ("| ", "|-", "`-", "=", "*")}
_TIMES = 25
"""Columns of the two times, and of what is between columns."""
_CORRECTED = 0.001
"""Seconds of a clock's correction that are worth a line."""


def took(span: float) -> str:
    """A duration of about three digits: ``0.05ms``, ``1.25ms``, ``23.1ms``, ``231ms``, ``1.25s``, ``90.0s``."""
    number, unit = (span * 1000, "ms") if span < 1.0 else (span, "s")
    return f"{number:.{2 if number < 10 else 1 if number < 100 else 0}f}{unit}"


def render_waterfall(trace: pb.GetTraceResponse, width: int, *, attributes: bool, ascii_only: bool) -> RenderableType:
    """The rows of a trace, each span with a bar, and below it its failure and its events.

    Args:
        trace: as the control plane answered.
        width: columns that there are.
        attributes: show those of spans, processes and events too.
        ascii_only: draw without what ASCII has not.
    """
    return Group(*_Waterfall(trace, width, attributes=attributes, ascii_only=ascii_only).parts())


class _Waterfall:
    def __init__(self, trace: pb.GetTraceResponse, width: int, *, attributes: bool, ascii_only: bool) -> None:
        self._trace = trace
        self._attributes = attributes
        self._through, self._branch, self._corner, self._block, self._point = _LINES["ascii" if ascii_only else "utf"]
        self._whole = max(seconds(trace.duration), 1e-9)
        self._guides = _guides([span.depth for span in trace.spans])
        names = [2 * len(own) + len(printable(span.name)) for span, (own, _) in self._rows()]
        others = max((len(span.service) for span in trace.spans), default=0) + _TIMES
        room = width - others - max(names, default=0)
        self._bars = max(min(_BARS, room), _LEAST_BARS)
        self._short = room < _LEAST_BARS
        self._mixed = len({bool(span.workload_id) for span in trace.spans}) > 1

    def parts(self) -> Iterator[RenderableType]:
        yield self._table()
        notes = list(self._notes())
        if notes:
            yield Text()
            yield from notes

    def _table(self) -> Table:
        shown = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold", show_edge=False)
        shown.add_column("SERVICE", overflow="fold")
        shown.add_column("SPAN", overflow="fold")
        shown.add_column("START", justify="right", no_wrap=True, overflow="crop")
        shown.add_column("TOOK", justify="right", no_wrap=True, overflow="crop")
        end = took(seconds(self._trace.duration))
        scale = f"0{end:>{self._bars - 1}}"
        shown.add_column(scale, no_wrap=True, overflow="crop", min_width=self._bars, max_width=self._bars)
        for span, (own, below) in self._rows():
            failed = span.status == pb.SPAN_STATUS_ERROR
            style = "red" if failed else ""
            name = Text(self._draw(own), style="dim")
            name.append(self._name(span) or "-", style=f"not dim {style}")
            claimed = "?" if self._mixed and not span.workload_id else ""
            shown.add_row(
                Text(printable(span.service) + claimed),
                name,
                Text(took(max(seconds(span.offset), 0.0))),
                Text(took(seconds(span.duration))),
                self._bar(seconds(span.offset), seconds(span.duration), "red" if failed else "green"),
            )
            for text, mark in self._details(span, failed):
                line = Text(self._draw(below), style="dim")
                line.append_text(text)
                shown.add_row(Text(), line, Text(), Text(), mark)
        return shown

    def _rows(self) -> Iterator[tuple[pb.TraceSpan, tuple[list[str], list[str]]]]:
        return zip(self._trace.spans, self._guides, strict=True)

    def _name(self, span: pb.TraceSpan) -> str:
        package, slash, method = span.name.rpartition("/")
        return printable(f"{package.rpartition('.')[2]}{slash}{method}" if self._short else span.name)

    def _details(self, span: pb.TraceSpan, failed: bool) -> Iterator[tuple[Text, Text]]:
        if failed:
            yield Text(f"! {printable(span.status_message) or 'failed'}", style="not dim red"), Text()
        if span.orphan:
            yield Text(f"! its parent {span.parent_span_id} is missing", style="not dim yellow"), Text()
        for event in span.events:
            what = f"{self._point} {printable(event.name)}{_pairs(event.attributes, ' ')}"
            yield Text(what, style="not dim cyan"), self._bar(seconds(event.offset), None, "cyan")
        if self._attributes:
            for values in (span.attributes, span.resource):
                for key, value in sorted(values.items()):
                    yield Text(printable(f"{key}={value}"), style="not dim"), Text()
            for link in span.links:
                yield Text(f"linked to span {link.span_id} of trace {link.trace_id}", style="not dim"), Text()
            if span.dropped:
                yield Text(f"{count(span.dropped, 'detail')} not kept", style="not dim yellow"), Text()

    def _draw(self, guides: Sequence[str]) -> str:
        signs = {"through": self._through, "branch": self._branch, "corner": self._corner, "": "  "}
        return "".join(signs[guide] for guide in guides)

    def _bar(self, offset: float, duration: float | None, style: str) -> Text:
        """Of at least one column; an event, which has no duration, is a point, and is not there if it is outside."""
        last = self._bars - 1
        first = round(offset / self._whole * last)
        if duration is None:
            return Text(" " * first + self._point, style=style) if 0 <= first <= last else Text()
        length = max(round(duration / self._whole * self._bars), 1)
        first = min(max(first, 0), last)
        return Text(" " * first + self._block * min(length, self._bars - first), style=style)

    def _notes(self) -> Iterator[RenderableType]:
        corrected: dict[tuple[str, str], float] = {}
        for span in self._trace.spans:
            by = seconds(span.clock_correction)
            if abs(by) >= _CORRECTED:
                corrected[span.service, span.workload_id or span.instance] = by
        for (service, process), by in corrected.items():
            off = f"{took(abs(by))} {'behind' if by > 0 else 'ahead'}"
            name = f"{service} {process}".strip()
            yield Text(printable(f"The clock of {name} is {off}; its spans are shown corrected."), style="yellow")
        if self._mixed:
            yield Text("?: sent without an identity, so the service is what the sender says.", style="yellow")
        if self._trace.summary.refused:
            yield Text(
                f"{count(self._trace.summary.refused, 'span')} of this trace {_were(self._trace.summary.refused)} not "
                "kept: they were too many or too large.",
                style="yellow",
            )
        if not self._trace.summary.complete:
            yield Text("The first span of the trace, the one without a parent, has not come.", style="yellow")


def _were(number: int) -> str:
    return "was" if number == 1 else "were"


def _pairs(values: Mapping[str, str], before: str) -> str:
    return "".join(f"{before}{printable(key)}={printable(value)}" for key, value in sorted(values.items()))


def _guides(depths: Sequence[int]) -> list[tuple[list[str], list[str]]]:
    """What is drawn before each span's name, and before the lines below it, from the depths of the rows in order."""
    drawn: list[tuple[list[str], list[str]]] = []
    follows: set[int] = set()
    """Depths at which a sibling follows; the rows are gone through from the end."""
    below_is = 0
    for depth in reversed(depths):
        above = ["through" if level in follows else "" for level in range(1, depth)]
        own = [*above, "branch" if depth in follows else "corner"] if depth else []
        siblings = [*above, "through" if depth in follows else ""] if depth else []
        drawn.append((own, [*siblings, "through" if below_is > depth else ""]))
        follows = {level for level in follows if level < depth} | {depth}
        below_is = depth
    return drawn[::-1]
