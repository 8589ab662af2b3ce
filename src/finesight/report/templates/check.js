/* ---- data check: issues, filtered by severity and code --------------------------------------- */

function drawIssue(issue) {
  const description = createElement(
    "div",
    {},
    createElement(
      "h3",
      {},
      createElement("span", { class: `badge ${issue.severity}` }, translate(issue.severity)),
      createElement("span", {}, issue.description),
    ),
    createElement("p", { class: "mono" }, issue.where),
    createElement("p", {}, issue.what),
  );
  if (issue.evidence.length) {
    description.append(
      createElement(
        "ul",
        { class: "evidence small" },
        ...issue.evidence.map((line) => createElement("li", {}, line)),
      ),
    );
  }
  description.append(
    createElement("p", {}, createElement("strong", {}, translate("Remedy: ")), issue.remedy),
  );
  const sample = issue.sample_id ? `${translate("sample {}", issue.sample_id)} · ` : "";
  const fix = issue.fix ? ` · ${translate("fixed by --fix: {}", issue.fix)}` : "";
  description.append(createElement("p", { class: "soft small" }, `${sample}${issue.code}${fix}`));
  if (!issue.images.length)
    return createElement("article", { class: "illustrated issue" }, description);
  return createElement(
    "article",
    { class: "illustrated issue with-images" },
    drawImages(issue, issue.description),
    description,
  );
}

function drawImages({ images, num_more: numMore }, description) {
  const figures = images.map(({ name, image_index: index, boxes }) => {
    const image = DATA.images[index];
    const figure =
      typeof image === "string"
        ? createElement("p", { class: "no-image" }, image)
        : drawImage(
            image,
            boxes,
            translate("{}, {} boxes drawn: {}", name, boxes.length, description),
          );
    return createElement("div", {}, figure, createElement("p", { class: "name" }, name));
  });
  const more = numMore
    ? createElement("p", { class: "soft small" }, translate("and {} more", numMore))
    : "";
  return createElement("div", {}, ...figures, more);
}

/* Lower-case text for the search, computed on first use. */
function searchText(issue) {
  issue.searchText ||= [
    issue.where,
    issue.sample_id,
    issue.what,
    issue.code,
    issue.description,
    ...issue.evidence,
    ...issue.images.map(({ name }) => name),
  ]
    .join("\n")
    .toLowerCase();
  return issue.searchText;
}

function startIssues() {
  const { issues } = DATA;
  const filter = { severity: "", code: "" };
  const [order, search] = ["issue-order", "search"].map(byId);
  const severities = ["", ...new Set(issues.map((issue) => issue.severity))];
  const buttons = severities.map((severity) =>
    createElement(
      "button",
      { type: "button", "data-severity": severity },
      translate(severity ? `${severity}s` : "all"),
    ),
  );
  const select = byId("issue-code");
  let moveFocus = () => {};

  const update = () => {
    for (const button of buttons) {
      button.setAttribute("aria-pressed", button.dataset.severity === filter.severity);
    }
    const query = search.value.trim().toLowerCase();
    const bySeverity = issues.filter(
      (issue) =>
        (!filter.severity || issue.severity === filter.severity) &&
        (!query || searchText(issue).includes(query)),
    );
    const counts = new Map();
    for (const { code } of bySeverity) counts.set(code, (counts.get(code) || 0) + 1);
    if (!counts.has(filter.code)) filter.code = "";
    select.replaceChildren(
      createElement("option", { value: "" }, translate("all codes")),
      ...[...counts].map(([code, count]) =>
        createElement("option", { value: code }, `${code} (${count})`),
      ),
    );
    select.value = filter.code;
    const matches = bySeverity.filter(({ code }) => !filter.code || code === filter.code);
    if (order.value === "file") {
      matches.sort((one, other) =>
        one.where.localeCompare(other.where, undefined, { numeric: true }),
      );
    }
    byId("num-shown").textContent = translate("{} of {} issues", matches.length, issues.length);
    moveFocus = createFeed(byId("list"), matches, drawIssue);
  };

  for (const button of buttons) {
    button.addEventListener("click", () => {
      filter.severity = button.dataset.severity;
      update();
    });
  }
  select.addEventListener("change", () => {
    filter.code = select.value;
    update();
  });
  order.addEventListener("change", update);
  search.addEventListener("input", update);
  for (const button of document.querySelectorAll("[data-code]")) {
    button.addEventListener("click", () => {
      filter.severity = "";
      filter.code = button.dataset.code;
      update();
      select.focus();
    });
  }
  byId("severities").append(...buttons);
  onNavigate((step) => moveFocus(step));
  update();
}

/* ---- random samples -------------------------------------------------------------------------- */

const PREVIEWS_PER_VIEW = 12;

function drawPreview(preview) {
  return createElement(
    "li",
    { class: "card" },
    drawImages(preview, preview.sample_id),
    createElement("p", { class: "question" }, preview.question),
    createElement("p", { class: "reference" }, preview.answer),
    createElement("p", { class: "soft small" }, `${preview.split} · ${preview.sample_id}`),
    createElement("p", { class: "name" }, preview.where),
  );
}

/* The samples are in random order, so that consecutive ones are a random selection. */
function startPreviews() {
  const { previews } = DATA;
  let start = 0;
  const show = () => {
    const shown = previews.slice(start, start + PREVIEWS_PER_VIEW);
    byId("previews").replaceChildren(...shown.map(drawPreview));
    byId("previews-shown").textContent = translate(
      "{} to {} of {}",
      start + 1,
      start + shown.length,
      previews.length,
    );
  };
  const button = byId("other-samples");
  button.hidden = previews.length <= PREVIEWS_PER_VIEW;
  button.addEventListener("click", () => {
    start = start + PREVIEWS_PER_VIEW < previews.length ? start + PREVIEWS_PER_VIEW : 0;
    show();
  });
  show();
}

if (DATA.issues.length) startIssues();
if (DATA.previews.length) startPreviews();
