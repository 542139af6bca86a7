// Charts: SVG drawn by hand, redrawn when their width changes.

/** About `count` round numbers from `low` to `high`, whose ends enclose both. */
function niceTicks(low, high, count) {
  if (!(high > low)) {
    const pad = Math.abs(low) || 1;
    low -= pad / 2;
    high += pad / 2;
  }
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= raw * 0.999);
  const ticks = [];
  for (let k = Math.floor(low / step + 1e-9); ; k++) {
    ticks.push(Number((k * step).toPrecision(12)));
    if (k * step >= high - step * 1e-9) return ticks;
  }
}

/** Whole numbers inside [low, high]. */
function stepTicks(low, high, count) {
  const ticks = niceTicks(low, high, count).filter((tick) => Number.isInteger(tick) && tick >= low && tick <= high);
  return ticks.length ? ticks : [low];
}

/**
 * A chart of values over steps.
 *
 * series: [{name, kind: "train" | "eval" | "other …", points: [[step, value, note?]]}]; a kind is a list of classes
 * options: {label, zero: start at 0, unit: true for rewards (0 to 1 where all lie in it), pick(step, series), height}
 */
function lineChart(series, options) {
  const figure = el("div", { class: "chart" });
  onWidth(figure, (width) => figure.replaceChildren(drawLines(series, options, width)));
  return figure;
}

function drawLines(series, options, width) {
  const height = options.height || 180;
  const points = series.flatMap((one) => one.points);
  const [yTicks, xTicks, x, y, left, bottom] = scales(points, options, width, height);
  const root = svg("svg", {
    width,
    height,
    viewBox: `0 0 ${width} ${height}`,
    role: "img",
    "aria-label": describe(series, options),
  });
  const [yTexts, xTexts] = [tickTexts(yTicks), tickTexts(xTicks)];
  yTicks.forEach((tick, k) =>
    root.append(
      svg("line", { class: "grid", x1: left, x2: width - 8, y1: y(tick), y2: y(tick) }),
      svg("text", { class: "tick", x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, yTexts[k]),
    ),
  );
  xTicks.forEach((tick, k) =>
    root.append(svg("text", { class: "tick", x: x(tick), y: bottom + 16, "text-anchor": "middle" }, xTexts[k])),
  );
  root.append(svg("text", { class: "axis", x: width - 8, y: height - 2, "text-anchor": "end" }, "optimizer step"));
  if (options.label) root.append(svg("text", { class: "axis", x: left, y: 10 }, options.label));
  for (const one of series) root.append(...drawSeries(one, x, y));
  hover(root, series, options, { x, y, left, bottom, width });
  return root;
}

function scales(points, options, width, height) {
  const xs = points.map((point) => point[0]),
    ys = points.map((point) => point[1]);
  let [low, high] = [Math.min(...ys), Math.max(...ys)];
  if (options.unit && low >= 0 && high <= 1) [low, high] = [0, 1];
  else if (options.zero && low >= 0) low = 0;
  if (options.zero && low === 0 && high === 0) high = 1;
  const yTicks = niceTicks(low, high, 4);
  const left = 12 + 6.6 * Math.max(...tickTexts(yTicks).map((text) => text.length));
  const [top, bottom, right] = [options.label ? 22 : 8, height - 34, width - 14];
  const [first, last] = [Math.min(...xs), Math.max(...xs)];
  const x = (value) =>
    last > first ? left + 6 + ((value - first) / (last - first)) * (right - left - 6) : (left + right) / 2;
  const [yLow, yHigh] = [yTicks[0], yTicks[yTicks.length - 1]];
  const y = (value) => bottom - ((value - yLow) / (yHigh - yLow)) * (bottom - top);
  return [yTicks, stepTicks(first, last, Math.max(2, Math.floor(width / 90))), x, y, left, bottom];
}

function drawSeries(one, x, y) {
  const path = one.points
    .map(([step, value], k) => `${k ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`)
    .join("");
  const marks =
    one.points.length === 1 || /eval|dashed/.test(one.kind)
      ? one.points.map(([step, value]) =>
          svg("circle", { class: `mark ${one.kind}`, cx: x(step), cy: y(value), r: 3.5 }),
        )
      : [];
  return [svg("path", { class: `line ${one.kind}`, d: path }), ...marks];
}

/** A hairline at the nearest step, and its values in the tooltip; a click picks the step. */
function hover(root, series, options, { x, y, left, bottom, width }) {
  const steps = [...new Set(series.flatMap((one) => one.points.map((point) => point[0])))].sort((a, b) => a - b);
  const hair = svg("line", { class: "hair", y1: 8, y2: bottom, visibility: "hidden" });
  const dots = svg("g", {});
  const nearest = (event) => {
    const at = event.clientX - root.getBoundingClientRect().left;
    return steps.reduce((best, step) => (Math.abs(x(step) - at) < Math.abs(x(best) - at) ? step : best));
  };
  const leave = () => {
    hair.setAttribute("visibility", "hidden");
    dots.replaceChildren();
    tip.hide();
  };
  const area = svg("rect", {
    class: options.pick ? "area pick" : "area",
    x: left,
    y: 0,
    width: Math.max(0, width - left),
    height: bottom,
  });
  area.addEventListener("pointermove", (event) => {
    const step = nearest(event);
    hair.setAttribute("x1", x(step));
    hair.setAttribute("x2", x(step));
    hair.setAttribute("visibility", "visible");
    const found = series
      .map((one) => [one, one.points.find((point) => point[0] === step)])
      .filter(([, point]) => point);
    dots.replaceChildren(
      ...found.map(([one, point]) =>
        svg("circle", { class: `mark ${one.kind}`, cx: x(step), cy: y(point[1]), r: 3.5 }),
      ),
    );
    tip.show(event.clientX, event.clientY, [
      el("b", {}, `step ${num(step)}`),
      found.map(([one, point]) =>
        el(
          "div",
          { class: "tip-row" },
          el("i", { class: `key ${one.kind}` }),
          `${one.name} `,
          el("b", {}, num(point[1], 5)),
          point[2] && el("span", { class: "quiet" }, ` ${point[2]}`),
        ),
      ),
    ]);
  });
  area.addEventListener("pointerleave", leave);
  if (options.pick)
    area.addEventListener("click", (event) => {
      tip.hide();
      options.pick(nearest(event));
    });
  root.append(hair, dots, area);
}

function describe(series, options) {
  return (
    `${options.title || options.label || "chart"}: ` +
    series
      .map((one) => {
        const values = one.points.map((point) => point[1]);
        const ends = `from ${num(values[0])} to ${num(values[values.length - 1])}`;
        return `${one.name} ${ends} over ${plural(values.length, "step")}`;
      })
      .join("; ")
  );
}

/** A panel with a title, a legend and a chart. */
function panel(title, series, options = {}) {
  const kept = series
    .map((one) => ({ ...one, points: one.points.filter((point) => Number.isFinite(point[1])) }))
    .filter((one) => one.points.length);
  if (!kept.length) return null;
  const legend =
    !options.bare && (kept.length > 1 || options.legend)
      ? el(
          "div",
          { class: "legend" },
          kept.map((one) => el("span", {}, el("i", { class: `key ${one.kind}` }), one.name)),
        )
      : null;
  return el(
    "figure",
    { class: "panel" },
    el("figcaption", {}, el("span", { class: "name", title }, title), legend),
    lineChart(kept, { ...options, title }),
  );
}

/** A bar whose length is a share of the largest. */
function bar(value, largest, kind = "") {
  return el("span", { class: "bar" }, el("i", { class: kind, css: { "--part": largest ? value / largest : 0 } }));
}
