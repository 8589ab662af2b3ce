() => {
  // The script of Gradio may run again; the page is the same.
  if (window.finesightStudio) return;
  window.finesightStudio = true;
  const shown = {};
  // Buttons that would start the running command again.
  const starters = ["check", "estimate-memory-and-time", "start-or-resume", "start-the-chat", "start-the-server",
    "start-labelling", "review-existing-labels"];
  let isEdited = false, savedText = "", question = "", shownQuery = "";

  // An action applies to the item in the URL. A refused one leaves the URL of the shown item.
  const act = (button, url) => {
    shownQuery ||= location.search;
    history.replaceState(null, "", url);
    document.getElementById(button).click();
  };
  const restoreUrl = () => {
    if (shownQuery) history.replaceState(null, "", shownQuery);
    shownQuery = "";
  };

  const replace = (id, html) => {
    const place = document.getElementById(id);
    if (!place || shown[id] === html) return;
    const log = place.querySelector(".log");
    const isAtEnd = !log || log.scrollTop + log.clientHeight > log.scrollHeight - 40;
    const scroll = log?.scrollTop ?? 0;
    const marked = [...place.querySelectorAll("input:checked")].map((box) => box.value);
    const opened = [...place.querySelectorAll("details[open]")].map((item) => item.id);
    const frame = place.querySelector("iframe");
    place.innerHTML = html;
    // A frame that shows the same page keeps its position.
    const newFrame = place.querySelector("iframe");
    if (frame && newFrame && frame.src === newFrame.src) newFrame.replaceWith(frame);
    for (const box of place.querySelectorAll("input[type=checkbox]")) box.checked = marked.includes(box.value);
    for (const item of place.querySelectorAll("details")) item.open = opened.includes(item.id);
    const newLog = place.querySelector(".log");
    if (newLog) newLog.scrollTop = isAtEnd ? newLog.scrollHeight : scroll;
    shown[id] = html;
  };

  const update = async () => {
    let delay = 8000;
    const query = location.search;
    try {
      const response = await fetch(`live${query}`);
      if (response.status === 401) location.reload();
      const page = await response.json();
      // Actions apply to the items in the URL, which are those that the page shows.
      if (query !== location.search) return void setTimeout(update, 500);
      history.replaceState(null, "", page.url);
      document.documentElement.lang = page.language;
      replace("studio-top", page.top);
      replace("studio-bottom", page.bottom);
      document.getElementById("stop")?.classList.toggle("shown", page.status === "running");
      document.getElementById("stop-again")?.classList.toggle("shown", page.status === "stopping");
      const isRunning = ["running", "stopping"].includes(page.status);
      for (const id of starters) {
        const button = document.getElementById(id);
        const needsData = id === "review-existing-labels" && !page.has_data;
        if (button) button.disabled = isRunning || needsData;
      }
      if (isRunning) delay = 1500;
    } catch { /* The studio was stopped; another attempt follows. */ }
    setTimeout(update, delay);
  };

  document.addEventListener("input", (event) => {
    if (event.target.closest?.("#editor") && event.isTrusted) isEdited = true;
    event.target.removeAttribute?.("aria-invalid");
  });
  window.addEventListener("beforeunload", (event) => { if (isEdited) event.preventDefault(); });
  document.addEventListener("submit", (event) => {
    const text = event.submitter?.dataset.missing;
    const box = event.target.querySelector("input[type=checkbox]");
    if (!text || !box || event.target.querySelectorAll("input:checked").length > 1) return;
    event.preventDefault();
    box.setCustomValidity(text);
    box.reportValidity();
    box.setCustomValidity("");
  });
  document.addEventListener("click", async (event) => {
    if (event.target.closest?.("#save-the-recipe")) savedText = document.querySelector("#editor textarea").value;
    const stop = event.target.closest?.("button.stop-job");
    if (stop) act("stop", stop.dataset.url);
    const remove = event.target.closest?.("button.delete");
    if (remove) {
      question = remove.dataset.confirm;
      act("ask-delete", remove.dataset.url);
    }
    const button = event.target.closest?.("button.copy");
    if (!button) return;
    if (navigator.clipboard) await navigator.clipboard.writeText(button.dataset.copy);
    else {
      // Browsers have no clipboard API on a page without TLS.
      const field = document.createElement("textarea");
      field.value = button.dataset.copy;
      document.body.append(field);
      field.select();
      document.execCommand("copy");
      field.remove();
    }
    button.textContent = "✓";
  });
  // Called with an empty address if the selected item cannot be deleted.
  window.finesightConfirm = (url) => {
    if (url && window.confirm(question)) document.getElementById("delete").click();
    else restoreUrl();
  };
  // Called with the address to open after an action; it is empty if the action has failed.
  window.finesightOpen = (url, isSaved) => {
    if (!url) {
      restoreUrl();
      // After the message is shown.
      setTimeout(() => {
        const name = document.querySelector("#message .message")?.dataset.field;
        const field = document.querySelector(".studio-form")?.parentElement.querySelector(
          `[id="${CSS.escape(name ?? "")}"] :is(input:not([type=file]), textarea)`);
        field?.setAttribute("aria-invalid", "true");
        field?.focus();
      }, 100);
      return;
    }
    if (isSaved && savedText === document.querySelector("#editor textarea").value) isEdited = false;
    window.location.assign(url);
  };
  update();
}
