import {
  byId,
  copyText,
  create,
  describe,
  fetchPage,
  parse,
  request,
  translate,
  update,
  upload,
} from "./app.js";

// Buttons that would start the running command again.
const starters = ["check", "plan", "train", "web", "serve", "label", "review"];
let isEdited = false;
let isActing = false;
let status = "";
let timer = 0;
const uploaded = new Map(); // Uploads by file, for another attempt after an error.

// Lists and jobs, which the server renders

const findLog = () => document.querySelector(".log");

const show = (page) => {
  const log = findLog();
  const isAtEnd = !log || log.scrollTop + log.clientHeight > log.scrollHeight - 40;
  for (const id of page ? ["side", "top", "bottom"] : [])
    update(byId(id), page.querySelector(`#${id}`));
  if (findLog() && (isAtEnd || !page)) findLog().scrollTop = findLog().scrollHeight;
  // Actions apply to the items in the URL, which are those that the page shows.
  const shown = byId("top").dataset;
  history.replaceState(null, "", shown.url);
  // The chip of the command is replaced with its part of the page, and so is not announced.
  if (status && status !== shown.status)
    byId("announcement").textContent = byId("job-h")?.textContent ?? "";
  ({ status } = shown);
  enableButtons();
  enableCompare();
  markResult();
  showLocalTimes();
  wait(["running", "stopping"].includes(status) ? 1500 : 8000);
};

const enableButtons = () => {
  const isRunning = ["running", "stopping"].includes(status);
  for (const button of document.querySelectorAll("button[data-action]")) {
    const { action } = button.dataset;
    let reason = "";
    if (action === "review" && !byId("top").dataset.hasData)
      reason = translate("There is no data set to review yet.");
    else if (isRunning && starters.includes(action))
      reason = translate("Wait until the running command ends, or stop it.");
    button.disabled = isActing || reason !== "";
    showReason(button, reason);
  }
};

/** Says after a disabled button why it is disabled. */
const showReason = (button, reason) => {
  let note = button.nextElementSibling;
  if (!note?.classList.contains("reason")) {
    if (!reason) return;
    note = create("span", { class: "reason soft small" });
    button.after(note);
  }
  note.textContent = reason;
  note.hidden = !reason;
};

const enableCompare = () => {
  const button = document.querySelector("button[data-compare]");
  if (!button) return;
  button.disabled = document.querySelectorAll("#runs input:checked").length < 2;
  button.nextElementSibling.hidden = !button.disabled;
};

/** The page has one blue button: that of the shown result, else that of its form. */
const markResult = () => {
  const hasResult = document.querySelector("#bottom .result-action") !== null;
  for (const button of document.querySelectorAll(
    "button[data-action=predict], button[data-action=serve]",
  ))
    button.classList.toggle("primary", !hasResult);
};

/** Shows times in the time zone of the browser, which may differ from that of the server. */
const showLocalTimes = () => {
  const format = new Intl.DateTimeFormat(document.documentElement.lang, {
    dateStyle: "medium",
    timeStyle: "short",
  });
  for (const time of document.querySelectorAll("time"))
    time.textContent = format.format(new Date(time.dateTime));
};

const refresh = async () => {
  try {
    show(await fetchPage(location.href));
  } catch {
    wait(8000); /* The studio was stopped; another attempt follows. */
  }
};

const wait = (delay) => {
  clearTimeout(timer);
  timer = setTimeout(refresh, delay);
};

// Actions

const findField = (name) =>
  document.querySelector(`form [name="${CSS.escape(name)}"]`) ??
  (name === "files" ? byId("upload") : null);

const report = (title, error) => {
  const text = create("span");
  text.textContent = describe(error);
  byId("message").replaceChildren(create("strong", {}, title), create("br"), text);
  byId("message").hidden = false;
  byId("message").scrollIntoView({ block: "nearest" });
  const field = error.field ? findField(error.field) : null;
  if (!field) return;
  for (let at = field.closest("details"); at; at = at.parentElement.closest("details"))
    at.open = true;
  field.setAttribute("aria-invalid", "true");
  field.focus();
};

/** Name of a file of a folder: files of equal names get those of their folders, too. */
const nameUpload = (file, files) => {
  const isUnique = files.every((other) => other === file || other.name !== file.name);
  if (isUnique || !file.webkitRelativePath) return file.name;
  return file.webkitRelativePath.replaceAll("/", "-");
};

const sendUploads = async () => {
  const files = [...(byId("upload")?.files ?? [])];
  const bar = byId("uploading");
  const batch = Math.random().toString(36);
  for (const [index, file] of files.entries()) {
    Object.assign(bar, { hidden: false, max: files.length, value: index });
    if (!uploaded.has(file))
      uploaded.set(file, (await upload(file, batch, nameUpload(file, files))).id);
  }
  if (bar) bar.hidden = true;
  return files.map((file) => uploaded.get(file));
};

const readForm = (form) => {
  const texts = {};
  const others = [];
  for (const [name, value] of form ? new FormData(form) : []) {
    if (name === "others") others.push(value);
    else texts[name] = value;
  }
  return { texts, others };
};

// Preview of an import

// With other values of these fields, the records have other keys.
const sourceFields = ["source", "columns", "format", "mapping", "no_header", "encoding"];

const findPreview = () => byId("preview")?.firstElementChild;

const readRoles = () => {
  const roles = Object.create(null); // a key may be __proto__
  if (!findPreview()?.dataset.chosen) return roles;
  for (const { dataset, value } of findPreview().querySelectorAll("select[data-path]")) {
    if (value) roles[dataset.path] = value;
  }
  return roles;
};

// Start: what the user has, the chosen files, and names from them

const isImage = (file) => /\.(jpe?g|png|webp|gif|bmp|tiff?|heic|avif)$/i.test(file.name);
const isTable = (file) => /\.(csv|tsv|jsonl?|parquet|xlsx)$/i.test(file.name);
const isReadable = (file) => isImage(file) || /\.pdf$/i.test(file.name);
const MAX_THUMBNAILS = 12;
const MAX_UPLOADS = 10000;

const setHave = (have) => {
  for (const one of document.querySelectorAll("[data-have]"))
    one.setAttribute("aria-pressed", one.dataset.have === have);
  const button = document.querySelector("button[data-images-label]");
  button.textContent = have === "images" ? button.dataset.imagesLabel : button.dataset.label;
  document.querySelector("button[data-action=import]").hidden = have === "images";
};

/** Name of the table, of the archive or of the first image without its number. */
const proposeName = (files) => {
  const named = files.find(isTable) ?? files.find((file) => !isImage(file)) ?? files[0];
  const stem = named.name.replace(/(\.tar)?\.[^.]*$/, "");
  const name = stem.replace(/[^\p{L}\p{N}_]+/gu, "-").replace(/^[-\d]+|[-_\d]+$/g, "");
  const taken = byId("new-data").dataset.taken.split(" ");
  if (!name) return "";
  let free = name.slice(0, 50);
  for (let number = 2; taken.includes(free); number++) free = `${name.slice(0, 50)}-${number}`;
  return free;
};

// The name of an earlier upload stays: new files are added to it.
let proposedName = byId("import:source")?.value ? "" : byId("import:out")?.value;

/** Shows what was chosen, before anything is sent. */
const showChosen = () => {
  const files = [...byId("upload").files];
  const images = files.filter(isImage);
  const list = byId("thumbnails");
  for (const image of list.querySelectorAll("img")) URL.revokeObjectURL(image.src);
  list.replaceChildren();
  for (const file of images.slice(0, MAX_THUMBNAILS)) {
    const image = create("img", { src: URL.createObjectURL(file), alt: file.name });
    // Browsers do not show all formats.
    image.addEventListener("error", () => image.closest("li").remove());
    list.append(create("li", {}, image));
  }
  list.hidden = images.length === 0;
  byId("chosen").hidden = files.length === 0;
  if (files.length === 0) return;
  const megabytes = files.reduce((sum, file) => sum + file.size, 0) / 1e6;
  const others = files.length - images.length;
  byId("chosen").textContent = translate(
    "Images: {}. Other files: {}. {} MB. Nothing is sent yet.",
    images.length,
    others,
    megabytes.toFixed(1),
  );
  if (!byId("new-data")) return;
  setHave(others === 0 ? "images" : "labels");
  // A name that the user has written stays.
  const name = proposeName(files);
  if (name && byId("import:out").value === proposedName) {
    byId("import:out").value = name;
    proposedName = name;
  }
};

/** Chooses the images of a folder; a folder has also other files, such as hidden ones. */
const chooseFolder = (input) => {
  const images = [...input.files].filter((file) => isReadable(file) && !file.name.startsWith("."));
  input.value = "";
  byId("message").hidden = true;
  if (images.length === 0 || images.length > MAX_UPLOADS) {
    const message = images.length
      ? translate("Copy it into the workspace, and name it there.")
      : translate("Choose a folder with images or PDF files.");
    const title = images.length
      ? translate("The folder has {} images, more than {}.", images.length, MAX_UPLOADS)
      : translate("The folder has no images.");
    report(title, { message });
    return;
  }
  const transfer = new DataTransfer();
  for (const image of images) transfer.items.add(image);
  byId("upload").files = transfer.files;
  showChosen();
};

const dropFiles = (event) => {
  if (!event.dataTransfer?.types.includes("Files")) return;
  // Elsewhere on the page, the browser would open the file instead of the page.
  event.preventDefault();
  const zone = event.target.closest?.(".drop");
  if (!zone) {
    event.dataTransfer.dropEffect = "none";
    return;
  }
  zone.classList.toggle("over", event.type === "dragover");
  if (event.type !== "drop") return;
  const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.());
  if (entries.some((entry) => entry?.isDirectory)) {
    const advice = translate("Choose the files inside of the folder, or an archive of it.");
    report(translate("A folder cannot be uploaded."), { message: advice });
    return;
  }
  byId("upload").files = event.dataTransfer.files;
  byId("upload").dispatchEvent(new Event("input", { bubbles: true }));
};

const markPrimary = (action) => {
  for (const name of ["preview", "import"]) {
    const button = document.querySelector(`button[data-action="${name}"]`);
    button.classList.toggle("primary", name === action);
  }
};

const clearPreview = () => {
  byId("preview").replaceChildren();
  markPrimary("preview");
};

const showProgress = () => {
  byId("uploading").removeAttribute("value");
  byId("uploading").hidden = false;
  byId("announcement").textContent = translate("Reading the first rows…");
};

const hideProgress = () => {
  byId("uploading").hidden = true;
  byId("announcement").textContent = "";
};

const showPreview = ({ section, source }) => {
  byId("preview").replaceChildren(...parse(section).children);
  markPrimary(findPreview().dataset.blocked ? "preview" : "import");
  if (byId("upload").files.length) {
    // The next request names the stored files.
    byId("upload").value = "";
    showChosen();
    byId("import:source").value = source;
    uploaded.clear();
  }
  byId("preview-h").focus({ preventScroll: true });
  byId("preview-h").scrollIntoView({ block: "start" });
};

const noteChange = (field) => {
  if (!findPreview() || !field.form?.contains(byId("preview"))) return;
  const name = field.name.replace("import:", "");
  if (field.id === "upload" || sourceFields.includes(name)) {
    clearPreview();
  } else if (name !== "out") {
    if (byId("preview").contains(field)) findPreview().dataset.chosen = "yes";
    findPreview().querySelector(".outdated").hidden = false;
    markPrimary("preview");
  }
};

const act = async (button) => {
  const { action, title, confirm, url, operation } = button.dataset;
  if (confirm && !window.confirm(confirm)) return;
  const query = url ? new URL(url, location).search : location.search;
  isActing = true;
  enableButtons();
  byId("message").hidden = true;
  try {
    const uploads = button.form?.contains(byId("upload")) ? await sendUploads() : [];
    const body = { ...readForm(button.form), uploads };
    if (operation) body.texts = { operation };
    if (action === "preview") showProgress();
    if (button.form?.contains(byId("preview"))) body.roles = readRoles();
    const path = action === "preview" ? action : `actions/${action}`;
    const answer = await request(`${path}${query}`, body);
    if (action === "save-recipe") isEdited = false;
    if (answer.section) showPreview(answer);
    else if (answer.url) location.assign(answer.url);
    else await refresh();
  } catch (error) {
    // An uploaded file may have expired: the next attempt sends all files again.
    if (error.field === "files") uploaded.clear();
    report(title ?? "", error);
  } finally {
    if (action === "preview") hideProgress();
    isActing = false;
    enableButtons();
  }
};

// Use in a program: the key is asked for when it is shown or copied, and never stays in the page.

const HIDDEN_KEY = "••••••••••••";

const fetchKey = async (panel) => {
  if (panel.dataset.hasKey !== "yes") return "";
  return (await request(`servers/${panel.dataset.job}/key`, {})).key;
};

const showKey = (key) => {
  for (const span of document.querySelectorAll("#program .api-key")) span.textContent = key;
};

const toggleKey = async (button) => {
  const isShown = button.getAttribute("aria-pressed") === "true";
  try {
    showKey(isShown ? HIDDEN_KEY : await fetchKey(byId("program")));
    button.setAttribute("aria-pressed", !isShown);
    button.textContent = isShown ? button.dataset.show : button.dataset.hide;
  } catch (error) {
    report(translate("No key"), error);
  }
};

// The browser may keep the page for its button “Back”, also after the sign-out.
addEventListener("pagehide", () => {
  const button = document.querySelector('[data-program="key"][aria-pressed="true"]');
  if (button) toggleKey(button);
});

const copyCode = async (button) => {
  const code = button.parentElement.querySelector("code").cloneNode(true);
  try {
    const key = await fetchKey(byId("program"));
    for (const span of code.querySelectorAll(".api-key")) span.textContent = key;
    await copyText(code.textContent);
    byId("announcement").textContent = translate("Copied");
    button.textContent = translate("Copied");
    setTimeout(() => {
      button.textContent = translate("Copy");
    }, 1500);
  } catch (error) {
    report(translate("Not copied"), error);
  }
};

const testServer = async (button) => {
  const result = byId("test-result");
  byId("message").hidden = true;
  button.disabled = true;
  result.replaceChildren(create("p", { class: "soft" }, translate("The model is reading…")));
  try {
    const answer = await request(`servers/${byId("program").dataset.job}/test`, {});
    const images = answer.images.map((src) =>
      create("img", { src, alt: translate("Image of the test") }),
    );
    const time = translate("Answer after {} s", answer.seconds);
    const text = create("pre", { tabindex: "0", role: "region", "aria-label": time });
    text.textContent = answer.answer;
    const answered = create("div", {}, create("p", { class: "soft small" }, time), text);
    result.replaceChildren(...images, answered);
  } catch (error) {
    result.replaceChildren();
    report(translate("The test has failed"), error);
  } finally {
    button.disabled = false;
  }
};

const showKinds = () => {
  const kind = byId("label:kind")?.value;
  for (const field of document.querySelectorAll("[data-kinds]")) {
    field.hidden = !field.dataset.kinds.split(" ").includes(kind);
  }
};

/** Writes the chosen card into the field for the name of a model, and clears it the other way. */
const chooseModel = (field) => {
  if (field.name === "model") byId("recipe:model").value = field.value;
  if (field.id !== "recipe:model") return;
  for (const card of document.querySelectorAll("input[name=model]"))
    card.checked = card.value === field.value;
};

document.addEventListener("input", (event) => {
  if (event.target.id === "editor:text") isEdited = true;
  event.target.removeAttribute("aria-invalid");
  if (event.target.id === "upload") showChosen();
  if (event.target.id === "upload-folder") chooseFolder(event.target);
  noteChange(event.target);
  chooseModel(event.target);
  enableCompare();
  showKinds();
});
for (const type of ["dragover", "dragleave", "drop"]) document.addEventListener(type, dropFiles);
addEventListener("beforeunload", (event) => {
  if (isEdited) event.preventDefault();
});
document.addEventListener("submit", (event) => {
  if (event.target.id !== "runs" && event.target.method === "get") event.preventDefault();
});
document.addEventListener("click", async (event) => {
  const button = event.target.closest("button");
  if (button?.dataset.action) {
    event.preventDefault();
    await act(button);
  } else if (button?.dataset.program) {
    await { key: toggleKey, copy: copyCode, test: testServer }[button.dataset.program](button);
  } else if (button?.dataset.have) {
    setHave(button.dataset.have);
  } else if (button && "prompt" in button.dataset) {
    byId("import:prompt").value = button.dataset.prompt;
    byId("kind").value = button.dataset.kind;
    clearPreview(); // another answer has other roles
    for (const one of button.parentElement.querySelectorAll("button")) {
      one.setAttribute("aria-pressed", one === button);
    }
  }
});
const openTarget = () => {
  const target = byId(location.hash.slice(1));
  if (!target?.matches("details")) return;
  target.open = true;
  target.scrollIntoView();
};
addEventListener("hashchange", openTarget);
openTarget();
showKinds();
show();
