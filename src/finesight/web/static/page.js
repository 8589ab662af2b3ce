() => {
  // The talk stays at its end while it grows, unless somebody has scrolled up to read.
  const near = () => innerHeight + scrollY > document.documentElement.scrollHeight - 160;
  let follows = true;
  addEventListener("scroll", () => { follows = near(); }, { passive: true });
  const talk = document.querySelector("#talk");
  const follow = () => { if (follows) scrollTo(0, document.documentElement.scrollHeight); };
  new MutationObserver(follow).observe(talk, { childList: true, subtree: true, characterData: true });
  const words = () => {
    const chinese = document.querySelector("#language")?.textContent.trim() === "English";
    document.documentElement.lang = chinese ? "zh" : "en";
  };
  new MutationObserver(words).observe(document.querySelector("#head"), { childList: true, subtree: true, characterData: true });
  words();
}
