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
  };
  new MutationObserver(updateLabels).observe(document.body, { ...observed, attributeFilter: ["placeholder"] });
  updateLabels();
}
