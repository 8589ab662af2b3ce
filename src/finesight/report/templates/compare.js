/* ---- samples with the answers of several runs ------------------------------------------------ */

const RUNS = DATA.runs.map((label) => ({ letter: label.slice(0, 1), name: label.slice(2) }));

function runBadge(index) {
  return createElement(
    "b",
    { class: `run r${index}`, title: RUNS[index].name },
    RUNS[index].letter,
  );
}

function drawSample(sample) {
  const scores = sample.scores.map((score, run) =>
    createElement("span", {}, runBadge(run), ` ${score === null ? "\u2013" : score}`),
  );
  return drawCard(
    sample,
    [createElement("span", { class: "scores small" }, ...scores)],
    sample.predictions.map((prediction, run) => ({
      kind: `r${run}`,
      mark: RUNS[run].letter,
      prediction,
      title: createElement("span", {}, runBadge(run), ` ${RUNS[run].name}`),
    })),
  );
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
    const matches = DATA.examples.filter(
      (sample) =>
        matchesFilter(sample, kind.value) &&
        isInRange(sample.scores[Number(run.value)], minScore.value, maxScore.value) &&
        (!query || searchText(sample).includes(query)),
    );
    byId("found").textContent = translate("{} found", matches.length);
    moveFocus = createFeed(byId("feed"), matches, drawSample, 20);
  };
  for (const field of fields) field.addEventListener("input", refresh);
  onNavigate((step) => moveFocus(step));
  refresh();
}

if (byId("feed")) startSamples();
