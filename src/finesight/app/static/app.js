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

/** Error of a request that the server has refused. */
export class RequestError extends Error {
  constructor(message, status, field = "") {
    super(message);
    Object.assign(this, { status, field });
  }
}

const check = async (response) => {
  if (response.status === 401) location.reload();
  if (response.ok) return response;
  let content = {};
  try { content = await response.clone().json(); } catch { /* The text is no JSON. */ }
  throw new RequestError(content.error ?? (await response.text()), response.status, content.field);
};

const language = () => ({ "accept-language": document.documentElement.lang });

/** Response to a GET request or, with a body, to a POST request. */
export const fetchResponse = async (url, body, options = {}) => {
  const headers = body ? { ...language(), "content-type": "application/json" } : language();
  const post = body && { method: "POST", body: JSON.stringify(body) };
  return check(await fetch(url, { headers, ...post, ...options }));
};

export const request = async (url, body) => (await fetchResponse(url, body)).json();

/** Uploads a file, and returns its ID and name. */
export const upload = async (file) => {
  const url = `uploads?${new URLSearchParams({ name: file.name })}`;
  return (await check(await fetch(url, { method: "POST", headers: language(), body: file }))).json();
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
