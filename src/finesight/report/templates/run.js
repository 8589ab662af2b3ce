
/* ---- examples --------------------------------------------------------------------------------- */

const KIND_WORDS = DATA.measurements.length > 1
  ? {better: say("got better"), worse: say("got worse"), wrong: say("stayed wrong"),
    right: say("stayed right")}
  : {better: "", worse: "", wrong: say("wrong"), right: say("right")};
const CHIPS = {better: "better", worse: "worse", wrong: "unsure", right: "trained"};

function drawExample(example) {
  const pictures = example.pictures.map((number) => DATA.pictures[number]);
  const change = example.change
    ? ` ${example.change > 0 ? "+" : "\u2212"}${Math.abs(example.change)} ${DATA.figure}` : "";
  const card = make("article", {class: pictures.length ? "example seen" : "example"},
    make("header", {},
      make("span", {class: `chip ${CHIPS[example.kind]}`}, KIND_WORDS[example.kind]),
      make("span", {class: "soft small"}, change),
      make("span", {class: "soft small mono id"}, example.id)));
  if (pictures.length) {
    card.append(make("div", {},
      ...pictures.map((picture, number) => drawnPicture(picture, number, example))));
  }
  card.append(make("div", {},
    ...clamped(make("h3", {class: "question"}, example.question || say("(no question)"))),
    make("div", {class: "answers"}, ...answersOf(example))));
  return card;
}

function drawnPicture(picture, number, example) {
  const name = picture.path.split("/").pop();
  if (picture.problem) {
    const told = make("p", {class: "small"}, `${picture.path}: ${picture.problem}`);
    return make("div", {class: "missing"}, ...clamped(told));
  }
  const boxes = [];
  const several = example.pictures.length > 1;
  /* With one box asked for and one answered, a label would only hide the picture. */
  const named = [example, example.before, example.after].some((one) => one?.boxes.length > 1);
  for (const [kind, found] of [["before", example.before?.boxes], ["after", example.after?.boxes],
                               ["truth", example.boxes]]) {
    for (const box of found || []) {
      if (!several || box.image === number) {
        boxes.push({...box, kind, label: named && kind !== "truth" ? box.label : ""});
      }
    }
  }
  const figure = drawPicture(picture, boxes, name);
  figure.title = picture.path;
  figure.addEventListener("click", () => figure.closest(".example").classList.toggle("wide"));
  return figure;
}

function answersOf(example) {
  const [first, last] = DATA.measurements;
  const right = example.right;
  const rows = [];
  if (right.length || example.boxes.length) {
    const title = say(right.length > 1 ? "right answers" : "right answer");
    rows.push(answerRow("truth", title, right.join("\n"), example.formula, example.boxes));
  }
  for (const [kind, answer, name] of [["before", example.before, first],
                                      ["after", example.after, last || first]]) {
    if (!answer) continue;
    const scores = Object.entries(answer.scores).map(([key, value]) => `${key} ${value}`);
    if (!answer.stopped) scores.push(say("cut off after {} tokens", answer.tokens));
    rows.push(answerRow(kind, name, answer.text, answer.formula, answer.boxes,
      scores.join(" · "), right.length === 1 ? right[0] : null));
  }
  return rows;
}

/* What a search looks at, in lower case, made when it is first needed. */
function wordsOf(example) {
  example.words ||= [example.id, example.question, ...example.right,
    example.before?.text, example.after?.text,
    ...example.pictures.map((number) => DATA.pictures[number].path),
    ...[example, example.before, example.after].flatMap(
      (one) => (one?.boxes || []).map(({label}) => label)),
  ].join("\n").toLowerCase();
  return example.words;
}

function startExamples() {
  const buttons = [...document.querySelectorAll(".chips button")];
  const search = byId("search");
  let kind = "";
  let step = () => {};
  const refresh = () => {
    const wanted = search.value.trim().toLowerCase();
    const found = DATA.examples.filter((example) =>
      (!kind || example.kind === kind) && (!wanted || wordsOf(example).includes(wanted)));
    for (const button of buttons) {
      button.setAttribute("aria-pressed", String(button.dataset.kind === kind));
    }
    byId("found").textContent = kind || wanted ? say("{} found", found.length) : "";
    step = feed(byId("feed"), found, drawExample, 20);
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
  onMove((by) => step(by));
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

/* A page that nobody writes anew looks like one of a run that goes on. */
function startStanding() {
  const old = Date.now() / 1000 - DATA.live.written;
  if (old < Math.max(300, 5 * DATA.live.again)) return;
  byId("stale").textContent = say("This page is {} minutes old: the run may have ended since.",
    Math.round(old / 60).toLocaleString("en"));
  byId("stale").hidden = false;
}
if (DATA.live) startStanding();
