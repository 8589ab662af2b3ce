/* ---- data show: one sample at a time, its images next to its tokens -------------------------- */

const INVISIBLE = /([ \n\t]|[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Zs}])/u;
const INVISIBLE_SYMBOLS = { " ": "·", "\n": "↵", "\t": "⇥" };

/* Text with a symbol for every invisible character; line breaks stay line breaks. */
function showInvisible(text) {
  return text
    .split(INVISIBLE)
    .filter(Boolean)
    .flatMap((segment) => {
      if (!INVISIBLE.test(segment)) return segment;
      const code = segment.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      const symbol = createElement(
        "span",
        { class: "white" },
        INVISIBLE_SYMBOLS[segment] || `U+${code}`,
      );
      return segment === "\n" ? [symbol, "\n"] : symbol;
    });
}

function formatSize([height, width]) {
  return `${width} × ${height}`;
}

function drawStat(name, value) {
  return createElement("div", {}, createElement("dt", {}, name), createElement("dd", {}, value));
}

/* ---- images and their boxes ------------------------------------------------------------------ */

function drawImages(sample) {
  return sample.images.map((image, imageIndex) => {
    const numbered = sample.boxes.map((box, boxIndex) => ({ ...box, boxIndex }));
    const boxes = numbered
      .filter((box) => box.image_index === imageIndex)
      .map(({ xyxy, label, boxIndex }) => ({
        xyxy,
        label: label === null ? `${boxIndex + 1}` : `${boxIndex + 1} ${label}`,
      }));
    const alt = translate(
      "{} as model input, {}",
      image.name,
      translate("{} boxes", boxes.length.toLocaleString("en")),
    );
    const frames = image.frames.map((frame, index) =>
      drawImage(
        frame,
        index ? [] : boxes,
        index ? translate("frame {} of {}", index + 1, image.name) : alt,
      ),
    );
    const sizes = translate(
      "{} resized to {} pixels, {} patches, {}",
      formatSize(image.original_size),
      formatSize(image.resized_size),
      image.grid_thw.join(" × "),
      translate("{} tokens", image.num_tokens.toLocaleString("en")),
    );
    const kind =
      image.kind === "video"
        ? translate(", video of {}", translate("{} frames", frames.length))
        : "";
    return createElement(
      "div",
      {},
      frames.length > 1
        ? createElement("div", { class: "frames", tabindex: 0 }, ...frames)
        : frames[0],
      createElement(
        "p",
        { class: "described" },
        createElement("strong", {}, translate("Image {}", imageIndex + 1)),
        translate(" {}{}: {}", image.name, kind, sizes),
      ),
    );
  });
}

function drawBoxes(sample) {
  if (!sample.boxes.length && !sample.num_sample_boxes) return [];
  const names = ["no.", "label", "in the model input", "in the original image"].map((name) =>
    translate(name),
  );
  const headers = names.map((name) => createElement("th", { scope: "col" }, name));
  const formatCorners = (xyxy) => xyxy.map(Math.round).join(", ");
  const rows = sample.boxes.map((box, index) =>
    createElement(
      "tr",
      {},
      createElement("td", {}, `${index + 1}`),
      createElement("td", { "data-label": names[1] }, box.label === null ? "–" : box.label),
      createElement("td", { class: "mono", "data-label": names[2] }, formatCorners(box.xyxy)),
      createElement(
        "td",
        { class: "mono", "data-label": names[3] },
        formatCorners(box.original_box),
      ),
    ),
  );
  const isEqual = sample.boxes.length === sample.num_sample_boxes;
  const counts = translate(
    "{} parsed from the tokens, {} in the sample",
    translate("{} boxes", sample.boxes.length.toLocaleString("en")),
    sample.num_sample_boxes,
  );
  return [
    createElement("p", { class: isEqual ? "small soft" : "small warn" }, counts),
    createElement(
      "div",
      { class: "scroll", tabindex: 0, role: "region", "aria-label": translate("Boxes") },
      createElement(
        "table",
        { class: "stack" },
        createElement("thead", {}, createElement("tr", {}, ...headers)),
        createElement("tbody", {}, ...rows),
      ),
    ),
  ];
}

/* ---- tokens ---------------------------------------------------------------------------------- */

function drawToken(row, sample) {
  const kind = row.kind === "text" ? "" : row.kind;
  const classes = `token ${kind} ${row.is_supervised ? "supervised" : ""}`;
  if (row.kind !== "image") {
    return createElement("span", { class: classes, tabindex: -1 }, ...showInvisible(row.text));
  }
  const { grid_thw: grid, name } = sample.images[row.image_index];
  const text = translate(
    "Image {}: {} {}, grid {}, {}",
    row.image_index + 1,
    translate("{} tokens", row.end - row.start + 1),
    row.text,
    grid.join(" × "),
    name,
  );
  return createElement("span", { class: `${classes} image-block`, tabindex: -1 }, text);
}

function describeToken(row, sample) {
  const strong = (text) => createElement("b", {}, text);
  const supervision = translate(row.is_supervised ? "supervised" : "not supervised");
  const formatPosition = (ids) => translate("time {}, height {}, width {}", ...ids);
  if (row.kind === "image") {
    const image = sample.images[row.image_index];
    return [
      strong(translate("Tokens {} to {}", row.start, row.end)),
      ` · id ${row.id} ${row.text} · ${supervision}`,
      createElement("br"),
      translate(
        "{} to {} · {} resized to {} pixels",
        formatPosition(row.first_position),
        formatPosition(row.last_position),
        formatSize(image.original_size),
        formatSize(image.resized_size),
      ),
    ];
  }
  const kind =
    {
      special: ` · ${translate("special token")}`,
      bytes: ` · ${translate("part of a character")}`,
    }[row.kind] || "";
  return [
    strong(translate("Token {}", row.start)),
    ` · id ${row.id} · `,
    strong(JSON.stringify(row.text)),
    `${kind} · ${supervision}`,
    createElement("br"),
    formatPosition(row.first_position),
  ];
}

function drawTokens(sample) {
  const detail = createElement("output", { class: "detail", "aria-live": "polite" });
  const tokens = [];
  const rowOfToken = new Map();
  const turns = sample.turns.map((turn) => {
    const text = createElement("div", { class: "text" });
    for (const row of turn.rows) {
      const token = drawToken(row, sample);
      rowOfToken.set(token, row);
      tokens.push(token);
      if (/^\s/.test(row.text)) text.append(createElement("wbr"));
      text.append(token);
    }
    const numSupervised = turn.rows.filter((row) => row.is_supervised).length;
    const title = numSupervised
      ? translate("{} · {} supervised", turn.role, numSupervised)
      : turn.role;
    return createElement(
      "section",
      { class: `turn ${turn.role === "assistant" ? "assistant" : ""}` },
      createElement("h4", {}, title),
      text,
    );
  });
  const group = createElement(
    "div",
    { role: "group", "aria-label": translate("Tokens") },
    ...turns,
  );
  const show = (token) => detail.replaceChildren(...describeToken(rowOfToken.get(token), sample));
  let current = tokens[0];
  const select = (token) => {
    current.tabIndex = -1;
    current = token;
    current.tabIndex = 0;
    show(token);
  };
  current.tabIndex = 0;
  group.addEventListener("focusin", (event) => select(event.target.closest(".token")));
  group.addEventListener("pointerover", (event) => {
    const token = event.target.closest(".token");
    if (token) show(token);
  });
  group.addEventListener("pointerleave", () => show(current));
  group.addEventListener("keydown", (event) => {
    const index = tokens.indexOf(current);
    const target = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: tokens.length - 1 }[
      event.key
    ];
    if (target === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    if (tokens[target]) tokens[target].focus();
  });
  show(current);
  return createElement(
    "div",
    { class: "card" },
    createElement("h3", {}, translate("Tokens")),
    group,
    detail,
  );
}

/* ---- page ------------------------------------------------------------------------------------ */

function drawSample(sample) {
  const numInputOnly = sample.num_tokens - sample.num_supervised_tokens;
  const columns = createElement("div", { class: "sides" });
  const images = [...drawImages(sample), ...drawBoxes(sample)];
  if (images.length) {
    columns.append(
      createElement(
        "div",
        { class: "card" },
        createElement("h3", {}, translate("Images")),
        ...images,
      ),
    );
  }
  columns.append(drawTokens(sample));
  const format = (count) => count.toLocaleString("en");
  return [
    createElement("h2", {}, translate("Sample {}", sample.id)),
    createElement(
      "dl",
      { class: "stats" },
      drawStat(translate("tokens"), format(sample.num_tokens)),
      drawStat(translate("supervised"), format(sample.num_supervised_tokens)),
      drawStat(translate("input only"), format(numInputOnly)),
      drawStat(translate("patches"), format(sample.num_patches)),
    ),
    columns,
  ];
}

/* Keys by which samples are sorted, highest first. */
const SORT_KEYS = {
  file: () => 0,
  tokens: (sample) => sample.num_tokens,
  supervised: (sample) => sample.num_supervised_tokens,
  boxes: (sample) => sample.num_sample_boxes,
  differences: (sample) => Math.abs(sample.boxes.length - sample.num_sample_boxes),
};

function startSamples() {
  let samples = DATA.samples;
  const select = createElement("select", { "aria-label": translate("Sample") });
  const addOptions = () =>
    select.replaceChildren(
      ...samples.map(({ id }, index) => createElement("option", { value: index }, id)),
    );
  addOptions();
  const { nav, go } = createPager(samples.length, (index) => {
    select.value = index;
    byId("sample").replaceChildren(...drawSample(samples[index]));
  });
  select.addEventListener("change", () => go(Number(select.value)));
  const orders = {
    file: translate("order of the file"),
    tokens: translate("most tokens first"),
    supervised: translate("most supervised tokens first"),
    boxes: translate("most boxes first"),
    differences: translate("differences of boxes first"),
  };
  const order = createElement(
    "select",
    {},
    ...Object.entries(orders).map(([key, name]) => createElement("option", { value: key }, name)),
  );
  order.addEventListener("change", () => {
    const key = SORT_KEYS[order.value];
    samples = [...DATA.samples].sort((one, other) => key(other) - key(one));
    addOptions();
    go(0);
  });
  if (samples.length > 1) {
    byId("bar").append(
      nav,
      createElement("label", {}, select),
      createElement("label", { class: "choice" }, `${translate("Sort")} `, order),
    );
  }
}

startSamples();
