
/* ---- samples with the answers of several runs ------------------------------------------------- */

const RUNS = DATA.runs.map((label) => ({letter: label.slice(0, 1), name: label.slice(2)}));

function badge(number) {
  return make("b", {class: `run r${number}`, title: RUNS[number].name}, RUNS[number].letter);
}

function drawSample(sample) {
  const pictures = sample.pictures.map((number) => DATA.pictures[number]);
  const card = make("article", {class: pictures.length ? "example seen" : "example"},
    make("header", {},
      make("span", {class: "marks small"}, ...sample.marks.map((mark, number) =>
        make("span", {}, badge(number), ` ${mark === null ? "\u2013" : mark}`))),
      make("span", {class: "soft small mono id"}, sample.id)));
  if (pictures.length) {
    card.append(make("div", {}, ...pictures.map((picture, number) =>
      drawnWithBoxes(picture, number, sample))));
  }
  card.append(make("div", {},
    ...clamped(make("h3", {class: "question"}, sample.question || say("(no question)"))),
    make("div", {class: "answers"}, ...answersTo(sample))));
  return card;
}

function drawnWithBoxes(picture, number, sample) {
  if (picture.problem) {
    const told = make("p", {class: "small"}, `${picture.path}: ${picture.problem}`);
    return make("div", {class: "missing"}, ...clamped(told));
  }
  const several = sample.pictures.length > 1;
  const here = ({image}) => !several || image === number;
  const boxes = sample.boxes.filter(here).map(({xyxy}) => ({xyxy, kind: "truth", label: ""}));
  /* Runs that agree on a box share one, with all their letters. */
  const drawn = new Map();
  sample.answers.forEach((answer, run) => (answer?.boxes || []).filter(here).forEach(({xyxy}) => {
    const at = xyxy.map(Math.round).join(" ");
    if (!drawn.has(at)) drawn.set(at, {xyxy, kind: `r${run}`, label: ""});
    const box = drawn.get(at);
    if (!box.label.includes(RUNS[run].letter)) box.label += RUNS[run].letter;
  }));
  boxes.push(...drawn.values());
  const figure = drawPicture(picture, boxes, picture.path.split("/").pop());
  figure.title = picture.path;
  figure.addEventListener("click", () => figure.closest(".example").classList.toggle("wide"));
  return figure;
}

function answersTo(sample) {
  const {right} = sample;
  const rows = [];
  if (right.length || sample.boxes.length) {
    const title = say(right.length > 1 ? "right answers" : "right answer");
    rows.push(answerRow("truth", title, right.join("\n"), sample.formula, sample.boxes));
  }
  sample.answers.forEach((answer, run) => {
    const name = make("span", {}, badge(run), ` ${RUNS[run].name}`);
    if (!answer) {
      rows.push(answerRow("", name, "", null, [], say("did not answer this sample")));
      return;
    }
    const mark = sample.marks[run];
    const scores = mark === null ? [] : [`${DATA.figure} ${mark}`];
    if (!answer.stopped) scores.push(say("cut off after {} tokens", answer.tokens));
    rows.push(answerRow("", name, answer.text, answer.formula, answer.boxes,
      scores.join(" · "), right.length === 1 ? right[0] : null));
  });
  return rows;
}

function textsOf(sample) {
  sample.texts ||= [sample.id, sample.question, ...sample.right,
    ...sample.answers.map((answer) => answer?.text || ""),
    ...sample.pictures.map((number) => DATA.pictures[number].path),
    ...[sample, ...sample.answers].flatMap(
      (one) => (one?.boxes || []).map(({label}) => label)),
  ].join("\n").toLowerCase();
  return sample.texts;
}

/* Whether a sample is one of those that were asked for: `better 2`, `worse 2`, or a kind. */
function isOf(sample, wanted) {
  if (!wanted) return true;
  const [what, run] = wanted.split(" ");
  if (run === undefined) return sample.kind === what;
  const [first, other] = [sample.marks[0], sample.marks[Number(run)]];
  if (first === null || other === null) return false;
  return what === "better" ? other > first : other < first;
}

function isWithin(mark, least, most) {
  if (least === "" && most === "") return true;
  if (mark === null) return false;
  return (least === "" || mark >= Number(least)) && (most === "" || mark <= Number(most));
}

function startSamples() {
  const fields = ["kind", "whose", "least", "most", "search"].map(byId);
  const [kind, whose, least, most, search] = fields;
  let step = () => {};
  const refresh = () => {
    const wanted = search.value.trim().toLowerCase();
    const found = DATA.examples.filter((sample) => isOf(sample, kind.value)
      && isWithin(sample.marks[Number(whose.value)], least.value, most.value)
      && (!wanted || textsOf(sample).includes(wanted)));
    byId("found").textContent = say("{} found", found.length);
    step = feed(byId("feed"), found, drawSample, 20);
  };
  for (const field of fields) field.addEventListener("input", refresh);
  onMove((by) => step(by));
  refresh();
}

if (byId("feed")) startSamples();
