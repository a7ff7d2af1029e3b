// The start: the token if one is needed, what the server says of itself, then all parts of the page.

import { startAbout } from "./about.js";
import { call } from "./api.js";
import { startCompare } from "./compare.js";
import { $, announce, el, showProblem } from "./dom.js";
import { startDraw } from "./draw.js";
import { startPeople } from "./people.js";
import { refreshJobs, refreshPeople, state, watch } from "./state.js";

const PARTS = ["people", "draw", "compare", "about"];
let part = null, hasStarted = false;

/** Shows the part that the address names. isChosen: somebody went there, so the focus goes, too. */
function showPart(isChosen) {
  const wanted = location.hash.slice(1);
  if (!hasStarted || (part && !PARTS.includes(wanted))) return;
  part = PARTS.includes(wanted) ? wanted : "people";
  for (const name of PARTS) $(`view-${name}`).hidden = name !== part;
  for (const link of $("parts").querySelectorAll("a")) {
    if (link.hash === `#${part}`) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
  }
  const title = $(`${part}-title`);
  document.title = `${title.textContent} · idea studio`;
  if (isChosen) {
    window.scrollTo(0, 0);
    title.focus({ preventScroll: true });
  }
}

/** Takes the token out of the address, where `idea-studio` puts it: it is never sent with the page. */
function tokenOfAddress() {
  const found = new URLSearchParams(location.hash.slice(1)).get("token");
  if (found) history.replaceState(null, "", location.pathname);
  return found;
}

async function enter() {
  const given = tokenOfAddress();
  if (given) await call("POST", "/v1/session", { json: { token: given } }).catch(() => {});
  return call("GET", "/v1/session");
}

function askForToken() {
  $("parts").hidden = true;
  for (const name of PARTS) $(`view-${name}`).hidden = true;
  $("view-login").hidden = false;
  $("token").focus();
}

async function logIn(event) {
  event.preventDefault();
  const place = event.currentTarget.querySelector(".problems"), token = $("token").value.trim();
  place.replaceChildren();
  try {
    await call("POST", "/v1/session", { json: { token } });
    location.reload();
  } catch (problem) {
    if (problem.status === 401) problem.message = "This is not the token. Copy it from the terminal once more.";
    showProblem(place, problem);
    $("token").select();
  }
}

/** Says so while the server makes itself ready. */
async function waitUntilReady() {
  let isSaid = false;
  for (;;) {
    const answer = await fetch("/readyz").catch(() => null);
    if (!answer || answer.ok) break;
    if (!isSaid) {
      const words = "The model is being made ready. You can choose photos meanwhile.";
      $("banner").replaceChildren(el("p", { class: "notice" }, words));
      isSaid = true;
    }
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
  $("banner").replaceChildren();
  if (isSaid) announce("The model is ready");
}

async function start() {
  try {
    const session = await enter();
    if (session.required && !session.authenticated) { askForToken(); return; }
    state.info = await call("GET", "/v1/info");
    await Promise.all([refreshPeople(), refreshJobs()]);
    startPeople();
    startDraw();
    startCompare();
    startAbout(session.required);
  } catch (problem) {
    showProblem($("banner"), problem, () => location.reload());
    return;
  }
  hasStarted = true;
  $("parts").hidden = false;
  showPart(false);
  document.documentElement.dataset.ready = "true";
  watch();
  waitUntilReady();
}

window.addEventListener("hashchange", () => showPart(true));
window.addEventListener("token-needed", () => { if (hasStarted) askForToken(); });
$("login").addEventListener("submit", logIn);
start();
