// One service: where it runs, who calls it, whether its clients have what is current, and why calls to it fail.

import { badge, h, link, section, table } from "./dom.js";
import { failure, findings } from "./explanation.js";
import { FIGURES, age, count, ejected, figures, method, service as linked, subscriptionState, within, word } from "./format.js";

export const service = {
  nav: "topology",
  title: (path) => `Service ${path[1] ?? ""}`,
  view: (path) => ["service", { service: path[1] ?? "" }],
  render(state) {
    const { explanation } = state;
    return [
      about(state),
      section("findings", "What was found", findings(explanation.findings)),
      section("endpoints", "Endpoints", endpoints(state)),
      section("callers", `Callers, of the last ${within(state.traffic.window)}`, callers(state)),
      methods(state),
      callees(state),
      section("acknowledged", "Who has acknowledged what", acknowledged(state.subscriptions)),
      section("failures", "Failed calls of the last 10 minutes",
        explanation.failures.length ? explanation.failures.map(failure) : h("p", {}, "No failed calls were reported.")),
    ];
  },
};

function about({ service: name, status }) {
  if (!status) return h("p", { class: "problem", "data-key": "about" }, `No registry lists a service ${name}; somebody calls it.`);
  const policy = status.has_policy ? status.policy_version : `${status.policy_version || "-"} (defaults)`;
  return h("dl", { class: "facts", "data-key": "about" },
    fact("Known from", status.source || "-"), fact("Endpoints version", h("code", {}, status.endpoints_version || "-")),
    fact("Policy version", link(policy, "policy", "service", name)), fact("Subscribers", status.subscribers),
    fact("Traces", h("a", { href: `#/traces?service=${encodeURIComponent(name)}` }, "of this service")));
}

const fact = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));

function endpoints({ endpoints: listed, traffic }) {
  const load = new Map(traffic.endpoints.map((each) => [each.endpoint_id, each]));
  const ids = new Set(listed.endpoints.map((each) => each.endpoint.id));
  const rows = listed.endpoints.map((each) => {
    const { id, address, port, weight, locality, metadata } = each.endpoint;
    const calls = load.get(id);
    const where = [locality?.region, locality?.zone].filter(Boolean).join("/");
    const labels = Object.entries(metadata).map(([key, value]) => `${key}=${value}`);
    return {
      key: id,
      cells: [id, `${address.includes(":") ? `[${address}]` : address}:${port}`, health(each), ejection(calls),
        ...(calls ? figures(calls.attempts) : ["-", "-", "-", "-", "-"]), weight || 1, [where, ...labels].filter(Boolean).join(", ") || "-", age(each.age)],
    };
  });
  for (const gone of traffic.endpoints.filter((each) => !ids.has(each.endpoint_id))) {
    rows.push({ key: gone.endpoint_id, style: "gone", cells: [gone.endpoint_id, "-", badge("not registered", "poor"), ejection(gone), ...figures(gone.attempts), "-", "-", "-"] });
  }
  if (!rows.length) return h("p", {}, "It has no endpoints.");
  return table("Endpoints", ["Endpoint", "Address", "Health", "Ejected", ">Attempts/s", ...FIGURES.slice(1), ">Weight", "Labels", ">For"], rows);
}

function health(each) {
  const state = word(each.endpoint.health, "HEALTH_STATUS_");
  const styles = { healthy: "good", unspecified: "good", unhealthy: "bad", draining: "poor" };
  return [badge(state === "unspecified" ? "healthy" : state, styles[state] ?? "none"),
    each.held ? [" ", badge("held", "poor")] : null, each.drained_by ? ` by ${each.drained_by}` : null];
}

const ejection = (load) => (load?.ejected_by ? badge(`by ${count(load.ejected_by, "process")}`, "poor") : "-");

function callers({ service: name, traffic }) {
  const rows = traffic.edges.filter((edge) => edge.service === name).map((edge) => ({
    key: edge.caller,
    cells: [linked(edge.caller), ...figures(edge.calls), edge.retries || "-", edge.in_flight || "-", breaker(edge), ejected(edge)],
  }));
  if (!rows.length) return h("p", {}, "Nobody has called it within the last 10 minutes.");
  return table("Callers", ["Caller", ...FIGURES, ">Retries", ">In flight", "Breaker", "Ejected"], rows);
}

const breaker = (edge) => (edge.received ? badge("as received", "plain") : edge.breakers_open ? badge(`open in ${edge.breakers_open} of ${edge.processes}`, "bad") : badge("closed", "plain"));

function methods({ traffic }) {
  if (!traffic.methods.length) return null;
  const rows = traffic.methods.map((each) => ({ key: each.method, cells: [method(each.method), ...figures(each.calls), each.retries || "-"] }));
  return section("methods", "Methods", table("Methods", ["Method", ...FIGURES, ">Retries"], rows));
}

function callees({ service: name, traffic }) {
  const rows = traffic.edges.filter((edge) => edge.caller === name).map((edge) => ({
    key: edge.service, cells: [linked(edge.service), ...figures(edge.calls), edge.retries || "-", breaker(edge), ejected(edge)],
  }));
  return rows.length ? section("callees", "What it calls", table("What it calls", ["Service", ...FIGURES, ">Retries", "Breaker", "Ejected"], rows)) : null;
}

/** Subscriptions, those that lag first. */
export function acknowledged(subscriptions) {
  const { all, current, rows } = subscriptions;
  if (!all) return h("p", { "data-key": "acknowledged" }, "No clients follow it.");
  const told = `${current} of ${all} have acknowledged what is current${rows.length < all ? `; ${rows.length} are shown` : ""}.`;
  return [h("p", { "data-key": "acknowledged" }, told),
    table("Who has acknowledged what", ["Client", "Of", "What", "Acknowledged", "Current", ">Ago", "State"], rows.map((each) => ({
      key: `${each.node_id} ${each.peer} ${each.type}`,
      cells: [each.node_id || each.peer, linked(each.client), each.type.endsWith("POLICY") ? "policy" : "endpoints", h("code", {}, each.acknowledged_version || "-"),
        h("code", {}, each.current_version || "-"), age(each.acknowledged_ago), [subscriptionState(each), each.rejection ? h("p", {}, each.rejection) : null]],
    })))];
}
