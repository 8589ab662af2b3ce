// What the scripts of all pages share.

export const settings = JSON.parse(document.body.dataset.settings ?? "{}");
export const byId = (id) => document.getElementById(id);
export const translate = (text, ...values) => {
  let translated = settings.texts[text] ?? text;
  for (const value of values) translated = translated.replace("{}", value);
  return translated;
};
export const create = (name, attributes = {}, ...children) => {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
};

const check = async (response) => {
  if (response.status === 401) location.reload();
  if (response.ok) return response;
  let content = {};
  try {
    content = await response.clone().json();
  } catch {
    /* The text is no JSON. */
  }
  const error = new Error(content.error ?? (await response.text()));
  throw Object.assign(error, { status: response.status, field: content.field ?? "" });
};

const language = () => ({ "accept-language": document.documentElement.lang });

/** Response to a GET request or, with a body, to a POST request. */
export const send = async (url, body) => {
  const headers = body ? { ...language(), "content-type": "application/json" } : language();
  const post = body && { method: "POST", body: JSON.stringify(body) };
  return check(await fetch(url, { headers, ...post }));
};

export const request = async (...values) => (await send(...values)).json();

/** The page of this server at a URL. */
export const fetchPage = async (...values) => parse(await (await send(...values)).text());

/**
 * Uploads a file, and returns its ID and name, or its images. Files of a batch are kept together.
 */
export const upload = async (file, batch = "", name = file.name) => {
  const url = `uploads?${new URLSearchParams({ name, batch })}`;
  return (
    await check(await fetch(url, { method: "POST", headers: language(), body: file }))
  ).json();
};

export const describe = (error) =>
  translate(error instanceof TypeError ? "The server does not answer." : error.message);

export const copyText = async (text) => {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  // Browsers have no clipboard API on a page without TLS.
  const field = create("textarea");
  field.value = text;
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  return field.remove();
};

addEventListener("click", async ({ target }) => {
  const button = target.closest?.("button[data-copy]");
  if (!button) return;
  const { copy: text, copied } = button.dataset;
  const label = button.textContent;
  await copyText(text);
  button.focus();
  if (label === copied) return;
  button.textContent = copied;
  setTimeout(() => {
    button.textContent = label;
  }, 1500);
});

/** Changes only what differs, so that the focus, open parts and forms of the user stay. */
export const update = (target, source) => {
  updateAttributes(target, source);
  const known = [...target.childNodes];
  const nodes = [...source.childNodes];
  nodes.forEach((node, index) => {
    const old = known[index];
    if (!old) target.append(node);
    // A mark belongs to its value, not to its position.
    else if (old.nodeName !== node.nodeName || old.defaultValue !== node.defaultValue)
      old.replaceWith(node);
    else if (old.nodeType !== Node.ELEMENT_NODE) {
      if (old.data !== node.data) old.data = node.data;
    } // A script has filled such an element.
    else if (!old.hasAttribute("data-own")) update(old, node);
  });
  for (const old of known.slice(nodes.length)) old.remove();
};

const updateAttributes = (old, node) => {
  for (const { name } of [...old.attributes]) {
    if (!node.hasAttribute(name) && !["open", "hidden"].includes(name)) old.removeAttribute(name);
  }
  for (const { name, value } of node.attributes) {
    if (old.getAttribute(name) === value || ["open", "hidden"].includes(name)) continue;
    old.setAttribute(name, value);
    // The reasoning is folded when the answer begins.
    if (name === "data-open") old.open = value !== "";
  }
};

export const parse = (html) => new DOMParser().parseFromString(html, "text/html").body;
