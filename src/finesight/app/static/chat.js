import {
  byId, create, describe, fetchPage, parse, request, send as sendRequest, settings, translate, update, upload
} from "./app.js";

const MAX_TITLE_CHARS = 80;
let chat = null, attachments = [];

// Messages

const report = (error) => {
  byId("error").textContent = error ? describe(error) : "";
  byId("error").hidden = !error;
};

/** Runs an action, and reports its error. Returns whether it succeeded. */
const attempt = async (action) => {
  report(null);
  try {
    await action();
    return true;
  } catch (error) {
    report(error);
    return false;
  }
};

// Conversations of this browser by ID, and the ID of that of this tab. Without a storage, they end with the page.

const openStorage = (name) => { try { return window[name]; } catch { return {}; } };
const stored = openStorage("localStorage"), tab = openStorage("sessionStorage");
// Servers may share an address. The images of a server that has stopped are gone.
const path = `chat ${location.pathname} `, prefix = `${path}${settings.server} `;
for (const id of Object.keys(stored)) if (id.startsWith(path) && !id.startsWith(prefix)) delete stored[id];

// Those with an answer that is being generated, which ends with the page.
const running = new Map();
const read = (id) => {
  const one = running.get(id) ?? JSON.parse(stored[id]);
  if (!running.has(id)) for (const reply of one.turns.at(-1).replies) reply.finish_reason ??= "cancelled";
  return one;
};
const listChats = () => Object.keys(stored).filter((id) => id.startsWith(prefix)).map(read)
  .sort((one, other) => other.changed - one.changed);

const remove = ({ id, turns }) => {
  delete stored[id];
  forget(turns.flatMap((turn) => turn.images), null);
};

const save = (one) => {
  one.changed = Date.now();
  const others = listChats().filter(({ id }) => id !== one.id && !running.has(id));
  others.splice(settings.max_chats - 1).forEach(remove);
  // The storage may be full. Old conversations are removed only if this one fits then.
  const store = (it) => { try { return Boolean(stored[it.id] = JSON.stringify(it)); } catch { return false; } };
  const removed = [];
  let isStored;
  while (!(isStored = store(one)) && others.length) {
    removed.push(others.pop());
    delete stored[removed.at(-1).id];
  }
  if (isStored) removed.forEach(remove);
  else {
    removed.forEach(store);
    report(new Error("This browser has no space for the chat, which ends with the page. Export it to keep it."));
  }
  showList();
};

addEventListener("pagehide", () => { for (const one of running.values()) if (one.turns.length) save(one); });
addEventListener("storage", ({ key }) => {
  if (!key?.startsWith(prefix)) return;
  showList();
  if (key === chat?.id && !running.has(key)) attempt(() => key in stored ? open(key) : startNew());
});

// Conversation

// The end of the conversation stays visible, unless the user has scrolled up.
const followEnd = (change) => {
  const root = document.documentElement;
  const isAtEnd = innerHeight + scrollY > root.scrollHeight - 160;
  change();
  if (isAtEnd) scrollTo(0, root.scrollHeight);
};

/** Shows the last turn of a conversation, after which there are no others. */
const showTurn = (html, index) => followEnd(() => {
  const [section] = parse(html).children, turns = byId("turns").children;
  while (turns.length > index + 1) turns[index + 1].remove();
  if (!turns[index]) byId("turns").append(section);
  else update(turns[index], section);
});

const showImageHint = () => {
  const hasImages = attachments.length > 0 || document.querySelector(".thumbs") !== null;
  byId("image-hint").hidden = !settings.expects_images || hasImages;
};

const showButtons = () => {
  const isGenerating = running.has(chat?.id), numTurns = byId("turns").children.length;
  const hasFocus = document.activeElement;
  for (const name of ["regenerate", "undo"]) byId(name).disabled = isGenerating || !numTurns;
  byId("new-chat").disabled = !numTurns;
  byId("export").hidden = isGenerating || !numTurns;
  byId("welcome").hidden = numTurns > 0;
  byId("send").hidden = isGenerating;
  byId("stop").hidden = !isGenerating;
  showImageHint();
  if (hasFocus?.matches("#send, #stop, #regenerate, #undo, #new-chat")
    && (hasFocus.hidden || hasFocus.disabled)) byId("question").focus();
};

const getTitle = ({ turns: [{ text, images }] }) => [text, ...images.map(({ name }) => name)]
  .find((one) => one.trim()).replace(/\s+/g, " ").trim().slice(0, MAX_TITLE_CHARS);

const showList = () => {
  const rows = listChats().map((one) => {
    const title = getTitle(one), label = translate("Delete");
    return create("li", { class: "chat-row" },
      create("button", { type: "button", class: "title", "aria-current": one.id === chat?.id && "true",
        "data-action": "open", "data-id": one.id }, title),
      create("button", { type: "button", "data-action": "delete", "data-id": one.id, disabled: running.has(one.id),
        "aria-label": `${label}: ${title}`, "data-confirm": translate("Delete “{}”?", title) }, label));
  });
  byId("num-chats").textContent = rows.length;
  byId("chat-list").querySelector("ul").replaceChildren(...rows);
  byId("no-chats").hidden = rows.length > 0;
};

const show = (one, html = "") => {
  chat = one;
  tab.chat = one?.id ?? "new";
  byId("turns").replaceChildren(...parse(html).childNodes);
  showList();
  showButtons();
};

const startNew = () => show(null);

const open = async (id) => {
  const one = read(id), body = await fetchPage("turns", { turns: one.turns });
  show(one, body.innerHTML);
  if (one.settings) setSettings(one.settings);
};

/** Deletes images on the server that no other turn of the conversation has. */
const forget = (images, one = chat) => {
  const getFile = ({ id }) => id.slice(0, 32), kept = one?.turns.flatMap((turn) => turn.images).map(getFile) ?? [];
  const unused = images.filter((one) => !kept.includes(getFile(one)));
  if (unused.length) request("forget", { images: unused }).catch(() => {});
};

// Settings

const setSettings = (values) => {
  for (const [name, value] of Object.entries(values)) {
    const field = byId(name);
    if (field?.type === "checkbox") field.checked = value;
    else if (field) field.value = value;
  }
};

/** Settings of the next answer; null if a number is invalid, which the browser reports. */
const readSettings = () => {
  const form = byId("settings"), values = {};
  if (!form.checkValidity()) {
    byId("settings-panel").open = true;
    form.reportValidity();
    return null;
  }
  for (const field of form.elements) {
    if (!field.name) continue;
    if (field.type === "checkbox") values[field.name] = field.checked;
    else values[field.name] = field.type === "number" ? Number(field.value || -1) : field.value;
  }
  return values;
};

// Images of the next question

const showAttachments = () => {
  byId("attachments").replaceChildren(...attachments.map((one) => create("li", {},
    one.file.type.startsWith("video/")
      ? create("video", { src: one.url, "aria-label": one.file.name, muted: true })
      : create("img", { src: one.url, alt: one.file.name }),
    create("button", { type: "button", "aria-label": `${translate("Delete")}: ${one.file.name}`,
      onclick: () => {
        detach([one]);
        one.uploaded.then(forget, () => {});
        byId("question").focus();
      } }, "×"))));
  showImageHint();
};

const detach = (removed) => {
  for (const { url } of removed) URL.revokeObjectURL(url);
  attachments = attachments.filter((one) => !removed.includes(one));
  showAttachments();
};

const attach = (files) => {
  for (const file of files) {
    const one = { file, url: URL.createObjectURL(file), uploaded: upload(file) };
    attachments.push(one);
    one.uploaded.catch((error) => {
      detach([one]);
      report(error);
    });
  }
  showAttachments();
};

byId("add").addEventListener("click", () => byId("files").click());
byId("files").addEventListener("change", () => {
  attach(byId("files").files);
  byId("files").value = "";
  byId("question").focus();
});
addEventListener("paste", ({ clipboardData }) => attach(clipboardData.files));
addEventListener("dragover", (event) => {
  if (event.dataTransfer.types.includes("Files")) event.preventDefault();
});
addEventListener("drop", (event) => {
  if (!event.dataTransfer.files.length) return;
  event.preventDefault();
  attach(event.dataTransfer.files);
});

// Actions

/** Lines of JSON in the body of a response. */
const readLines = async function* ({ body }) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
};

/** Receives the answer to the last question, also while the page shows another conversation. */
const receive = async (one, turns, question, response) => {
  const removed = one.turns.slice(turns.length).flatMap((turn) => turn.images);
  let line;
  try {
    for await (line of readLines(response)) {
      const isFirst = one.answer !== line.id;
      Object.assign(one, { turns: [...turns, { ...question, replies: line.replies }], answer: line.id });
      if (chat === one) showTurn(line.html, turns.length);
      if (!isFirst) continue;
      save(one);
      forget(removed, one);
      if (one.isStopped) attempt(() => stop(one));
      if (chat === one) showButtons();
    }
    if (chat === one && line?.error) report(new Error(line.error));
  } finally {
    running.delete(one.id);
    if (line) save(one);
    if (chat === one) showButtons();
  }
  if (chat !== one) return;
  const replies = document.querySelectorAll("#turns > :last-child .reply .message-text");
  byId("announcement").textContent = [...replies].map((reply) => reply.textContent).join("\n");
};

/** Stops the answer of a conversation, as soon as the server has sent its ID. */
const stop = async (one) => {
  one.isStopped = true;
  if (one.answer) await request(`answers/${one.answer}/stop`, {});
};

/** Asks a question with images or uploads after some turns. Returns whether the answer has started. */
const ask = async (one, text, uploads, index) => {
  const chosen = readSettings();
  if (!chosen || running.has(one.id)) return false;
  const turns = one.turns.slice(0, index);
  Object.assign(one, { answer: null, isStopped: false });
  running.set(one.id, one);
  showButtons();
  const hasStarted = await attempt(async () => {
    const question = { text, images: (await Promise.all(uploads)).flat() };
    const response = await sendRequest("answers", { turns, question, settings: chosen });
    one.settings = chosen;
    if (chat === one) tab.chat = one.id;
    attempt(() => receive(one, turns, question, response));
  });
  if (!hasStarted) {
    running.delete(one.id);
    showButtons();
  }
  return hasStarted;
};

const send = async () => {
  const field = byId("question"), text = field.value, sent = attachments;
  if ((!text.trim() && !sent.length) || byId("send").hidden) return;
  scrollTo(0, document.documentElement.scrollHeight);
  chat ??= { id: `${prefix}${Date.now()} ${Math.random()}`, turns: [] };
  if (!await ask(chat, text, sent.map(({ uploaded }) => uploaded))) return;
  if (field.value === text) field.value = "";
  detach(sent);
};

/** Asks the question of a turn again, with another text. */
const askAgain = (index, text = chat.turns[index].text) => ask(chat, text, chat.turns[index].images, index);

const isPlainEnter = (event) =>
  event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;

byId("stop").addEventListener("click", () => attempt(() => stop(chat)));
byId("regenerate").addEventListener("click", () => askAgain(chat.turns.length - 1));
byId("undo").addEventListener("click", () => {
  const { text, images } = chat.turns.pop();
  byId("turns").lastElementChild.remove();
  forget(images);
  if (chat.turns.length) save(chat);
  else delete stored[chat.id];
  show(chat.turns.length ? chat : null, byId("turns").innerHTML);
  byId("question").value ||= text;
  byId("question").focus();
});
byId("new-chat").addEventListener("click", () => {
  startNew();
  byId("question").focus();
});
byId("export").addEventListener("click", () => attempt(async () => {
  const { turns, settings: chosen } = chat, response = await sendRequest("chat.zip", { turns, settings: chosen });
  const url = URL.createObjectURL(await response.blob());
  create("a", { href: url, download: "chat.zip" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}));

const actions = {
  open: async ({ id }) => {
    byId("chats").open = false;
    await open(id);
    byId("question").focus();
  },
  delete: async ({ id }) => {
    remove(read(id));
    if (id === chat?.id) startNew();
    else showList();
    document.querySelector("#chats summary").focus();
  },
  edit: ({ index }, text) => askAgain(Number(index), text),
};

const showForm = (form, isShown) => {
  form.hidden = !isShown;
  const field = form.querySelector("textarea, input");
  if (isShown) {
    field.value = field.defaultValue;
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  } else form.parentElement.querySelector("[data-form]").focus();
};

// A click enlarges an image to the window, the next one to its pixels or twice the window.
const enlarge = (button) => {
  const figure = (button.closest(".boxed") ?? button.firstElementChild).cloneNode(true);
  figure.removeAttribute("style");
  figure.querySelector(".zoom")?.replaceWith(figure.querySelector("img"));
  const image = figure.matches("img") ? figure : figure.querySelector("img");
  const [width, height] = ["width", "height"].map((name) => Number(image.getAttribute(name)));
  const fit = width * Math.min((innerWidth - 32) / width, (innerHeight - 32) / height);
  const dialog = byId("zoomed"), inner = dialog.querySelector(".view");
  for (const one of [dialog, inner]) one.ariaLabel = button.ariaLabel;
  inner.replaceChildren(figure);
  inner.onclick = () => {
    const isFull = dialog.classList.toggle("full-size");
    inner.style.width = `${isFull ? Math.max(2 * fit, width) : fit}px`;
  };
  dialog.classList.add("full-size");
  inner.click();
  dialog.showModal();
};
byId("zoomed").addEventListener("click", ({ target }) => {
  if (target.matches("dialog, .close")) byId("zoomed").close();
});

addEventListener("click", (event) => {
  const button = event.target.closest?.("button");
  if (!button) return;
  const { dataset } = button;
  if ("zoom" in dataset) enlarge(button);
  else if ("prompt" in dataset) {
    byId("question").value = dataset.prompt;
    byId("question").focus();
  } else if ("form" in dataset) showForm(button.parentElement.querySelector("form"), true);
  else if ("cancel" in dataset) showForm(button.form, false);
  else if ("action" in dataset && (!dataset.confirm || confirm(dataset.confirm))) {
    attempt(() => actions[dataset.action](dataset));
  }
});
addEventListener("submit", (event) => {
  const form = event.target, { action } = form.dataset;
  event.preventDefault();
  if (form.id === "composer") send();
  if (!action) return;
  // After an error, the text stays.
  attempt(async () => await actions[action](form.dataset, form.querySelector("textarea, input").value)
    && showForm(form, false));
});
addEventListener("keydown", (event) => {
  const form = event.target.closest?.("form[data-action]");
  if (event.key === "Escape" && form) showForm(form, false);
  else if (event.key === "Escape") byId("chats").open = false;
  else if (event.target.matches?.("#composer textarea, form[data-action] textarea") && isPlainEnter(event)) {
    event.preventDefault();
    event.target.form.requestSubmit();
  }
});
addEventListener("error", ({ target }) => {
  if (!target.dataset?.missing) return;
  const text = `${target.alt} – ${target.dataset.missing}`;
  target.closest(".zoom, .zoomed button")?.replaceWith(create("span", { class: "missing-image" }, text));
}, true);

attempt(async () => {
  // A reload shows the same conversation.
  const known = listChats(), last = tab.chat;
  startNew();
  if (known.length && last !== "new") await open((known.find(({ id }) => id === last) ?? known[0]).id);
});
