// Making and changing parts of the page. Text from the server is only ever set as text.

export const $ = (id) => document.getElementById(id);

/** An element: el("p", {class: "hint", onclick: f, hidden: true}, "text", another). */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

/** Says something to those who hear the page. */
export function announce(text) {
  $("live").textContent = "";
  // The same text twice is a change only if it was gone in between.
  setTimeout(() => { $("live").textContent = text; }, 30);
}

/**
 * Shows a node for each item. Nodes of unchanged items stay as they are, and the focus stays where it was.
 * make: an item -> its node; what can have the focus in it has a data-focus of its own.
 */
export function keyed(parent, items, keyOf, make) {
  const old = new Map([...parent.children].map((node) => [node.dataset.key, node]));
  const active = parent.contains(document.activeElement) ? document.activeElement : null;
  const place = active && { key: active.closest("[data-key]")?.dataset.key, part: active.dataset.focus };
  const nodes = items.map((item) => {
    const key = String(keyOf(item)), mark = JSON.stringify(item), before = old.get(key);
    if (before && before.mark === mark) return before;
    const node = make(item);
    node.dataset.key = key;
    node.mark = mark;
    return node;
  });
  if (nodes.length === parent.children.length && nodes.every((node, i) => node === parent.children[i])) return;
  parent.replaceChildren(...nodes);
  if (!place) return;
  const holder = nodes.find((node) => node.dataset.key === place.key);
  const part = holder && [...holder.querySelectorAll("[data-focus]")].find((node) => node.dataset.focus === place.part);
  part?.focus({ preventScroll: true });
}

/** The words of a problem, beside what caused it; also said aloud. again: what may be tried again. */
export function showProblem(place, problem, again = null) {
  const parts = (problem.errors ?? []).filter((one) => one.detail && !problem.message.includes(one.detail));
  place.replaceChildren(
    el("div", { class: "problem", role: "alert" },
      el("p", {}, el("b", {}, problem.title ? `${problem.title}. ` : ""), problem.message),
      parts.length > 0 && el("ul", {}, parts.slice(0, 6).map((one) => el("li", {}, `${inWords(one.where)}: ${one.detail}`))),
      again && el("p", { class: "row" }, el("button", { type: "button", onclick: again }, "Try again")),
    ),
  );
}

/** "rows[2].prompt" as people count. */
function inWords(where) {
  return String(where)
    .replace(/rows\[(\d+)\]\.?/, (_, n) => `picture ${Number(n) + 1} `)
    .replace(/photos\[(\d+)\]/, (_, n) => `photo ${Number(n) + 1}`)
    .trim();
}

/** What the server says of a photo, in the words of this page. */
export function ofPhoto(text) {
  if (/no face found/.test(text)) return "No face was found. Take a photo with a larger, clearer face.";
  return text.charAt(0).toUpperCase() + text.slice(1);
}

/** Marks a field as wrong, says why, and goes there. */
export function refuse(form, field, text) {
  clearProblems(form);
  field.setAttribute("aria-invalid", "true");
  const drop = () => field.removeAttribute("aria-invalid");
  field.addEventListener("input", drop, { once: true });
  const hidden = field.closest("details");
  if (hidden) hidden.open = true;
  showProblem(form.querySelector(".problems"), { message: text, errors: [] });
  field.focus();
}

export function clearProblems(form) {
  form.querySelector(".problems").replaceChildren();
  for (const field of form.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
}

/** Opens a dialog with a title, its content, and a way out. */
export function openDialog(id, title, ...content) {
  const dialog = $(id);
  const heading = el("h2", { id: `${id}-title`, tabindex: "-1" }, title);
  const close = el("button", { type: "button", class: "quiet", onclick: () => dialog.close() }, "Close");
  dialog.replaceChildren(el("div", { class: "dialog-head" }, heading, close), ...content);
  if (!dialog.open) dialog.showModal();
  return dialog;
}

/** Asks before something that cannot be undone; resolves to whether it is wanted. */
export function ask(title, text, yes, no) {
  const dialog = $("question");
  return new Promise((resolve) => {
    const answer = (value) => () => dialog.close(value);
    dialog.replaceChildren(
      el("h2", { id: "question-title" }, title),
      el("p", {}, text),
      el("p", { class: "row" },
        el("button", { type: "button", autofocus: true, onclick: answer("") }, no),
        el("button", { type: "button", class: "danger", onclick: answer("yes") }, yes)),
    );
    dialog.returnValue = "";
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
    dialog.showModal();
  });
}

/** A progress bar with a name and words. set(done, total, text); total 0 for no end in sight. */
export function progressBar(label) {
  const bar = el("progress", { "aria-label": label, max: "1" });
  const words = el("p", { class: "hint" });
  const set = (done, total, text) => {
    if (total > 0) { bar.max = total; bar.value = done; } else bar.removeAttribute("value");
    words.textContent = text;
  };
  return { node: el("div", { class: "progress" }, bar, words), set };
}

/** A table of rows of texts; `head` as the first row. */
export function table(head, rows) {
  return el("table", {},
    head && el("thead", {}, el("tr", {}, head.map((text) => el("th", { scope: "col" }, text)))),
    el("tbody", {}, rows.map(([first, ...rest]) =>
      el("tr", {}, el("th", { scope: "row" }, first), rest.map((text) => el("td", {}, text))))));
}

const UNITS = ["bytes", "KB", "MB", "GB"];

export function size(bytes) {
  let value = bytes, unit = 0;
  while (value >= 1000 && unit < UNITS.length - 1) { value /= 1000; unit += 1; }
  return `${unit ? value.toFixed(value < 10 ? 1 : 0) : value} ${UNITS[unit]}`;
}

export function day(time) {
  return new Date(time).toLocaleDateString(undefined, { day: "numeric", month: "short", year: "numeric" });
}

export const plural = (number, one, many) => `${number} ${number === 1 ? one : many}`;
export const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];
