// People who are being learned: how far they are, and pictures of them on the way.

import { call } from "./api.js";
import { $, announce, el, ofPhoto, progressBar, showProblem } from "./dom.js";
import { drawPerson } from "./draw.js";
import { COMPILING } from "./drawing.js";
import { isUnderWay, lookNow, on, state } from "./state.js";

const STAGES = {
  waiting: "Waiting", looking: "Looking at the photos", compiling: COMPILING,
  learning: "Learning", writing: "Writing", drawing: "Drawing",
};
const cards = new Map();  // by the id of the job
const own = new Set();  // those that this page has started or seen under way
const dismissed = new Set();

export function startLessons() {
  on("jobs", render);
  render();
}

/** Shows a job from now on, also when it has ended by the next look. */
export function followed(job) {
  own.add(job.id);
  state.jobs = [job, ...state.jobs];
  render();
}

function render() {
  for (const job of state.jobs) if (isUnderWay(job)) own.add(job.id);
  const shown = state.jobs.filter((job) => own.has(job.id) && !dismissed.has(job.id));
  for (const [id, card] of cards) {
    if (!shown.some((job) => job.id === id)) { card.node.remove(); cards.delete(id); }
  }
  for (const job of [...shown].reverse()) {
    if (!cards.has(job.id)) {
      cards.set(job.id, makeCard(job));
      $("jobs").prepend(cards.get(job.id).node);
    }
    cards.get(job.id).update(job);
  }
}

function makeCard(job) {
  const title = el("h2", {}), bar = progressBar(`Learning ${job.name}`), place = el("div", { class: "problems" });
  const shown = el("ul", { class: "previews", "aria-label": `${job.name} on the way` });
  const buttons = el("p", { class: "row" });
  const node = el("article", { class: "card job" }, title, bar.node, shown, place, buttons);
  let state = null, stage = null, quarter = 0;

  const dismiss = el("button", { type: "button", class: "quiet", onclick: () => {
    dismissed.add(job.id);
    render();
    $("library-title").focus();
  } }, "Dismiss");
  const cancel = el("button", { type: "button", "aria-label": `Cancel learning ${job.name}`, onclick: async () => {
    cancel.disabled = true;
    await call("DELETE", `/v1/jobs/${job.id}`).catch((problem) => showProblem(place, problem));
    lookNow();
  } }, "Cancel");

  function say(now) {
    const part = now.total ? Math.floor(4 * now.done / now.total) : 0;
    if (now.state !== state) announce(titleOf(now));
    else if (now.stage !== stage && isUnderWay(now)) announce(`${now.name}: ${STAGES[now.stage] ?? now.stage}`);
    else if (part > quarter) announce(`${now.name}: ${now.done} of ${now.total} steps`);
    quarter = part;
  }

  function update(now) {
    say(now);
    title.textContent = titleOf(now);
    bar.node.hidden = !isUnderWay(now);
    bar.set(now.stage === "learning" ? now.done : 0, now.stage === "learning" ? now.total : 0, wordsOf(now));
    for (const one of now.previews.slice(shown.children.length)) shown.append(preview(now, one));
    if (now.state === state && now.stage === stage) return;
    const hadFocus = buttons.contains(document.activeElement);
    if (isUnderWay(now)) buttons.replaceChildren(cancel);
    else if (now.state === "done") {
      const draw = el("button", { type: "button", class: "main", onclick: () => drawPerson(now.name) }, `Draw ${now.name}`);
      buttons.replaceChildren(draw, dismiss);
    } else buttons.replaceChildren(dismiss);
    if (hadFocus) buttons.firstChild.focus();
    if (now.problem && now.state === "failed") {
      showProblem(place, { title: ofPhoto(now.problem.title), message: ofPhoto(now.problem.detail), errors: [] });
    }
    node.classList.toggle("failed", now.state === "failed");
    ({ state, stage } = now);
  }
  return { node, update };
}

function titleOf(job) {
  if (job.state === "done") return `${job.name} is learned`;
  if (job.state === "failed") return `${job.name} could not be learned`;
  if (job.state === "cancelled") return `Learning ${job.name} was cancelled`;
  return `Learning ${job.name}`;
}

function wordsOf(job) {
  const stage = STAGES[job.stage] ?? "";
  if (job.stage === "learning") return `${stage}: step ${job.done} of ${job.total}`;
  if (job.state === "queued" && job.position) return `${stage}: ${job.position} before it`;
  return `${stage} …`;
}

function preview(job, one) {
  const likeness = one.likeness === null ? null : el("span", {}, ` likeness ${one.likeness.toFixed(2)}`);
  return el("li", {}, el("img", { src: one.url, alt: `${job.name} after ${one.step} steps` }),
    el("span", {}, `step ${one.step}`), likeness);
}
