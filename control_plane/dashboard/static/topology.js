// Who calls whom, as a picture and as the same in a table; what the control plane reads; what is wrong.

import { badge, h, link, printable, s, section, table } from "./dom.js";
import { FIGURES, age, count, figures, grade, names, percent, rate, service, took, trouble, within } from "./format.js";

const NOBODY = "-";
const WIDE = { width: 160, height: 52, along: 290, across: 84 };
const NARROW = { width: 104, height: 52, along: 132, across: 112 };

export const topology = {
  nav: "topology",
  title: () => "Topology",
  view: () => ["topology", {}],
  render(state, context) {
    const { status, traffic } = state;
    return [
      problems(status),
      section("calls", `Calls of the last ${within(traffic.window)}`, calls(state, context)),
      section("services", "Services", services(status)),
      status.edges.length ? section("edges", "Edges", edges(status)) : null,
      section("plane", "Control plane", plane(state)),
    ];
  },
};

/** What is wrong with the mesh as a whole, in words. */
function problems(status) {
  const told = [];
  for (const source of status.sources.filter((each) => !each.connected)) {
    told.push([`source-${source.name}`, `Source lost: ${source.name} for ${age(source.since)}: ${source.detail || "no detail"}; what it said last stays published.`]);
  }
  const hold = status.removal_hold;
  if (hold) {
    told.push(["hold", `Held removals: the source has not listed ${count(hold.endpoints, "endpoint")} of ${names(hold.services)} for ${age(hold.since)}. So many vanishing at once looks like a fault of the registry, so they stay published; they are removed in ${age(hold.remaining)}. If they are really gone, run \`mesh removals confirm\`. If not, repair the registry.`]);
  }
  for (const problem of status.policy_problems) {
    const errors = problem.errors.map((error) => (error.path ? `${error.path}: ${error.message}` : error.message)).join("; ");
    told.push([`policy-${problem.kind}-${problem.service}`, `Invalid policy: the one stored for ${problem.service} is not obeyed; ${problem.obeyed_version ? `version ${problem.obeyed_version}` : "the defaults"} holds. ${errors}`]);
  }
  return told.map(([key, text]) => h("p", { class: "problem", "data-key": `problem-${key}` }, text));
}

function calls({ status, traffic, layers }, { narrow }) {
  const told = h("p", { "data-key": "told" }, `${count(traffic.reporting, "process")} report${traffic.reporting === 1 ? "s" : ""}.`);
  if (!layers.length) return [told, h("p", {}, "No services are known: none is registered yet.")];
  const shown = [told, picture(status, traffic.edges, layers, narrow)];
  if (!traffic.edges.length) return [...shown, h("p", {}, "Nobody has called anybody within the last 10 minutes.")];
  const rows = traffic.edges.map((edge) => ({
    key: `${edge.caller} ${edge.service}`,
    cells: [service(edge.caller), service(edge.service), ...figures(edge.calls), edge.retries || "-", edge.in_flight || "-", trouble(edge)],
  }));
  return [...shown, table("Who calls whom", ["Caller", "Service", ...FIGURES, ">Retries", ">In flight", "State"], rows)];
}

/** Layers from left to right, or from top to bottom where there is little room. */
function picture(status, edges, layers, narrow) {
  const size = narrow ? NARROW : WIDE;
  const most = Math.max(...layers.map((layer) => layer.length));
  const places = new Map();
  layers.forEach((layer, depth) => {
    layer.forEach((name, index) => {
      const across = (index + (most - layer.length) / 2) * size.across;
      places.set(name, narrow
        ? { x: 4 + across, y: 4 + depth * size.along }
        : { x: 4 + depth * size.along, y: 4 + across });
    });
  });
  const width = narrow ? (most - 1) * size.across + size.width + 8 : (layers.length - 1) * size.along + size.width + 8;
  const height = narrow ? (layers.length - 1) * size.along + size.height + 8 : (most - 1) * size.across + size.height + 8;
  const known = new Map(status.services.map((each) => [each.service, each]));
  const drawn = edges.filter((edge) => (edge.caller || NOBODY) !== edge.service);
  return h("div", { class: "picture", "data-key": "picture" },
    s("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": "Who calls whom; the table below says the same" },
      s("defs", {}, s("marker", { id: "arrow", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, markerUnits: "userSpaceOnUse", orient: "auto" },
        s("path", { d: "M0 0 8 4 0 8z", class: "tip" }))),
      drawn.map((edge) => line(edge, places, size, narrow)),
      [...places].map(([name, place]) => node(name, known.get(name), place, size)),
      drawn.map((edge) => label(edge, places, size, narrow))));
}

const from = ({ x, y }, size, narrow) => (narrow ? { x: x + size.width / 2, y: y + size.height } : { x: x + size.width, y: y + size.height / 2 });
const to = ({ x, y }, size, narrow) => (narrow ? { x: x + size.width / 2, y: y - 1 } : { x: x - 1, y: y + size.height / 2 });

function line(edge, places, size, narrow) {
  const a = from(places.get(edge.caller || NOBODY), size, narrow), b = to(places.get(edge.service), size, narrow);
  const bend = Math.max(36, (narrow ? Math.abs(b.y - a.y) : Math.abs(b.x - a.x)) / 2);
  const d = narrow
    ? `M${a.x} ${a.y}C${a.x} ${a.y + bend} ${b.x} ${b.y - bend} ${b.x} ${b.y}`
    : `M${a.x} ${a.y}C${a.x + bend} ${a.y} ${b.x - bend} ${b.y} ${b.x} ${b.y}`;
  const width = edge.calls.count ? Math.min(1.5 + Math.log10(1 + edge.calls.rate), 5) : 1;
  return s("path", { d, class: `line ${grade(edge.calls)}`, "stroke-width": width.toFixed(1), "marker-end": "url(#arrow)", "data-key": `line ${edge.caller} ${edge.service}` });
}

function label(edge, places, size, narrow) {
  const a = from(places.get(edge.caller || NOBODY), size, narrow), b = to(places.get(edge.service), size, narrow);
  // Nearer to who is called: lines that come from one caller have parted there.
  const share = narrow ? { x: 0.85, y: 0.6 } : { x: 0.55, y: 0.6 };
  const x = a.x + (b.x - a.x) * share.x, y = a.y + (b.y - a.y) * share.y;
  const p95 = edge.calls.p95 === null ? "" : took(edge.calls.p95);
  const state = edge.breakers_open ? "breaker open" : edge.ejected.length ? `${edge.ejected.length} ejected` : edge.received ? "as received" : "";
  const texts = [`${rate(edge.calls.rate)}/s ${percent(edge.calls)}`, p95, state].filter(Boolean);
  return s("text", { class: `label ${grade(edge.calls)}`, x, y: y - (texts.length - 1) * 6, "data-key": `label ${edge.caller} ${edge.service}`, "aria-hidden": "true" },
    texts.map((text, index) => s("tspan", { x, dy: index ? 12 : 3 }, text)));
}

function node(name, known, { x, y }, size) {
  const most = Math.floor(size.width / 8.2);
  const short = name.length > most ? `${name.slice(0, most - 1)}...` : name;
  const state = known ? health(known) : "calls only";
  const style = known ? (known.healthy ? (known.unhealthy ? "poor" : "good") : "bad") : "none";
  const inside = [
    s("title", {}, `${name}: ${state}`),
    s("rect", { x, y, width: size.width, height: size.height, rx: 8 }),
    s("text", { x: x + size.width / 2, y: y + 22, class: "name" }, short),
    s("text", { x: x + size.width / 2, y: y + 40, class: "state" }, state),
  ];
  const key = `node ${name}`;
  return known || name !== NOBODY
    ? s("a", { href: `#/service/${encodeURIComponent(name)}`, class: `node ${style}`, "data-key": key, "aria-label": `${printable(name)}: ${state}` }, inside)
    : s("g", { class: `node ${style}`, "data-key": key }, inside);
}

function health(known) {
  const told = [known.unhealthy ? `${known.unhealthy} unhealthy` : "", known.draining ? `${known.draining} leaving` : ""];
  return [`${known.healthy} healthy`, ...told.filter(Boolean)].join(", ");
}

function services(status) {
  if (!status.services.length) return h("p", {}, "No services are known: none is registered yet.");
  const rows = status.services.map((each) => ({
    key: each.service,
    cells: [service(each.service), each.source || "-", each.healthy ? each.healthy : badge("0", "bad"), each.unhealthy ? badge(each.unhealthy, "bad") : 0,
      each.draining, each.subscribers, h("code", {}, each.endpoints_version || "-"),
      link(each.policy_version ? `${each.policy_version}${each.has_policy ? "" : " (defaults)"}` : "-", "policy", "service", each.service)],
  }));
  return table("Services", ["Service", "Source", ">Healthy", ">Unhealthy", ">Draining", ">Subscribers", "Endpoints", "Policy"], rows);
}

function edges(status) {
  const rows = status.edges.flatMap((edge) => {
    const who = [link(edge.edge, "policy", "edge", edge.edge), edge.policy_version || "-"];
    if (!edge.gateways.length) return [{ key: edge.edge, cells: [...who, badge("no gateway", "poor"), "-", "-"] }];
    return edge.gateways.map((each) => ({ key: `${edge.edge} ${each.id}`, cells: [...who, each.id, age(each.connected), each.report?.applied_version || "-"] }));
  });
  return table("Edges", ["Edge", "Policy", "Gateway", ">For", "Applied"], rows);
}

function plane({ status, clients }) {
  const sources = status.sources.map((each) => ({
    key: each.name,
    cells: [each.name, each.connected ? badge("connected", "good") : badge("lost", "bad"), age(each.since), each.detail || "-"],
  }));
  const about = `${status.control_plane}, up ${age(status.uptime)}, ${status.trust_domain ? `trust domain ${status.trust_domain}` : "insecure: nobody proves who they are"}; ${count(clients, "client")} connected.`;
  const denials = status.denials.map((each) => ({ key: each.caller, cells: [each.caller, each.count] }));
  return [h("p", { "data-key": "about" }, about), table("Sources", ["Source", "State", ">For", "Detail"], sources),
    denials.length ? [h("h3", {}, "Refused by the control plane"), table("Refused", ["Who", ">Times"], denials),
      h("p", {}, "They asked for what their identity does not allow; the control plane's log says for what.")] : null];
}
