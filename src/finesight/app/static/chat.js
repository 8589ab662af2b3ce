import {
  byId,
  create,
  describe,
  fetchPage,
  parse,
  request,
  send as post,
  settings,
  translate,
  update,
  upload,
} from "./app.js";

const UPDATE_INTERVAL_MS = 80;
const RETRY_INTERVAL_MS = 2000;
let attachments = [];
let isSending = false;
let timer = 0;
let numOpened = 0;
let shown = null;
const getChat = () => byId("turns").dataset.chat;

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
    // It may have stopped for a conversation that is not shown.
    follow(getChat(), RETRY_INTERVAL_MS);
    return false;
  }
};

// Conversation

// The end of the conversation stays visible, unless the user has scrolled up.
const followEnd = (change) => {
  const root = document.documentElement;
  const isAtEnd = innerHeight + scrollY > root.scrollHeight - 160;
  change();
  if (isAtEnd) scrollTo(0, root.scrollHeight);
};

const showImageHint = () => {
  const hasImages = attachments.length > 0 || document.querySelector(".thumbs") !== null;
  byId("image-hint").hidden = !settings.expects_images || hasImages;
};

const showButtons = () => {
  const isBusy = isSending || "busy" in byId("turns").dataset;
  const numTurns = byId("turns").children.length;
  const hasFocus = document.activeElement;
  for (const name of ["regenerate", "undo"]) byId(name).disabled = isBusy || !numTurns;
  byId("new-chat").disabled = !numTurns;
  byId("export").hidden = isBusy || !numTurns;
  byId("welcome").hidden = numTurns > 0;
  // A question that is being sent cannot be stopped yet.
  byId("send").hidden = isBusy && !isSending;
  byId("send").disabled = isSending;
  byId("stop").hidden = !isBusy || isSending;
  showImageHint();
  if (
    hasFocus?.matches("#send, #stop, #regenerate, #undo, #new-chat") &&
    (hasFocus.hidden || hasFocus.disabled)
  )
    byId("question").focus();
};

/**
 * Shows a conversation as the server has it, or none, and announces its last answer if it is
 * awaited.
 */
const open = async (chat, isAwaited = false) => {
  const url = new URL(location);
  const number = ++numOpened;
  url.searchParams.set("chat", chat || "new");
  // The next question belongs to it also before the server answers.
  byId("turns").dataset.chat = chat;
  const page = await fetchPage(url);
  const turns = page.querySelector("#turns");
  if (number !== numOpened) return; // The answer to an earlier request may come later.
  history.replaceState(null, "", url);
  for (const id of ["num-chats", "chat-list", "language"])
    byId(id).replaceWith(page.querySelector(`#${id}`));
  followEnd(() =>
    shown === turns.dataset.chat ? update(byId("turns"), turns) : byId("turns").replaceWith(turns),
  );
  show();
  if (!isAwaited || "busy" in byId("turns").dataset) return;
  const replies = document.querySelectorAll("#turns > :last-child .reply .message-text");
  byId("announcement").textContent = [...replies].map((reply) => reply.textContent).join("\n");
};

const show = () => {
  if (shown !== getChat()) setSettings(JSON.parse(byId("turns").dataset.values));
  shown = getChat(); // The conversation on the page, while another one may be loading.
  showButtons();
  follow(shown);
};

/** Shows the last answer while it is being generated, also if another tab has asked. */
const follow = (chat, delay = UPDATE_INTERVAL_MS) => {
  clearTimeout(timer);
  if ("busy" in byId("turns").dataset) timer = setTimeout(() => refresh(chat), delay);
};

const refresh = async (chat) => {
  const number = numOpened;
  try {
    const [section] = (await fetchPage(`turns/${chat}`)).children;
    const form = section.querySelector("form");
    // The user may open another conversation meanwhile.
    if (number !== numOpened || chat !== getChat()) return;
    // Another tab may have changed the turns.
    const isShown = chat === shown && Number(form.dataset.index) === getLast();
    if (!isShown || !section.querySelector(".streaming")) return await open(chat, isShown);
    followEnd(() => update(byId("turns").lastElementChild, section));
    follow(chat);
  } catch (error) {
    if (chat !== getChat()) return;
    if (error.status < 500) return attempt(() => open(chat)); // Another tab has deleted it.
    report(error);
    follow(chat, RETRY_INTERVAL_MS);
  }
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
  const form = byId("settings");
  if (form.checkValidity())
    return { ...Object.fromEntries(new FormData(form)), seed: byId("seed").value || -1 };
  byId("settings-panel").open = true;
  form.reportValidity();
  return null;
};

// Images of the next question

const showAttachments = () => {
  byId("attachments").replaceChildren(
    ...attachments.map((one) =>
      create(
        "li",
        {},
        one.file.type.startsWith("video/")
          ? create("video", { src: one.url, "aria-label": one.file.name, muted: true })
          : create("img", { src: one.url, alt: one.file.name }),
        create(
          "button",
          {
            type: "button",
            "aria-label": `${translate("Delete")}: ${one.file.name}`,
            onclick: () => {
              detach([one]);
              one.uploaded.then((images) => request("forget", { images })).catch(() => {});
              byId("question").focus();
            },
          },
          "×",
        ),
      ),
    ),
  );
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

/**
 * Asks a question after some turns, by default all of them. Returns whether the answer has started.
 */
const ask = async (text, images, index) => {
  const chosen = readSettings();
  if (!chosen || isSending) return false;
  isSending = true;
  showButtons();
  const hasStarted = await attempt(async () => {
    const asked = getChat();
    const numShown = index === undefined ? null : getLast() + 1;
    const body = {
      chat: asked,
      text,
      index,
      num_turns: numShown,
      images: await images,
      settings: chosen,
    };
    const { chat } = await request("answers", body);
    const isAwaited = asked === getChat();
    // The user may have opened another conversation meanwhile.
    await open(isAwaited ? chat : getChat(), isAwaited);
  });
  isSending = false;
  showButtons();
  return hasStarted;
};

const send = async () => {
  const field = byId("question");
  const text = field.value;
  const sent = attachments;
  if ((!text.trim() && !sent.length) || byId("send").hidden || isSending) return;
  scrollTo(0, document.documentElement.scrollHeight);
  if (
    !(await ask(
      text,
      Promise.all(sent.map(({ uploaded }) => uploaded)).then((found) => found.flat()),
    ))
  )
    return;
  if (field.value === text) field.value = "";
  detach(sent);
};

const isPlainEnter = (event) =>
  event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;

const getLast = () => byId("turns").children.length - 1;
const actions = {
  stop: () => request("stop", { chat: getChat() }),
  regenerate: () =>
    ask(document.querySelector("#turns > :last-child form textarea").defaultValue, null, getLast()),
  undo: async () => {
    const index = getLast();
    const isLast = !index;
    const { text } = await request("delete", { chat: getChat(), index, num_turns: index + 1 });
    await open(isLast ? "" : getChat());
    byId("question").value ||= text;
    byId("question").focus();
  },
  new: async () => {
    await open("");
    byId("question").focus();
  },
  export: async () => {
    const response = await post("chat.zip", { chat: getChat() });
    const url = URL.createObjectURL(await response.blob());
    create("a", { href: url, download: "chat.zip" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
  },
  open: async ({ id }) => {
    byId("chats").open = false;
    await open(id);
    byId("question").focus();
  },
  delete: async ({ id }) => {
    await request("delete", { chat: id });
    await open(id === getChat() ? "" : getChat());
    document.querySelector("#chats summary").focus();
  },
  edit: ({ index }, text) => ask(text, null, Number(index)),
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
  const dialog = byId("zoomed");
  const inner = dialog.querySelector(".view");
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
  const form = event.target;
  const { action } = form.dataset;
  event.preventDefault();
  if (form.id === "composer") send();
  if (!action) return;
  // After an error, the text stays.
  attempt(
    async () =>
      (await actions[action](form.dataset, form.querySelector("textarea, input").value)) &&
      showForm(form, false),
  );
});
addEventListener("keydown", (event) => {
  const form = event.target.closest?.("form[data-action]");
  if (event.key === "Escape" && form) showForm(form, false);
  else if (event.key === "Escape") byId("chats").open = false;
  else if (
    event.target.matches?.("#composer textarea, form[data-action] textarea") &&
    isPlainEnter(event)
  ) {
    event.preventDefault();
    event.target.form.requestSubmit();
  }
});
addEventListener(
  "error",
  ({ target }) => {
    if (!target.dataset?.missing) return;
    const text = `${target.alt} – ${target.dataset.missing}`;
    target
      .closest(".zoom, .zoomed button")
      ?.replaceWith(create("span", { class: "missing-image" }, text));
  },
  true,
);

show();
