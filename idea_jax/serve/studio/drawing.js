// Having rows drawn, with progress and a way to stop; and one picture looked at closely.

import { call, events } from "./api.js";
import { $, announce, ask, el, openDialog, plural, progressBar, randomSeed, showProblem, size, table } from "./dom.js";
import { removeFromGallery } from "./gallery.js";
import { changed, state } from "./state.js";

export const COMPILING = "Making the program, once for this kind";

/**
 * Draws rows, and hands over each picture as it comes; resolves to whether all were drawn.
 * place: where progress and problems are shown; keep: whether the server keeps the pictures; again: tries once more.
 */
export async function drawRows(rows, { place, keep, onPicture, again }) {
  const stop = new AbortController(), total = rows.length;
  const bar = progressBar(`Drawing ${plural(total, "picture", "pictures")}`);
  const cancel = el("button", { type: "button", onclick: () => stop.abort() }, "Cancel drawing");
  place.replaceChildren(el("div", { class: "card job" }, bar.node, el("p", { class: "row" }, cancel)));
  bar.set(0, 0, "Waiting …");
  announce(`Drawing ${plural(total, "picture", "pictures")}`);
  const began = performance.now();
  let done = 0, said = 0;
  try {
    const likeness = state.info.has_faces;
    for await (const [name, about] of events("/v1/images", { rows, likeness, keep, stream: true }, stop.signal)) {
      if (name === "picture") {
        done += 1;
        onPicture(about);
      } else if (name === "progress" && about.state === "queued") {
        const before = `Waiting: ${plural(about.position, "picture", "pictures")} before these`;
        bar.set(0, 0, about.stage === "compiling" ? `${COMPILING} …` : about.position ? before : "Waiting …");
        continue;
      }
      bar.set(done, done ? total : 0, done ? `${done} of ${total} drawn` : "Drawing …");
      // Not each of many aloud: at every quarter.
      const quarter = Math.floor(4 * done / total);
      if (quarter > said && done < total) announce(`${done} of ${total} drawn`);
      said = quarter;
    }
    if (done < total) throw new Error("The drawing ended early. Try again.");
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    finish(place, cancel, el("p", { class: "hint" }, `${plural(total, "picture", "pictures")} in ${seconds} s`));
    announce(`${plural(total, "picture is", "pictures are")} drawn`);
    return true;
  } catch (problem) {
    const words = done ? `${done} of ${total} were drawn. ` : "";
    if (problem.name === "AbortError") {
      finish(place, cancel, el("p", { class: "hint" }, `Cancelled. ${words}`));
      announce("Drawing was cancelled");
    } else {
      problem.message = `${words}${problem.message}`;
      showProblem(place, problem, again);
    }
    return false;
  } finally {
    if (keep && done) changed("pictures");
  }
}

/** The end of a drawing; the focus goes on from the button that goes. */
function finish(place, cancel, node) {
  const hadFocus = document.activeElement === cancel;
  place.replaceChildren(node);
  if (hadFocus) {
    node.setAttribute("tabindex", "-1");
    node.focus();
  }
}

/** The address of a picture, of the server or of the page's own copy. */
export function addressOf(picture) {
  if (picture.url) return picture.url;
  const bytes = Uint8Array.from(atob(picture.data), (letter) => letter.charCodeAt(0));
  picture.copy ??= URL.createObjectURL(new Blob([bytes], { type: picture.type }));
  return picture.copy;
}

export const peopleOf = (picture) => picture.about.people ?? [];

/** The prompt with the people in it. */
export function promptOf(about) {
  const names = about.people ?? [];
  return about.prompt.replace("{}", names.join(" and ")).replace(/\{([a-z0-9_-]+)\}/g, "$1");
}

export function likenessOf(picture) {
  const found = Object.entries(picture.likeness ?? {});
  if (!found.length) return "";
  if (found.length === 1) return `likeness ${found[0][1].toFixed(2)}`;
  return `likeness ${found.map(([name, value]) => `${name} ${value.toFixed(2)}`).join(", ")}`;
}

/** Why a picture has no likeness, in words. */
export function whyNone(names) {
  const known = state.people.filter((person) => names.includes(person.name));
  if (known.some((person) => !person.keeps_face)) return "no likeness: the face is not kept";
  return "no face was found";
}

export const altOf = (picture) => `${promptOf(picture.about)}, seed ${picture.about.seed}`;

export function downloadLink(picture, attributes = {}) {
  const { about } = picture, kind = picture.type.split("/").pop();
  const name = `${peopleOf(picture).join("-") || "picture"}-seed${about.seed}-${about.number}.${kind}`;
  return el("a", { class: "button quiet", href: addressOf(picture), download: name, ...attributes }, "Download");
}

/** The row that a picture was drawn from, as it is asked for. */
export function rowOf(about) {
  const row = { identity: (about.people ?? []).join(",") };
  for (const name of ["prompt", "negative_prompt", "seed", "number", "height", "width", "num_inference_steps",
    "scheduler", "guidance_scale", "id_strength"]) row[name] = about[name];
  return row;
}

export const anotherSeed = (about) => ({ ...rowOf(about), seed: randomSeed(), number: 0 });

/** A picture on its own, with all its settings. again, use: what its buttons do; null for no button. */
export function lookClosely(picture, { again = null, use = null } = {}) {
  const { about } = picture, place = el("div", { class: "problems" });
  const closing = (action) => () => { $("dialog").close(); action(about); };
  const facts = table(null, [
    ["Who", peopleOf(picture).join(", ")],
    ["Prompt", about.prompt],
    ...(about.negative_prompt ? [["Not on it", about.negative_prompt]] : []),
    ["Seed", `${about.seed}, number ${about.number}`],
    ["Size", `${about.width} × ${about.height}, ${size(picture.bytes)}`],
    ["Steps", `${about.num_inference_steps}, ${about.scheduler}`],
    ["Guidance", String(about.guidance_scale)],
    ["Strength", String(about.id_strength)],
    ["Likeness", likenessOf(picture).replace("likeness ", "") || whyNone(peopleOf(picture))],
    ["Model", String(about.model ?? "")],
    ["Drawn", new Date(picture.created).toLocaleString()],
  ]);
  openDialog("dialog", "Picture",
    el("img", { class: "large", src: addressOf(picture), alt: altOf(picture) }),
    el("p", { class: "row" },
      again && el("button", { type: "button", class: "main", onclick: closing(again) }, "Again with another seed"),
      use && el("button", { type: "button", onclick: closing(use) }, "Use these settings"),
      downloadLink(picture),
      picture.id && el("button", { type: "button", class: "danger", onclick: () => remove(picture, place) }, "Delete …")),
    place,
    el("div", { class: "scroller" }, facts));
}

async function remove(picture, place) {
  const isSure = await ask("Delete this picture for good?", "The server keeps no copy. This cannot be undone.",
    "Delete for good", "Keep it");
  if (!isSure) return;
  try {
    await call("DELETE", `/v1/pictures/${picture.id}`);
  } catch (problem) {
    if (problem.code !== "not-found") { showProblem(place, problem); return; }
  }
  $("dialog").close();
  removeFromGallery(picture.id);
  changed("pictures");
  announce("The picture is deleted");
  $("gallery-title").focus();
}
