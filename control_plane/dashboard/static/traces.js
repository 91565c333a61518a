// The last traces, and which of them are wanted.

import { badge, h, link, table } from "./dom.js";
import { age, count, took } from "./format.js";

const MIB = 1024 * 1024;
const FIELDS = ["service", "method", "slow", "errors"];

export const traces = {
  nav: "traces",
  title: () => "Traces",
  view: (path, query) => ["traces", wanted(query)],
  render(answer, { query }) {
    return [form(query), list(answer, FIELDS.some((name) => query.get(name))), kept(answer)];
  },
  submit({ navigate }, asked) {
    const values = Object.fromEntries(new FormData(asked));
    navigate(`#/traces?${new URLSearchParams(Object.entries(values).filter(([, value]) => value))}`);
  },
};

const wanted = (query) => Object.fromEntries(FIELDS.filter((name) => query.get(name)).map((name) => [name, query.get(name)]));

function form(query) {
  const field = (name, label, attributes) => h("p", {}, h("label", { for: `f-${name}` }, label),
    h("input", { id: `f-${name}`, name, value: query.get(name), autocomplete: "off", ...attributes }));
  return h("form", { class: "filter", "data-key": "filter", role: "search", "aria-label": "Traces" },
    field("service", "Service", { maxlength: 63 }), field("method", "Method", { maxlength: 300 }),
    field("slow", "At least, ms", { inputmode: "numeric", pattern: "[0-9]{0,8}", size: 6 }),
    h("p", { class: "check" }, h("input", { id: "f-errors", name: "errors", type: "checkbox", value: "1", checked: query.get("errors") === "1" }),
      h("label", { for: "f-errors" }, "Only with errors")),
    h("p", {}, h("button", {}, "Show")));
}

function list({ traces: found, store }, filtered) {
  if (!found.length) {
    const text = store.traces ? (filtered ? "No trace that is kept is one of those." : "No trace is kept.")
      : "No traces have come yet. Services send them when they run with MESH_TRACING=1 and the tracing extra.";
    return h("p", { "data-key": "none" }, text);
  }
  const linked = found.some((each) => each.link);
  const rows = found.map((each) => ({
    key: each.trace_id,
    cells: [link(each.trace_id.slice(0, 16), "trace", each.trace_id), startOf(each), took(each.duration), each.service,
      each.complete ? each.name : `${each.name} (root missing)`, each.spans, each.errors ? badge(each.errors, "bad") : 0,
      each.services.join(", "), ...(linked ? [jaeger(each.link)] : [])],
  }));
  return table("The last traces, newest first", ["Trace", "Start", ">Took", "Service", "Entry", ">Spans", ">Errors", "Services", ...(linked ? ["Jaeger"] : [])], rows);
}

function kept({ store, jaeger_ui: ui }) {
  const held = `${count(store.traces, "trace")} with ${count(store.spans, "span")} kept, ${(store.bytes / MIB).toFixed(1)} of ${Math.round(store.max_bytes / MIB)} MiB, each for ${age(store.max_age)} at most.`;
  const refused = store.refused || store.refused_requests
    ? h("p", { class: "problem" }, `Refused since the start: ${count(store.refused, "span")}, ${count(store.refused_requests, "request")}; the control plane's log says whose and why.`) : null;
  return h("div", { "data-key": "kept" }, h("p", {}, held), refused, ui ? h("p", {}, "Jaeger: ", jaeger(ui, ui)) : null);
}

/** When a trace began, to the millisecond, UTC. */
export const startOf = (trace) => `${trace.start.replace(/\.\d+Z$|Z$/, "")}.${(/\.(\d{1,3})/.exec(trace.start)?.[1] ?? "0").padEnd(3, "0")}Z`;

/** A link to Jaeger; nothing but http and https is one. */
export const jaeger = (address, text = "open") =>
  (/^https?:\/\//.test(address) ? h("a", { href: address, rel: "noreferrer noopener", target: "_blank" }, text) : "-");
