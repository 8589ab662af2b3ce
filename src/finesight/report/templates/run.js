/* ---- examples -------------------------------------------------------------------------------- */

const CHIP_CLASSES = { better: "better", worse: "worse", wrong: "unsure", right: "trained" };

function drawExample(example) {
  const change = example.change
    ? ` ${example.change > 0 ? "+" : "\u2212"}${Math.abs(example.change)} ${DATA.metric}`
    : "";
  const [before, after] = example.predictions;
  const [firstName, lastName = firstName] = DATA.evaluation_names;
  const answers = [
    { kind: "before", title: firstName, prediction: before },
    { kind: "after", title: lastName, prediction: after },
  ];
  return drawCard(
    example,
    [
      createElement(
        "span",
        { class: `chip ${CHIP_CLASSES[example.kind]}` },
        DATA.kind_labels[example.kind],
      ),
      createElement("span", { class: "soft small" }, change),
    ],
    answers.filter(({ prediction }) => prediction),
  );
}

/* A group of responses to one prompt, side by side. */
function drawGroup(group) {
  const answers = group.predictions.map((prediction, index) => {
    const kind = `r${index % 8}`;
    return {
      kind,
      prediction,
      title: createElement("b", { class: `run ${kind}` }, `${index + 1}`),
    };
  });
  const step = translate("step {}", group.row_index.toLocaleString("en"));
  return drawCard(group, [createElement("strong", {}, step)], answers, true);
}

if (byId("groups")) createFeed(byId("groups"), DATA.groups, drawGroup, 3);

/* ---- order, grid and export ------------------------------------------------------------------ */

const KIND_ORDER = ["wrong", "worse", "better", "right"];

function lastScore({ scores }) {
  return scores.findLast((score) => score !== null) ?? null;
}

/* Examples without a score are last. */
function compareScores(one, other, sign) {
  const [score, otherScore] = [lastScore(one), lastScore(other)];
  if (score === null || otherScore === null) return (score === null) - (otherScore === null);
  return sign * (score - otherScore);
}

const ORDERS = {
  incorrect: (one, other) =>
    KIND_ORDER.indexOf(one.kind) - KIND_ORDER.indexOf(other.kind) || compareScores(one, other, 1),
  lowest: (one, other) => compareScores(one, other, 1),
  highest: (one, other) => compareScores(one, other, -1),
  decrease: (one, other) => one.change - other.change,
  increase: (one, other) => other.change - one.change,
  file: () => 0,
};

function sortExamples(examples, order) {
  return [...examples].sort(
    (one, other) => ORDERS[order](one, other) || one.row_index - other.row_index,
  );
}

/* A tile of the grid. `enlarge` shows the complete example. */
function drawTile(example, enlarge) {
  const image = example.images.map((index) => DATA.images[index]).find(({ src }) => src);
  const score = lastScore(example);
  const prediction = example.predictions.findLast(Boolean);
  const kind = DATA.kind_labels[example.kind];
  const tile = createElement(
    "button",
    { type: "button", class: "tile", "aria-label": translate("{}, {}: enlarge", kind, example.id) },
    image
      ? createElement("img", { src: image.src, alt: image.path.split("/").pop() })
      : createElement("span", { class: "no-image small" }, example.question),
    createElement(
      "span",
      { class: "small" },
      createElement("span", { class: `chip ${CHIP_CLASSES[example.kind]}` }, kind),
      score === null ? "" : ` ${score}`,
    ),
    createElement("span", { class: "small answer-text" }, prediction.text),
  );
  tile.addEventListener("click", enlarge);
  return tile;
}

/* The first image of an incorrect answer, with the boxes of the answer and of its reference. */
function drawErrorImage(example, prediction) {
  const images = example.images.map((index) => DATA.images[index]);
  const index = images.findIndex(({ src }) => src);
  const image = images[index];
  if (!example.boxes.length && !prediction.boxes.length) {
    return createElement("img", { src: image.src, alt: image.path.split("/").pop() });
  }
  const kind = DATA.evaluation_names.length > 1 ? "after" : "before";
  const figure = drawSampleImage(image, index, example, [{ kind, prediction }]);
  figure.style.width = `min(100%, ${(8.5 * image.width) / image.height}rem)`;
  return figure;
}

/* The score of the boxes of an answer. */
function describeBoxes({ boxes, scores }) {
  if (!boxes.length) return translate("no box");
  const overlap = Object.keys(scores).find((name) => DATA.score_names[name] === "iou");
  const name = overlap ?? DATA.metric;
  return name in scores ? `${name} ${scores[name]}` : translate("{} boxes", boxes.length);
}

/* The image of an incorrect answer, with the answer and its reference. */
function drawError(example, enlarge) {
  const prediction = example.predictions.findLast(Boolean);
  const fields = prediction.fields?.differences ?? [];
  const lines = fields
    .slice(0, 3)
    .map(([name, expected, predicted]) =>
      translate(
        "{}: {} instead of {}",
        name,
        predicted.join(", ") || "–",
        expected.join(", ") || "–",
      ),
    );
  const [reference] = example.references;
  if (example.boxes.length) lines.unshift(describeBoxes(prediction));
  if (!lines.length && reference) {
    lines.push(translate("“{}” instead of “{}”", prediction.text || "–", reference));
  }
  const tile = createElement(
    "button",
    { type: "button", class: "tile", "aria-label": translate("{}: enlarge", example.id) },
    drawErrorImage(example, prediction),
    ...lines.map((line) => createElement("span", { class: "small answer-text" }, line)),
  );
  tile.addEventListener("click", enlarge);
  return tile;
}

function drawErrors() {
  const examples = DATA.worst.map((index) => DATA.examples[index]);
  byId("worst").replaceChildren(
    ...examples.map((example, index) => drawError(example, () => enlargeExample(examples, index))),
  );
}
if (byId("worst")) drawErrors();

function addCopyButton(command) {
  command.append(...copyButton(command.textContent.trim(), translate("command")));
}
if (byId("next-command")) addCopyButton(byId("next-command"));

/* Show one of `examples` in the dialog, with buttons and keys for the others. */
function enlargeExample(examples, index) {
  const dialog = byId("enlarged");
  const enlarged = createElement("div");
  const content = createElement("div");
  const { nav, go } = createPager(
    examples.length,
    (next) => {
      enlarged.replaceChildren(drawExample(examples[next]));
      dialog.scrollTop = 0;
    },
    content,
  );
  const close = createElement("button", { type: "button", class: "close" }, translate("Close"));
  close.addEventListener("click", () => dialog.close());
  nav.append(close);
  content.append(nav, enlarged);
  dialog.replaceChildren(content);
  go(index);
  dialog.showModal();
}

/* A line of a prediction file, as in a file of incorrect answers. */
function toPredictionLine(example) {
  const prediction = example.predictions.findLast(Boolean);
  const [gold = "", ...references] = example.references;
  const paths = example.images.map((index) => DATA.images[index].path);
  const toBoxes = (boxes) => boxes.map((box) => ({ ...box, label: box.label || null }));
  const scores = Object.entries(prediction.scores).map(([name, value]) => [
    DATA.score_names[name],
    value,
  ]);
  const line = {
    id: example.id,
    image: paths.length > 1 ? paths : (paths[0] ?? null),
    prompt: example.question,
    answer: prediction.text,
    boxes: toBoxes(prediction.boxes),
    gold,
    references,
    gold_boxes: toBoxes(example.boxes),
    scores: Object.fromEntries(scores),
    num_tokens: prediction.num_tokens,
    finish_reason: prediction.is_complete ? "stop" : "length",
  };
  if (example.is_truncated) line.is_truncated = true;
  return `${JSON.stringify(line)}\n`;
}

function startExamples() {
  const buttons = [...document.querySelectorAll("[data-kind]")];
  const views = [...document.querySelectorAll("[data-view]")];
  const [search, order, save] = ["search", "order", "save"].map(byId);
  let kind = "";
  let view = "list";
  let matches = [];
  let moveFocus = () => {};
  const refresh = () => {
    const query = search.value.trim().toLowerCase();
    matches = sortExamples(
      DATA.examples.filter(
        (example) =>
          (!kind || example.kind === kind || (kind === "wrong" && example.is_incorrect)) &&
          (!query || searchText(example).includes(query)),
      ),
      order.value,
    );
    for (const button of buttons) {
      button.setAttribute("aria-pressed", String(button.dataset.kind === kind));
    }
    for (const button of views) {
      button.setAttribute("aria-pressed", String(button.dataset.view === view));
    }
    byId("found").textContent = translate("{} found", matches.length);
    const numIncorrect = matches.filter((example) => example.is_incorrect).length;
    save.textContent = translate("Save {} incorrect as JSONL", numIncorrect);
    save.disabled = numIncorrect === 0;
    byId("feed").classList.toggle("grid", view === "grid");
    moveFocus =
      view === "grid"
        ? createFeed(
            byId("feed"),
            matches,
            (example, index) => drawTile(example, () => enlargeExample(matches, index)),
            60,
          )
        : createFeed(byId("feed"), matches, drawExample, 20);
  };
  const attach = (options, set) =>
    options.forEach((button) =>
      button.addEventListener("click", () => {
        set(button.dataset);
        refresh();
      }),
    );
  attach(buttons, (data) => {
    kind = data.kind;
  });
  attach(views, (data) => {
    view = data.view;
  });
  order.addEventListener("change", refresh);
  search.addEventListener("input", refresh);
  search.addEventListener("keydown", (event) => {
    if (event.key === "Escape") search.blur();
  });
  save.addEventListener("click", () => {
    const name = document.querySelector("h1").textContent;
    saveFile(
      `${name}-incorrect.jsonl`,
      matches
        .filter((example) => example.is_incorrect)
        .map(toPredictionLine)
        .join(""),
    );
  });
  onNavigate((step) => moveFocus(step));
  byId("feed").addEventListener("keydown", (event) => {
    if (!event.target.matches("li") || event.key !== "Enter") return;
    event.preventDefault();
    event.target.querySelector(".tile")?.click();
    event.target.querySelector(".example")?.classList.toggle("wide");
  });
  onNavigate(() => search.focus(), { "/": 1 });
  refresh();
}

if (byId("feed")) startExamples();

/* Warn about an outdated page of a run that was in progress: the run may have ended. */
function showStaleNotice() {
  const age = Date.now() / 1000 - DATA.live.written_at;
  if (age < Math.max(300, 5 * DATA.live.interval_s)) return;
  byId("stale").textContent = translate(
    "This page is {} minutes old. The run may have ended.",
    Math.round(age / 60).toLocaleString("en"),
  );
  byId("stale").hidden = false;
}
if (DATA.live) showStaleNotice();
