/* ---- charts: values at the pointer, or by arrow keys ----------------------------------------- */

const PLOT_AREA = { left: 46, right: 390, top: 10, bottom: 196 };

function attachReadout(figure, chart) {
  const svg = figure.querySelector("svg");
  const pointer = figure.querySelector(".pointer");
  const readout = figure.querySelector(".readout");
  const steps = [...new Set(chart.series.flatMap(({ points }) => points.map(([x]) => x)))].sort(
    (a, b) => a - b,
  );
  const toX = (x) =>
    PLOT_AREA.left +
    ((x - chart.x[0]) / (chart.x[1] - chart.x[0])) * (PLOT_AREA.right - PLOT_AREA.left);
  const toY = (y) =>
    PLOT_AREA.bottom -
    ((y - chart.y[0]) / (chart.y[1] - chart.y[0])) * (PLOT_AREA.bottom - PLOT_AREA.top);
  let current = null;

  const show = (index) => {
    current = Math.max(0, Math.min(index, steps.length - 1));
    const step = steps[current];
    const markers = [
      createElement("svg:path", { d: `M${toX(step)} ${PLOT_AREA.top}V${PLOT_AREA.bottom}` }),
    ];
    const texts = [
      chart.labels ? chart.labels[step] : translate("step {}", step.toLocaleString("en")),
    ];
    for (const { name, points } of chart.series) {
      const [x, y, text] =
        points[
          nearestIndex(
            points.map(([pointX]) => pointX),
            step,
          )
        ];
      markers.push(createElement("svg:circle", { cx: toX(x), cy: toY(y), r: 3.6 }));
      texts.push(x === step ? `${name} ${text}` : translate("{} {} (step {})", name, text, x));
    }
    pointer.replaceChildren(...markers);
    pointer.removeAttribute("hidden");
    readout.textContent = texts.join(" · ");
  };
  const hide = () => {
    current = null;
    pointer.setAttribute("hidden", "");
    readout.textContent = "";
  };
  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect();
    const x = ((event.clientX - frame.left) / frame.width) * 400;
    const fraction = (x - PLOT_AREA.left) / (PLOT_AREA.right - PLOT_AREA.left);
    show(nearestIndex(steps, chart.x[0] + fraction * (chart.x[1] - chart.x[0])));
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, PageUp: 50, PageDown: -50 }[event.key];
    const end = { Home: 0, End: steps.length - 1 }[event.key];
    if (step === undefined && end === undefined) return;
    event.preventDefault();
    if (end !== undefined) show(end);
    else if (current === null) show(step > 0 ? 0 : steps.length - 1);
    else show(current + step);
  });
}

/* Index of the value in a sorted list that is nearest to `target`. */
function nearestIndex(values, target) {
  let low = 0;
  let high = values.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (values[middle] < target) low = middle;
    else high = middle;
  }
  return Math.abs(values[low] - target) <= Math.abs(values[high] - target) ? low : high;
}

document.querySelectorAll("[data-chart]").forEach((figure) => {
  attachReadout(figure, DATA.charts[figure.dataset.chart]);
});
