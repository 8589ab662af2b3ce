() => {
  const observed = { childList: true, subtree: true, characterData: true };
  const page = document.documentElement;

  // Keep the end of the chat visible during generation, unless the user has scrolled up.
  let isAtEnd = true;
  addEventListener("scroll", () => {
    isAtEnd = innerHeight + scrollY > page.scrollHeight - 160;
  }, { passive: true });
  const scrollToEnd = () => { if (isAtEnd) scrollTo(0, page.scrollHeight); };
  new MutationObserver(scrollToEnd).observe(document.querySelector("#chat"), observed);
  addEventListener("load", scrollToEnd, true);

  // Gradio sets neither the language of the page nor a label of the text field.
  const updateLabels = () => {
    const buttonText = document.querySelector("#language")?.textContent.trim();
    const language = buttonText === "English" ? "zh" : "en";
    if (page.lang !== language) page.lang = language;
    const field = document.querySelector("#composer textarea");
    if (field && field.ariaLabel !== field.placeholder) field.ariaLabel = field.placeholder;
    // A reload shows the same conversation.
    const chats = document.querySelector(".chats");
    if (chats) sessionStorage.setItem("chat", chats.dataset.current);
    if (chats && chats.open !== areChatsOpen) chats.open = areChatsOpen;
  };
  let areChatsOpen = false;
  addEventListener("toggle", (event) => {
    if (event.target.matches?.(".chats") && event.target.isConnected) areChatsOpen = event.target.open;
  }, true);
  new MutationObserver(updateLabels).observe(document.body, { ...observed, attributeFilter: ["placeholder"] });
  updateLabels();

  const sendAction = ({ action, token = "", index = 0 }, text = "") => {
    window.chatAction = { kind: action, token, index: Number(index), text };
    document.querySelector("#action").click();
  };

  const showForm = (form, isShown) => {
    form.hidden = !isShown;
    const field = form.querySelector("textarea, input");
    if (isShown) { field.focus(); field.setSelectionRange(field.value.length, field.value.length); }
    else form.parentElement.querySelector("[data-form]").focus();
  };

  const copyText = async (button) => {
    const { copy, copied } = button.dataset;
    try { await navigator.clipboard.writeText(copy); } catch {
      // Without https, browsers have only the old interface.
      const field = document.body.appendChild(document.createElement("textarea"));
      field.value = copy;
      field.select();
      document.execCommand("copy");
      field.remove();
      button.focus();
    }
    const label = button.textContent;
    if (label === copied) return;
    button.textContent = copied;
    setTimeout(() => { button.textContent = label; }, 1500);
  };

  // A click enlarges an image to the window, the next one to its pixels or twice the window.
  const enlarge = (button) => {
    const dialog = document.createElement("dialog");
    dialog.className = "zoomed";
    dialog.ariaLabel = button.ariaLabel;
    const close = dialog.appendChild(document.createElement("button"));
    close.className = "close";
    close.textContent = button.dataset.zoom;
    close.addEventListener("click", () => dialog.close());
    const figure = (button.closest(".boxed") ?? button.firstElementChild).cloneNode(true);
    figure.removeAttribute("style");
    figure.querySelector(".zoom")?.replaceWith(figure.querySelector("img"));
    const inner = dialog.appendChild(document.createElement("button"));
    inner.className = "view";
    inner.ariaLabel = button.ariaLabel;
    inner.append(figure);
    const [width, height] = ["width", "height"].map((name) => Number(figure.getAttribute(name)
      ?? figure.querySelector("img").getAttribute(name)));
    const fit = width * Math.min((innerWidth - 32) / width, (innerHeight - 32) / height);
    const resize = () => {
      const isFull = dialog.classList.contains("full-size");
      inner.style.width = `${isFull ? Math.max(2 * fit, width) : fit}px`;
    };
    inner.addEventListener("click", () => { dialog.classList.toggle("full-size"); resize(); });
    resize();
    dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
    dialog.addEventListener("close", () => { dialog.remove(); button.focus(); });
    document.body.append(dialog);
    dialog.showModal();
  };

  const fillQuestion = (text) => {
    const field = document.querySelector("#composer textarea");
    field.value = text;
    field.dispatchEvent(new Event("input", { bubbles: true }));
    field.focus();
  };

  addEventListener("click", (event) => {
    const button = event.target.closest?.("button");
    if (!button?.closest("#head, #chat, #prompts")) return;
    const { dataset } = button;
    if ("zoom" in dataset) enlarge(button);
    else if ("copy" in dataset) copyText(button);
    else if ("prompt" in dataset) fillQuestion(dataset.prompt);
    else if ("form" in dataset) showForm(button.parentElement.querySelector("form"), true);
    else if ("cancel" in dataset) showForm(button.form, false);
    else if ("action" in dataset && (!dataset.confirm || confirm(dataset.confirm))) {
      if (dataset.action === "open") areChatsOpen = false;
      sendAction(dataset);
    }
  });
  addEventListener("submit", (event) => {
    const form = event.target;
    if (!form.dataset.action) return;
    event.preventDefault();
    form.hidden = true;
    sendAction(form.dataset, form.querySelector("textarea, input").value);
  });
  addEventListener("keydown", (event) => {
    const form = event.target.closest?.("form[data-action]");
    if (event.isComposing) return;
    if (event.key === "Escape" && form) showForm(form, false);
    else if (event.key === "Escape") areChatsOpen = false, updateLabels();
    else if (event.key === "Enter" && !event.shiftKey && form && event.target.matches("textarea")) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  addEventListener("error", (event) => {
    const { target } = event;
    if (!target.dataset?.missing) return;
    const placeholder = document.createElement("span");
    placeholder.className = "missing-image";
    placeholder.textContent = `${target.alt} – ${target.dataset.missing}`;
    target.closest(".zoom, .zoomed button")?.replaceWith(placeholder);
  }, true);
}
