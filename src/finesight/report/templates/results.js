/* ---- charts: values at the pointer, or by arrow keys ------------------------------------------ */

const PLOT_AREA = {left: 46, right: 390, top: 10, bottom: 196};

function attachReadout(figure, chart) {
  const svg = figure.querySelector("svg");
  const pointer = figure.querySelector(".pointer");
  const readout = figure.querySelector(".readout");
  const steps = [...new Set(chart.series.flatMap(({points}) => points.map(([x]) => x)))]
    .sort((a, b) => a - b);
  const toX = (x) => PLOT_AREA.left
    + (x - chart.x[0]) / (chart.x[1] - chart.x[0]) * (PLOT_AREA.right - PLOT_AREA.left);
  const toY = (y) => PLOT_AREA.bottom
    - (y - chart.y[0]) / (chart.y[1] - chart.y[0]) * (PLOT_AREA.bottom - PLOT_AREA.top);
  let current = null;

  const show = (index) => {
    current = Math.max(0, Math.min(index, steps.length - 1));
    const step = steps[current];
    const markers = [
      createElement("svg:path", {d: `M${toX(step)} ${PLOT_AREA.top}V${PLOT_AREA.bottom}`}),
    ];
    const texts = [
      chart.labels ? chart.labels[step] : translate("step {}", step.toLocaleString("en")),
    ];
    for (const {name, points} of chart.series) {
      const [x, y, text] = points[nearestIndex(points.map(([pointX]) => pointX), step)];
      markers.push(createElement("svg:circle", {cx: toX(x), cy: toY(y), r: 3.6}));
      texts.push(x === step ? `${name} ${text}` : translate("{} {} (step {})", name, text, x));
    }
    pointer.replaceChildren(...markers);
    pointer.removeAttribute("hidden");
    readout.textContent = texts.join(" · ");
  };
  const hide = () => {
    current = null;
    pointer.setAttribute("hidden", "");
    readout.textContent = "";
  };
  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect();
    const x = (event.clientX - frame.left) / frame.width * 400;
    const fraction = (x - PLOT_AREA.left) / (PLOT_AREA.right - PLOT_AREA.left);
    show(nearestIndex(steps, chart.x[0] + fraction * (chart.x[1] - chart.x[0])));
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const step = {ArrowRight: 1, ArrowLeft: -1, PageUp: 50, PageDown: -50}[event.key];
    const end = {Home: 0, End: steps.length - 1}[event.key];
    if (step === undefined && end === undefined) return;
    event.preventDefault();
    if (end !== undefined) show(end);
    else if (current === null) show(step > 0 ? 0 : steps.length - 1);
    else show(current + step);
  });
}

/* Index of the value in a sorted list that is nearest to `target`. */
function nearestIndex(values, target) {
  let low = 0;
  let high = values.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (values[middle] < target) low = middle; else high = middle;
  }
  return Math.abs(values[low] - target) <= Math.abs(values[high] - target) ? low : high;
}

/* ---- answers --------------------------------------------------------------------------------- */

/* Answers are formulas, shown as source in a monospace font. */
const IS_CODE = DATA.examples.some(({formula}) => formula);

function answerRow(kind, title, text, formula, boxes, score = "", reference = null) {
  const row = createElement("section", {class: `answer ${kind}`},
    createElement("h4", {}, title, createElement("span", {class: "score"}, score)));
  if (formula) row.append(createElement("div", {class: "formula"}, buildMathML(formula)));
  const source = createElement("p", {class: IS_CODE || boxes.length ? "text mono" : "text"});
  if (reference === null || reference === text) source.append(text);
  else source.append(...highlightDiff(text, reference));
  if (text || !boxes.length) row.append(...truncateText(source));
  if (boxes.length) {
    row.append(createElement("ul", {}, ...boxes.map(({label, xyxy}) => {
      const corners = xyxy.map((corner) => Math.round(corner * 10) / 10).join(", ");
      return createElement("li", {}, `${label || translate("box")}: ${corners}`);
    })));
  }
  return row;
}

/* The element, and for a long text a button that shows all of it. */
function truncateText(element) {
  const {length} = element.textContent;
  if (length < 360 && element.textContent.split("\n").length <= 5) return [element];
  element.classList.add("truncated");
  const showAll = translate("Show all {} characters", length.toLocaleString("en"));
  const button = createElement("button",
    {type: "button", class: "toggle-text", "aria-expanded": "false"}, showAll);
  button.addEventListener("click", () => {
    const isTruncated = element.classList.toggle("truncated");
    button.setAttribute("aria-expanded", String(!isTruncated));
    button.textContent = isTruncated ? showAll : translate("Show less");
  });
  return [element, button];
}

/* A formula from its tree: [name, attributes, ...texts and subtrees]. */
function buildMathML([name, attributes, ...children]) {
  return createElement(`math:${name}`, attributes,
    ...children.map((child) => typeof child === "string" ? child : buildMathML(child)));
}

/* Mark insertions and deletions relative to the reference, by the longest common subsequence of
   words. Long texts have no marks. */
function highlightDiff(text, reference) {
  const split = (string) => string.match(/(?:\\[A-Za-z]+|[\p{L}\p{N}]+|\s|.)\s*/gsu) || [];
  const answerWords = split(text);
  const referenceWords = split(reference);
  const isEqual = (i, j) => answerWords[i].trim() === referenceWords[j].trim();
  if (answerWords.length * referenceWords.length > 250000) return [text];
  const length = answerWords.map(() => new Uint16Array(referenceWords.length + 1));
  length.push(new Uint16Array(referenceWords.length + 1));
  for (let i = answerWords.length - 1; i >= 0; i -= 1) {
    for (let j = referenceWords.length - 1; j >= 0; j -= 1) {
      length[i][j] = isEqual(i, j)
        ? length[i + 1][j + 1] + 1 : Math.max(length[i + 1][j], length[i][j + 1]);
    }
  }
  /* Marks are not informative for texts with few words in common. */
  if (length[0][0] < 0.4 * Math.max(answerWords.length, referenceWords.length)) return [text];
  const segments = [];
  const add = (kind, word) => {
    const last = segments[segments.length - 1];
    if (last && last.kind === kind) last.text += word; else segments.push({kind, text: word});
  };
  let i = 0;
  let j = 0;
  while (i < answerWords.length || j < referenceWords.length) {
    if (i < answerWords.length && j < referenceWords.length && isEqual(i, j)) {
      add("", answerWords[i]);
      i += 1;
      j += 1;
    } else if (j >= referenceWords.length
        || (i < answerWords.length && length[i + 1][j] >= length[i][j + 1])) {
      add("ins", answerWords[i]);
      i += 1;
    } else {
      add("del", referenceWords[j]);
      j += 1;
    }
  }
  return segments.map(({kind, text: segment}) => {
    if (!kind) return segment;
    if (kind === "ins") {
      return createElement("ins", {title: translate("not in the reference answer")}, segment);
    }
    return createElement("del", {title: translate("missing: {}", segment)}, "‸");
  });
}

/* Lower-case text for the search, computed on first use. */
function searchText(sample) {
  sample.searchText ||= [sample.id, sample.question, ...sample.references,
    ...sample.predictions.map((prediction) => prediction?.text || ""),
    ...sample.images.map((index) => DATA.images[index].path),
    ...[sample, ...sample.predictions].flatMap(
      (item) => (item?.boxes || []).map(({label}) => label)),
  ].join("\n").toLowerCase();
  return sample.searchText;
}

document.querySelectorAll("[data-chart]").forEach((figure) => {
  attachReadout(figure, DATA.charts[figure.dataset.chart]);
});
