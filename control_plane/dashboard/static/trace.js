// One trace as a waterfall: what called what, when, for how long, and what went wrong.

import { badge, h, s, section, table } from "./dom.js";
import { failure, findings } from "./explanation.js";
import { count, names, took } from "./format.js";
import { jaeger, startOf } from "./traces.js";

const WIDTH = 1000, LEAST = 6, DEEPEST = 12, CORRECTED = 0.001;

export const trace = {
  nav: "traces",
  title: (path) => `Trace ${(path[1] ?? "").slice(0, 16)}`,
  view: (path) => ["trace", { id: path[1] ?? "" }],
  render({ trace: found, explanation }) {
    const { summary } = found;
    return [
      h("p", { "data-key": "about" }, `${startOf(summary)}: ${took(summary.duration)}, ${count(summary.spans, "span")} of ${names(summary.services)}, ${count(summary.errors, "error")}.`,
        summary.link ? [" ", jaeger(summary.link, "Open in Jaeger")] : null),
      section("waterfall", "Waterfall", waterfall(found), notes(found)),
      explanation ? section("why", "Why its call failed", explanation.failures.map(failure), findings(explanation.findings)) : null,
    ];
  },
};

function waterfall(found) {
  const whole = Math.max(found.duration, 1e-9);
  const mixed = new Set(found.spans.map((each) => Boolean(each.workload_id))).size > 1;
  const rows = found.spans.map((span) => {
    const failed = span.status === "SPAN_STATUS_ERROR";
    return {
      key: span.span_id,
      style: failed ? "failed" : null,
      cells: [`${span.service}${mixed && !span.workload_id ? "?" : ""}`,
        h("div", { class: `span depth-${Math.min(span.depth, DEEPEST)}` }, span.name || "-", details(span, failed)),
        took(Math.max(span.offset, 0)), took(span.duration), bar(span, whole, failed)],
    };
  });
  return table(`Spans, in ${took(found.duration)} from left to right`, ["Service", "Span", ">Start", ">Took", "When"], rows);
}

function bar(span, whole, failed) {
  const x = Math.min(Math.max((span.offset / whole) * WIDTH, 0), WIDTH - LEAST);
  const width = Math.min(Math.max((span.duration / whole) * WIDTH, LEAST), WIDTH - x);
  const points = span.events.filter((event) => event.offset >= 0 && event.offset <= whole)
    .map((event) => s("circle", { cx: (event.offset / whole) * WIDTH, cy: 8, r: 5, class: "point" }));
  return s("svg", { class: "bar", viewBox: `0 0 ${WIDTH} 16`, preserveAspectRatio: "none", "aria-hidden": "true" },
    s("rect", { x: x.toFixed(1), y: 2, width: width.toFixed(1), height: 12, rx: 2, class: failed ? "bad" : "good" }), points);
}

function details(span, failed) {
  const told = [];
  if (failed) told.push(h("p", { class: "error" }, span.status_message || "failed"));
  if (span.orphan) told.push(h("p", { class: "warning" }, `its parent ${span.parent_span_id} is missing`));
  for (const event of span.events) told.push(h("p", { class: "event" }, `${event.name}${pairs(event.attributes)}`));
  const facts = [...Object.entries(span.attributes), ...Object.entries(span.resource), ["instance", span.instance]].filter(([, value]) => value);
  for (const each of span.links) facts.push(["linked to", `span ${each.span_id} of trace ${each.trace_id}`]);
  if (span.dropped) facts.push(["not kept", count(span.dropped, "detail")]);
  if (facts.length) {
    told.push(h("details", {}, h("summary", {}, "Attributes"),
      h("dl", {}, facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))))));
  }
  return told;
}

const pairs = (values) => Object.entries(values).map(([name, value]) => ` ${name}=${value}`).join("");

function notes({ spans, summary }) {
  const told = [];
  const corrected = new Map(spans.filter((each) => Math.abs(each.clock_correction ?? 0) >= CORRECTED)
    .map((each) => [`${each.service} ${each.workload_id || each.instance}`, each.clock_correction]));
  for (const [name, by] of corrected) {
    told.push(`The clock of ${name} is ${took(Math.abs(by))} ${by > 0 ? "behind" : "ahead"}; its spans are shown corrected.`);
  }
  if (new Set(spans.map((each) => Boolean(each.workload_id))).size > 1) {
    told.push("?: sent without an identity, so the service is what the sender says.");
  }
  if (summary.refused) told.push(`${count(summary.refused, "span")} of this trace not kept: too many, or too large.`);
  if (!summary.complete) told.push("The first span of the trace, the one without a parent, has not come.");
  return told.map((text) => h("p", { class: "note" }, badge("note", "poor"), " ", text));
}
