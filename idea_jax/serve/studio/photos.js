// The photos that somebody is to be learned from: looked at by the server as soon as they are chosen.

import { call } from "./api.js";
import { $, announce, el, ofPhoto, plural, showProblem, size } from "./dom.js";
import { state } from "./state.js";

// Of each photo: file, url (of the browser's own copy), looked (the server's answer), face (the chosen one).
let photos = [];
let made = 0;

export const chosenPhotos = () => photos;

export const isLooking = () => photos.some((photo) => !photo.looked);

/** Photos that cannot be learned from. */
export const unusable = () => photos.filter((photo) => photo.looked?.problem);

export function clearPhotos() {
  for (const photo of photos) URL.revokeObjectURL(photo.url);
  photos = [];
  render();
}

/** Takes files, and has the server look for faces on them. */
export async function addFiles(files) {
  const place = $("learn").querySelector(".problems");
  place.replaceChildren();
  const { photos: most, photo_bytes: bytes } = state.info.limits;
  let wanted = [...files];
  const large = wanted.filter((file) => file.size > bytes);
  wanted = wanted.filter((file) => file.size <= bytes);
  const room = most - photos.length;
  if (large.length || wanted.length > room) {
    const message = large.length
      ? `${large.map((file) => file.name).join(", ")}: a photo may have ${size(bytes)} at most. Scale it down.`
      : `At most ${most} photos are taken: the others were left out.`;
    showProblem(place, { message, errors: [] });
  }
  const added = wanted.slice(0, Math.max(0, room)).map((file) => (
    { file, url: URL.createObjectURL(file), looked: null, face: null, key: (made += 1) }));
  if (!added.length) return;
  photos.push(...added);
  render();
  announce(`Looking for faces on ${plural(added.length, "photo", "photos")}`);
  for (const photo of added) await look(photo, place);
  const bad = added.filter((photo) => photo.looked?.problem).length;
  if (added.every((photo) => photo.looked)) {
    announce(bad ? `${plural(bad, "photo", "photos")} cannot be used` : added.map(told).join(". "));
  }
}

async function look(photo, place) {
  const form = new FormData();
  form.append("photos", photo.file);
  try {
    [photo.looked] = (await call("POST", "/v1/faces", { form })).photos;
    photo.face = photo.looked.chosen;
  } catch (problem) {
    photos = photos.filter((one) => one !== photo);
    showProblem(place, problem, () => addFiles([photo.file]));
  }
  render();
}

function told(photo) {
  const { looked } = photo;
  if (!looked) return "Looking for faces …";
  if (looked.problem) return ofPhoto(looked.problem);
  if (looked.faces.length === 1) return "1 face found";
  return `${looked.faces.length} faces found. Choose one: number ${photo.face + 1} from the left is taken.`;
}

function remove(photo) {
  const place = photos.indexOf(photo);
  URL.revokeObjectURL(photo.url);
  photos = photos.filter((one) => one !== photo);
  render();
  const next = $("looked").children[Math.min(place, photos.length - 1)];
  (next?.querySelector("button") ?? $("photos")).focus();
  announce("The photo is taken out");
}

function render() {
  const focused = document.activeElement?.closest?.("#looked") ? document.activeElement.id : null;
  $("looked").replaceChildren(...photos.map(item));
  if (focused) $(focused)?.focus({ preventScroll: true });
}

function item(photo, place) {
  const { looked } = photo, number = place + 1;
  const image = el("img", { src: photo.url, alt: `Photo ${number}` });
  const frame = el("div", { class: "frame" }, image);
  // What the browser cannot show, such as HEIC, still has a place for its faces.
  image.addEventListener("error", () => {
    frame.classList.add("unseen-picture");
    if (looked?.width) frame.style.aspectRatio = `${looked.width} / ${looked.height}`;
  }, { once: true });
  const many = (looked?.faces.length ?? 0) > 1;
  const boxes = (looked?.faces ?? []).map((face) => box(photo, face, many));
  const faces = many
    ? el("fieldset", { class: "boxes" }, el("legend", { class: "unseen" }, `Face on photo ${number}`), boxes)
    : el("div", { class: "boxes" }, boxes);
  frame.append(faces);
  const bad = Boolean(looked?.problem);
  return el("li", { class: ["photo", bad && "bad", many && "many"].filter(Boolean).join(" "), "aria-busy": looked ? null : "true" },
    frame,
    el("div", { class: "photo-words" },
      el("p", {}, bad && el("b", {}, "Cannot be used. "), told(photo)),
      el("button", {
        type: "button", class: "quiet", id: `remove-${photo.key}`, onclick: () => remove(photo),
        "aria-label": `Take out photo ${number}`,
      }, "Take out")));
}

function box(photo, face, isChoice) {
  const { width, height } = photo.looked, [left, top, right, bottom] = face.box;
  const number = String(face.number + 1), id = `face-${photo.key}-${face.number}`;
  const inner = isChoice
    ? el("label", { class: bottom - top < 0.4 * height ? "box low" : "box" },
      el("input", {
        type: "radio", name: `face-${photo.key}`, id, checked: photo.face === face.number,
        "aria-label": `Face ${number} from the left`,
        onchange: () => { photo.face = face.number; announce(`Face ${number} from the left is taken`); words(photo); },
      }), el("span", { "aria-hidden": "true" }, number))
    : el("span", { class: "box sole" });
  inner.style.left = `${Math.max(0, 100 * left / width)}%`;
  inner.style.top = `${Math.max(0, 100 * top / height)}%`;
  inner.style.width = `${100 * (Math.min(right, width) - Math.max(left, 0)) / width}%`;
  inner.style.height = `${100 * (Math.min(bottom, height) - Math.max(top, 0)) / height}%`;
  return inner;
}

function words(photo) {
  const node = $("looked").children[photos.indexOf(photo)];
  node.querySelector(".photo-words p").textContent = told(photo);
}
