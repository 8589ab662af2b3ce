/* ---- curves: values where somebody points, or moves with the arrow keys ----------------------- */

const AREA = {left: 46, right: 390, top: 10, bottom: 196};

function readable(figure, chart) {
  const drawing = figure.querySelector("svg");
  const pointer = figure.querySelector(".pointer");
  const readout = figure.querySelector(".readout");
  const steps = [...new Set(chart.series.flatMap(({points}) => points.map(([x]) => x)))]
    .sort((a, b) => a - b);
  const across = (x) =>
    AREA.left + (x - chart.x[0]) / (chart.x[1] - chart.x[0]) * (AREA.right - AREA.left);
  const up = (y) =>
    AREA.bottom - (y - chart.y[0]) / (chart.y[1] - chart.y[0]) * (AREA.bottom - AREA.top);
  let at = null;

  const show = (index) => {
    at = Math.max(0, Math.min(index, steps.length - 1));
    const step = steps[at];
    const marks = [make("svg:path", {d: `M${across(step)} ${AREA.top}V${AREA.bottom}`})];
    const words = [chart.labels ? chart.labels[step] : say("step {}", step.toLocaleString("en"))];
    for (const {name, points} of chart.series) {
      const [x, y, text] = points[nearest(points.map(([x]) => x), step)];
      marks.push(make("svg:circle", {cx: across(x), cy: up(y), r: 3.6}));
      words.push(x === step ? `${name} ${text}` : say("{} {} (step {})", name, text, x));
    }
    pointer.replaceChildren(...marks);
    pointer.removeAttribute("hidden");
    readout.textContent = words.join(" · ");
  };
  const hide = () => {
    at = null;
    pointer.setAttribute("hidden", "");
    readout.textContent = "";
  };
  drawing.addEventListener("pointermove", (event) => {
    const frame = drawing.getBoundingClientRect();
    const x = (event.clientX - frame.left) / frame.width * 400;
    const share = (x - AREA.left) / (AREA.right - AREA.left);
    show(nearest(steps, chart.x[0] + share * (chart.x[1] - chart.x[0])));
  });
  drawing.addEventListener("pointerleave", hide);
  drawing.addEventListener("blur", hide);
  drawing.addEventListener("keydown", (event) => {
    const by = {ArrowRight: 1, ArrowLeft: -1, PageUp: 50, PageDown: -50}[event.key];
    const to = {Home: 0, End: steps.length - 1}[event.key];
    if (by === undefined && to === undefined) return;
    event.preventDefault();
    show(to !== undefined ? to : at === null ? (by > 0 ? 0 : steps.length - 1) : at + by);
  });
}

/* The index of the value in an ordered list that is nearest to `wanted`. */
function nearest(values, wanted) {
  let low = 0;
  let high = values.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (values[middle] < wanted) low = middle; else high = middle;
  }
  return Math.abs(values[low] - wanted) <= Math.abs(values[high] - wanted) ? low : high;
}

/* ---- answers --------------------------------------------------------------------------------- */

/* Whether answers are formulas, whose source is told apart by its letters. */
const IS_CODE = DATA.examples.some(({formula}) => formula);

function answerRow(kind, title, text, formula, boxes, score = "", right = null) {
  const row = make("section", {class: `answer ${kind}`},
    make("h4", {}, title, make("span", {class: "score"}, score)));
  if (formula) row.append(make("div", {class: "formula"}, built(formula)));
  const source = make("p", {class: IS_CODE || boxes.length ? "text mono" : "text"});
  if (right === null || right === text) source.append(text);
  else source.append(...marked(text, right));
  if (text || !boxes.length) row.append(...clamped(source));
  if (boxes.length) {
    row.append(make("ul", {}, ...boxes.map(({label, xyxy}) => make("li", {},
      `${label || say("box")}: ${xyxy.map((corner) => Math.round(corner * 10) / 10).join(", ")}`))));
  }
  return row;
}

/* A text, of a long one the beginning and a button for the rest. */
function clamped(text) {
  const {length} = text.textContent;
  if (length < 360 && text.textContent.split("\n").length <= 5) return [text];
  text.classList.add("clamped");
  const whole = say("Show all {} characters", length.toLocaleString("en"));
  const button = make("button", {type: "button", class: "whole", "aria-expanded": "false"}, whole);
  button.addEventListener("click", () => {
    const short = text.classList.toggle("clamped");
    button.setAttribute("aria-expanded", String(!short));
    button.textContent = short ? whole : say("Show less");
  });
  return [text, button];
}

/* A formula from its tree: [name, attributes, ...texts and trees]. */
function built([name, attributes, ...children]) {
  return make(`math:${name}`, attributes,
    ...children.map((child) => typeof child === "string" ? child : built(child)));
}

/* The text with what differs from the right one marked: superfluous pieces and gaps. By the
   longest common subsequence of words; long texts stay as they are. */
function marked(text, right) {
  const split = (words) => words.match(/(?:\\[A-Za-z]+|[\p{L}\p{N}]+|\s|.)\s*/gsu) || [];
  const said = split(text);
  const truth = split(right);
  const same = (i, j) => said[i].trim() === truth[j].trim();
  if (said.length * truth.length > 250000) return [text];
  const length = said.map(() => new Uint16Array(truth.length + 1));
  length.push(new Uint16Array(truth.length + 1));
  for (let i = said.length - 1; i >= 0; i -= 1) {
    for (let j = truth.length - 1; j >= 0; j -= 1) {
      length[i][j] = same(i, j)
        ? length[i + 1][j + 1] + 1 : Math.max(length[i + 1][j], length[i][j + 1]);
    }
  }
  /* Where next to nothing agrees, marks say nothing. */
  if (length[0][0] < 0.4 * Math.max(said.length, truth.length)) return [text];
  const pieces = [];
  const add = (kind, piece) => {
    const last = pieces[pieces.length - 1];
    if (last && last.kind === kind) last.text += piece; else pieces.push({kind, text: piece});
  };
  let i = 0;
  let j = 0;
  while (i < said.length || j < truth.length) {
    if (i < said.length && j < truth.length && same(i, j)) {
      add("", said[i]);
      i += 1;
      j += 1;
    } else if (j >= truth.length || (i < said.length && length[i + 1][j] >= length[i][j + 1])) {
      add("ins", said[i]);
      i += 1;
    } else {
      add("del", truth[j]);
      j += 1;
    }
  }
  return pieces.map(({kind, text: piece}) => {
    if (!kind) return piece;
    if (kind === "ins") return make("ins", {title: say("not in the right answer")}, piece);
    return make("del", {title: say("missing: {}", piece)}, "‸");
  });
}

document.querySelectorAll("[data-chart]").forEach((figure) => {
  readable(figure, DATA.charts[figure.dataset.chart]);
});
