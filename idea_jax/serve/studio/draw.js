// Drawing people: who, what, and how.

import { $, announce, clearProblems, el, keyed, plural, randomSeed, refuse } from "./dom.js";
import { anotherSeed, drawRows } from "./drawing.js";
import { addToGallery, startGallery } from "./gallery.js";
import { cover } from "./people.js";
import { on, state } from "./state.js";

const EXAMPLES = 5;  // that are shown: short ones, of all kinds
const chosen = new Set();
let isDrawing = false;

export function startDraw() {
  const form = $("draw");
  fillSettings(state.info.defaults);
  $("seed").value = String(state.info.defaults.seed ?? 0);
  $("negative").value = state.info.defaults.negative_prompt ?? "";
  $("count").max = String(state.info.limits.rows);
  $("prompt").maxLength = $("negative").maxLength = state.info.limits.prompt_letters;
  for (const name of ["width", "height"]) {
    Object.assign($(name), { min: state.info.size_multiple, step: state.info.size_multiple, max: state.info.limits.side });
  }
  $("steps").max = String(state.info.limits.num_inference_steps);
  $("dice").addEventListener("click", () => {
    $("seed").value = String(randomSeed());
    announce(`Seed ${$("seed").value}`);
  });
  for (const name of ["guidance", "strength"]) $(name).addEventListener("input", () => slid(name));
  const short = state.info.examples.filter((text) => text.length <= 40);
  const count = Math.min(EXAMPLES, short.length);
  const shown = Array.from({ length: count }, (_, place) => short[Math.floor(place * short.length / count)]);
  $("examples").replaceChildren(...shown.map((text) => el("button",
    { type: "button", onclick: () => { $("prompt").value = text; announce(`Prompt: ${text}`); } }, text)));
  for (const input of form.elements.namedItem("together")) input.addEventListener("change", castChanged);
  form.addEventListener("submit", submit);
  on("people", render);
  render();
  startGallery();
}

function fillSettings(values) {
  $("width").value = values.width;
  $("height").value = values.height;
  $("steps").value = values.num_inference_steps;
  $("scheduler").replaceChildren(...state.info.schedulers.map((name) => el("option", {}, name)));
  $("scheduler").value = values.scheduler;
  slideTo("guidance", values.guidance_scale);
  slideTo("strength", values.id_strength);
}

/** Sets a slider to what a server begins with, also where its usual range or steps lack that. */
function slideTo(name, value) {
  const slider = $(name);
  slider.min = String(Math.min(Number(slider.min), value));
  slider.max = String(Math.max(Number(slider.max), value));
  slider.value = String(value);
  if (Number(slider.value) !== value) Object.assign(slider, { step: "any", value: String(value) });
  slid(name);
}

function slid(name) {
  $(`${name}-now`).textContent = Number($(name).value).toFixed(name === "strength" ? 2 : 1);
}

/** A list of people to tick. chosen: names, which it changes; changed: called after each change. */
export function castList(list, names, changed) {
  keyed(list, state.people.map(({ name, cover: url }) => ({ name, cover: url })), (person) => person.name, (person) =>
    el("li", {}, el("label", { class: "member" },
      el("input", {
        type: "checkbox", value: person.name, checked: names.has(person.name), "data-focus": "tick",
        onchange: (event) => {
          if (event.target.checked) names.add(person.name); else names.delete(person.name);
          changed();
        },
      }), cover(person), el("span", {}, person.name))));
}

/** Leaves out who is gone; takes the newest where nobody is chosen. */
export function tidy(names) {
  const here = state.people.map((person) => person.name);
  for (const name of names) if (!here.includes(name)) names.delete(name);
  if (!names.size && here.length) names.add(here[0]);
}

function render() {
  const form = $("draw");
  tidy(chosen);
  form.querySelector("[data-when=nobody]").hidden = state.people.length > 0;
  castList($("cast"), chosen, castChanged);
  castChanged();
}

function together() {
  return chosen.size > 1 && $("draw").elements.namedItem("together").value === "1";
}

function castChanged() {
  $("together-row").hidden = chosen.size < 2;
  const names = orderedNames().map((name) => `{${name}}`);
  $("prompt-hint").replaceChildren(...(together()
    ? [el("code", {}, "{}"), ` stands for ${names.join(" and ")}. Or write each name where it belongs.`]
    : [el("code", {}, "{}"), " stands for the person."]));
}

/** Whom to draw, in the order of the list. */
function orderedNames() {
  return state.people.map((person) => person.name).filter((name) => chosen.has(name));
}

/** Goes to this part with one person chosen. */
export function drawPerson(name) {
  chosen.clear();
  chosen.add(name);
  for (const input of $("cast").querySelectorAll("input")) input.checked = input.value === name;
  castChanged();
  location.hash = "#draw";
}

function wrongNumber(form) {
  const fields = { count: "a number of pictures", seed: "a seed", width: "a width", height: "a height", steps: "steps" };
  for (const [id, words] of Object.entries(fields)) {
    const field = $(id);
    if (field.value !== "" && field.checkValidity()) continue;
    const step = field.step && field.step !== "1" ? `, a multiple of ${field.step}` : "";
    refuse(form, field, `Give ${words} from ${field.min || 0} to ${field.max}${step}.`);
    return true;
  }
  return false;
}

async function submit(event) {
  event.preventDefault();
  const form = event.currentTarget, names = orderedNames();
  clearProblems(form);
  let prompt = $("prompt").value.trim();
  const { rows: most, people_per_row: mostPeople } = state.info.limits;
  if (!names.length) return refuse(form, $("cast").querySelector("input") ?? $("prompt"), "Choose who is to be drawn.");
  if (!/\{[a-z0-9_-]*\}/.test(prompt)) return refuse(form, $("prompt"), "Say where the person is: write {} in the prompt.");
  if (wrongNumber(form)) return undefined;
  if (together() && mostPeople && names.length > mostPeople) {
    return refuse(form, $("prompt"), `At most ${mostPeople} people are on one picture: choose fewer.`);
  }
  if (together()) prompt = prompt.replaceAll("{}", names.map((name) => `{${name}}`).join(" and "));
  const count = Number($("count").value), casts = together() ? [names.join(",")] : names;
  if (count * casts.length > most) {
    return refuse(form, $("count"), `That is ${count * casts.length} pictures, and ${most} may be drawn at once.`);
  }
  const settings = {
    prompt, negative_prompt: $("negative").value.trim(), seed: Number($("seed").value),
    height: Number($("height").value), width: Number($("width").value),
    num_inference_steps: Number($("steps").value), guidance_scale: Number($("guidance").value),
    id_strength: Number($("strength").value), scheduler: $("scheduler").value,
  };
  const numbers = [...Array(count).keys()];
  return start(casts.flatMap((identity) => numbers.map((number) => ({ identity, ...settings, number }))));
}

/** Draws rows into the gallery, one request after the other. */
async function start(rows) {
  if (isDrawing) {
    announce("Something is being drawn: wait for it, or cancel it");
    return;
  }
  const button = $("draw").querySelector("button[type=submit]");
  isDrawing = true;
  button.setAttribute("aria-disabled", "true");
  button.textContent = `Drawing ${plural(rows.length, "picture", "pictures")} …`;
  let left = rows;
  const onPicture = (picture) => {
    left = left.filter((row) => row !== rows[picture.row]);
    addToGallery(picture);
  };
  await drawRows(rows, { place: $("drawing"), keep: true, onPicture, again: () => start(left) });
  isDrawing = false;
  button.removeAttribute("aria-disabled");
  button.textContent = "Draw";
}

/** The same picture with another seed. */
export function drawAgain(about) {
  return start([anotherSeed(about)]);
}

/** Puts the settings of a picture into the form. */
export function useSettings(about) {
  const names = about.people ?? [], here = names.filter((name) => state.people.some((person) => person.name === name));
  if (here.length) {
    chosen.clear();
    for (const name of here) chosen.add(name);
    for (const input of $("cast").querySelectorAll("input")) input.checked = chosen.has(input.value);
    $("draw").elements.namedItem("together").value = here.length > 1 ? "1" : "";
  }
  fillSettings(about);
  $("prompt").value = about.prompt;
  $("negative").value = about.negative_prompt ?? "";
  $("seed").value = about.seed;
  castChanged();
  announce("The settings are taken over");
  $("prompt").focus();
}
