// Failed calls of the last minutes, by why they failed.

import { h, section } from "./dom.js";
import { failure } from "./explanation.js";
import { count } from "./format.js";

const RECEIVED = "received";
const REASONS = {
  [RECEIVED]: "Answered so, to callers that do not report their calls",
  FAILURE_REASON_ATTEMPTS_FAILED: "Every attempt failed",
  FAILURE_REASON_UNKNOWN_SERVICE: "Unknown service",
  FAILURE_REASON_NO_ENDPOINTS: "No endpoints",
  FAILURE_REASON_NO_MATCHING_ENDPOINTS: "No endpoint matches the route's labels",
  FAILURE_REASON_CONTROL_PLANE_NEVER_REACHED: "The control plane was never reached",
  FAILURE_REASON_NO_IDENTITY: "No certificate of the mesh",
  FAILURE_REASON_BREAKER_OPEN: "The service breaker is open",
  FAILURE_REASON_CONCURRENCY_LIMIT: "Too many calls in flight",
  FAILURE_REASON_FAULT_INJECTED: "A fault was injected by policy",
  FAILURE_REASON_DEADLINE_EXCEEDED: "The deadline passed",
};

export const failures = {
  nav: "failures",
  title: () => "Failures",
  view: () => ["failures", {}],
  render({ groups }) {
    if (!groups.length) return h("p", { "data-key": "none" }, "No failed calls were reported within the last 10 minutes.");
    const reasons = new Map();
    for (const group of groups) {
      const reason = group.received ? RECEIVED : group.reason;
      reasons.set(reason, [...(reasons.get(reason) ?? []), group]);
    }
    return [h("p", { "data-key": "about" }, "Of the last 10 minutes, the most frequent first."), [...reasons].map(([reason, of]) => {
      const calls = of.reduce((sum, group) => sum + group.count, 0);
      return section(reason, `${REASONS[reason] ?? "Another reason"}: ${count(calls, "call")}`, of.map(failure));
    })];
  },
};
