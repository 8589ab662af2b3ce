
/* ---- data show: one sample at a time, its pictures beside its tokens ------------------------- */

const INVISIBLE = /([ \n\t]|[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Zs}])/u;
const SIGNS = {" ": "·", "\n": "↵", "\t": "⇥"};

/* Text in which every invisible character shows; a line break still breaks the line. */
function visible(text) {
  return text.split(INVISIBLE).filter(Boolean).flatMap((piece) => {
    if (!INVISIBLE.test(piece)) return piece;
    const code = piece.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    const sign = make("span", {class: "white"}, SIGNS[piece] || `U+${code}`);
    return piece === "\n" ? [sign, "\n"] : sign;
  });
}

/* A number of things; their words have a place for it. */
function count(number, one, many) {
  return say(number === 1 ? one : many, number.toLocaleString("en"));
}

function bySides([height, width]) {
  return `${width} × ${height}`;
}

function figure(name, value) {
  return make("div", {}, make("dt", {}, name), make("dd", {}, value));
}

/* ---- pictures and their boxes ---- */

function drawPictures(sample) {
  return sample.pictures.map((picture, number) => {
    const numbered = sample.boxes.map((box, at) => ({...box, at}));
    const boxes = numbered.filter((box) => box.picture === number).map(({xyxy, label, at}) =>
      ({xyxy, label: label === null ? `${at + 1}` : `${at + 1} ${label}`}));
    const alt = say("{} as the model sees it, {}", picture.name,
      count(boxes.length, "{} box", "{} boxes"));
    const frames = picture.frames.map((frame, at) =>
      drawPicture(frame, at ? [] : boxes, at ? say("frame {} of {}", at + 1, picture.name) : alt));
    const told = say("{} resized to {} pixels, {} patches, {}", bySides(picture.original),
      bySides(picture.resized), picture.grid.join(" × "),
      count(picture.tokens, "{} token", "{} tokens"));
    const kind = picture.kind === "video"
      ? say(", video of {}", count(frames.length, "{} frame", "{} frames")) : "";
    return make("div", {},
      frames.length > 1 ? make("div", {class: "frames", tabindex: 0}, ...frames) : frames[0],
      make("p", {class: "described"}, make("strong", {}, say("Picture {}", number + 1)),
        say(" {}{}: {}", picture.name, kind, told)));
  });
}

function drawBoxes(sample) {
  if (!sample.boxes.length && !sample.written) return [];
  const head = [say("no."), say("label"), say("picture as seen"), say("in the original")].map((name) =>
    make("th", {scope: "col"}, name));
  const corners = (xyxy) => xyxy.map(Math.round).join(", ");
  const lines = sample.boxes.map((box, at) => make("tr", {},
    make("td", {}, `${at + 1}`), make("td", {}, box.label === null ? "–" : box.label),
    make("td", {class: "mono"}, corners(box.xyxy)),
    make("td", {class: "mono"}, corners(box.original))));
  const same = sample.boxes.length === sample.written;
  const told = say("{} read back from the tokens, {} in the sample",
    count(sample.boxes.length, "{} box", "{} boxes"), sample.written);
  return [
    make("p", {class: same ? "small soft" : "small warn"}, told),
    make("div", {class: "scroll", tabindex: 0, role: "region", "aria-label": say("Boxes")},
      make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...lines))),
  ];
}

/* ---- tokens ---- */

function drawToken(row, sample) {
  const names = `token ${row.kind === "text" ? "" : row.kind} ${row.learned ? "learned" : ""}`;
  if (row.kind !== "picture") {
    return make("span", {class: names, tabindex: -1}, ...visible(row.text));
  }
  const {grid, name} = sample.pictures[row.picture];
  const told = say("Picture {}: {} {}, grid {}, {}", row.picture + 1,
    count(row.to - row.at + 1, "{} token", "{} tokens"), row.text, grid.join(" × "), name);
  return make("span", {class: `${names} picture-block`, tabindex: -1}, told);
}

function describe(row, sample) {
  const strong = (text) => make("b", {}, text);
  const learned = say(row.learned ? "learned" : "not learned");
  const place = (values) => say("time {}, height {}, width {}", ...values);
  if (row.kind === "picture") {
    const {original, resized} = sample.pictures[row.picture];
    return [strong(say("Tokens {} to {}", row.at, row.to)), ` · id ${row.id} ${row.text} · ${learned}`,
      make("br"), say("{} up to {} · {} as {} pixels", place(row.place), place(row.last),
        bySides(original), bySides(resized))];
  }
  const kind = {special: ` · ${say("special token")}`,
    bytes: ` · ${say("part of a character")}`}[row.kind] || "";
  return [strong(say("Token {}", row.at)), ` · id ${row.id} · `, strong(JSON.stringify(row.text)),
    `${kind} · ${learned}`, make("br"), place(row.place)];
}

function drawTokens(sample) {
  const detail = make("output", {class: "detail", "aria-live": "polite"});
  const all = [];
  const of = new Map();
  const turns = sample.turns.map((turn) => {
    const text = make("div", {class: "text"});
    for (const row of turn.rows) {
      const token = drawToken(row, sample);
      of.set(token, row);
      all.push(token);
      if (/^\s/.test(row.text)) text.append(make("wbr"));
      text.append(token);
    }
    const learned = turn.rows.filter((row) => row.learned).length;
    return make("section", {class: `turn ${turn.role === "assistant" ? "assistant" : ""}`},
      make("h4", {}, learned ? say("{} · {} learned", turn.role, learned) : turn.role), text);
  });
  const box = make("div", {role: "group", "aria-label": say("Tokens")}, ...turns);
  const show = (token) => detail.replaceChildren(...describe(of.get(token), sample));
  let current = all[0];
  const enter = (token) => {
    current.tabIndex = -1;
    current = token;
    current.tabIndex = 0;
    show(token);
  };
  current.tabIndex = 0;
  box.addEventListener("focusin", (event) => enter(event.target.closest(".token")));
  box.addEventListener("pointerover", (event) => {
    const token = event.target.closest(".token");
    if (token) show(token);
  });
  box.addEventListener("pointerleave", () => show(current));
  box.addEventListener("keydown", (event) => {
    const at = all.indexOf(current);
    const to = {ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1}[event.key];
    if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    if (all[to]) all[to].focus();
  });
  show(current);
  return make("div", {class: "card"}, make("h3", {}, say("Tokens")), box, detail);
}

/* ---- the page ---- */

function drawSample(sample) {
  const read = sample.tokens - sample.learned;
  const sides = make("div", {class: "sides"});
  const pictures = [...drawPictures(sample), ...drawBoxes(sample)];
  if (pictures.length) {
    sides.append(make("div", {class: "card"}, make("h3", {}, say("Pictures")), ...pictures));
  }
  sides.append(drawTokens(sample));
  return [
    make("h2", {}, say("Sample {}", sample.id)),
    make("dl", {class: "figures"}, figure(say("tokens"), sample.tokens.toLocaleString("en")),
      figure(say("learned"), sample.learned.toLocaleString("en")),
      figure(say("only read"), read.toLocaleString("en")),
      figure(say("patches"), sample.patches.toLocaleString("en"))),
    sides,
  ];
}

function startSamples() {
  const choice = make("select", {"aria-label": say("Sample")},
    ...DATA.map(({id}, at) => make("option", {value: at}, id)));
  const {nav, go} = browse(DATA.length, (at) => {
    choice.value = at;
    byId("sample").replaceChildren(...drawSample(DATA[at]));
  });
  choice.addEventListener("change", () => go(Number(choice.value)));
  const label = make("label", {}, choice);
  if (DATA.length > 1) byId("bar").append(nav, label);
}

startSamples();
