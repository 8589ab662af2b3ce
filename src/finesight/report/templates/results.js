/* ---- answers --------------------------------------------------------------------------------- */

/* Answers are formulas, shown as source in a monospace font. */
const IS_CODE = DATA.examples.some(({ formula }) => formula);

/* A card of a sample: its images with boxes, its question, the reference and answers, such as those
   of evaluations or runs. An answer has `kind` (a class), `title`, and `prediction` (null without
   one). Its boxes have its `mark` as label, and equal boxes of marked answers are drawn once. Many
   answers have an image each. */
function drawCard(sample, header, answers, hasImagePerAnswer = false) {
  const { references, boxes, formula } = sample;
  const images = sample.images.map((index) => DATA.images[index]);
  const card = createElement(
    "article",
    { class: `illustrated example ${images.length ? "with-images" : ""}` },
    createElement(
      "header",
      {},
      ...header,
      createElement("span", { class: "soft small mono id" }, sample.id),
    ),
  );
  const draw = (several) =>
    images.map((image, index) => drawSampleImage(image, index, sample, several));
  if (images.length)
    card.append(createElement("div", {}, ...draw(hasImagePerAnswer ? [] : answers)));
  const rows = answers.map((answer) => {
    const { kind, title, prediction } = answer;
    const row = prediction
      ? answerRow(kind, title, prediction, references[0])
      : answerRow(kind, title, { text: "", boxes: [] }, "", translate("no answer to this sample"));
    if (hasImagePerAnswer && prediction.boxes.length) row.append(...draw([answer]));
    return row;
  });
  if (references.length || boxes.length) {
    const title = translate(references.length > 1 ? "reference answers" : "reference answer");
    rows.unshift(answerRow("truth", title, { text: references.join("\n"), formula, boxes }));
  }
  const isSideBySide = hasImagePerAnswer || answers.some(({ mark }) => mark);
  card.append(
    createElement(
      "div",
      {},
      ...drawQuestion(sample),
      createElement("div", { class: `answers ${isSideBySide ? "side-by-side" : ""}` }, ...rows),
    ),
  );
  return card;
}

function drawSampleImage(image, index, sample, answers) {
  if (image.error) {
    const message = createElement("p", { class: "small" }, `${image.path}: ${image.error}`);
    return createElement("div", { class: "missing" }, ...truncateText(message));
  }
  const list = (item) =>
    (item?.boxes || []).filter((box) => sample.images.length === 1 || box.image === index);
  /* Labels cover the image, so boxes have labels only if an answer contains several. */
  const hasLabels = [sample, ...answers.map(({ prediction }) => prediction)].some(
    (item) => item?.boxes.length > 1,
  );
  const drawn = new Map();
  for (const { kind, mark, prediction } of answers) {
    for (const { xyxy, label } of list(prediction)) {
      const key = mark ? `${xyxy.map(Math.round)} ${label}` : drawn.size;
      if (!drawn.has(key)) drawn.set(key, { xyxy, kind, label: hasLabels ? label : "", marks: [] });
      const { marks } = drawn.get(key);
      if (mark && !marks.includes(mark)) marks.push(mark);
    }
  }
  const boxes = [...drawn.values()].map(({ marks, label, ...box }) => ({
    ...box,
    label: `${marks.join(",")} ${label}`.trim(),
  }));
  boxes.push(...list(sample).map(({ xyxy }) => ({ xyxy, kind: "truth" })));
  const figure = drawImage(image, boxes, image.path.split("/").pop());
  figure.title = image.path;
  figure.addEventListener("click", () => figure.closest(".example")?.classList.toggle("wide"));
  return figure;
}

/* An answer with its title, scores and copy button. `answer` has `text`, `formula` and `boxes`, and
   of a prediction also `scores`, and `diff` or `fields`, its differences from `reference`. */
function answerRow(kind, title, answer, reference = "", note = "") {
  const { text, formula, boxes, diff, fields, scores = {} } = answer;
  const notes = [note, ...Object.entries(scores).map(([name, value]) => `${name} ${value}`)];
  if (answer.is_complete === false)
    notes.push(translate("truncated after {} tokens", answer.num_tokens));
  const copied = text || (boxes.length ? JSON.stringify(boxes) : "");
  const heading = createElement(
    "div",
    { class: "heading" },
    createElement(
      "h4",
      {},
      title,
      createElement("span", { class: "score" }, notes.filter(Boolean).join(" · ")),
    ),
  );
  if (copied) heading.append(...copyButton(copied, title.textContent || title));
  const row = createElement("section", { class: `answer ${kind}` }, heading);
  if (formula) row.append(createElement("div", { class: "formula" }, buildMathML(formula)));
  const isCode = IS_CODE || boxes.length || fields;
  const source = createElement(
    "p",
    { class: isCode ? "text mono" : "text" },
    ...(diff ? highlightDiff(text, reference, diff) : [text]),
  );
  if (text || !boxes.length) row.append(...truncateText(source));
  if (fields) row.append(...drawFieldDiff(fields));
  if (answer.turns?.length) row.append(drawTurns(answer.turns));
  if (boxes.length) {
    row.append(
      createElement(
        "ul",
        {},
        ...boxes.map(({ label, xyxy }) => {
          const corners = xyxy.map((corner) => Math.round(corner * 10) / 10).join(", ");
          return createElement("li", {}, `${label || translate("box")}: ${corners}`);
        }),
      ),
    );
  }
  return row;
}

/* Answers and tool results of an episode, with small images. */
function drawTurns(turns) {
  const drawn = turns.map(({ role, parts }) => {
    const content = parts.flatMap(({ text, image }) =>
      image
        ? [createElement("img", { src: image, alt: translate("image of a tool") })]
        : truncateText(createElement("p", { class: "text mono" }, text)),
    );
    const title = translate(role === "tool" ? "result of tools" : "answer");
    return createElement("li", { class: role }, createElement("strong", {}, title), ...content);
  });
  const summary = createElement("summary", {}, translate("episode of {} turns", turns.length));
  return createElement("details", { class: "turns" }, summary, createElement("ol", {}, ...drawn));
}

/* Fields of a JSON answer that differ from the reference, with the number of equal values. */
function drawFieldDiff({ differences, num_equal: numEqual }) {
  const note = createElement(
    "p",
    { class: "soft small" },
    translate("{} equal values, {} fields with differences", numEqual, differences.length),
  );
  if (!differences.length) return [note];
  const names = ["field", "reference", "answer", "difference"].map((name) => translate(name));
  const headers = names.map((name) => createElement("th", { scope: "col" }, name));
  const rows = differences.map(([name, missing, extra]) => {
    const kind =
      missing.length && extra.length ? "different" : missing.length ? "missing" : "extra";
    return createElement(
      "tr",
      {},
      createElement("th", { scope: "row" }, name || "[ ]"),
      createElement("td", { "data-label": names[1] }, createElement("del", {}, missing.join("; "))),
      createElement("td", { "data-label": names[2] }, createElement("ins", {}, extra.join("; "))),
      createElement("td", { "data-label": names[3] }, translate(kind)),
    );
  });
  return [
    note,
    createElement(
      "div",
      {
        class: "scroll fields",
        tabindex: 0,
        role: "region",
        "aria-label": translate("Differences by field"),
      },
      createElement(
        "table",
        { class: "stack" },
        createElement("thead", {}, createElement("tr", {}, ...headers)),
        createElement("tbody", {}, ...rows),
      ),
    ),
  ];
}

/* ---- clipboard and files --------------------------------------------------------------------- */

/* A button that copies a text with a name, and its status. */
function copyButton(text, name) {
  const status = createElement("span", { class: "soft small", role: "status" });
  const button = createElement(
    "button",
    { type: "button", class: "copy", "aria-label": translate("Copy: {}", name) },
    translate("Copy"),
  );
  button.addEventListener("click", async () => {
    const isCopied = await copyText(text, button);
    status.textContent = translate(isCopied ? "Copied" : "Not copied: select the text instead");
    setTimeout(() => {
      status.textContent = "";
    }, 4000);
  });
  return [button, status];
}

/* Browsers may deny local files the clipboard API. The older command copies a selected text. */
async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = createElement("textarea", { class: "offscreen", "aria-label": translate("Copy") });
    area.value = text;
    button.after(area);
    area.select();
    const isCopied = document.execCommand("copy");
    area.remove();
    button.focus();
    return isCopied;
  }
}

function saveFile(name, text) {
  const address = URL.createObjectURL(new Blob([text], { type: "application/x-ndjson" }));
  createElement("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60000);
}

/* ---- texts ----------------------------------------------------------------------------------- */

/* The element, and for a long text a button that shows all of it. */
function truncateText(element) {
  const { length } = element.textContent;
  if (length < 360 && element.textContent.split("\n").length <= 5) return [element];
  element.classList.add("truncated");
  const showAll = translate("Show all {} characters", length.toLocaleString("en"));
  const button = createElement(
    "button",
    { type: "button", class: "toggle-text", "aria-expanded": "false" },
    showAll,
  );
  button.addEventListener("click", () => {
    const isTruncated = element.classList.toggle("truncated");
    button.setAttribute("aria-expanded", String(!isTruncated));
    button.textContent = isTruncated ? showAll : translate("Show less");
  });
  return [element, button];
}

/* The question of a sample, with a copy button. */
function drawQuestion({ question }) {
  const heading = createElement(
    "h3",
    { class: "question" },
    question || translate("(no question)"),
  );
  const [, toggle = ""] = truncateText(heading);
  return [
    createElement(
      "div",
      { class: "heading" },
      heading,
      toggle,
      ...(question ? copyButton(question, translate("question")) : []),
    ),
  ];
}

/* A formula from its tree: [name, attributes, ...texts and subtrees]. */
function buildMathML([name, attributes, ...children]) {
  return createElement(
    `math:${name}`,
    attributes,
    ...children.map((child) => (typeof child === "string" ? child : buildMathML(child))),
  );
}

/* The answer with the differences of `diff_texts`: texts that are missing and texts that are not in
   the reference. Positions count Unicode characters. */
function highlightDiff(text, reference, diff) {
  const [characters, expected] = [[...text], [...reference]];
  const isSpace = (character) => character !== undefined && !character.trim();
  const segments = [];
  let position = 0;
  for (const [start, end, first, last] of diff) {
    segments.push(characters.slice(position, start).join(""));
    if (last > first) {
      const isOnly = start === end;
      const before = isOnly && start && isSpace(expected[first - 1]) ? " " : "";
      const after = isOnly && !start && isSpace(expected[last]) ? " " : "";
      segments.push(
        createElement(
          "del",
          { title: translate("missing") },
          before + expected.slice(first, last).join("") + after,
        ),
      );
    }
    if (end > start) {
      segments.push(
        createElement(
          "ins",
          { title: translate("not in the reference answer") },
          characters.slice(start, end).join(""),
        ),
      );
    }
    position = end;
  }
  return [...segments, characters.slice(position).join("")];
}

/* Lower-case text for the search, computed on first use. */
function searchText(sample) {
  sample.searchText ||= [
    sample.id,
    sample.question,
    ...sample.references,
    ...sample.predictions.map((prediction) => prediction?.text || ""),
    ...sample.images.map((index) => DATA.images[index].path),
    ...[sample, ...sample.predictions].flatMap((item) =>
      (item?.boxes || []).map(({ label }) => label),
    ),
  ]
    .join("\n")
    .toLowerCase();
  return sample.searchText;
}
