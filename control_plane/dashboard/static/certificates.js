// The certificate authority, its roots, everybody's certificates, and when they end.

import { badge, h, section, table } from "./dom.js";
import { age, count, names } from "./format.js";

const SOON = 60 * 86400, VERY_SOON = 7 * 86400;
const LATE = 0.25;
// Workloads renew at two thirds of a certificate's life: with a quarter left, something is wrong.

export const certificates = {
  nav: "certificates",
  title: () => "Certificates",
  view: () => ["certificates", {}],
  render(state, { clock }) {
    if (!state.authority) return h("p", { class: "problem", "data-key": "insecure" }, "This control plane runs with --insecure: nobody has a certificate, and nobody proves who they are.");
    const now = clock / 1000;
    return [
      warnings(state, now),
      section("authority", "Certificate authority", authority(state, now)),
      section("workloads", "Workloads and operators", workloads(state, now)),
      section("tokens", "Join tokens", tokens(state, now)),
    ];
  },
};

const left = (moment, now) => Date.parse(moment) / 1000 - now;
const isOperator = (workload) => workload.spiffe_id.includes("/operator/");
const isLate = (workload, state, now) => !isOperator(workload) && !workload.revoked && left(workload.expires, now) < LATE * state.leaf_lifetime;

function warnings(state, now) {
  const told = [];
  const { roots, issuer, issuer_expires: ends } = state.authority;
  for (const root of roots.filter((each) => left(each.expires, now) < SOON)) {
    told.push(`The trust root ${root.fingerprint.slice(0, 16)} ends in ${age(left(root.expires, now))}; rotate it: \`mesh ca rotate add\`, then overlap, then retire.`);
  }
  if (issuer !== "own root" && left(ends, now) < SOON) told.push(`The issuer ends in ${age(left(ends, now))}; replace its files.`);
  if (roots.length > 1) told.push(rotation(roots));
  const late = state.authority.workloads.filter((each) => isLate(each, state, now) && state.nodes[each.id]);
  if (late.length) {
    told.push(`Certificates are near their end, and not renewed, of ${names(late.flatMap((each) => state.nodes[each.id]))}; \`mesh logs SERVICE --logger mesh_client.identity\` shows why.`);
  }
  const revoked = state.authority.workloads.filter((each) => each.revoked && state.nodes[each.id]);
  if (revoked.length) told.push(`Revoked, and connected still: ${names(revoked.flatMap((each) => state.nodes[each.id]))}; stop them.`);
  return told.filter(Boolean).map((text) => h("p", { class: "problem", "data-key": `warning ${text.slice(0, 24)}` }, text));
}

/** Where a rotation of the trust root stands; roots are in the order previous, signing, next. */
function rotation([first, second]) {
  if (first.signing && !second.signing) {
    return second.unconfirmed
      ? `A root was added; ${count(second.unconfirmed, "workload")} did not confirm yet that it is trusted.`
      : "A root was added, and every workload trusts it. Next: `mesh ca rotate overlap`, which signs by it.";
  }
  if (!first.signing && second.signing) {
    return first.workloads
      ? `The new root signs; ${count(first.workloads, "workload")} of the old one will renew soon.`
      : "The new root signs, and no workload depends on the old one. Next: `mesh ca rotate retire`.";
  }
  return "";
}

function authority({ authority: shown, leaf_lifetime: life }, now) {
  const rows = shown.roots.map((root) => ({
    key: root.fingerprint,
    cells: [h("code", {}, root.fingerprint.slice(0, 16)), root.signing ? badge("signs", "good") : badge("trusted", "plain"), ending(root.expires, now, VERY_SOON, SOON),
      root.workloads, root.unconfirmed],
  }));
  return [h("p", { "data-key": "about" }, `Trust domain ${shown.trust_domain}, bundle ${shown.bundle_version}; certificates from ${shown.issuer} until ${shown.issuer_expires}, good for ${age(life)} each.`),
    table("Trusted roots", ["Root", "State", "Ends", ">Workloads", ">Unconfirmed"], rows)];
}

function ending(moment, now, bad, poor) {
  const seconds = left(moment, now);
  if (seconds <= 0) return badge(`ended ${age(-seconds)} ago`, "bad");
  return [badge(`in ${age(seconds)}`, seconds < bad ? "bad" : seconds < poor ? "poor" : "plain"), " ", h("time", { datetime: moment, class: "quiet" }, moment)];
}

function workloads(state, now) {
  const { workloads: all, bundle_version: bundle } = state.authority;
  if (!all.length) return h("p", {}, "No workload has a certificate.");
  const sorted = [...all].sort((a, b) => a.spiffe_id.localeCompare(b.spiffe_id, "en") || a.id.localeCompare(b.id, "en"));
  return table("Workloads and operators", ["Identity", "Process", "Ends", "State", "Trusts", "Attested by", "Workload"], sorted.map((each) => ({
    key: each.id,
    cells: [each.spiffe_id, names(state.nodes[each.id] ?? []), ending(each.expires, now, 0, isOperator(each) ? VERY_SOON : LATE * state.leaf_lifetime),
      each.revoked ? badge("revoked", "bad") : isLate(each, state, now) ? badge("not renewed", "poor") : badge("valid", "good"),
      each.bundle_version === bundle ? badge("current", "good") : each.bundle_version || "-", each.attested_by || "-", h("code", {}, each.id)],
  })));
}

function tokens({ tokens: all }, now) {
  if (!all.length) return h("p", {}, "No join token is good now.");
  return table("Join tokens", ["Token", "Service", "Ends", ">Uses left", "Made by"], all.map((each) => ({
    key: each.id, cells: [h("code", {}, each.id), each.service, ending(each.expires, now, 0, 0), `${each.uses_left} of ${each.uses}`, each.created_by],
  })));
}
