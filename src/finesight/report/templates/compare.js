
/* ---- samples with the answers of several runs ------------------------------------------------- */

const RUNS = DATA.runs.map((label) => ({letter: label.slice(0, 1), name: label.slice(2)}));

function runBadge(index) {
  return createElement("b", {class: `run r${index}`, title: RUNS[index].name}, RUNS[index].letter);
}

function drawSample(sample) {
  const images = sample.images.map((index) => DATA.images[index]);
  const card = createElement("article", {class: images.length ? "example with-images" : "example"},
    createElement("header", {},
      createElement("span", {class: "scores small"}, ...sample.scores.map((score, run) =>
        createElement("span", {}, runBadge(run), ` ${score === null ? "\u2013" : score}`))),
      createElement("span", {class: "soft small mono id"}, sample.id)));
  if (images.length) {
    card.append(createElement("div", {}, ...images.map((image, index) =>
      drawImageWithBoxes(image, index, sample))));
  }
  card.append(createElement("div", {},
    ...drawQuestion(sample),
    createElement("div", {class: "answers"}, ...drawPredictions(sample))));
  return card;
}

function drawImageWithBoxes(image, index, sample) {
  if (image.error) {
    const message = createElement("p", {class: "small"}, `${image.path}: ${image.error}`);
    return createElement("div", {class: "missing"}, ...truncateText(message));
  }
  const hasSeveralImages = sample.images.length > 1;
  const isOnImage = (box) => !hasSeveralImages || box.image === index;
  const boxes = sample.boxes.filter(isOnImage).map(({xyxy}) => ({xyxy, kind: "truth", label: ""}));
  /* Equal boxes of several runs are drawn once, with the letters of these runs. */
  const byCorners = new Map();
  sample.predictions.forEach((prediction, run) => {
    for (const {xyxy} of (prediction?.boxes || []).filter(isOnImage)) {
      const corners = xyxy.map(Math.round).join(" ");
      if (!byCorners.has(corners)) byCorners.set(corners, {xyxy, kind: `r${run}`, label: ""});
      const box = byCorners.get(corners);
      if (!box.label.includes(RUNS[run].letter)) box.label += RUNS[run].letter;
    }
  });
  boxes.push(...byCorners.values());
  const figure = drawImage(image, boxes, image.path.split("/").pop());
  figure.title = image.path;
  figure.addEventListener("click", () => figure.closest(".example").classList.toggle("wide"));
  return figure;
}

function drawPredictions(sample) {
  const {references} = sample;
  const rows = [];
  if (references.length || sample.boxes.length) {
    const title = translate(references.length > 1 ? "reference answers" : "reference answer");
    rows.push(answerRow("truth", title, {...sample, text: references.join("\n")}));
  }
  sample.predictions.forEach((prediction, run) => {
    const name = createElement("span", {}, runBadge(run), ` ${RUNS[run].name}`);
    if (!prediction) {
      rows.push(answerRow("", name, {text: "", boxes: []}, translate("no answer to this sample")));
      return;
    }
    const score = sample.scores[run];
    const notes = score === null ? [] : [`${DATA.metric} ${score}`];
    if (!prediction.is_complete) {
      notes.push(translate("truncated after {} tokens", prediction.num_tokens));
    }
    rows.push(answerRow("", name, prediction, notes.join(" · "), references[0]));
  });
  return rows;
}

/* Apply a filter: `better 2` or `worse 2` for a run index, or a kind of sample. */
function matchesFilter(sample, filter) {
  if (!filter) return true;
  const [kind, run] = filter.split(" ");
  if (run === undefined) return sample.kind === kind;
  const [reference, other] = [sample.scores[0], sample.scores[Number(run)]];
  if (reference === null || other === null) return false;
  return kind === "better" ? other > reference : other < reference;
}

function isInRange(score, min, max) {
  if (min === "" && max === "") return true;
  if (score === null) return false;
  return (min === "" || score >= Number(min)) && (max === "" || score <= Number(max));
}

function startSamples() {
  const fields = ["kind", "run", "min_score", "max_score", "search"].map(byId);
  const [kind, run, minScore, maxScore, search] = fields;
  let moveFocus = () => {};
  const refresh = () => {
    const query = search.value.trim().toLowerCase();
    const matches = DATA.examples.filter((sample) => matchesFilter(sample, kind.value)
      && isInRange(sample.scores[Number(run.value)], minScore.value, maxScore.value)
      && (!query || searchText(sample).includes(query)));
    byId("found").textContent = translate("{} found", matches.length);
    moveFocus = createFeed(byId("feed"), matches, drawSample, 20);
  };
  for (const field of fields) field.addEventListener("input", refresh);
  onNavigate((step) => moveFocus(step));
  refresh();
}

if (byId("feed")) startSamples();
