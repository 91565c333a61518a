// Numbers and states in the words of the `mesh` command.

import { badge, link, printable } from "./dom.js";

const CODES = ["OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
  "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL",
  "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED"];
const GOOD = 0.999, POOR = 0.95;

/** The name of a gRPC status. */
export const code = (number) => CODES[number] ?? String(number);

/** `1 endpoint`, `2 endpoints`. */
export function count(number, noun) {
  if (number === 1) return `1 ${noun}`;
  return `${number} ${noun.endsWith("y") ? `${noun.slice(0, -1)}ies` : noun.endsWith("s") ? `${noun}es` : `${noun}s`}`;
}

/** A span of time in its two largest units: `3.2s`, `42s`, `4m12s`, `2h05m`, `3d04h`. */
export function age(seconds) {
  if (seconds === null || seconds === undefined) return "-";
  if (seconds < 0) return `-${age(-seconds)}`;
  if (seconds < 10) return `${Math.floor(seconds * 10) / 10}s`;
  const whole = Math.floor(seconds), two = (number) => String(number).padStart(2, "0");
  if (whole < 60) return `${whole}s`;
  if (whole < 3600) return `${Math.floor(whole / 60)}m${two(whole % 60)}s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)}h${two(Math.floor((whole % 3600) / 60))}m`;
  return `${Math.floor(whole / 86400)}d${two(Math.floor((whole % 86400) / 3600))}h`;
}

const digits = (number) => number.toFixed(number < 10 ? 2 : number < 100 ? 1 : 0);

/** Calls a second with about three digits. */
export const rate = digits;

/** A duration of about three digits: `1.25ms`, `231ms`, `1.25s`. */
export const took = (seconds) => (seconds < 1 ? `${digits(seconds * 1000)}ms` : `${digits(seconds)}s`);

/** How well calls went, as a style: good, poor, bad, or none without calls. */
export function grade(stats) {
  const share = stats.success_rate;
  return share === null ? "none" : share >= GOOD ? "good" : share >= POOR ? "poor" : "bad";
}

/** A success rate in percent as a text: never 100% unless it is; a dash without calls. */
export function percent(stats) {
  if (stats.success_rate === null) return "-";
  return stats.success_rate >= 1 ? "100%" : `${(Math.floor(stats.success_rate * 10000) / 100).toFixed(2)}%`;
}

/** The same in its colour. */
export const share = (stats) => badge(percent(stats), `plain ${grade(stats)}`);

/** A percentile; a dash without calls, and `>104s` beyond what is told apart. */
export function percentile(stats, name) {
  return stats[name] === null ? (stats.count ? ">104s" : "-") : took(stats[name]);
}

/** The figures of calls or attempts, as cells. */
export const FIGURES = [">Calls/s", ">Success", ">p50", ">p95", ">p99"];
export const figures = (stats) =>
  [rate(stats.rate), share(stats), percentile(stats, "p50"), percentile(stats, "p95"), percentile(stats, "p99")];

/** How far back something goes: `42 s`, `1 min`, `10 min`. */
export function within(seconds) {
  const whole = Math.round(seconds);
  return whole && whole % 60 === 0 ? `${whole / 60} min` : `${whole} s`;
}

/** The end of an enum's name, in words: BREAKER_STATE_HALF_OPEN gives `half-open`. */
export const word = (name, prefix) => name.replace(prefix, "").toLowerCase().replaceAll("_", "-");

/** A list of names in a sentence, or a dash. */
export const names = (of) => of.map(printable).join(", ") || "-";

/** A full method without its leading slash. */
export const method = (name) => name.replace(/^\//, "");

/** A service as a link to its page; those who belong to none have none. */
export const service = (name) => (name ? link(name, "service", name) : "-");

/** A message of somebody else, in one line. */
export const oneLine = (text) => text.split(/\s+/u).filter(Boolean).join(" ");

/** In a word: whether a client has what is current. */
export function subscriptionState(subscription) {
  if (subscription.rejection) return badge("rejected", "bad");
  if (!subscription.acknowledged_version && !subscription.current_version) return badge("unknown service", "poor");
  if (subscription.acknowledged_version === subscription.current_version) return badge("current", "good");
  return badge(subscription.acknowledged_version ? "behind" : "waiting", "poor");
}

/** Endpoints that somebody who calls has ejected; empty for none. */
export const ejected = (edge) => (edge.ejected.length ? badge(names(edge.ejected), "poor") : "-");

/** What is to be known of calls of one service to another: whose count it is, and what is wrong; else empty. */
export function trouble(edge) {
  const told = [];
  if (edge.received) told.push(badge("as received", "plain"));
  if (edge.breakers_open) told.push(badge(`breaker open in ${edge.breakers_open} of ${edge.processes}`, "bad"));
  if (edge.ejected.length) told.push(" ", badge(`ejected: ${names(edge.ejected)}`, "poor"));
  return told;
}
