
/* ---- examples --------------------------------------------------------------------------------- */

const KIND_LABELS = DATA.evaluation_names.length > 1
  ? {better: translate("improved"), worse: translate("worsened"),
    wrong: translate("still incorrect"), right: translate("still correct")}
  : {better: "", worse: "", wrong: translate("incorrect"), right: translate("correct")};
const CHIP_CLASSES = {better: "better", worse: "worse", wrong: "unsure", right: "trained"};

function drawExample(example) {
  const images = example.images.map((index) => DATA.images[index]);
  const change = example.change
    ? ` ${example.change > 0 ? "+" : "\u2212"}${Math.abs(example.change)} ${DATA.metric}` : "";
  const card = createElement("article", {class: images.length ? "example with-images" : "example"},
    createElement("header", {},
      createElement("span", {class: `chip ${CHIP_CLASSES[example.kind]}`}, KIND_LABELS[example.kind]),
      createElement("span", {class: "soft small"}, change),
      createElement("span", {class: "soft small mono id"}, example.id)));
  if (images.length) {
    card.append(createElement("div", {},
      ...images.map((image, index) => drawExampleImage(image, index, example))));
  }
  card.append(createElement("div", {},
    ...truncateText(createElement("h3", {class: "question"},
      example.question || translate("(no question)"))),
    createElement("div", {class: "answers"}, ...drawAnswers(example))));
  return card;
}

function drawExampleImage(image, index, example) {
  const name = image.path.split("/").pop();
  if (image.error) {
    const message = createElement("p", {class: "small"}, `${image.path}: ${image.error}`);
    return createElement("div", {class: "missing"}, ...truncateText(message));
  }
  const boxes = [];
  const hasSeveralImages = example.images.length > 1;
  /* Labels cover the image, so boxes have labels only if an answer contains several. */
  const [before, after] = example.predictions;
  const hasLabels = [example, before, after].some((item) => item?.boxes.length > 1);
  for (const [kind, kindBoxes] of [["before", before?.boxes], ["after", after?.boxes],
                                   ["truth", example.boxes]]) {
    for (const box of kindBoxes || []) {
      if (!hasSeveralImages || box.image === index) {
        boxes.push({...box, kind, label: hasLabels && kind !== "truth" ? box.label : ""});
      }
    }
  }
  const figure = drawImage(image, boxes, name);
  figure.title = image.path;
  figure.addEventListener("click", () => figure.closest(".example").classList.toggle("wide"));
  return figure;
}

function drawAnswers(example) {
  const [firstName, lastName] = DATA.evaluation_names;
  const {references, predictions: [before, after]} = example;
  const rows = [];
  if (references.length || example.boxes.length) {
    const title = translate(references.length > 1 ? "reference answers" : "reference answer");
    rows.push(answerRow("truth", title, references.join("\n"), example.formula, example.boxes));
  }
  for (const [kind, answer, name] of [["before", before, firstName],
                                      ["after", after, lastName || firstName]]) {
    if (!answer) continue;
    const scores = Object.entries(answer.scores).map(([key, value]) => `${key} ${value}`);
    if (!answer.is_complete) scores.push(translate("truncated after {} tokens", answer.num_tokens));
    rows.push(answerRow(kind, name, answer.text, answer.formula, answer.boxes,
      scores.join(" · "), references.length === 1 ? references[0] : null));
  }
  return rows;
}

function startExamples() {
  const buttons = [...document.querySelectorAll(".chips button")];
  const search = byId("search");
  let kind = "";
  let moveFocus = () => {};
  const refresh = () => {
    const query = search.value.trim().toLowerCase();
    const matches = DATA.examples.filter((example) =>
      (!kind || example.kind === kind) && (!query || searchText(example).includes(query)));
    for (const button of buttons) {
      button.setAttribute("aria-pressed", String(button.dataset.kind === kind));
    }
    byId("found").textContent = kind || query ? translate("{} found", matches.length) : "";
    moveFocus = createFeed(byId("feed"), matches, drawExample, 20);
  };
  for (const button of buttons) {
    button.addEventListener("click", () => {
      kind = button.dataset.kind;
      refresh();
    });
  }
  search.addEventListener("input", refresh);
  search.addEventListener("keydown", (event) => {
    if (event.key === "Escape") search.blur();
  });
  onNavigate((step) => moveFocus(step));
  byId("feed").addEventListener("keydown", (event) => {
    const card = event.target.matches("li") && event.target.querySelector(".example");
    if (card && event.key === "Enter") card.classList.toggle("wide");
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && !event.target.closest("input, select, textarea")) {
      event.preventDefault();
      search.focus();
    }
  });
  refresh();
}

if (byId("feed")) startExamples();

/* Warn about an outdated page of a run that was in progress: the run may have ended. */
function showStaleNotice() {
  const age = Date.now() / 1000 - DATA.live.written_at;
  if (age < Math.max(300, 5 * DATA.live.interval_s)) return;
  byId("stale").textContent = translate("This page is {} minutes old. The run may have ended.",
    Math.round(age / 60).toLocaleString("en"));
  byId("stale").hidden = false;
}
if (DATA.live) showStaleNotice();
