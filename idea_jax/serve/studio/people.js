// People: learning somebody, and the library of those who were learned.

import { call } from "./api.js";
import {
  $, announce, ask, clearProblems, day, el, keyed, openDialog, plural, refuse, showProblem, size, table,
} from "./dom.js";
import { drawPerson } from "./draw.js";
import { dropGallery } from "./gallery.js";
import { followed, startLessons } from "./lessons.js";
import { addFiles, chosenPhotos, clearPhotos, isLooking, unusable } from "./photos.js";
import { changed, lookNow, on, refreshPeople, state } from "./state.js";

const NAME = /^[a-z0-9][a-z0-9_-]*$/;
const PROGRAMS = { diffusers: "diffusers", a1111: "AUTOMATIC1111", comfyui: "ComfyUI" };

export function startPeople() {
  const { info } = state, form = $("learn");
  $("photo-limits").textContent =
    `At most ${info.limits.photos} photos of ${size(info.limits.photo_bytes)} each.`;
  const [atOnce, more] = form.elements.namedItem("steps");
  const steps = info.defaults.learn_steps || 25;
  more.value = String(steps);
  more.closest("label").hidden = info.limits.learn_steps < 1;
  $("more-steps").textContent = `${steps} steps`;
  atOnce.closest("label").hidden = !info.has_enhancer;
  (info.has_enhancer ? atOnce : more).checked = true;
  $("own-steps").max = String(info.limits.learn_steps);
  $("photos").addEventListener("change", (event) => {
    addFiles(event.target.files);
    event.target.value = "";  // the same file may be chosen again
  });
  startDrop($("drop"));
  $("name").addEventListener("input", nameNow);
  form.addEventListener("submit", learn);
  startLessons();
  on("people", render);
  render();
  offerTrial();
}

function startDrop(place) {
  const stop = (event) => event.preventDefault();
  for (const kind of ["dragover", "drop"]) document.addEventListener(kind, stop);  // else the photo opens
  place.addEventListener("dragover", () => place.classList.add("over"));
  for (const kind of ["dragleave", "drop"]) place.addEventListener(kind, () => place.classList.remove("over"));
  place.addEventListener("drop", (event) => addFiles(event.dataTransfer.files));
}

/** Photos of made-up people to try, where the server has some. */
async function offerTrial() {
  const { people } = await call("GET", "/v1/examples").catch(() => ({ people: [] }));
  if (!people.length) return;
  const buttons = people.map((person) => el("button",
    { type: "button", class: "try", onclick: () => tryOut(person), "aria-label": `Take the photos of ${person.name}` },
    el("img", { src: person.photos[0], alt: "" }), person.name));
  $("trial").replaceChildren(el("p", { class: "hint" }, "Or try somebody who does not exist:"),
    el("div", { class: "tries" }, buttons));
  $("trial").hidden = false;
}

async function tryOut(person) {
  clearPhotos();
  const files = [];
  try {
    for (const url of person.photos) {
      const answer = await fetch(url);
      files.push(new File([await answer.blob()], url.split("/").pop(), { type: "image/png" }));
    }
  } catch {
    showProblem($("learn").querySelector(".problems"), { message: "The photos cannot be read. Try again.", errors: [] });
    return;
  }
  $("name").value = freeName(person.name);
  nameNow();
  await addFiles(files);
}

const isHere = (name) => state.people.some((person) => person.name === name);

function freeName(name) {
  for (let number = 2; ; number += 1) {
    const wanted = number === 2 ? name : `${name}-${number - 1}`;
    if (!isHere(wanted)) return wanted;
  }
}

/** The name as the server wants it, and what follows from it. */
function nameNow() {
  const field = $("name");
  const name = field.value.trim().toLowerCase().normalize("NFKD").replace(/\p{M}/gu, "").replace(/\s+/g, "-");
  const taken = isHere(name);
  $("replace-row").hidden = !taken;
  if (!taken) $("replace").checked = false;
  $("replace-text").textContent = `Replace ${name}, who is here already`;
  const isChanged = name && name !== field.value;
  $("name-hint").textContent = isChanged ? `Will be called ${name}.` : "Small letters, digits, - and _.";
  return name;
}

async function learn(event) {
  event.preventDefault();
  const form = event.currentTarget, photos = chosenPhotos(), name = nameNow();
  clearProblems(form);
  const { learn_steps: most } = state.info.limits;
  const own = $("own-steps").value, steps = own === "" ? form.elements.namedItem("steps").value : own;
  const [bad] = unusable();
  if (!photos.length) return refuse(form, $("photos"), "Choose a photo first.");
  if (isLooking()) return refuse(form, $("photos"), "The photos are still being looked at. Wait a moment.");
  if (bad) {
    refuse(form, $("photos"), "A photo cannot be used: its reason stands beside it. Take it out first.");
    return $(`remove-${bad.key}`).focus();
  }
  if (!NAME.test(name)) {
    return refuse(form, $("name"), "Give a name of small letters, digits, - and _, which begins with a letter or digit.");
  }
  if (isHere(name) && !$("replace").checked) {
    return refuse(form, $("name"), `${name} is here already: take another name, or tick “Replace”.`);
  }
  if (!/^\d+$/.test(steps) || Number(steps) > most) {
    return refuse(form, $("own-steps"), `Give a number of steps from 0 to ${most}.`);
  }
  if (!$("learn-seed").checkValidity()) {
    return refuse(form, $("learn-seed"), "Give a seed from 0 to 4294967295.");
  }
  if (!$("consent").checked) {
    return refuse(form, $("consent"), "Tick that the person agreed. Nobody may be learned without that.");
  }
  const sent = new FormData();
  for (const photo of photos) sent.append("photos", photo.file);
  const about = {
    name, steps, consent: "true", seed: $("learn-seed").value || "0",
    faces: JSON.stringify(photos.map((photo) => photo.face)),
    preview: $("preview").checked, keep_photos: $("keep-photos").checked, keep_face: $("keep-face").checked,
    replace: $("replace").checked,
  };
  for (const [key, value] of Object.entries(about)) sent.append(key, String(value));
  if (await send(form, sent)) {
    clearPhotos();
    for (const id of ["name", "own-steps"]) $(id).value = "";
    for (const id of ["consent", "replace"]) $(id).checked = false;
    nameNow();
  }
}

/** Sends somebody to be learned; whether the server took it. */
async function send(form, sent) {
  const button = form.querySelector("button[type=submit]");
  button.disabled = true;
  try {
    const job = await call("POST", "/v1/identities", { form: sent });
    followed(job);
    announce(`${job.name} is being learned`);
    lookNow();
    return true;
  } catch (problem) {
    showProblem(form.querySelector(".problems"), problem);
    return false;
  } finally {
    button.disabled = false;
  }
}

function render() {
  $("nobody").hidden = state.people.length > 0;
  keyed($("library"), state.people, (person) => person.name, card);
  nameNow();
}

export function cover(person, alt = "") {
  if (person.cover) return el("img", { class: "cover", src: person.cover, alt, loading: "lazy" });
  return el("span", { class: "cover none", "aria-hidden": "true" }, person.name.charAt(0).toUpperCase());
}

const stepsOf = (person) => (person.steps ? plural(person.steps, "step", "steps") : "at once");

function card(person) {
  return el("li", { class: "person" },
    cover(person, `${person.name}, drawn`),
    el("div", { class: "person-words" },
      el("h3", {}, person.name),
      el("p", { class: "hint" }, `${day(person.created)} · ${stepsOf(person)}`),
      el("p", { class: "hint" }, `${person.model} · ${size(person.bytes)}`),
      el("p", { class: "row" },
        el("button", {
          type: "button", "data-focus": "draw", "aria-label": `Draw ${person.name}`,
          onclick: () => drawPerson(person.name),
        }, "Draw"),
        el("button", {
          type: "button", class: "quiet", "data-focus": "more", onclick: () => details(person),
          "aria-label": `More of ${person.name}`, "aria-haspopup": "dialog",
        }, "More …"))));
}

function details(person) {
  const likeness = person.cover_likeness === null ? "" : `, likeness ${person.cover_likeness.toFixed(2)}`;
  const facts = table(null, [
    ["Learned", `${new Date(person.created).toLocaleString()}, ${stepsOf(person)}`
      + (person.seconds === null ? "" : ` in ${person.seconds.toFixed(1)} s`)],
    ["From", `${plural(person.photos, "photo", "photos")}, ${person.kept_photos ? "kept" : "not kept"}`],
    ["Face", person.keeps_face ? "kept, for likeness" : "not kept, so that no likeness can be told"],
    ["Cover", person.cover ? `drawn${likeness}` : "is being drawn"],
    ["Model", `${person.model}, ${person.profile}`],
    ["Size", size(person.bytes)],
    ["SHA-256", el("code", { class: "long" }, person.sha256)],
  ]);
  const place = el("div", { class: "problems" });
  const content = [el("div", { class: "scroller" }, facts), ...exporting(person)];
  if (person.kept_photos && state.info.limits.learn_steps) content.push(...anew(person, place));
  content.push(
    el("h3", {}, "Delete"),
    el("p", { class: "hint" }, `All that is kept of ${person.name} goes, with the pictures that show them.`),
    place,
    el("p", { class: "row" }, el("button", {
      type: "button", class: "danger", onclick: () => remove(person, place),
    }, `Delete ${person.name} …`)));
  openDialog("dialog", person.name, ...content);
}

function exporting(person) {
  const link = el("a", { class: "button", download: `${person.name}.zip` }, "Download");
  const ticks = Object.entries(PROGRAMS).map(([value, words]) =>
    el("label", { class: "tick" }, el("input", { type: "checkbox", value, checked: true, onchange: update }), ` ${words}`));
  function update() {
    const wanted = ticks.map((tick) => tick.querySelector("input")).filter((input) => input.checked);
    const query = new URLSearchParams(wanted.map((input) => ["to", input.value]));
    if (wanted.length) link.href = `/v1/identities/${encodeURIComponent(person.name)}/export?${query}`;
    else link.removeAttribute("href");
  }
  update();
  return [el("h3", {}, "Export"), el("fieldset", { class: "flat" },
    el("legend", { class: "hint" }, "For other programs, as a zip file"), ticks), el("p", { class: "row" }, link)];
}

/** Learning again from the photos that were kept. */
function anew(person, place) {
  const steps = state.info.defaults.learn_steps || 25;
  const start = async () => {
    const sent = new FormData();
    const about = {
      name: person.name, consent: true, replace: true, steps, keep_photos: true, keep_face: person.keeps_face,
    };
    for (const [key, value] of Object.entries(about)) sent.append(key, String(value));
    try {
      followed(await call("POST", "/v1/identities", { form: sent }));
      $("dialog").close();
      announce(`${person.name} is being learned anew`);
      lookNow();
    } catch (problem) {
      showProblem(place, problem);
    }
  };
  return [el("h3", {}, "More like them"),
    el("p", { class: "hint" }, `Learns ${person.name} anew from the kept photos. What is here now is replaced.`),
    el("p", { class: "row" }, el("button", { type: "button", onclick: start }, `Learn anew with ${steps} steps`))];
}

async function remove(person, place) {
  const { name } = person;
  const isSure = await ask(`Delete ${name} for good?`,
    `What was learned of ${name}, the photos and the face, if they are kept, and every picture that shows ${name} are `
    + "deleted from the server. This cannot be undone.", "Delete for good", `Keep ${name}`);
  if (!isSure) return;
  let gone;
  try {
    gone = await call("DELETE", `/v1/identities/${encodeURIComponent(name)}`);
  } catch (problem) {
    if (problem.code !== "not-found") { showProblem(place, problem); return; }
    gone = { files: [], pictures: 0 };  // another tab was faster
  }
  $("dialog").close();
  await refreshPeople().catch(() => {});
  dropGallery(name);
  changed("people");
  const words = `${name} is deleted: ${plural(gone.files.length, "file", "files")}, among them `
    + `${plural(gone.pictures, "picture", "pictures")}.`
    + (gone.was_being_learned ? " Learning anew was ended." : "");
  const list = gone.files.length > 0 && el("details", {}, el("summary", {}, "Which files"),
    el("ul", { class: "files" }, gone.files.map((file) => el("li", {}, el("code", { class: "long" }, file)))));
  const note = el("div", { class: "notice" }, el("p", {}, words), list, el("p", { class: "row" },
    el("button", { type: "button", class: "quiet", onclick: () => { note.remove(); $("library-title").focus(); } },
      "Dismiss")));
  $("jobs").prepend(note);
  announce(words);
  $("library-title").focus();
}
