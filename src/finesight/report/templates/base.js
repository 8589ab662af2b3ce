"use strict";
/* What every page leans on. Data becomes text nodes and plain attributes: nothing parses HTML.

DATA                                the page's data
say(text, ...values)                the text in the page's language, its places {} filled
make(tag, attributes, ...children)  an element; strings among the children become text; svg:rect and
                                    math:mfrac are made in their own languages; an attribute that is
                                    false, null or undefined is left out
drawPicture(picture, boxes, alt)    a picture {src, width, height} with boxes {xyxy, label, kind} in
                                    its pixels; `kind` becomes a class of the box
onMove(move, keys)                  calls move(1) or move(-1) for j k, or for other keys
browse(count, show)                 one example at a time: {nav, go}, an element with buttons (keys: j k
                                    and the arrows) and what goes to an example by its number
feed(place, items, draw)            cards below each other, drawn some at a time as they are asked for;
                                    gives what moves the focus on by so many cards, for onMove
*/

const DATA = JSON.parse(document.getElementById("data").textContent);
const LANGUAGES = {svg: "http://www.w3.org/2000/svg", math: "http://www.w3.org/1998/Math/MathML"};

const WORDS = JSON.parse(document.body.dataset.words);

function say(text, ...values) {
  let at = 0;
  return (WORDS[text] || text).replace(/\{\}/g, () => values[at++]);
}

function make(tag, attributes = {}, ...children) {
  const [language, name] = tag.includes(":") ? tag.split(":") : [null, tag];
  const element = language
    ? document.createElementNS(LANGUAGES[language], name)
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

/* ---- pictures -------------------------------------------------------------------------------- */

function drawPicture(picture, boxes = [], alt = "") {
  const frame = frameAround(picture, boxes);
  const figure = make("figure", {class: "picture"});
  const shown = Math.max(frame.width, Math.min(280, frame.width * 4));
  figure.style.width = `min(100%, ${shown}px, ${(70 * frame.width / frame.height).toFixed(2)}vh)`;
  figure.style.aspectRatio = `${frame.width} / ${frame.height}`;
  const image = make("img", {src: picture.src, alt});
  place(image, [0, 0, picture.width, picture.height], frame);
  figure.append(image);
  for (const box of boxes) {
    const mark = make("span", {class: `box ${box.kind || ""}`});
    place(mark, inOrder(box.xyxy), frame);
    if (box.label) {
      mark.append(make("b", {class: roomFor(inOrder(box.xyxy), frame)}, box.label));
    }
    figure.append(mark);
  }
  return figure;
}

/* Where a box's label hides the least of it: above, in one that is tall enough, or below. */
function roomFor([left, top, , bottom], frame) {
  const inside = bottom - top > frame.height * 0.25 ? "inside" : "below";
  const upright = top - frame.y > frame.height * 0.12 ? "above" : inside;
  return `${upright} ${left - frame.x > frame.width * 0.6 ? "leftwards" : "rightwards"}`;
}

/* The picture, or somewhat more where boxes leave it: at most a quarter of it on each side. */
function frameAround(picture, boxes) {
  const reach = (values, low, high, edge, pick) =>
    Math.min(Math.max(pick(edge, ...values), low), high);
  const across = boxes.flatMap(({xyxy}) => [xyxy[0], xyxy[2]]);
  const down = boxes.flatMap(({xyxy}) => [xyxy[1], xyxy[3]]);
  const {width, height} = picture;
  const x = reach(across, -width / 4, 0, 0, Math.min);
  const y = reach(down, -height / 4, 0, 0, Math.min);
  const right = reach(across, width, width * 1.25, width, Math.max);
  const bottom = reach(down, height, height * 1.25, height, Math.max);
  return {x, y, width: right - x, height: bottom - y};
}

function inOrder([x1, y1, x2, y2]) {
  return [Math.min(x1, x2), Math.min(y1, y2), Math.max(x1, x2), Math.max(y1, y2)];
}

function place(element, [x1, y1, x2, y2], frame) {
  const percent = (value, whole) => `${(100 * value / whole).toFixed(3)}%`;
  element.style.left = percent(x1 - frame.x, frame.width);
  element.style.top = percent(y1 - frame.y, frame.height);
  element.style.width = percent(x2 - x1, frame.width);
  element.style.height = percent(y2 - y1, frame.height);
}

/* ---- moving about ---------------------------------------------------------------------------- */

/* Calls `move(1)` or `move(-1)` when a key asks for the next or the one before. Fields keep their
   own keys, and so does what calls preventDefault first. */
function onMove(move, keys = {j: 1, k: -1}) {
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input, select, textarea");
    if (typing || event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in keys) {
      event.preventDefault();
      move(keys[event.key]);
    }
  });
}

function browse(count, show) {
  const back = make("button", {type: "button", title: say("Previous: k or ←"),
    "aria-label": say("Previous")}, "←", make("span", {}, ` ${say("Previous")}`));
  const next = make("button", {type: "button", title: say("Next: j or →"),
    "aria-label": say("Next")}, make("span", {}, `${say("Next")} `), "→");
  const where = make("output", {class: "where", "aria-live": "polite"});
  let at = 0;
  const go = (to) => {
    if (to < 0 || to >= count) return;
    at = to;
    where.textContent = say("{} of {}", at + 1, count);
    back.disabled = at === 0;
    next.disabled = at === count - 1;
    show(at);
  };
  back.addEventListener("click", () => go(at - 1));
  next.addEventListener("click", () => go(at + 1));
  onMove((step) => go(at + step), {j: 1, k: -1, ArrowRight: 1, ArrowLeft: -1});
  if (count) go(0);
  return {nav: make("nav", {class: "browse", "aria-label": say("Examples")}, back, where, next), go};
}

function feed(place, items, draw, atOnce = 30) {
  const list = make("ol", {class: "feed"});
  const more = make("button", {type: "button", class: "more"});
  let drawn = 0;
  const grow = () => {
    const upTo = Math.min(drawn + atOnce, items.length);
    for (; drawn < upTo; drawn += 1) {
      const card = draw(items[drawn], drawn);
      list.append(make("li", {class: "card", tabindex: "-1"}, card));
    }
    more.textContent = say("Show {} more", Math.min(atOnce, items.length - drawn));
    more.hidden = drawn >= items.length;
  };
  more.addEventListener("click", () => {
    const first = drawn;
    grow();
    /* What is new comes next for the keyboard. */
    list.children[first]?.focus({preventScroll: true});
  });
  place.replaceChildren(list, more);
  grow();
  return (step) => {
    const cards = [...list.children];
    const to = cards.indexOf(document.activeElement.closest(".feed > li")) + step;
    if (to >= cards.length && !more.hidden) grow();
    const card = list.children[Math.max(0, Math.min(to, list.children.length - 1))];
    if (card) card.focus();
  };
}
