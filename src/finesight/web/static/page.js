() => {
  const all = { childList: true, subtree: true, characterData: true };
  const page = document.documentElement;

  // The talk stays at its end while it grows, unless somebody has scrolled up to read.
  let follows = true;
  addEventListener("scroll", () => {
    follows = innerHeight + scrollY > page.scrollHeight - 160;
  }, { passive: true });
  const follow = () => { if (follows) scrollTo(0, page.scrollHeight); };
  new MutationObserver(follow).observe(document.querySelector("#talk"), all);
  addEventListener("load", follow, true);

  // What Gradio leaves out: the language of the page, and a name for the field of the question.
  const name = () => {
    const shown = document.querySelector("#language")?.textContent.trim();
    const language = shown === "English" ? "zh" : "en";
    if (page.lang !== language) page.lang = language;
    const field = document.querySelector("#composer textarea");
    if (field && field.ariaLabel !== field.placeholder) field.ariaLabel = field.placeholder;
  };
  new MutationObserver(name).observe(document.body, { ...all, attributeFilter: ["placeholder"] });
  name();
}
