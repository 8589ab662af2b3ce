
/* ---- data check: findings, narrowed down by severity and by fault ---------------------------- */

function drawFinding(finding) {
  const words = make("div", {},
    make("h3", {}, make("span", {class: `badge ${finding.severity}`}, say(finding.severity)),
      make("span", {}, finding.says)),
    make("p", {class: "mono"}, finding.where),
    make("p", {}, finding.what));
  if (finding.evidence.length) {
    words.append(make("ul", {class: "evidence small"},
      ...finding.evidence.map((line) => make("li", {}, line))));
  }
  words.append(make("p", {}, make("strong", {}, say("Remedy: ")), finding.remedy));
  const sample = finding.sample ? `${say("sample {}", finding.sample)} · ` : "";
  const mended = finding.fix ? ` · ${say("mended by --fix: {}", finding.fix)}` : "";
  words.append(make("p", {class: "soft small"}, `${sample}${finding.code}${mended}`));
  const pictures = finding.shown.map((shown) => drawShown(shown, finding));
  if (!pictures.length) return make("article", {class: "finding"}, words);
  if (finding.more) pictures.push(make("p", {class: "soft small"}, say("and {} more", finding.more)));
  return make("article", {class: "finding pictured"}, make("div", {}, ...pictures), words);
}

function drawShown({name, picture, boxes}, finding) {
  const found = DATA.pictures[picture];
  const drawn = typeof found === "string"
    ? make("p", {class: "nothing"}, found)
    : drawPicture(found, boxes, say("{}, {} boxes drawn: {}", name, boxes.length, finding.says));
  return make("div", {}, drawn, make("p", {class: "name"}, name));
}

function startFindings() {
  const all = DATA.findings;
  const chosen = {severity: "", code: ""};
  const severities = ["", ...new Set(all.map((finding) => finding.severity))];
  const buttons = severities.map((severity) =>
    make("button", {type: "button", "data-severity": severity}, say(severity ? `${severity}s` : "all")));
  const select = byId("fault");
  let move = () => {};

  const update = () => {
    for (const button of buttons) {
      button.setAttribute("aria-pressed", button.dataset.severity === chosen.severity);
    }
    const graded = all.filter(({severity}) => !chosen.severity || severity === chosen.severity);
    const codes = new Map();
    for (const {code} of graded) codes.set(code, (codes.get(code) || 0) + 1);
    if (!codes.has(chosen.code)) chosen.code = "";
    select.replaceChildren(make("option", {value: ""}, say("every fault")),
      ...[...codes].map(([code, count]) => make("option", {value: code}, `${code} (${count})`)));
    select.value = chosen.code;
    const fitting = graded.filter(({code}) => !chosen.code || code === chosen.code);
    byId("shown").textContent = say("{} of {} findings", fitting.length, all.length);
    move = feed(byId("list"), fitting, drawFinding);
  };

  for (const button of buttons) {
    button.addEventListener("click", () => {
      chosen.severity = button.dataset.severity;
      update();
    });
  }
  select.addEventListener("change", () => {
    chosen.code = select.value;
    update();
  });
  for (const button of document.querySelectorAll("[data-code]")) {
    button.addEventListener("click", () => {
      chosen.severity = "";
      chosen.code = button.dataset.code;
      update();
      select.focus();
    });
  }
  byId("severities").append(...buttons);
  onMove((step) => move(step));
  update();
}

if (DATA.findings.length) startFindings();
