// Which page is shown, kept up to date; who is signed in; and what is said when the data is old.

import { ApiError, post } from "./api.js";
import { certificates } from "./certificates.js";
import { h, morphChildren } from "./dom.js";
import { failures } from "./failures.js";
import { Feed } from "./feed.js";
import { age } from "./format.js";
import { policies, policy } from "./policies.js";
import { service } from "./service.js";
import { topology } from "./topology.js";
import { trace } from "./trace.js";
import { traces } from "./traces.js";

// A page: title(path), view(path, query) to listen to, render(state, context), and what it does (actions, inputs, forms).
const PAGES = { "": topology, service, failures, traces, trace, policies, policy, certificates };

const byId = (id) => document.getElementById(id);
const main = byId("main");

let page = null, path = [], query = new URLSearchParams(), state = null, clock = 0, arrived = false, signedOut = "";

const feed = new Feed({
  onState(fresh, at) {
    [state, clock] = [fresh, at];
    draw();
  },
  onHeard(at) {
    clock = at;
    tellFreshness();
  },
  onSignedOut() {
    signOut("You are signed out: the session has ended.");
  },
});

const context = () => ({ path, query, clock, narrow: main.clientWidth < 640, redraw: draw, announce, navigate });

function navigate(hash) {
  location.hash = hash;
}

function announce(text) {
  byId("announcement").textContent = text;
}

/** Draws what is known now. Whatever had the focus keeps it; if it is gone, the heading gets it. */
function draw() {
  const active = document.activeElement;
  const inside = main.contains(active) && active !== main;
  const fresh = h("main", {}, content());
  morphChildren(main, fresh);
  if (inside && !main.contains(active)) main.querySelector("h1")?.focus({ preventScroll: true });
  else if (inside && document.activeElement !== active) active.focus({ preventScroll: true });
  if (!arrived && main.querySelector("h1")) {
    arrived = true;
    main.querySelector("h1").focus({ preventScroll: true });
    scrollTo(0, 0);
  }
}

function content() {
  const title = (text) => h("h1", { tabindex: -1, "data-key": "title" }, text);
  if (signedOut) {
    return [title("Sign in"), h("p", {}, signedOut), h("p", {}, "Run ", h("code", {}, "mesh dashboard"),
      " with your operator's credentials, and open the link that it writes.")];
  }
  if (page === null) return [title("There is no such page"), h("p", {}, h("a", { href: "#/" }, "To the topology"))];
  if (state === null) return [title(page.title(path)), h("p", { "data-key": "waiting" }, "Waiting for the control plane ...")];
  if (state.error) {
    return [title(page.title(path)), h("p", { class: "problem", "data-key": "error" }, state.error.details)];
  }
  return [title(page.title(path)), page.render(state, context())];
}

function route() {
  const login = /^#login=(.+)$/.exec(location.hash);
  if (login) {
    signIn(login[1]);
    return;
  }
  if (location.hash === "#main") {
    main.focus();
    return;
  }
  const [where, asked] = location.hash.replace(/^#\/?/, "").split("?");
  path = where.split("/").map((part) => {
    try {
      return decodeURIComponent(part);
    } catch {
      return part;
    }
  });
  query = new URLSearchParams(asked ?? "");
  page = Object.hasOwn(PAGES, path[0]) ? PAGES[path[0]] : null;
  [state, arrived, signedOut] = [null, false, ""];
  for (const each of document.querySelectorAll("nav a")) {
    if (each.dataset.page === page?.nav) each.setAttribute("aria-current", "page");
    else each.removeAttribute("aria-current");
  }
  document.title = `${page?.title(path) ?? "No such page"} - grpc-mesh`;
  draw();
  if (page === null) feed.stop();
  else feed.watch(...page.view(path, query));
}

async function signIn(code) {
  history.replaceState(null, "", "#/");
  try {
    await post("/api/login", { code });
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    signOut(`You are not signed in: ${error.message}.`);
    return;
  }
  begin();
}

function signOut(why) {
  feed.stop();
  [signedOut, arrived] = [why, false];
  byId("who").textContent = "";
  byId("logout").hidden = true;
  draw();
  tellFreshness();
}

/** Asks who is signed in, then shows the page. */
async function begin() {
  if (location.hash.startsWith("#login=")) {
    route();
    return;
  }
  let answer;
  try {
    answer = await fetch("/api/session");
  } catch {
    route();
    return;
  }
  if (answer.status === 401) {
    signOut("This dashboard is for operators.");
    return;
  }
  const { operator } = await answer.json();
  byId("who").textContent = operator ?? "insecure: nobody signs in";
  byId("logout").hidden = !operator;
  route();
}

/** Says plainly when what is shown is old. */
function tellFreshness() {
  const silent = feed.stale;
  const banner = byId("banner");
  document.body.classList.toggle("stale", silent > 0);
  if (silent > 0) {
    const text = "The control plane does not answer. What you see is old.";
    if (banner.hidden) byId("banner-text").textContent = text;
    byId("banner-age").textContent = `Data is ${age(silent / 1000).replace(/\.\d/, "")} old; trying again.`;
  }
  banner.hidden = silent === 0;
  const at = clock ? new Date(clock).toISOString().slice(0, 19).replace("T", " ") : "";
  byId("freshness").textContent = feed.address === null || !at ? "" : `As of ${at} UTC, by the control plane's clock.`;
}

addEventListener("hashchange", route);
document.addEventListener("visibilitychange", () => (document.hidden ? feed.pause() : feed.resume()));
matchMedia("(max-width: 44rem)").addEventListener("change", draw);
setInterval(tellFreshness, 500);

byId("skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
byId("logout").addEventListener("click", async () => {
  await post("/api/logout", {}).catch(() => null);
  signOut("You are signed out.");
});
main.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-action]");
  if (button) page?.actions?.[button.dataset.action]?.(context(), button);
});
main.addEventListener("input", (event) => {
  if (event.target.dataset.input) page?.inputs?.[event.target.dataset.input]?.(context(), event.target);
});
main.addEventListener("submit", (event) => {
  event.preventDefault();
  page?.submit?.(context(), event.target);
});

begin();
