import { byId, create, describe, request, settings, translate } from "./app.js";

let decisions = []; // Of all items, in their order; "" for an open item.
let item = null; // Item that the page shows, as the server sent it.
// The answer in the form: new texts of JSON fields are by path.
let answer = { text: "", edits: {}, boxes: [] };
let selected = -1;
let imageIndex = 0;
let numOpened = 0;
let numLoaded = 0;
let isSaving = false;
const entered = new Set(); // Fields of the item in which Enter was pressed, with the answer.
let updates = []; // Functions that show a changed answer, apart from the form.
const isTouch = matchMedia("(pointer: coarse)");

const isEqual = (one, other) => JSON.stringify(one) === JSON.stringify(other);
// Minimum confidence of the suggestions that the form shows, in percent; above 100, it shows none.
const thresholdKey = `threshold/${settings.session}`;
let threshold = Number(sessionStorage.getItem(thresholdKey) ?? 0);
const isHidden = (confidence) => Math.floor(100 * (confidence ?? 1)) < threshold || threshold > 100;
const makeAnswer = ({
  answer: { text, boxes },
  question,
  fields,
  parts,
  decision,
  suggestion,
  confidence,
}) => {
  const made = { text, edits: {}, boxes: structuredClone(boxes), question: [...question] };
  if (decision !== "open" || !isEqual(suggestion, { text, boxes })) return made;
  const hidden = parts.filter((part) => isHidden(part.confidence)).map(getKey);
  if (fields.length) {
    const keys = fields.map(getKey).filter((key) => hidden.includes(key));
    made.edits = Object.fromEntries(keys.map((key) => [key, ""]));
  } else if (boxes.length)
    made.boxes = made.boxes.filter((_, index) => !hidden.includes(`[${index}]`));
  else if (isHidden(confidence)) made.text = "";
  return made;
};
const getKey = ({ path }) => JSON.stringify(path);
const getBase = ({ answer: saved, question }) => [saved, question];
const isChanged = () => !isEqual(answer, makeAnswer(item));

// Unsaved answers are kept while another image is opened or the page is reloaded. Servers may share
// an address, and the order of the images changes when the server starts.

const draftKey = (id) => `draft/${settings.session}/${id}`;
const undoKey = `undo/${settings.version}`;
const readStored = (key) => JSON.parse(sessionStorage.getItem(key));
const store = (key, value) => {
  try {
    sessionStorage.setItem(key, JSON.stringify(value));
  } catch {
    /* The storage is full. */
  }
};
const keepDraft = () => {
  if (!item) return;
  if (isChanged()) store(draftKey(item.id), { base: getBase(item), answer });
  else sessionStorage.removeItem(draftKey(item.id));
};
addEventListener("pagehide", keepDraft);

// Messages

const report = (title, error) => {
  byId("error").textContent = `${translate(title)}: ${describe(error)}`;
  byId("error").hidden = false;
  byId("error").scrollIntoView({ block: "nearest" });
};
const notify = (text) => {
  byId("notice").textContent = text;
};

const showCounts = (counts) => {
  const total = decisions.length;
  const done = total - counts.open;
  byId("done").textContent = translate("{} of {} done", done, total);
  Object.assign(byId("bar"), { max: total || 1, value: done });
  byId("counts").replaceChildren(
    ...Object.entries(counts).map(([name, count]) =>
      create("span", {}, `${translate(name)} ${count}`),
    ),
  );
  const isFinished = total > 0 && !counts.open;
  byId("finished").hidden = !isFinished;
  byId("all-decided").textContent = isFinished
    ? translate("All {} images are decided.", total)
    : "";
  byId("review").hidden = !counts.skipped;
  byId("review").textContent = translate("Review the skipped images ({})", counts.skipped);
  byId("save-text").textContent = translate(isFinished ? "Save" : "Save and next");
};

const loadItems = async () => {
  const number = ++numLoaded;
  const content = await request("items");
  if (number !== numLoaded) return; // A decision or another request may have followed.
  ({ decisions } = content);
  showCounts(content.counts);
};

const open = async (index, hasFocus = false) => {
  const number = ++numOpened;
  try {
    const loaded = await request(`items/${index}`);
    // The answer to an earlier request may come later.
    if (number !== numOpened) return false;
    load(loaded, hasFocus);
    return true;
  } catch (error) {
    if (number === numOpened) report("Not loaded", error);
    return false;
  }
};

const load = (loaded, hasFocus = false) => {
  keepDraft();
  item = loaded;
  selected = -1;
  entered.clear();
  imageIndex = item.answer.boxes[0]?.image ?? 0;
  answer = makeAnswer(item);
  const draft = readStored(draftKey(item.id));
  const paths = item.fields.map(getKey);
  const isCurrent = draft && isEqual(draft.base, getBase(item));
  if (isCurrent) {
    const edits = Object.entries(draft.answer.edits).filter(([path]) => paths.includes(path));
    answer = { ...draft.answer, edits: Object.fromEntries(edits) };
  }
  byId("error").hidden = true;
  notify("");
  location.hash = byId("language").hash = item.index;
  const event = item.decision === "open" ? "" : item.decision;
  if (decisions[item.index] !== event) loadItems().catch((error) => report("Not loaded", error));
  decisions[item.index] = event;
  show(draft && !isCurrent ? draft.answer : null);
  markListed();
  scrollTo(0, 0);
  // An empty text has the focus, so that the letters of the answer are no commands. After a command
  // it has not, so that the next letter is one, too.
  const isReadable = !item.images.some((image) => image.error);
  const isEmpty = isReadable && !answer.text && !isChanged() && item.decision === "open";
  if (hasFocus && isEmpty && !isTouch.matches && ["text", "fields"].includes(settings.kind)) edit();
};

const findOpen = (index) => {
  for (let step = 1; step <= decisions.length; step++) {
    const other = (index + step) % decisions.length;
    if (!decisions[other]) return other;
  }
  return -1;
};

// Update an item after its answer was saved, and keep what was typed since. Returns whether
// nothing was.
const settle = (saved, loaded, sent) => {
  const kept = saved === item ? answer : readStored(draftKey(saved.id))?.answer;
  const isSettled = !kept || JSON.stringify(kept) === sent;
  let current = makeAnswer(loaded);
  if (!isSettled) {
    const edits = loaded.fields
      .map((field) => [getKey(field), kept.edits[getKey(field)], field.text])
      .filter(([, edited, text]) => edited !== undefined && edited !== text);
    const hasFields = kept.text === saved.answer.text && saved.fields.length;
    current = hasFields
      ? { ...kept, text: loaded.answer.text, edits: Object.fromEntries(edits) }
      : kept;
  }
  Object.assign(saved, loaded);
  if (saved === item) answer = current;
  if (isSettled) sessionStorage.removeItem(draftKey(saved.id));
  else store(draftKey(saved.id), { base: getBase(saved), answer: current });
  return isSettled;
};

// Returns whether the decision is saved.
const decide = async (action) => {
  if (!item || isSaving) return false;
  isSaving = true;
  const decided = item;
  const number = numOpened;
  const sent = JSON.stringify(answer);
  const { id, index, revision } = item;
  try {
    const result = await request("decision", { id, revision, action, ...encodeAnswer() });
    numLoaded++;
    decisions[index] = action === "reopen" ? "" : result.item.decision;
    if (action !== "reopen") store(undoKey, [...(readStored(undoKey) ?? []), index]);
    showCounts(result.counts);
    // A skipped answer is not saved, and remains a draft.
    const isSettled = action !== "save" || settle(decided, result.item, sent);
    showList();
    if (item !== decided) return true;
    if (action === "reopen") load(result.item);
    else if (!isSettled) {
      refresh();
      notify(translate("Saved without your later changes"));
    } else if (number === numOpened) {
      Object.assign(item, result.item);
      // Enter does not press the same button again. Text that is typed until the next image is
      // kept.
      if (document.activeElement?.matches("button")) document.activeElement.blur();
      const next = findOpen(index);
      if (next < 0) load(result.item);
      else await open(next, action === "save");
    }
    return true;
  } catch (error) {
    report("Not saved", error);
    return false;
  } finally {
    isSaving = false;
  }
};

const undo = async () => {
  if (!item || isSaving) return;
  if (!byId("error").hidden) {
    // Nothing was saved, so the answer stays as it is.
    byId("error").hidden = true;
    return;
  }
  const index = findUndone();
  if (Array.isArray(index)) return decideMany({ action: "reopen", items: index });
  if (index < 0) {
    notify(translate("Nothing to undo"));
    return;
  }
  if (!(await open(index))) return;
  const { decision } = item;
  const name = item.images[0]?.name ?? item.id;
  if (!(await decide("reopen"))) return;
  store(undoKey, (readStored(undoKey) ?? []).slice(0, -1));
  refresh();
  notify(translate("Undone: {}", `${translate(decision)} · ${name}`));
};

// Accepts all suggestions from a confidence on, which one undo reopens.
const decideMany = async (decision) => {
  if (isSaving) return;
  isSaving = true;
  notify("…"); // Thousands of images take seconds.
  try {
    const { items } = await request("decisions", decision);
    const isAccepted = decision.action === "accept";
    const earlier = readStored(undoKey) ?? [];
    store(
      undoKey,
      isAccepted ? [...earlier, ...(items.length ? [items] : [])] : earlier.slice(0, -1),
    );
    await loadItems();
    await open(isAccepted || !items.length ? Math.max(0, findOpen(item.index - 1)) : items[0][0]);
    showList();
    notify(translate(isAccepted ? "Accepted: {}" : "Reopened: {}", items.length));
  } catch (error) {
    // Some of the decisions may be saved.
    await loadItems().catch(() => {});
    await open(item.index);
    report("Not saved", error);
  } finally {
    isSaving = false;
  }
};

// The last image decided on this page, or several, or else the shown one; -1 if it is open.
const findUndone = () => readStored(undoKey)?.at(-1) ?? (decisions[item.index] ? item.index : -1);

// Answer

// Fields replace a text only as long as nobody has typed another one.
const listFields = () => (answer.text === item.answer.text ? item.fields : []);

const encodeAnswer = () => {
  const { text, edits, boxes, question } = answer;
  const fields = listFields();
  const edited = fields
    .map((field, index) => [index, edits[getKey(field)]])
    .filter(([, value]) => value !== undefined);
  const hasFields = fields.length && (!boxes.length || edited.length);
  // The server replaces the fields: numbers of JavaScript have fewer digits than those of JSON.
  return { text, edits: hasFields ? Object.fromEntries(edited) : null, boxes, question };
};

const getValue = (text, path) => {
  try {
    return path.reduce((value, key) => value?.[key], JSON.parse(text));
  } catch {
    return undefined;
  }
};
// Returns what is saved instead of the number, or true or false, of the template; "" if nothing.
const describeType = ({ path, text }, value) => {
  const own = getValue(item.answer.text, path);
  const word = value.trim();
  const typical =
    getValue(
      item.template,
      path.map((key) => (Number.isInteger(key) ? 0 : key)),
    ) ?? own;
  const isText =
    value === text && own !== undefined
      ? typeof own === "string"
      : typeof (own ?? typical) === "string" ||
        (typeof typical === "number"
          ? !/^-?(0|[1-9]\d*)(\.\d+)?(e[+-]?\d+)?$/i.test(word)
          : !["true", "false"].includes(word));
  if (!word || word === "null" || !isText || !["number", "boolean"].includes(typeof typical))
    return "";
  return typeof typical === "number" ? "text, not a number" : "text, not true or false";
};

// Show the state of a changed answer without its form, in which the user may be typing.
const refresh = () => {
  keepDraft();
  const isSuggested =
    isEqual(item.suggestion, item.answer) && !isChanged() && !isUnknownClass(answer.text);
  byId("position").textContent = translate("{} of {}", item.index + 1, decisions.length);
  byId("decision").textContent = translate(item.decision);
  byId("confidence").textContent =
    item.score !== null
      ? translate("error score {}", item.score.toFixed(2))
      : !item.suggestion
        ? translate("No suggestion")
        : isSuggested && item.confidence !== null
          ? translate("confidence {}", `${Math.floor(100 * item.confidence)} %`)
          : "";
  byId("reset").hidden = !isChanged();
  byId("undo").disabled = findUndone() === -1;
  for (const update of updates) update();
};

const getConfidence = (path) =>
  item.parts.find((part) => JSON.stringify(part.path) === JSON.stringify(path))?.confidence;

// The badge is visible as long as the value is the suggested one.
const makeBadge = (confidence, isSuggested) => {
  if (confidence === undefined || confidence === null) return "";
  const level = confidence < 0.5 ? "low" : confidence < 0.9 ? "medium" : "high";
  const badge = create("span", { class: `badge ${level}` }, `${Math.floor(100 * confidence)} %`);
  if (isSuggested)
    updates.push(() => {
      badge.hidden = !isSuggested();
    });
  return badge;
};

// The two corners of a point are equal.
const isPoint = ({ xyxy: [x1, y1, x2, y2] }) => x1 === x2 && y1 === y2;
const nameBox = (box, index) => translate(isPoint(box) ? "Point {}" : "Box {}", index + 1);
const formatAnswer = ({ text, boxes: shown }) =>
  [
    text,
    ...shown.map(
      (box) =>
        `${box.label ?? ""} [${box.xyxy
          .slice(0, isPoint(box) ? 2 : 4)
          .map(Math.round)
          .join(", ")}]`,
    ),
  ]
    .join("\n")
    .trim();

// List of all images

let listed = 0;
let listRequest = 0;
let searchTimer;
const showList = async (start = 0) => {
  if (!byId("list").open) return;
  const number = ++listRequest;
  const query = new URLSearchParams({
    text: byId("list-text").value,
    state: byId("list-state").value,
    start,
  });
  try {
    const found = await request(`search?${query}`);
    // The answer to an earlier request may come later.
    if (number !== listRequest) return;
    const rows = found.items.map((row) =>
      create(
        "li",
        {},
        create(
          "button",
          { type: "button", "data-index": row.index, onclick: () => openListed(row.index) },
          row.url
            ? create("img", {
                src: `${row.url}&small=true`,
                alt: "",
                loading: "lazy",
                onerror: ({ target }) => target.removeAttribute("src"),
              })
            : create("span"),
          create("span", {}, row.name),
          " ",
          create(
            "span",
            { class: "chips" },
            ...(sessionStorage.getItem(draftKey(row.id))
              ? [create("span", { class: "chip draft" }, translate("unsaved")), " "]
              : []),
            create("span", { class: "chip" }, translate(row.decision)),
          ),
          " ",
          create("span", { class: "answer" }, row.answer),
        ),
      ),
    );
    if (start) byId("list-items").append(...rows);
    else byId("list-items").replaceChildren(...rows);
    listed = start + rows.length;
    byId("list-count").textContent = translate(
      found.count > 1 ? "{} images" : found.count ? "1 image" : "No image matches",
      found.count,
    );
    byId("list-more").hidden = listed >= found.count;
    markListed();
  } catch (error) {
    byId("list-count").textContent = describe(error);
  }
};
const openListed = async (index) => {
  document.activeElement?.blur?.();
  await open(index);
};
const markListed = () => {
  for (const button of document.querySelectorAll("#list-items button")) {
    button.setAttribute("aria-current", Number(button.dataset.index) === item?.index);
  }
};
byId("list").addEventListener("toggle", () => showList());
byId("review").addEventListener("click", async () => {
  // Another tab may have skipped them.
  try {
    await loadItems();
  } catch (error) {
    report("Not loaded", error);
    return;
  }
  byId("list-state").value = "skipped";
  if (byId("list").open) showList();
  byId("list").open = true;
  const index = decisions.indexOf("skipped");
  if (index >= 0) openListed(index);
});
byId("list-state").addEventListener("change", () => showList());
byId("list-text").addEventListener("input", () => {
  clearTimeout(searchTimer);
  searchTimer = setTimeout(showList, 200);
});

// Page

const show = (lost = null) => {
  const { history, answer: loaded, suggestion } = item;
  byId("history").hidden = !history.length;
  byId("history")
    .querySelector("ol")
    .replaceChildren(
      ...history.map((entry) =>
        create(
          "li",
          {},
          new Date(entry.time).toLocaleString(document.documentElement.lang),
          " ",
          [translate(entry.event), ...(entry.event === "suggested" ? [entry.model] : [])].join(" "),
          ...(entry.question.length
            ? [
                create(
                  "div",
                  { class: "small" },
                  `${translate("Prompt")}: ${entry.question.join("")}`,
                ),
              ]
            : []),
          ...(entry.old
            ? [
                create(
                  "div",
                  { class: "small" },
                  translate("before:"),
                  " ",
                  create("del", {}, formatAnswer(entry.old)),
                ),
              ]
            : []),
          ...(entry.new
            ? [
                create(
                  "div",
                  { class: "small" },
                  ...(entry.old ? [translate("after:"), " "] : []),
                  create("ins", {}, formatAnswer(entry.new)),
                ),
              ]
            : []),
        ),
      ),
    );
  const hints = [];
  const isShown = isEqual(suggestion, loaded);
  if (suggestion && !isHidden(item.confidence) && (item.has_template || !isShown)) {
    hints.push([["The model suggests:", makeBadge(item.confidence)], suggestion]);
  }
  if (item.has_template && loaded.text && !isShown) hints.push([["Answer without JSON:"], loaded]);
  if (lost) {
    const text = [lost.text, ...Object.values(lost.edits)].join("\n");
    hints.push([["Your unsaved answer:"], { ...lost, text }]);
  }
  byId("hint").hidden = !hints.length;
  byId("hint").replaceChildren(
    ...hints.flatMap(([[title, ...badges], shown]) => [
      create("p", { class: "small soft" }, translate(title), " ", ...badges),
      create("pre", {}, formatAnswer(shown)),
    ]),
  );
  byId("save").disabled = item.images.some((image) => image.error);
  showQuestion();
  showForm();
  showImage();
};

// Each sample has its own question, whose texts are between its images.
const showQuestion = () => {
  byId("turns").replaceChildren(
    ...item.turns.flatMap(({ role, text }) => [
      create("strong", {}, role),
      " ",
      text,
      create("br"),
    ]),
  );
  byId("question").replaceChildren(
    ...answer.question.map((text, index) =>
      makeInput(
        "textarea",
        {
          rows: 2,
          "aria-label": translate("Prompt"),
          hidden: !item.question[index].trim() && item.question.some((one) => one.trim()),
        },
        text,
        (edited) => {
          answer.question[index] = edited;
        },
      ),
    ),
  );
};

const showForm = () => {
  updates = [];
  const fields = listFields();
  const { boxes } = answer;
  const rows = boxes.map((box, index) =>
    create(
      "div",
      {
        class: `row${index === selected ? " selected" : ""}`,
        style: `--color: ${getColor(index)}`,
        onfocusin: () => {
          if (selected !== index) select(index, false);
        },
      },
      create(
        "label",
        { for: `box-${index}` },
        nameBox(box, index),
        " ",
        makeBadge(
          getConfidence([findSuggested(box)]),
          () => findSuggested(answer.boxes[index]) >= 0,
        ),
      ),
      makeInput("input", { id: `box-${index}`, list: "names" }, box.label ?? "", (value) => {
        box.label = value || null;
        drawBoxes();
      }),
      create(
        "button",
        {
          type: "button",
          "aria-label": `${translate("Delete")} ${nameBox(box, index)}`,
          onclick: () => remove(index),
        },
        "✕",
      ),
      makeClassNote(() => box.label, true),
    ),
  );
  const badge = makeBadge(
    getConfidence([]),
    () => answer.text === item.suggestion?.text && !isUnknownClass(answer.text),
  );
  const isChoice = settings.kind === "classes" && item.choices.length;
  if (isChoice || (boxes.length && item.choices.length))
    rows.unshift(makeChoices(isChoice ? badge : ""));
  const names = [...new Set([...item.choices, ...settings.names])];
  rows.push(
    create("datalist", { id: "names" }, ...names.map((value) => create("option", { value }))),
  );
  if (fields.length) rows.push(...fields.map(makeField));
  else {
    const isBoxes = settings.kind === "boxes";
    const change = (value) => {
      answer.text = value;
    };
    if (isChoice) {
      const getSuggested = () =>
        isEqual(item.suggestion, item.answer) ? item.suggestion.text : "";
      rows.push(create("div", { class: "row" }, makeClassNote(getSuggested)));
      if (!settings.closed) rows.push(makeOther(change));
    } else {
      const label = create(
        "label",
        { for: "answer" },
        translate(settings.kind === "fields" ? "JSON" : "Text"),
        " ",
        badge,
      );
      const input = makeInput(
        "textarea",
        { id: "answer", rows: isBoxes ? 1 : 6 },
        answer.text,
        change,
      );
      rows.push(
        create(
          "div",
          { class: "row" },
          label,
          input,
          ...(isBoxes
            ? [
                create(
                  "button",
                  { type: "button", onclick: clear },
                  translate("No objects"),
                  " ",
                  create("kbd", {}, "0"),
                ),
              ]
            : []),
        ),
      );
    }
  }
  byId("form").replaceChildren(...rows);
  refresh();
};

const makeField = (field, index) => {
  const { path, text } = field;
  const key = getKey(field);
  const getEdit = () => answer.edits[key] ?? text;
  const isSuggested = () => getEdit() === text && item.answer.text === item.suggestion?.text;
  const note = create("span", { class: "note", role: "status" });
  updates.push(() => {
    note.textContent = translate(describeType(field, getEdit()));
  });
  return create(
    "div",
    { class: "row" },
    create(
      "label",
      { for: `field-${index}` },
      path.join("."),
      " ",
      makeBadge(getConfidence(path), isSuggested),
    ),
    makeInput("input", { id: `field-${index}` }, getEdit(), (edited) => {
      if (edited === text) delete answer.edits[key];
      else answer.edits[key] = edited;
    }),
    note,
  );
};

const makeInput = (name, attributes, value, onInput) => {
  const change = () => {
    onInput(input.value);
    refresh();
  };
  const input = create(name, { ...attributes, oninput: change });
  input.value = value;
  return input;
};

const isKnown = (value) => item.choices.includes(value);
const isUnknown = (value) =>
  settings.closed && Boolean(value) && item.choices.length > 0 && !isKnown(value);
const isUnknownClass = (value) => settings.kind === "classes" && isUnknown(value);
const makeClassNote = (getName, isRequired = false) => {
  const note = create("span", { class: "note" });
  updates.push(() => {
    const name = getName();
    const isMissing = isRequired && settings.names.length && !name;
    note.textContent = isUnknown(name)
      ? translate("{} is not one of the classes", name)
      : isMissing
        ? translate("Choose a class")
        : "";
  });
  return note;
};

// Buttons of the classes, for the answer or the selected box. A new form follows each choice.
const makeChoices = (badge) => {
  const buttons = item.choices.map((name, index) =>
    create(
      "button",
      {
        type: "button",
        onclick: () => {
          choose(index); // It draws the buttons again.
          byId("form").querySelectorAll(".choices button")[index].focus();
        },
      },
      ...(index < 9 ? [create("kbd", {}, index + 1), " "] : []),
      name,
    ),
  );
  updates.push(() =>
    buttons.forEach((button, index) => {
      const isClass = settings.kind === "classes";
      button.disabled = !isClass && !answer.boxes[selected];
      button.setAttribute(
        "aria-pressed",
        item.choices[index] === (isClass ? answer.text : answer.boxes[selected]?.label),
      );
    }),
  );
  return create(
    "fieldset",
    { class: "choices" },
    create("legend", {}, translate("Class"), " ", badge),
    ...buttons,
  );
};

// Returns the input of a class that is none of the choices.
const makeOther = (onInput) =>
  create(
    "div",
    { class: "row" },
    create("label", { for: "other" }, translate("Other class")),
    makeInput(
      "input",
      { id: "other", list: "names" },
      isKnown(answer.text) ? "" : answer.text,
      onInput,
    ),
  );

const findSuggested = (box) => item.suggestion?.boxes.findIndex((one) => isEqual(one, box)) ?? -1;

const choose = (index) => {
  const name = item.choices[index];
  const box = answer.boxes[selected];
  if (name === undefined) return;
  if (settings.kind === "classes") answer.text = name;
  else if (box) box.label = name;
  showForm();
  if (box) drawBoxes();
};

// Image and boxes

const getColor = (index) => settings.colors[index % settings.colors.length];

const showImage = () => {
  const shown = item.images[imageIndex];
  byId("stage").hidden = !shown || shown.error;
  byId("unreadable").hidden = !shown?.error;
  byId("name").textContent = shown?.name ?? "";
  byId("next-image").hidden = item.images.length < 2;
  byId("next-image").textContent = translate("Image {} of {}", imageIndex + 1, item.images.length);
  if (!shown) return;
  if (shown.error) {
    byId("image").removeAttribute("src");
    byId("unreadable").textContent = `${translate("The image cannot be read.")}\n${shown.error}`;
    return;
  }
  if (byId("image").getAttribute("src") !== shown.url) {
    // The previous image must not stay visible while the next one loads.
    byId("image").removeAttribute("src");
    byId("image").src = shown.url;
    zoom = 1;
  }
  byId("image").alt = shown.name;
  byId("image").width = shown.width;
  byId("image").height = shown.height;
  byId("view").style.setProperty("--width", `${shown.width}px`);
  byId("view").style.setProperty("--ratio", shown.width / shown.height);
  byId("overlay").setAttribute("viewBox", `0 0 ${shown.width} ${shown.height}`);
  showZoom();
};

byId("image").addEventListener("error", () => {
  // The header is readable, but the pixels are not.
  byId("unreadable").textContent = translate("The image cannot be read.");
  byId("unreadable").hidden = false;
  byId("image").removeAttribute("src");
  document.activeElement?.blur?.();
});

const drawBoxes = () => {
  const draw = (name, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    overlay.append(element);
    return element;
  };
  const overlay = byId("overlay");
  overlay.replaceChildren();
  const unit = item.images[imageIndex].width / Math.max(1, overlay.clientWidth) / zoom;
  answer.boxes.forEach((box, index) => {
    if (box.image !== imageIndex) return;
    const [x1, y1, x2, y2] = box.xyxy;
    const color = getColor(index);
    const shared = {
      stroke: color,
      class: index === selected ? "selected" : "",
      "data-box": index,
    };
    if (isPoint(box)) {
      const point = { cx: x1, cy: y1, "data-box": index };
      draw("circle", { ...point, r: 10 * unit, class: "reach" });
      draw("circle", { ...shared, ...point, r: 5 * unit, fill: color });
    } else {
      draw("rect", {
        ...shared,
        x: x1,
        y: y1,
        width: Math.max(0, x2 - x1),
        height: Math.max(0, y2 - y1),
      });
    }
    const text = draw("text", {
      x: x1,
      y: Math.max(y1 - 3 * unit, 12 * unit),
      fill: color,
      "font-size": 13 * unit,
      "stroke-width": 3 * unit,
    });
    text.textContent = box.label ? `${box.label}${isUnknown(box.label) ? "?" : ""}` : index + 1;
    if (index !== selected || isPoint(box)) return;
    // The invisible area of a corner is larger, and leaves the middle of a small box.
    const reach = Math.min(18 * unit, Math.max(8 * unit, (x2 - x1) / 3, (y2 - y1) / 3));
    for (const [corner, x, y] of [
      [0, x1, y1],
      [1, x2, y1],
      [2, x1, y2],
      [3, x2, y2],
    ]) {
      const point = { cx: x, cy: y, "data-box": index, "data-corner": corner };
      draw("circle", { ...point, r: reach, class: "reach" });
      draw("circle", { ...point, r: 6 * unit, fill: color });
    }
  });
};

const select = (index, hasForm = true) => {
  selected = index;
  if (hasForm) showForm();
  else
    document
      .querySelectorAll("#form .row")
      .forEach((row, number) => row.classList.toggle("selected", number === index));
  if (!hasForm) refresh();
  drawBoxes();
};

const remove = (index) => {
  answer.boxes.splice(index, 1);
  if (!answer.boxes.length && !answer.text && settings.kind === "boxes")
    answer.text = settings.no_objects;
  select(Math.min(selected, answer.boxes.length - 1));
};

const clear = () => {
  answer.boxes = [];
  answer.text = settings.no_objects;
  select(-1);
};

const add = (xyxy) => {
  // Boxes replace an unchanged text of an answer without boxes.
  const isReplaced =
    answer.text === settings.no_objects ||
    (!item.answer.boxes.length && answer.text === item.answer.text);
  if (!answer.boxes.length && isReplaced) answer.text = "";
  answer.boxes.push({ image: imageIndex, label: null, xyxy });
  select(answer.boxes.length - 1);
};

const clampBox = (xyxy) => {
  const { width, height } = item.images[imageIndex];
  const [x1, x2] = [xyxy[0], xyxy[2]]
    .map((x) => Math.min(Math.max(x, 0), width))
    .sort((a, b) => a - b);
  const [y1, y2] = [xyxy[1], xyxy[3]]
    .map((y) => Math.min(Math.max(y, 0), height))
    .sort((a, b) => a - b);
  return [x1, y1, x2, y2].map((value) => Math.round(value * 10) / 10);
};

// Moves one of the corners, which are numbered by row, or without one the whole box.
const changeBox = ([x1, y1, x2, y2], corner, dx, dy) => {
  const { width, height } = item.images[imageIndex];
  if (corner !== undefined) {
    const [right, bottom] = [corner % 2, Math.floor(corner / 2)];
    return clampBox([
      x1 + dx * (1 - right),
      y1 + dy * (1 - bottom),
      x2 + dx * right,
      y2 + dy * bottom,
    ]);
  }
  // A moved box keeps its size at the border of the image.
  dx = Math.min(Math.max(dx, -x1), width - x2);
  dy = Math.min(Math.max(dy, -y1), height - y2);
  return clampBox([x1 + dx, y1 + dy, x2 + dx, y2 + dy]);
};

// Zoom and pan

const MAX_ZOOM = 16;
let zoom = 1;
let pan = [0, 0];
let panned = null; // In pixels of the page, from the corner of the stage.
const touches = new Map(); // Positions of the fingers on the image.
const showZoom = () => {
  const stage = byId("stage");
  const sizes = [stage.clientWidth, stage.clientHeight];
  pan = pan.map((value, axis) => Math.min(0, Math.max(value, (1 - zoom) * sizes[axis])));
  stage.style.setProperty("--zoom", `translate(${pan[0]}px, ${pan[1]}px) scale(${zoom})`);
  stage.classList.toggle("zoomed", zoom > 1);
  byId("zoom-out").disabled = zoom === 1;
  drawBoxes();
};
const zoomAt = (factor, [x, y]) => {
  const { left, top } = byId("stage").getBoundingClientRect();
  const at = [x - left, y - top];
  const next = Math.min(MAX_ZOOM, Math.max(1, zoom * factor));
  pan = pan.map((value, axis) => at[axis] - ((at[axis] - value) * next) / zoom);
  zoom = next;
  showZoom();
};
// Keys and buttons keep the selected box, or else the middle.
const zoomBy = (factor) => {
  const shown = byId("overlay").querySelector(".selected") ?? byId("stage");
  const { left, top, width, height } = shown.getBoundingClientRect();
  zoomAt(factor, [left + width / 2, top + height / 2]);
};
byId("stage").addEventListener(
  "wheel",
  (event) => {
    // At its smallest size, the image lets the page scroll.
    if (zoom === 1 && event.deltaY > 0) return;
    event.preventDefault();
    zoomAt(Math.exp(-event.deltaY / 400), [event.clientX, event.clientY]);
  },
  { passive: false },
);
byId("stage").addEventListener(
  "pointerdown",
  (event) => {
    const at = [event.clientX, event.clientY];
    const { box } = event.target.dataset;
    if (event.pointerType === "touch") touches.set(event.pointerId, at);
    const isDrawing =
      settings.kind === "boxes" &&
      !event.shiftKey &&
      event.button !== 1 &&
      (event.pointerType === "mouse" ||
        byId("view").classList.contains("drawing") ||
        box !== undefined);
    if (touches.size < 2 && (isDrawing || zoom === 1)) return;
    // A second finger ends a box that the first one has begun to draw.
    event.preventDefault();
    event.stopPropagation();
    drag = null;
    panned = at;
    byId("stage").setPointerCapture(event.pointerId);
  },
  true,
);
byId("stage").addEventListener(
  "pointermove",
  (event) => {
    const at = [event.clientX, event.clientY];
    const before = touches.get(event.pointerId);
    if (before) touches.set(event.pointerId, at);
    if (!panned) return;
    event.stopPropagation();
    const [other] = [...touches].filter(([id]) => id !== event.pointerId).map(([, point]) => point);
    if (before && other) {
      const measure = ([x, y]) => Math.max(1, Math.hypot(x - other[0], y - other[1]));
      zoomAt(measure(at) / measure(before), other);
    } else {
      pan = pan.map((value, axis) => value + at[axis] - panned[axis]);
      panned = at;
      showZoom();
    }
  },
  true,
);
for (const name of ["pointerup", "pointercancel"])
  byId("stage").addEventListener(
    name,
    (event) => {
      touches.delete(event.pointerId);
      panned = null;
    },
    true,
  );

let drag = null;
const getPoint = (event) => {
  const area = byId("overlay").getBoundingClientRect();
  const shown = item.images[imageIndex];
  return [
    ((event.clientX - area.left) * shown.width) / area.width,
    ((event.clientY - area.top) * shown.height) / area.height,
  ];
};
byId("overlay").addEventListener("pointerdown", (event) => {
  if (settings.kind !== "boxes" || event.button) return;
  event.preventDefault();
  byId("stage").focus({ preventScroll: true });
  byId("overlay").setPointerCapture(event.pointerId);
  const { box, corner } = event.target.dataset;
  const start = getPoint(event);
  // A finger scrolls the page, unless it draws or moves the selected box.
  const isDrawing = event.pointerType === "mouse" || byId("view").classList.contains("drawing");
  const isMoving = isDrawing || Number(box) === selected;
  if (box !== undefined) select(Number(box));
  drag = {
    start,
    corner,
    isMoving,
    box: box === undefined ? -1 : Number(box),
    before: box === undefined ? null : [...answer.boxes[Number(box)].xyxy],
  };
});
byId("draw").addEventListener("click", () => {
  const isOn = byId("view").classList.toggle("drawing");
  byId("draw").setAttribute("aria-pressed", isOn);
});
byId("overlay").addEventListener("pointermove", (event) => {
  if (!drag?.isMoving) return;
  const [x, y] = getPoint(event);
  const [dx, dy] = [x - drag.start[0], y - drag.start[1]];
  if (drag.box < 0) {
    if (Math.hypot(dx, dy) < 3) return;
    const before = [...drag.start, ...drag.start];
    add(clampBox(settings.points ? before : [...drag.start, x, y]));
    // A new box is drawn by its lower right corner.
    Object.assign(drag, { box: selected, corner: settings.points ? undefined : 3, before });
  }
  answer.boxes[drag.box].xyxy = changeBox(drag.before, drag.corner, dx, dy);
  drawBoxes();
});
for (const name of ["pointerup", "pointercancel"])
  byId("overlay").addEventListener(name, () => {
    // A click next to all boxes selects none, or adds a point. The start of scrolling cancels a
    // pointer.
    if (drag && drag.box < 0 && name === "pointerup") {
      if (settings.points && drag.isMoving) add(clampBox([...drag.start, ...drag.start]));
      else select(-1);
    } else if (drag) showForm();
    drag = null;
  });

// Keys

const edit = () => {
  const inputs = [...byId("form").querySelectorAll("input, textarea")];
  const fields = listFields();
  const values = item.parts.map((part) => part.confidence);
  const least = item.parts[values.indexOf(Math.min(...values))]?.path;
  const paths = fields.length
    ? fields.map(({ path }) => path)
    : answer.boxes.map((box) => [findSuggested(box)]);
  const index = paths.findIndex((path) => isEqual(path, least));
  const target =
    inputs[Math.max(0, index) + (fields.length ? answer.boxes.length : 0)] ??
    byId("form").querySelector(".choices button");
  // The row is visible above the buttons of a narrow page, and the image stays in view.
  target?.focus({ preventScroll: true });
  target?.closest(".row, .choices").scrollIntoView({ block: "nearest" });
  // New text replaces a field, and continues a longer text.
  if (target?.matches("textarea"))
    target.setSelectionRange(target.value.length, target.value.length);
  else target?.select?.();
};

const moveByKey = (event) => {
  const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[
    event.key
  ];
  const size = event.ctrlKey ? 10 : 1;
  const box = answer.boxes[selected];
  const corner = event.shiftKey && !isPoint(box) ? 3 : undefined;
  box.xyxy = changeBox(box.xyxy, corner, dx * size, dy * size);
  showForm();
  drawBoxes();
};

const addByKey = () => {
  const { width, height } = item.images[imageIndex] ?? {};
  const [start, stop] = settings.points ? [0.5, 0.5] : [0.25, 0.75];
  if (width) add(clampBox([start * width, start * height, stop * width, stop * height]));
};

const move = (step) => open((item.index + decisions.length + step) % decisions.length);

// Enter in a field continues with the next empty one, so that no half-empty record is saved. The
// second Enter in a field saves an unchanged answer.
const enter = (target) => {
  const inputs = listFields().length ? [...byId("form").querySelectorAll("input[id^=field]")] : [];
  const position = inputs.indexOf(target);
  const others = position < 0 ? [] : [...inputs.slice(position + 1), ...inputs.slice(0, position)];
  const empty = others.find((input) => !input.value.trim());
  const state = JSON.stringify([position, answer]);
  if (!empty || entered.has(state)) decide("save");
  else {
    entered.add(state);
    empty.focus();
  }
};

// Actions of keys and, by their IDs, of buttons.
const actions = {
  save: () => decide("save"),
  skip: () => decide("skip"),
  undo,
  edit,
  clear,
  add: addByKey,
  previous: () => move(-1),
  next: () => move(1),
  "zoom-in": () => zoomBy(1.5),
  "zoom-out": () => zoomBy(1 / 1.5),
  "next-box": () => {
    if (answer.boxes.length) select((selected + 1) % answer.boxes.length);
  },
  remove: () => {
    if (selected >= 0) remove(selected);
  },
  reset: () => {
    answer = makeAnswer(item);
    selected = -1;
    show();
  },
  "next-image": () => {
    imageIndex = (imageIndex + 1) % item.images.length;
    showImage();
  },
  "list-more": () => showList(listed),
};
for (const [id, action] of Object.entries(actions))
  byId(id)?.addEventListener("click", () => action());
const keys = {
  a: "save",
  s: "skip",
  u: "undo",
  e: "edit",
  ArrowLeft: "previous",
  ArrowRight: "next",
  "+": "zoom-in",
  "=": "zoom-in",
  "-": "zoom-out",
};
const boxKeys = { b: "next-box", n: "add", 0: "clear", Delete: "remove", Backspace: "remove" };
document.addEventListener("keydown", (event) => {
  // Enter also ends the composition of an input method.
  if (!item || event.isComposing || event.keyCode === 229 || event.metaKey || event.altKey) return;
  const { key, target } = event;
  const isBoxes = settings.kind === "boxes";
  const isArrow = key.startsWith("Arrow");
  if (target.matches?.(":is(#list, .filters) :is(input, select, button)")) return;
  const isText = target.matches?.("input, textarea");
  if (key === "Escape") {
    if (isText) target.blur();
    else if (selected >= 0) select(-1);
    return;
  }
  if (key === "Enter" && !target.matches?.("button:not(.choices *), a, summary")) {
    // Enter starts a new line in a text with Shift.
    if (event.shiftKey && target.matches?.("textarea")) return;
    event.preventDefault();
    if (event.ctrlKey && !event.repeat) decide("save");
    else if (!event.repeat) enter(target);
    return;
  }
  if (isText) return;
  const names = { ...keys, ...(isBoxes && boxKeys) };
  let action = actions[names[key] ?? names[key.toLowerCase()]];
  if (isBoxes && selected >= 0 && isArrow) action = () => moveByKey(event);
  else if (event.ctrlKey) return;
  if (/^[1-9]$/.test(key)) action = () => choose(Number(key) - 1);
  if (!action) return;
  event.preventDefault();
  if (!event.repeat || isArrow) action();
});
byId("form").addEventListener("submit", (event) => event.preventDefault());
byId("bulk")?.addEventListener("submit", (event) => {
  event.preventDefault();
  decideMany({ action: "accept", min_confidence: byId("min-confidence").value / 100 });
});
const showThreshold = () => {
  if (!byId("threshold")) return;
  byId("threshold").value = threshold;
  byId("threshold-value").textContent = threshold > 100 ? translate("off") : `${threshold} %`;
};
byId("threshold")?.addEventListener("input", ({ target }) => {
  const hasChanges = isChanged();
  threshold = Number(target.value);
  store(thresholdKey, threshold);
  showThreshold();
  if (!hasChanges) answer = makeAnswer(item);
  show();
});
showThreshold();
byId("train")?.addEventListener("click", async ({ target }) => {
  const { studio, query } = target.dataset;
  target.disabled = true;
  try {
    location.assign(studio + (await request(`${studio}actions/train-now?${query}`, {})).url);
  } catch (error) {
    report("Command not started", error);
    target.disabled = false;
  }
});
window.addEventListener("resize", () => {
  if (item?.images.length) showZoom();
});

(async () => {
  try {
    await loadItems();
    const index = Number(location.hash.slice(1));
    const isKnown = location.hash && index < decisions.length;
    if (decisions.length) await open(isKnown ? index : Math.max(0, findOpen(-1)), true);
  } catch (error) {
    report("Not loaded", error);
  }
})();

export { answer, decide, decisions, isSaving, open, showList };
