"use strict";
const settings = JSON.parse(document.body.dataset.settings);
const byId = (id) => document.getElementById(id);
const translate = (text, ...values) => {
  let translated = settings.texts[text] ?? text;
  for (const value of values) translated = translated.replace("{}", value);
  return translated;
};
const create = (name, attributes = {}, ...children) => {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
};

let decisions = []; // Of all items, in their order; "" for an open item.
let item = null; // Item that the page shows.
// The answer without its boxes, and new texts of its JSON fields.
let answerText = "", edits = {};
let boxes = [], selected = -1, imageIndex = 0;
let loadedAnswer = ""; // The answer as loaded, to find unsaved edits.
let isSaving = false, decided = []; // Items decided on this page, newest last.

// Requests

const request = async (url, body) => {
  const options = body && {
    method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
  const response = await fetch(url, options);
  if (response.status === 401) location.reload();
  const content = await response.json();
  if (!response.ok) throw new Error(content.error ?? content.detail ?? response.status);
  return content;
};

const describe = (error) =>
  error instanceof TypeError ? translate("The server does not answer.") : error.message;
const report = (error) => {
  byId("error").textContent = `${translate("Not saved")}: ${describe(error)}`;
  byId("error").hidden = false;
};

const showCounts = (counts) => {
  byId("counts").textContent = Object.entries(counts)
    .map(([name, count]) => `${translate(name)} ${count}`).join(" · ");
};

const open = async (index, select = -1) => {
  try {
    const loaded = await request(`items/${index}`);
    keepDraft();
    item = loaded;
    selected = select;
    imageIndex = item.answer.boxes[0]?.image ?? 0;
    boxes = structuredClone(item.answer.boxes);
    answerText = item.answer.text;
    edits = {};
    loadedAnswer = JSON.stringify(readAnswer());
    const draft = JSON.parse(sessionStorage.getItem(`draft/${item.id}`));
    if (draft?.loadedAnswer === loadedAnswer) ({ answerText, edits, boxes } = draft);
    byId("error").hidden = true;
    location.hash = index;
    show();
    markListed();
    // An empty text has the focus, so that the letters of the answer are no commands.
    const isReadable = !item.images.some((image) => image.error);
    const isEmpty = isReadable && !answerText && item.decision === "open";
    if (isEmpty && ["text", "fields"].includes(settings.kind)) edit();
    return true;
  } catch (error) {
    report(error);
    return false;
  }
};

// Keep unsaved edits when another image is opened or the page is reloaded.
const keepDraft = () => {
  if (!item) return;
  if (JSON.stringify(readAnswer()) === loadedAnswer) sessionStorage.removeItem(`draft/${item.id}`);
  else sessionStorage.setItem(`draft/${item.id}`, JSON.stringify({ loadedAnswer, answerText, edits, boxes }));
};
addEventListener("pagehide", keepDraft);

const findOpen = (index) => {
  for (let step = 1; step <= decisions.length; step++) {
    const other = (index + step) % decisions.length;
    if (!decisions[other]) return other;
  }
  return -1;
};

const decide = async (action) => {
  if (!item || isSaving) return;
  isSaving = true;
  try {
    const { index } = item;
    const result = await request("decision", { id: item.id, action, ...readAnswer() });
    loadedAnswer = JSON.stringify(readAnswer());
    decisions[index] = action === "reopen" ? "" : result.item.decision;
    showCounts(result.counts);
    showList();
    if (action === "reopen") return;
    decided.push(index);
    document.activeElement?.blur?.();
    const next = findOpen(index);
    await open(next < 0 ? index : next);
    if (next < 0) byId("counts").textContent += ` · ${translate("All images are decided.")}`;
  } catch (error) {
    report(error);
  } finally { isSaving = false; }
};

const undo = async () => {
  if (!item || isSaving) return;
  if (!byId("error").hidden) {
    // Nothing was saved, so the answer stays as it is.
    byId("error").hidden = true;
    return;
  }
  const index = decided.length ? decided.pop() : decisions[item.index] ? item.index : -1;
  if (index < 0) return;
  if (!await open(index)) return;
  await decide("reopen");
  await open(index);
};

// Answer

const readAnswer = () => {
  const hasFields = item.fields.length && (!boxes.length || Object.keys(edits).length);
  // The server replaces the fields: numbers of JavaScript have fewer digits than those of JSON.
  return { text: answerText, edits: hasFields ? edits : null, boxes };
};

const getConfidence = (path) => item.parts.find(
  (part) => JSON.stringify(part.path) === JSON.stringify(path))?.confidence;

const makeBadge = (confidence) => {
  if (confidence === undefined || confidence === null) return "";
  const level = confidence < 0.5 ? "low" : confidence < 0.9 ? "medium" : "high";
  return create("span", { class: `badge ${level}` }, `${Math.floor(100 * confidence)} %`);
};

const formatAnswer = ({ text, boxes: shown }) => [text, ...shown.map((box) =>
  `${box.label ?? ""} [${box.xyxy.map(Math.round).join(", ")}]`)].join("\n").trim();

// List of all images

let listed = 0, listRequest = 0;
const showList = async (start = 0) => {
  if (!byId("list").open) return;
  const number = ++listRequest;
  const query = new URLSearchParams({ text: byId("list-text").value, state: byId("list-state").value, start });
  try {
    const found = await request(`search?${query}`);
    // The answer to an earlier request may come later.
    if (number !== listRequest) return;
    const rows = found.items.map(({ index, name, decision, answer }) => create("li", {}, create("button",
      { type: "button", "data-index": index, onclick: () => openListed(index) },
      create("span", {}, name), " ", create("span", { class: "chip" }, translate(decision)), " ",
      create("span", { class: "answer" }, answer))));
    if (start) byId("list-items").append(...rows);
    else byId("list-items").replaceChildren(...rows);
    listed = start + rows.length;
    byId("list-count").textContent = translate("{} images", found.count);
    byId("list-more").hidden = listed >= found.count;
    markListed();
  } catch (error) { byId("list-count").textContent = describe(error); }
};
let searchTimer;
const openListed = async (index) => {
  document.activeElement?.blur?.();
  if (await open(index)) window.scrollTo(0, 0);
};
const markListed = () => {
  for (const button of document.querySelectorAll("#list-items button")) {
    button.setAttribute("aria-current", Number(button.dataset.index) === item?.index);
  }
};
byId("list").addEventListener("toggle", () => showList());
byId("list-state").addEventListener("change", () => showList());
byId("list-text").addEventListener("input", () => {
  clearTimeout(searchTimer);
  searchTimer = setTimeout(showList, 200);
});
byId("list-more").addEventListener("click", () => showList(listed));

// Page

const show = () => {
  const { history, answer, suggestion } = item;
  byId("position").textContent = translate("{} of {}", item.index + 1, decisions.length);
  byId("decision").textContent = translate(item.decision);
  byId("confidence").textContent = item.score !== null
    ? translate("error score {}", item.score.toFixed(2))
    : item.suggestion
      ? translate("confidence {}", `${Math.floor(100 * item.confidence)} %`) : translate("No suggestion");
  byId("history").hidden = !history.length;
  byId("history").querySelector("ol").replaceChildren(...history.map((entry) => create(
    "li", {}, `${entry.time.slice(0, 19).replace("T", " ")} ${translate(entry.event)} ${entry.model}`,
    ...(entry.old ? [create("div", { class: "small" }, translate("before:"), " ",
      create("del", {}, formatAnswer(entry.old)))] : []),
    ...(entry.new ? [create("div", { class: "small" }, ...(entry.old ? [translate("after:"), " "] : []),
      create("ins", {}, formatAnswer(entry.new)))] : []))));
  const hints = [];
  const isShown = JSON.stringify(suggestion) === JSON.stringify(answer);
  if (suggestion && (item.has_template || !isShown)) hints.push([translate("The model suggests:"), suggestion]);
  if (item.has_template && answer.text && !isShown) hints.push([translate("Answer without JSON:"), answer]);
  byId("hint").hidden = !hints.length;
  byId("hint").replaceChildren(...hints.flatMap(([title, shown]) => [
    create("p", { class: "small soft" }, title), create("pre", {}, formatAnswer(shown))]));
  byId("save").disabled = item.images.some((image) => image.error);
  showForm();
  showImage();
};

const showForm = () => {
  const form = byId("form");
  const rows = boxes.map((box, index) => create(
    "div", { class: `row${index === selected ? " selected" : ""}`, style: `--color: ${getColor(index)}`,
      onfocusin: () => { if (selected !== index) select(index, false); } },
    create("label", { for: `box-${index}` }, translate("Box {}", index + 1), " ",
      makeBadge(isUnchangedBox(index) ? getConfidence([index]) : null)),
    makeChoice(`box-${index}`, box.label ?? "", (value) => { box.label = value || null; drawBoxes(); }),
    create("button", { type: "button", "aria-label": `${translate("Delete")} ${translate("Box {}", index + 1)}`,
      onclick: () => remove(index) }, "✕")));
  if (item.fields.length) {
    rows.push(...item.fields.map(({ path, text }, index) => create("div", { class: "row" },
      create("label", { for: `field-${index}` }, path.join("."), " ", makeBadge(getConfidence(path))),
      makeInput(`field-${index}`, edits[index] ?? text, (edited) => {
        if (edited === text) delete edits[index];
        else edits[index] = edited;
      }))));
  } else {
    const isBoxes = settings.kind === "boxes", change = (value) => { answerText = value; };
    const isChoice = settings.kind === "classes" && settings.choices.length;
    const name = isChoice ? "Class" : settings.kind === "fields" ? "JSON" : "Text";
    const label = create("label", { for: "answer" }, translate(name), " ",
      makeBadge(getConfidence([])));
    const input = isChoice ? makeChoice("answer", answerText, change)
      : create("textarea", { id: "answer", rows: isBoxes ? 1 : 6, oninput: () => change(input.value) });
    if (!isChoice) input.value = answerText;
    rows.push(create("div", { class: "row" }, label, input, ...(isBoxes ? [create("button",
      { type: "button", onclick: clear }, translate("No objects"), " ", create("kbd", {}, "0"))] : [])));
  }
  form.replaceChildren(...rows);
};

const makeInput = (id, value, onInput) => {
  const input = create("input", { id, oninput: () => onInput(input.value) });
  input.value = value;
  return input;
};

const makeChoice = (id, value, onInput) => {
  if (!settings.choices.length) return makeInput(id, value, onInput);
  const names = settings.choices.includes(value) ? settings.choices : [value, ...settings.choices];
  const choice = create("select", { id, onchange: () => onInput(choice.value) },
    ...names.map((name) => create("option", { value: name }, name)));
  choice.value = value;
  return choice;
};

const isUnchangedBox = (index) =>
  JSON.stringify(item.suggestion?.boxes[index]) === JSON.stringify(boxes[index]);

const choose = (index) => {
  const name = settings.choices[index];
  if (name === undefined) return;
  if (settings.kind === "classes") byId("answer").value = answerText = name;
  else if (boxes[selected]) {
    boxes[selected].label = name;
    showForm();
    drawBoxes();
  }
};

// Image and boxes

const getColor = (index) => settings.colors[index % settings.colors.length];

const showImage = () => {
  const shown = item.images[imageIndex];
  byId("stage").hidden = !shown || shown.error;
  byId("unreadable").hidden = !shown?.error;
  byId("name").textContent = shown?.name ?? "";
  byId("next-image").hidden = item.images.length < 2;
  byId("next-image").textContent = translate("Image {} of {}", imageIndex + 1, item.images.length);
  if (!shown) return;
  if (shown.error) {
    byId("image").removeAttribute("src");
    byId("unreadable").textContent = `${translate("The image cannot be read.")}\n${shown.error}`;
    return;
  }
  if (byId("image").getAttribute("src") !== shown.url) {
    // The previous image must not stay visible while the next one loads.
    byId("image").removeAttribute("src");
    byId("image").src = shown.url;
  }
  byId("image").alt = shown.name;
  byId("image").width = shown.width;
  byId("image").height = shown.height;
  byId("stage").style.setProperty("--width", `${shown.width}px`);
  byId("stage").style.setProperty("--ratio", shown.width / shown.height);
  byId("overlay").setAttribute("viewBox", `0 0 ${shown.width} ${shown.height}`);
  drawBoxes();
};

byId("image").addEventListener("error", () => {
  // The header is readable, but the pixels are not.
  byId("unreadable").textContent = translate("The image cannot be read.");
  byId("unreadable").hidden = false;
  byId("image").removeAttribute("src");
  document.activeElement?.blur?.();
});

const drawBoxes = () => {
  const draw = (name, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    overlay.append(element);
    return element;
  };
  const overlay = byId("overlay");
  overlay.replaceChildren();
  const unit = item.images[imageIndex].width / Math.max(1, overlay.clientWidth);
  boxes.forEach((box, index) => {
    if (box.image !== imageIndex) return;
    const [x1, y1, x2, y2] = box.xyxy, color = getColor(index);
    draw("rect", { x: x1, y: y1, width: Math.max(0, x2 - x1), height: Math.max(0, y2 - y1), stroke: color,
      class: index === selected ? "selected" : "", "data-box": index });
    const text = draw("text", { x: x1, y: Math.max(y1 - 3 * unit, 12 * unit), fill: color,
      "font-size": 13 * unit, "stroke-width": 3 * unit });
    text.textContent = box.label ?? index + 1;
    if (index !== selected) return;
    for (const [corner, x, y] of [[0, x1, y1], [1, x2, y1], [2, x1, y2], [3, x2, y2]]) {
      draw("circle", { cx: x, cy: y, r: 6 * unit, fill: color, "data-box": index, "data-corner": corner });
    }
  });
};

const select = (index, hasForm = true) => {
  selected = index;
  if (hasForm) showForm();
  else document.querySelectorAll("#form .row").forEach(
    (row, number) => row.classList.toggle("selected", number === index));
  drawBoxes();
};

const remove = (index) => {
  boxes.splice(index, 1);
  if (!boxes.length && !answerText && settings.kind === "boxes") answerText = settings.no_objects;
  select(Math.min(selected, boxes.length - 1));
};

const clear = () => {
  boxes = [];
  answerText = settings.no_objects;
  select(-1);
};

const add = (xyxy) => {
  // Boxes replace an unchanged text of an answer without boxes.
  const isReplaced = answerText === settings.no_objects
    || !item.answer.boxes.length && answerText === item.answer.text;
  if (!boxes.length && isReplaced) answerText = "";
  const label = boxes[selected]?.label ?? settings.choices[0] ?? null;
  boxes.push({ image: imageIndex, label, xyxy });
  select(boxes.length - 1);
};

const clampBox = (xyxy) => {
  const { width, height } = item.images[imageIndex];
  const [x1, x2] = [xyxy[0], xyxy[2]].map((x) => Math.min(Math.max(x, 0), width)).sort((a, b) => a - b);
  const [y1, y2] = [xyxy[1], xyxy[3]].map((y) => Math.min(Math.max(y, 0), height)).sort((a, b) => a - b);
  return [x1, y1, x2, y2].map((value) => Math.round(value * 10) / 10);
};

const shiftBox = ([x1, y1, x2, y2], dx, dy) => {
  // A moved box keeps its size at the border of the image.
  const { width, height } = item.images[imageIndex];
  dx = Math.min(Math.max(dx, -x1), width - x2);
  dy = Math.min(Math.max(dy, -y1), height - y2);
  return clampBox([x1 + dx, y1 + dy, x2 + dx, y2 + dy]);
};

let drag = null;
const getPoint = (event) => {
  const area = byId("overlay").getBoundingClientRect(), shown = item.images[imageIndex];
  return [(event.clientX - area.left) * shown.width / area.width,
    (event.clientY - area.top) * shown.height / area.height];
};
byId("overlay").addEventListener("pointerdown", (event) => {
  if (settings.kind !== "boxes" || event.button) return;
  event.preventDefault();
  byId("stage").focus({ preventScroll: true });
  byId("overlay").setPointerCapture(event.pointerId);
  const { box, corner } = event.target.dataset, start = getPoint(event);
  if (box !== undefined) select(Number(box));
  drag = { start, corner, box: box === undefined ? -1 : Number(box),
    before: box === undefined ? null : [...boxes[Number(box)].xyxy] };
});
byId("overlay").addEventListener("pointermove", (event) => {
  if (!drag) return;
  const [x, y] = getPoint(event), [dx, dy] = [x - drag.start[0], y - drag.start[1]];
  if (drag.box < 0) {
    if (Math.hypot(dx, dy) < 3) return;
    add(clampBox([...drag.start, x, y]));
    Object.assign(drag, { box: selected, corner: "new" });
  }
  const box = boxes[drag.box];
  if (drag.corner === "new") box.xyxy = clampBox([...drag.start, x, y]);
  else if (drag.corner === undefined) box.xyxy = shiftBox(drag.before, dx, dy);
  else {
    const corners = [...drag.before], corner = Number(drag.corner);
    corners[corner % 2 ? 2 : 0] += dx;
    corners[corner > 1 ? 3 : 1] += dy;
    box.xyxy = clampBox(corners);
  }
  drawBoxes();
});
for (const name of ["pointerup", "pointercancel"]) byId("overlay").addEventListener(name, () => {
  // A click next to all boxes selects none.
  if (drag && drag.box < 0) select(-1);
  else if (drag) showForm();
  drag = null;
});

// Keys

const edit = () => {
  const inputs = [...byId("form").querySelectorAll("input, select, textarea")];
  const values = item.parts.map((part) => part.confidence);
  const least = item.parts[values.indexOf(Math.min(...values))]?.path;
  const paths = item.fields.length ? item.fields.map(({ path }) => path) : boxes.map((_, index) => [index]);
  const index = paths.findIndex((path) => JSON.stringify(path) === JSON.stringify(least));
  const target = inputs[Math.max(0, index) + (item.fields.length ? boxes.length : 0)];
  target?.focus();
  target?.select?.();
};

const moveByKey = (event) => {
  const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  const size = event.ctrlKey ? 10 : 1, box = boxes[selected], [x1, y1, x2, y2] = box.xyxy;
  box.xyxy = event.shiftKey ? clampBox([x1, y1, x2 + dx * size, y2 + dy * size])
    : shiftBox(box.xyxy, dx * size, dy * size);
  showForm();
  drawBoxes();
};

const addByKey = () => {
  const { width, height } = item.images[imageIndex] ?? {};
  if (width) add(clampBox([width / 4, height / 4, 3 * width / 4, 3 * height / 4]));
};

document.addEventListener("keydown", (event) => {
  // Enter also ends the composition of an input method.
  if (!item || event.isComposing || event.keyCode === 229 || event.metaKey || event.altKey) return;
  if (event.target.matches?.("#list :is(input, select, button)")) return;
  const isField = event.target.matches?.("input, textarea, select");
  const isControl = event.target.matches?.("button, a, summary");
  if (event.key === "Escape") {
    if (isField) event.target.blur();
    else if (selected >= 0) select(-1);
    return;
  }
  if (event.key === "Enter" && !isControl) {
    // Enter starts a new line in a text with Shift.
    if (event.shiftKey && event.target.matches?.("textarea")) return;
    event.preventDefault();
    if (!event.repeat) decide("save");
    return;
  }
  if (isField) return;
  const isBoxes = settings.kind === "boxes", isArrow = event.key.startsWith("Arrow");
  const actions = {
    a: () => decide("save"), s: () => decide("skip"), u: undo, e: edit,
    ArrowLeft: () => open((item.index + decisions.length - 1) % decisions.length),
    ArrowRight: () => open((item.index + 1) % decisions.length),
    ...(isBoxes && {
      b: () => { if (boxes.length) select((selected + 1) % boxes.length); },
      n: addByKey, 0: clear,
      Delete: () => { if (selected >= 0) remove(selected); },
      Backspace: () => { if (selected >= 0) remove(selected); } }),
  };
  let action = actions[event.key] ?? actions[event.key.toLowerCase()];
  if (isBoxes && selected >= 0 && isArrow) action = () => moveByKey(event);
  else if (event.ctrlKey) return;
  if (/^[1-9]$/.test(event.key)) action = () => choose(Number(event.key) - 1);
  if (!action) return;
  event.preventDefault();
  if (!event.repeat || isArrow) action();
});
byId("form").addEventListener("submit", (event) => event.preventDefault());
byId("save").addEventListener("click", () => decide("save"));
byId("skip").addEventListener("click", () => decide("skip"));
byId("undo").addEventListener("click", undo);
byId("previous").addEventListener("click", () => open((item.index + decisions.length - 1) % decisions.length));
byId("next").addEventListener("click", () => open((item.index + 1) % decisions.length));
byId("next-image").addEventListener("click", () => {
  imageIndex = (imageIndex + 1) % item.images.length;
  showImage();
});
window.addEventListener("resize", () => { if (item?.images.length) drawBoxes(); });

(async () => {
  try {
    const content = await request("items");
    ({ decisions } = content);
    showCounts(content.counts);
    const index = Number(location.hash.slice(1));
    const isKnown = location.hash && index < decisions.length;
    if (decisions.length) await open(isKnown ? index : Math.max(0, findOpen(-1)));
  } catch (error) { report(error); }
})();
