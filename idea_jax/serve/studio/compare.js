// Tables of pictures: people and prompts, or strengths and guidance of one person.

import { $, clearProblems, el, refuse } from "./dom.js";
import { castList, tidy } from "./draw.js";
import { addressOf, altOf, drawRows, likenessOf, lookClosely, peopleOf, promptOf, whyNone } from "./drawing.js";
import { on, state } from "./state.js";

const chosen = new Set();
let isBusy = false, copies = [];

export function startCompare() {
  const form = $("compare");
  $("compare-steps").value = state.info.defaults.num_inference_steps;
  $("compare-steps").max = String(state.info.limits.num_inference_steps);
  $("compare-prompts").value = ["a photo of {}", ...state.info.examples.slice(0, 2)].join("\n");
  for (const input of form.elements.namedItem("grid")) input.addEventListener("change", kindChanged);
  form.addEventListener("submit", submit);
  on("people", render);
  render();
  for (const person of state.people.slice(0, 2)) chosen.add(person.name);
  for (const input of $("compare-cast").querySelectorAll("input")) input.checked = chosen.has(input.value);
  kindChanged();
}

const isOfPrompts = () => $("compare").elements.namedItem("grid").value === "prompts";

function kindChanged() {
  const kind = $("compare").elements.namedItem("grid").value;
  for (const part of $("compare").querySelectorAll("[data-grid]")) part.hidden = part.dataset.grid !== kind;
  $("compare-prompts-label").textContent = isOfPrompts() ? "Prompts, one on each line" : "Prompt";
  $("compare-prompts").rows = isOfPrompts() ? 4 : 2;
}

function render() {
  tidy(chosen);
  $("compare").querySelector("[data-when=nobody]").hidden = state.people.length > 0;
  castList($("compare-cast"), chosen, () => {});
  const select = $("compare-one"), before = select.value;
  select.replaceChildren(...state.people.map((person) => el("option", { value: person.name }, person.name)));
  if (state.people.some((person) => person.name === before)) select.value = before;
}

/** Numbers between commas; null where something else stands there. */
function numbersOf(text) {
  const found = text.split(/[,;\s]+/).filter(Boolean).map(Number);
  return found.length && found.every((value) => Number.isFinite(value) && value >= 0) ? found : null;
}

/** {rows: heads, columns: heads, cell: (r, c) -> row to draw} of the form; null if it was refused. */
function plan(form) {
  const prompts = $("compare-prompts").value.split("\n").map((line) => line.trim()).filter(Boolean);
  const common = { seed: Number($("compare-seed").value), num_inference_steps: Number($("compare-steps").value), number: 0 };
  const no = (field, text) => { refuse(form, field, text); return null; };
  for (const id of ["compare-seed", "compare-steps"]) {
    const field = $(id);
    if (!field.value || !field.checkValidity()) return no(field, `Give a number from ${field.min} to ${field.max}.`);
  }
  if (!prompts.length) return no($("compare-prompts"), "Write a prompt.");
  const lost = prompts.find((prompt) => !prompt.includes("{}"));
  if (lost) return no($("compare-prompts"), `Say where the person is: write {} in “${lost}”.`);
  if (isOfPrompts()) {
    const names = state.people.map((person) => person.name).filter((name) => chosen.has(name));
    if (!names.length) return no($("compare-cast").querySelector("input") ?? $("compare-prompts"), "Choose somebody.");
    return {
      rows: prompts, columns: names,
      cell: (r, c) => ({ identity: names[c], prompt: prompts[r], ...common }),
    };
  }
  const name = $("compare-one").value;
  if (!name) return no($("compare-one"), "Nobody is here yet: learn somebody first.");
  const strengths = numbersOf($("strengths").value), scales = numbersOf($("guidances").value);
  if (!strengths) return no($("strengths"), "Give numbers with commas between them, such as 0.5, 1, 1.5.");
  if (!scales) return no($("guidances"), "Give numbers with commas between them, such as 1.5, 3, 6.");
  return {
    rows: strengths.map((value) => `strength ${value}`), columns: scales.map((value) => `guidance ${value}`),
    cell: (r, c) => ({
      identity: name, prompt: prompts[0], id_strength: strengths[r], guidance_scale: scales[c], ...common,
    }),
  };
}

async function submit(event) {
  event.preventDefault();
  if (isBusy) return;
  const form = event.currentTarget;
  clearProblems(form);
  const found = plan(form);
  if (!found) return;
  const total = found.rows.length * found.columns.length, most = state.info.limits.rows;
  if (total > most) {
    refuse(form, $("compare-prompts"), `That is ${total} pictures, and ${most} may be drawn at once. Take fewer.`);
    return;
  }
  const button = form.querySelector("button[type=submit]");
  isBusy = true;
  button.setAttribute("aria-disabled", "true");
  const cells = lay(found);
  const rows = found.rows.flatMap((_, r) => found.columns.map((_, c) => found.cell(r, c)));
  const isWhole = await drawRows(rows, {
    place: $("grid-progress"), keep: false, onPicture: (picture) => fill(cells[picture.row], picture),
    again: () => form.requestSubmit(),
  });
  if (!isWhole) for (const cell of cells) if (!cell.querySelector("img")) cell.replaceChildren("not drawn");
  isBusy = false;
  button.removeAttribute("aria-disabled");
}

/** An empty table; returns its cells, row after row. */
function lay(found) {
  for (const copy of copies) URL.revokeObjectURL(copy);
  copies = [];
  const cells = found.rows.flatMap(() => found.columns.map(() => el("td", {}, el("span", { class: "wait" }, "…"))));
  const width = found.columns.length;
  $("grid").replaceChildren(el("table", { class: "grid" },
    el("thead", {}, el("tr", {}, el("td", {}), found.columns.map((text) => el("th", { scope: "col" }, text)))),
    el("tbody", {}, found.rows.map((text, r) =>
      el("tr", {}, el("th", { scope: "row" }, text), cells.slice(r * width, (r + 1) * width))))));
  $("grid").hidden = false;
  $("no-grid").hidden = true;
  return cells;
}

function fill(cell, picture) {
  copies.push(addressOf(picture));
  const names = peopleOf(picture);
  cell.replaceChildren(
    el("button", {
      type: "button", class: "thumb", onclick: () => lookClosely(picture), "aria-haspopup": "dialog",
      "aria-label": `${promptOf(picture.about)}: look closely`,
    }, el("img", { src: addressOf(picture), alt: altOf(picture) })),
    el("p", { class: "hint" }, likenessOf(picture) || whyNone(names)));
}
