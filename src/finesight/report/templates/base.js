"use strict";
/* Functions of all pages. Data is inserted as text nodes and attributes only: HTML is never parsed.

DATA                               data of the page
translate(text, ...values)         text in the language of the page, with {} replaced by the values
createElement(tag, attributes, ...children)
                                   new element; string children become text; svg:rect and math:mfrac
                                   are created in their namespaces; attributes that are false, null
                                   or undefined are omitted
drawImage(image, boxes, alt)       image {src, width, height} with boxes {xyxy, label, kind} in its
                                   pixels; `kind` becomes a class of the box
onNavigate(move, keys, target)     calls move(1) or move(-1) for the keys j and k, or for other keys
createPager(count, show, target)   pager for one example at a time: {nav, go}, an element with
                                   buttons (keys in the target: j, k and arrows) and a function that
                                   shows an example by index
createFeed(parent, items, draw)    list of cards, drawn in batches on demand; returns a function
                                   that moves the focus by a number of cards, for onNavigate
*/

const DATA = JSON.parse(document.getElementById("data").textContent);
const NAMESPACES = {
  svg: "http://www.w3.org/2000/svg",
  math: "http://www.w3.org/1998/Math/MathML",
};

const TRANSLATIONS = JSON.parse(document.body.dataset.translations);

function translate(text, ...values) {
  let index = 0;
  // An English noun after 1 is singular.
  return (TRANSLATIONS[text] || text).replace(
    /\{\}(?:( (?:box|frame|token))e?s\b)?/g,
    (field, noun = "") => {
      const value = String(values[index++]);
      return value + (value === "1" ? noun : field.slice(2));
    },
  );
}

function createElement(tag, attributes = {}, ...children) {
  const [namespace, name] = tag.includes(":") ? tag.split(":") : [null, tag];
  const element = namespace
    ? document.createElementNS(NAMESPACES[namespace], name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

function byId(name) {
  return document.getElementById(name);
}

/* ---- images ---------------------------------------------------------------------------------- */

function drawImage(image, boxes = [], alt = "") {
  const frame = computeFrame(image, boxes);
  const figure = createElement("figure", { class: "image" });
  const displayWidth = Math.max(frame.width, Math.min(280, frame.width * 4));
  const maxHeightWidth = ((70 * frame.width) / frame.height).toFixed(2);
  figure.style.width = `min(100%, ${displayWidth}px, ${maxHeightWidth}vh)`;
  figure.style.aspectRatio = `${frame.width} / ${frame.height}`;
  const img = createElement("img", { src: image.src, alt });
  positionElement(img, [0, 0, image.width, image.height], frame);
  figure.append(img);
  for (const box of boxes) {
    const xyxy = sortCorners(box.xyxy);
    const outline = createElement("span", { class: `box ${box.kind || ""}` });
    positionElement(outline, xyxy, frame);
    if (box.label) {
      outline.append(createElement("b", { class: labelPosition(xyxy, frame) }, box.label));
    }
    figure.append(outline);
  }
  return figure;
}

/* CSS classes of the label position that covers least of the box: above, inside a tall box, or
   below. */
function labelPosition([left, top, , bottom], frame) {
  const insideOrBelow = bottom - top > frame.height * 0.25 ? "inside" : "below";
  const vertical = top - frame.y > frame.height * 0.12 ? "above" : insideOrBelow;
  return `${vertical} ${left - frame.x > frame.width * 0.6 ? "leftwards" : "rightwards"}`;
}

/* Area of the image, extended by at most a quarter on each side for boxes that exceed it. */
function computeFrame(image, boxes) {
  const clampEdge = (values, low, high, edge, pick) =>
    Math.min(Math.max(pick(edge, ...values), low), high);
  const xs = boxes.flatMap(({ xyxy }) => [xyxy[0], xyxy[2]]);
  const ys = boxes.flatMap(({ xyxy }) => [xyxy[1], xyxy[3]]);
  const { width, height } = image;
  const x = clampEdge(xs, -width / 4, 0, 0, Math.min);
  const y = clampEdge(ys, -height / 4, 0, 0, Math.min);
  const right = clampEdge(xs, width, width * 1.25, width, Math.max);
  const bottom = clampEdge(ys, height, height * 1.25, height, Math.max);
  return { x, y, width: right - x, height: bottom - y };
}

function sortCorners([x1, y1, x2, y2]) {
  return [Math.min(x1, x2), Math.min(y1, y2), Math.max(x1, x2), Math.max(y1, y2)];
}

function positionElement(element, [x1, y1, x2, y2], frame) {
  const percent = (value, total) => `${((100 * value) / total).toFixed(3)}%`;
  element.style.left = percent(x1 - frame.x, frame.width);
  element.style.top = percent(y1 - frame.y, frame.height);
  element.style.width = percent(x2 - x1, frame.width);
  element.style.height = percent(y2 - y1, frame.height);
}

/* ---- navigation ------------------------------------------------------------------------------ */

/* Calls `move(1)` or `move(-1)` on a key press. Ignores keys in input fields and events whose
   default was prevented. */
function onNavigate(move, keys = { j: 1, k: -1 }, target = document) {
  target.addEventListener("keydown", (event) => {
    const isTyping = event.target.closest("input, select, textarea");
    if (isTyping || event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey)
      return;
    if (event.key in keys) {
      event.preventDefault();
      move(keys[event.key]);
    }
  });
}

function createPager(count, show, target = document) {
  const previous = createElement(
    "button",
    { type: "button", title: translate("Previous: k or ←"), "aria-label": translate("Previous") },
    "←",
    createElement("span", {}, ` ${translate("Previous")}`),
  );
  const next = createElement(
    "button",
    { type: "button", title: translate("Next: j or →"), "aria-label": translate("Next") },
    createElement("span", {}, `${translate("Next")} `),
    "→",
  );
  const position = createElement("output", { class: "position", "aria-live": "polite" });
  let current = 0;
  const go = (index) => {
    if (index < 0 || index >= count) return;
    current = index;
    position.textContent = translate("{} of {}", current + 1, count);
    previous.disabled = current === 0;
    next.disabled = current === count - 1;
    show(current);
  };
  previous.addEventListener("click", () => go(current - 1));
  next.addEventListener("click", () => go(current + 1));
  onNavigate((step) => go(current + step), { j: 1, k: -1, ArrowRight: 1, ArrowLeft: -1 }, target);
  if (count) go(0);
  const nav = createElement(
    "nav",
    { class: "pager", "aria-label": translate("Examples") },
    previous,
    position,
    next,
  );
  return { nav, go };
}

function createFeed(parent, items, draw, batchSize = 30) {
  const list = createElement("ol", { class: "feed" });
  const more = createElement("button", { type: "button", class: "more" });
  let numDrawn = 0;
  const drawBatch = () => {
    const end = Math.min(numDrawn + batchSize, items.length);
    for (; numDrawn < end; numDrawn += 1) {
      const card = draw(items[numDrawn], numDrawn);
      list.append(createElement("li", { class: "card", tabindex: "-1" }, card));
    }
    more.textContent = translate("Show {} more", Math.min(batchSize, items.length - numDrawn));
    more.hidden = numDrawn >= items.length;
  };
  more.addEventListener("click", () => {
    const firstNew = numDrawn;
    drawBatch();
    /* The first new card gets the keyboard focus. */
    list.children[firstNew]?.focus({ preventScroll: true });
  });
  parent.replaceChildren(list, more);
  drawBatch();
  return (step) => {
    const cards = [...list.children];
    const index = cards.indexOf(document.activeElement.closest(".feed > li")) + step;
    if (index >= cards.length && !more.hidden) drawBatch();
    const card = list.children[Math.max(0, Math.min(index, list.children.length - 1))];
    if (card) card.focus();
  };
}
