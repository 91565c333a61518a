// Failed calls and what was found about them, in words.

import { badge, h, link } from "./dom.js";
import { age, code, count, method, oneLine, service, took, word } from "./format.js";

const SEVERITIES = { SEVERITY_OK: ["ok", "good"], SEVERITY_WARNING: ["warning", "poor"], SEVERITY_ERROR: ["error", "bad"] };

/** What was found, the worst first. */
export function findings(found) {
  return h("ul", { class: "findings", "data-key": "findings" }, found.map((each) => {
    const [text, style] = SEVERITIES[each.severity] ?? ["-", "none"];
    return h("li", { "data-key": `${each.subject} ${each.message}` }, badge(text, style), " ", h("strong", {}, each.subject), `: ${each.message}`,
      each.remedy ? h("p", { class: "remedy" }, `\u2192 ${each.remedy}`) : null);
  }));
}

/** A group of failed calls: what, how many, why, the last one, and what to do. */
export function failure(group) {
  const key = [group.caller, group.service, group.method, group.code, group.reason].join(" ");
  return h("article", { class: "failure", "data-key": key },
    h("p", {}, h("strong", {}, count(group.count, "call")), " of ", group.caller ? service(group.caller) : group.received ? "callers without identity" : "no service", " to ", service(group.service),
      `, ${method(group.method)}: `, badge(code(group.code), "bad"), group.received ? ", as received" : null),
    group.explanation ? h("p", { class: "explanation" }, group.explanation) : null,
    group.remedy ? h("p", { class: "remedy" }, `\u2192 ${group.remedy}`) : null,
    group.example ? example(group.example) : null);
}

function example(last) {
  const state = [`last one ${age(last.ago)} ago`, `breaker ${word(last.breaker, "BREAKER_STATE_")}`];
  if (last.endpoints_version) {
    state.push(`endpoints ${last.endpoints_version} ${last.snapshot_age === null ? "from the disk cache" : `${age(last.snapshot_age)} old`}`);
  }
  if (last.control_plane) state.push(`control plane ${last.control_plane}`);
  if (last.identity) state.push(`identity: ${last.identity}`);
  const attempts = last.attempts.map((each) => h("li", {},
    `tried ${each.endpoint_id} at ${each.target}: ${code(each.code)} after ${took(each.elapsed)}${each.details ? `: ${oneLine(each.details)}` : ""}`));
  return h("details", {}, h("summary", {}, "The last one"), h("p", {}, state.join("; ")), attempts.length ? h("ol", {}, attempts) : null,
    last.trace_id ? h("p", {}, link("Its trace", "trace", last.trace_id)) : null);
}
