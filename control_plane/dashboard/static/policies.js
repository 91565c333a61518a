// Policies: what holds, a change of it tried and compared before it is stored, and who has acknowledged it.

import { post } from "./api.js";
import { badge, h, lines, link, section, table } from "./dom.js";
import { count, method, within } from "./format.js";
import { acknowledged } from "./service.js";

export const policies = {
  nav: "policies",
  title: () => "Policies",
  view: () => ["policies", {}],
  render(state) {
    const problems = state.problems.map((each) => h("p", { class: "problem", "data-key": `problem ${each.kind} ${each.service}` },
      `The policy stored for ${each.service} is invalid and not obeyed: ${each.errors.map(fieldError).join("; ")}`));
    const rows = state.services.map((each) => ({
      key: each.service,
      cells: [link(each.service, "policy", "service", each.service), each.has_policy ? "its own" : "the defaults", h("code", {}, each.policy_version || "-"),
        each.followers ? badge(`${each.current} of ${each.followers}`, each.current === each.followers ? "good" : "poor") : "-"],
    }));
    const unknown = state.service.filter((stored) => !state.services.some((each) => each.service === stored.name));
    rows.push(...unknown.map((each) => ({ key: each.name, cells: [link(each.name, "policy", "service", each.name), "its own", "-", badge("no such service", "poor")] })));
    const edges = state.edge.map((each) => ({ key: each.name, cells: [link(each.name, "policy", "edge", each.name), each.stored_version, each.errors.length ? badge("invalid", "bad") : badge("valid", "good")] }));
    return [problems,
      section("services", "Of services", rows.length ? table("Policies of services", ["Service", "Policy", "Version", "Acknowledged"], rows) : h("p", {}, "No services are known.")),
      section("edges", "Of edges", edges.length ? table("Policies of edges", ["Edge", "Stored version", "State"], edges) : h("p", {}, "No policies of edges are stored; nothing is exposed."))];
  },
};

const fieldError = (error) => (error.path ? `${error.path}: ${error.message}` : error.message);

/** What was written and found out, by kind and name, so that going elsewhere and back loses nothing. */
const drafts = new Map();

function draft(path) {
  const key = `${path[1]} ${path[2]}`;
  if (!drafts.has(key)) drafts.set(key, { text: null, busy: "", verdict: null, diff: null, applied: null, error: null });
  return drafts.get(key);
}

export const policy = {
  nav: "policies",
  title: (path) => `Policy of ${path[1] === "edge" ? "edge " : ""}${path[2] ?? ""}`,
  view: (path) => ["policy", { kind: path[1] ?? "", name: path[2] ?? "" }],
  render(state, { path }) {
    const mine = draft(path);
    mine.published = state.published;
    mine.text ??= state.stored?.yaml || `${state.kind}: ${state.name}\n`;
    return [
      section("force", "In force", inForce(state)),
      section("edit", "Change", editor(mine)),
      h("div", { class: "outcome", "data-key": "outcome", role: "status" }, outcome(mine, state)),
      state.kind === "service" ? section("acknowledged", "Who has acknowledged it", acknowledged(state.subscriptions)) : null,
    ];
  },
  inputs: {
    document({ path, redraw }, area) {
      const mine = draft(path);
      Object.assign(mine, { text: area.value, verdict: null, error: null, applied: null });
      redraw();
    },
  },
  actions: {
    validate: (context) => ask(context, "validate", "checking", (mine, answer) => {
      mine.verdict = answer;
      return answer.errors.length ? `Not valid: ${count(answer.errors.length, "error")}` : "Valid";
    }),
    diff: (context) => ask(context, "diff", "comparing", (mine, answer) => {
      mine.diff = { ...answer, document: mine.text };
      return answer.difference.length ? "The difference is shown" : "Nothing would change";
    }),
    apply: (context) => ask(context, "apply", "storing", (mine, answer) => {
      mine.applied = { ...answer, before: mine.published };
      mine.diff = null;
      return `Stored as version ${answer.stored_version}`;
    }),
    reset({ path, redraw }) {
      drafts.delete(`${path[1]} ${path[2]}`);
      document.getElementById("document").value = "";
      redraw();
      document.getElementById("document").value = draft(path).text;
    },
  },
};

async function ask({ path, redraw, announce }, what, busy, take) {
  const mine = draft(path);
  if (mine.busy || (what === "apply" && mine.diff?.document !== mine.text)) return;
  Object.assign(mine, { busy, error: null, verdict: null, applied: null });
  redraw();
  const request = { kind: path[1], document: mine.text };
  if (what === "apply") request.if_version = mine.diff.stored_version;
  try {
    announce(take(mine, await post(`/api/policy/${what}`, request)));
  } catch (error) {
    mine.error = error.message;
    if (error.code === "ABORTED") mine.diff = null;
    announce(`Refused: ${error.message}`);
  }
  mine.busy = "";
  redraw();
}

function inForce({ kind, stored, published, edge }) {
  if (!stored) return h("p", {}, kind === "edge" ? "No policy is stored; it exposes nothing." : `No policy is stored; the defaults apply${published ? ` as version ${published}` : ""}.`);
  const versions = [`Stored version ${stored.stored_version}`, published ? `published as ${published}` : "", edge?.policy_version ? `in force as ${edge.policy_version}` : ""];
  return [h("p", { "data-key": "versions" }, `${versions.filter(Boolean).join(", ")}.`),
    stored.errors.map((error) => h("p", { class: "problem" }, fieldError(error))),
    stored.effective ? h("details", { "data-key": "effective" }, h("summary", {}, "With every default"), lines("The policy with every default", stored.effective.trimEnd().split("\n"))) : null];
}

function editor(mine) {
  const shown = mine.diff?.document === mine.text;
  const busy = Boolean(mine.busy);
  const area = h("textarea", { id: "document", "data-input": "document", rows: Math.min(Math.max(mine.text.split("\n").length + 1, 8), 28), spellcheck: "false", autocapitalize: "off", autocomplete: "off", "aria-describedby": "apply-hint" });
  area.value = mine.text;
  return [h("label", { for: "document" }, "Policy, YAML"), area,
    h("p", { class: "buttons" },
      h("button", { type: "button", "data-action": "validate", disabled: busy }, "Validate"),
      h("button", { type: "button", "data-action": "diff", disabled: busy }, "Show the difference"),
      h("button", { type: "button", "data-action": "apply", class: "strong", disabled: busy || !shown }, "Apply"),
      h("button", { type: "button", "data-action": "reset", disabled: busy }, "Begin anew")),
    h("p", { id: "apply-hint" }, shown ? "What is applied is what the difference below shows." : "It can be applied once the difference of this very text is shown.")];
}

function outcome(mine, state) {
  if (mine.busy) return h("p", {}, `${mine.busy} ...`);
  if (mine.error) return h("p", { class: "problem" }, mine.error);
  if (mine.verdict) return verdict(mine.verdict);
  if (mine.applied) return progress(mine.applied, state);
  if (mine.diff) return comparison(mine.diff, mine.diff.document === mine.text);
  return null;
}

function verdict({ errors, warnings }) {
  if (errors.length) return [h("h2", {}, "Not valid"), h("ul", { class: "problems" }, errors.map((error) => h("li", {}, fieldError(error))))];
  return [h("h2", {}, "Valid"), warningsOf(warnings)];
}

const warningsOf = (warnings) => (warnings.length ? h("ul", { class: "warnings" }, warnings.map((each) => h("li", {}, fieldError(each)))) : null);

function comparison(diff, current) {
  const style = (line) => (/^(\+\+\+|---)/.test(line) ? "file" : line.startsWith("+") ? "plus" : line.startsWith("-") ? "minus" : line.startsWith("@") ? "hunk" : null);
  return [h("h2", {}, "Difference"), current ? null : h("p", { class: "problem" }, "The text has been changed since; show the difference again."),
    diff.difference.length ? lines("Difference", diff.difference, style) : h("p", {}, "It is in force as it is: nothing would change."),
    warningsOf(diff.warnings), diff.tried ? dryRun(diff) : null];
}

const CALLS = [["for who calls", "unauthorized", "exactly"], ["by rate limits", "rate_limited", "at least"], ["for calls in flight", "shed", "about"]];
const EVENTS = [["by a pause", "paused", "exactly"], ["for who publishes", "unauthorized", "exactly"], ["in the time allowed", "timed_out", "at least"]];

function dryRun({ name, tried }) {
  if (!tried.calls && !tried.handled) return h("p", {}, `${name}: no instance has reported a call within the last ${within(tried.window)}.`);
  return [tried.calls ? refusedCalls(tried) : null, tried.handled ? keptEvents(tried) : null];
}
function refusedCalls(tried) {
  const details = tried.proposed.details.map((each) => ({
    key: `${each.caller} ${each.method}`,
    cells: [each.caller || "nobody of the mesh", method(each.method), each.calls, each.unauthorized || "-", each.rate_limited || "-", each.shed || "-"],
  }));
  return [h("h3", {}, `Of ${count(tried.calls, "call")} that ${count(tried.instances, "instance")} received within the last ${within(tried.window)}`),
    table("What would have been refused", ["Refused", ">In force", ">Proposed", ""], totals(CALLS, tried.current, tried.proposed)),
    details.length ? table("Who would have been refused", ["Caller", "Method", ">Calls", ">Who calls", ">Rate", ">In flight"], details) : null];
}
function keptEvents(tried) {
  const details = tried.proposed_events.details.map((each) => ({
    key: `${each.publisher} ${each.type} ${each.group}`,
    cells: [each.publisher, each.type, each.group, each.handled, each.paused || "-", each.unauthorized || "-", each.timed_out || "-"],
  }));
  return [h("h3", {}, `Of ${count(tried.handled, "event")} that its groups handled within the last ${within(tried.window)}`),
    table("What would not have been handled", ["Not handled", ">In force", ">Proposed", ""], totals(EVENTS, tried.current_events, tried.proposed_events)),
    details.length ? table("Whose events would not have been handled", ["Publisher", "Type", "Group", ">Handled", ">Paused", ">Who publishes", ">Time"], details) : null];
}
function totals(kinds, current, proposed) {
  return kinds.map(([what, field, how]) => {
    const now = current[field], then = proposed[field];
    return { key: field, cells: [what, now || "-", badge(then || "-", then > now ? "bad" : then < now ? "good" : "plain"), now || then ? how : ""] };
  });
}

function progress(applied, state) {
  const told = [h("h2", {}, "Applied"), h("p", {}, `Stored as version ${applied.stored_version}${applied.changed ? "" : "; nothing has changed by it"}.`)];
  if (state.kind !== "service" || applied.name !== state.name) return told;
  if (applied.changed && state.published === applied.before) return [...told, h("p", {}, "It is not published yet.")];
  const { all, current } = state.subscriptions;
  return [...told, h("p", { class: "acknowledgement" }, `Published as ${state.published || "-"}; `,
    badge(`${current} of ${all} have acknowledged it`, current === all ? "good" : "poor"))];
}
