// What all parts of the page know: the server's limits, the people, the jobs. Other tabs are told of changes.

import { call } from "./api.js";

export const state = { info: null, people: [], jobs: [] };

const listeners = { people: [], jobs: [] };
const tabs = "BroadcastChannel" in window ? new BroadcastChannel("idea-studio") : null;
const SOON = 500, LATER = 10_000; // milliseconds between two looks
let isWatching = false, timer = null, coverLooks = 0;

export function on(what, listener) {
  listeners[what].push(listener);
}

function tell(what) {
  for (const listener of listeners[what]) listener();
}

/** Tells the other tabs of this browser that people or pictures have changed. */
export function changed(what) {
  tabs?.postMessage(what);
}

export function onOtherTab(listener) {
  tabs?.addEventListener("message", (event) => listener(event.data));
}

export async function refreshPeople() {
  const found = (await call("GET", "/v1/identities")).identities;
  if (JSON.stringify(found) === JSON.stringify(state.people)) return;
  state.people = found;
  coverLooks = 0;
  tell("people");
}

export async function refreshJobs() {
  state.jobs = (await call("GET", "/v1/jobs")).jobs.filter((job) => job.kind === "learn");
  tell("jobs");
}

export const isUnderWay = (job) => job.state === "queued" || job.state === "running";

/** Looks again and again: often while somebody is learned or a cover is drawn, else now and then. */
export function watch() {
  if (isWatching) return;
  isWatching = true;
  document.addEventListener("visibilitychange", () => { if (!document.hidden) lookNow(); });
  window.addEventListener("focus", lookNow);
  onOtherTab(lookNow);
  look();
}

export function lookNow() {
  if (!isWatching) return;
  clearTimeout(timer);
  timer = setTimeout(look, 0);
}

async function look() {
  let wait = LATER;
  try {
    const before = state.jobs.filter(isUnderWay).map((job) => job.id);
    await refreshJobs();
    const ended = state.jobs.filter((job) => before.includes(job.id) && job.state === "done");
    const missing = state.people.some((person) => !person.cover) && coverLooks < 60;
    await refreshPeople();
    if (missing) coverLooks += 1;
    if (ended.length) changed("people");
    if (missing || state.jobs.some(isUnderWay)) wait = SOON;
  } catch {
    // What somebody does next says it; a look that fails is tried again.
  }
  if (document.hidden) wait = LATER;
  clearTimeout(timer);
  timer = setTimeout(look, wait);
}
