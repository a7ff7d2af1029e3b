// The pictures that the server keeps, the newest first.

import { call } from "./api.js";
import { $, el, keyed } from "./dom.js";
import { addressOf, altOf, downloadLink, likenessOf, lookClosely, peopleOf, promptOf } from "./drawing.js";
import { drawAgain, useSettings } from "./draw.js";
import { on, onOtherTab, state } from "./state.js";

const PAGE = 24;  // pictures at once
let pictures = [], next = null, isOpen = false;

export function startGallery() {
  isOpen = true;
  $("of-whom").addEventListener("change", load);
  $("older").addEventListener("click", older);
  on("people", choices);
  onOtherTab(load);
  choices();
  load();
}

function choices() {
  const select = $("of-whom"), chosen = select.value, names = state.people.map((person) => person.name);
  const options = names.map((name) => el("option", { value: name }, name));
  select.replaceChildren(el("option", { value: "" }, "everybody"), ...options);
  select.value = names.includes(chosen) ? chosen : "";
  if (select.value !== chosen) load();
}

async function page(before) {
  const query = new URLSearchParams({ limit: PAGE });
  if ($("of-whom").value) query.set("identity", $("of-whom").value);
  if (before) query.set("before", before);
  return call("GET", `/v1/pictures?${query}`);
}

/** Shows the newest pictures. */
export async function load() {
  if (!isOpen) return;
  try {
    ({ pictures, next } = await page(null));
  } catch {
    return;  // what is shown stays
  }
  render();
}

async function older() {
  const known = pictures.length;
  try {
    const found = await page(next);
    pictures = [...pictures, ...found.pictures];
    ({ next } = found);
  } catch {
    return;
  }
  render();
  $("gallery").children[known]?.querySelector("button")?.focus();
}

export function addToGallery(picture) {
  const only = $("of-whom").value;
  if (only && !peopleOf(picture).includes(only)) return;
  pictures = [picture, ...pictures.filter((one) => one.id !== picture.id)];
  render();
}

export function removeFromGallery(id) {
  pictures = pictures.filter((picture) => picture.id !== id);
  render();
}

/** Takes out the pictures of somebody who was deleted. */
export function dropGallery(name) {
  pictures = pictures.filter((picture) => !peopleOf(picture).includes(name));
  render();
}

function render() {
  $("no-pictures").hidden = pictures.length > 0;
  $("older").hidden = !next;
  keyed($("gallery"), pictures, (picture) => picture.id, tile);
}

function tile(picture) {
  const { about } = picture;
  const closer = () => lookClosely(picture, { again: drawAgain, use: useSettings });
  return el("li", { class: "tile" },
    el("button", { type: "button", class: "thumb", onclick: closer, "data-focus": "thumb", "aria-haspopup": "dialog" },
      el("img", { src: addressOf(picture), alt: altOf(picture), loading: "lazy" })),
    el("p", { class: "words" }, promptOf(about)),
    el("p", { class: "hint" }, [`seed ${about.seed}${about.number ? ` + ${about.number}` : ""}`, likenessOf(picture)]
      .filter(Boolean).join(" · ")),
    el("p", { class: "row" },
      el("button", {
        type: "button", class: "quiet", "data-focus": "again", onclick: () => drawAgain(about),
        "aria-label": `Again with another seed: ${promptOf(about)}`, title: "Again with another seed",
      }, "Again"),
      downloadLink(picture, { "aria-label": `Download: ${altOf(picture)}`, "data-focus": "download" })));
}
