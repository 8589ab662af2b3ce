import {
  byId, create, describe, parse, request, settings, translate, update, updateAttributes, upload
} from "./app.js";

const streams = new Map();
let chat = "", created = null, isAsking = false, attachments = [];

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

// Conversation

// The end of the conversation stays visible, unless the user has scrolled up.
const followEnd = (change) => {
  const page = document.documentElement;
  const isAtEnd = innerHeight + scrollY > page.scrollHeight - 160;
  change();
  if (isAtEnd) scrollTo(0, page.scrollHeight);
};

const showTurn = ({ index, turn }) => followEnd(() => {
  const [section] = parse(turn).children, old = byId("turns").children[index];
  if (!section) return;
  if (!old) byId("turns").append(section);
  else {
    updateAttributes(old, section);
    update(old, section);
  }
});

const showButtons = (isGenerating) => {
  const numTurns = byId("turns").children.length, hasFocus = document.activeElement;
  for (const name of ["regenerate", "undo"]) byId(name).disabled = isGenerating || !numTurns;
  byId("new-chat").disabled = !numTurns;
  byId("export").hidden = isGenerating || !numTurns;
  byId("welcome").hidden = numTurns > 0;
  byId("send").hidden = isGenerating;
  byId("stop").hidden = !isGenerating;
  if (hasFocus?.matches("#send, #stop, #regenerate, #undo, #new-chat")
    && (hasFocus.hidden || hasFocus.disabled)) byId("question").focus();
};

const showImageHint = () => {
  const hasImages = attachments.length > 0 || document.querySelector(".thumbs") !== null;
  byId("image-hint").hidden = !settings.expects_images || hasImages;
};

const showList = ({ chats }) => {
  update(byId("chat-list"), parse(chats));
  byId("num-chats").textContent = byId("chat-list").querySelectorAll("li").length;
};

const show = (state) => followEnd(() => {
  const isOther = state.token !== chat;
  chat = state.token;
  sessionStorage.setItem("chat", chat);
  if (isOther) byId("turns").replaceChildren();
  update(byId("turns"), parse(state.turns));
  showList(state);
  byId("export").href = `chats/${chat}/chat.zip`;
  showButtons(state.is_generating);
  showImageHint();
  if (isOther && state.settings) setSettings(state.settings);
  if (state.error) report(new Error(state.error));
  if (state.is_generating) follow();
});

// Every answer is received until its end, also while the page shows another conversation. The
// server stops an answer that no page receives.
const follow = () => {
  if (streams.has(chat)) return;
  const token = chat;
  const source = new EventSource(`chats/${token}/stream?lang=${document.documentElement.lang}`);
  const close = () => {
    source.close();
    streams.delete(token);
  };
  streams.set(token, source);
  source.addEventListener("message", ({ data }) => {
    const { state, ...turn } = JSON.parse(data);
    if (state) close();
    if (token !== chat) return;
    if (!state) {
      showTurn(turn);
      return;
    }
    show(state);
    const replies = document.querySelectorAll("#turns > :last-child .reply .message-text");
    byId("announcement").textContent = [...replies].map((reply) => reply.textContent).join("\n");
  });
  source.addEventListener("error", () => {
    if (source.readyState !== EventSource.CLOSED) return;
    close();
    attempt(refresh);
  });
};

const startNew = () => {
  chat = "";
  created = null;
  sessionStorage.setItem("chat", "new");
  byId("turns").replaceChildren();
  showButtons(false);
  showImageHint();
};

const open = async (token) => show(await request(`chats/${token}`));

const refresh = async () => {
  if (!chat) showList(await request("chats"));
  else if (!isAsking) {
    const token = chat, state = await request(`chats/${token}`);
    if (chat === token) show(state);
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
      onclick: () => { detach([one]); byId("question").focus(); } }, "×"))));
  showImageHint();
};

const detach = (removed) => {
  for (const { url } of removed) URL.revokeObjectURL(url);
  attachments = attachments.filter((one) => !removed.includes(one));
  showAttachments();
};

/** The shown conversation. Its first image or question creates it. */
const findChat = async () => {
  if (chat) return chat;
  created ??= request("chats", {}).catch((error) => { created = null; throw error; });
  return (await created).token;
};

/** Uploads an image to the shown conversation, unless it has it. Returns its number, or those of its pages. */
const uploadTo = async (one) => {
  const token = await findChat();
  if (one.token !== token) Object.assign(one, { token, uploaded: upload(one.file, `chats/${token}/uploads`) });
  return (await one.uploaded).numbers;
};

const attach = (files) => {
  for (const file of files) {
    const one = { file, url: URL.createObjectURL(file) };
    attachments.push(one);
    uploadTo(one).catch((error) => {
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

/** Requests another answer. Returns whether it has started. */
const ask = async (values) => {
  const chosen = readSettings();
  if (!chosen || isAsking) return false;
  isAsking = true;
  const hasStarted = await attempt(async () => {
    const token = await findChat(), files = (await Promise.all((values.files ?? []).map(uploadTo))).flat();
    chat = token;
    const body = { ...values, ...(values.files && { files }), settings: chosen };
    const state = await request(`chats/${token}/ask`, body);
    if (chat === token) show(state);
  });
  isAsking = false;
  return hasStarted;
};

const send = async () => {
  const field = byId("question"), text = field.value, sent = attachments;
  if ((!text.trim() && !sent.length) || byId("send").hidden) return;
  scrollTo(0, document.documentElement.scrollHeight);
  if (!await ask({ text, files: sent })) return;
  if (field.value === text) field.value = "";
  detach(sent);
};

const isPlainEnter = (event) =>
  event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
byId("question").addEventListener("keydown", (event) => {
  if (!isPlainEnter(event)) return;
  event.preventDefault();
  send();
});
byId("settings").addEventListener("submit", (event) => event.preventDefault());
byId("stop").addEventListener("click", () => attempt(() => request(`chats/${chat}/stop`, {})));
byId("regenerate").addEventListener("click", () => ask({ index: byId("turns").children.length - 1 }));
byId("undo").addEventListener("click", () => attempt(async () => {
  const { text, ...state } = await request(`chats/${chat}/undo`, {});
  show(state);
  byId("question").value ||= text;
  byId("question").focus();
}));
byId("new-chat").addEventListener("click", () => attempt(async () => {
  startNew();
  byId("question").focus();
  await refresh();
}));

const actions = {
  open: async ({ token }) => {
    byId("chats").open = false;
    await open(token);
    byId("question").focus();
  },
  delete: async ({ token }) => {
    await request(`chats/${token}/delete`, {});
    if (token === chat) startNew();
    await refresh();
    document.querySelector("#chats summary").focus();
  },
  edit: ({ index }, text) => ask({ index: Number(index), text }),
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
  if (!action) return;
  event.preventDefault();
  showForm(form, false);
  attempt(() => actions[action](form.dataset, form.querySelector("textarea, input").value));
});
addEventListener("keydown", (event) => {
  const form = event.target.closest?.("form[data-action]");
  if (event.key === "Escape" && form) showForm(form, false);
  else if (event.key === "Escape") byId("chats").open = false;
  else if (form && event.target.matches("textarea") && isPlainEnter(event)) {
    event.preventDefault();
    form.requestSubmit();
  }
});
addEventListener("error", ({ target }) => {
  if (!target.dataset?.missing) return;
  const text = `${target.alt} – ${target.dataset.missing}`;
  target.closest(".zoom, .zoomed button")?.replaceWith(create("span", { class: "missing-image" }, text));
}, true);

// Other pages of the browser may change the conversation. The requests also mark it as displayed.
const poll = () => {
  if (!document.hidden) refresh().catch(() => {});
};
setInterval(poll, 60_000);
document.addEventListener("visibilitychange", poll);
if (!navigator.cookieEnabled) {
  addEventListener("pagehide", () => chat && navigator.sendBeacon(`chats/${chat}/delete`));
}

attempt(async () => {
  // A reload shows the same conversation.
  const known = sessionStorage.getItem("chat");
  startNew();
  showList(await request("chats"));
  const latest = byId("chat-list").querySelector("[data-token]")?.dataset.token;
  for (const token of known === "new" ? [] : [known, latest].filter(Boolean)) {
    try {
      await open(token);
      return;
    } catch (error) {
      if (error.status !== 404) throw error;
    }
  }
});
