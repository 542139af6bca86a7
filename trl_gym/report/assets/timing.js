// Where a rollout's time went. The journal has how long each part took, in order, and not when it began.

const PARTS = [
  ["queue_s", "queue", "waiting in the engine's queue"],
  ["prefill_s", "prefill", "from scheduling to the first token"],
  ["decode_s", "decode", "from the first token to the last"],
];

async function timingTab(i, content) {
  const body = await conversationOf(i);
  const total = run.columns.seconds[i];
  const rows = timingRows(body.turns);
  const known = rows.reduce((sum, row) => sum + row.parts.reduce((a, [, value]) => a + value, 0), 0);
  const rest = total === null ? null : total - known;
  const end = Math.max(total || 0, known);
  if (!end) return content.replaceChildren(el("p", { class: "notice" }, "No times are recorded for this rollout."));
  const chart = el("div", { class: "chart" });
  onWidth(chart, (width) => chart.replaceChildren(drawWaterfall(rows, rest, end, width)));
  content.replaceChildren(
    timingLegend(rows, rest),
    chart,
    timingNotes(rows, rest, known),
    el("div", { class: "scroll-x" }, timingTable(rows, rest, total)),
  );
}

function timingLegend(rows, rest) {
  const seen = new Set(rows.flatMap((row) => row.parts.map(([kind]) => kind)));
  const item = (kind, text, title) => el("span", { title }, el("i", { class: `swatch ${kind}` }), text);
  return el(
    "p",
    { class: "legend" },
    PARTS.filter(([, name]) => seen.has(name)).map(([, name, title]) => item(name, name, title)),
    seen.has("tool") && item("tool", "tool"),
    rest !== null &&
      rest > 0 &&
      item("rest", seen.has("tool") ? "verifier, agent, network" : "tools, verifier, agent, network"),
  );
}

/** One row per model or tool call: {name, parts: [[kind, seconds]], known}. */
function timingRows(turns) {
  let calls = 0;
  return turns.map((turn) => {
    if (turn.kind === "tool")
      return {
        name: `tool ${turn.name}`,
        turn,
        parts: turn.seconds === null || turn.seconds === undefined ? [] : [["tool", turn.seconds]],
      };
    const parts = PARTS.filter(([key]) => turn[key] !== null && turn[key] !== undefined).map(([key, name]) => [
      name,
      turn[key],
    ]);
    return { name: `model call ${++calls}`, turn, parts };
  });
}

function drawWaterfall(rows, rest, end, width) {
  const [line, left] = [24, Math.min(190, Math.max(96, width * 0.26))];
  const listed = rest !== null && rest > 0 ? [...rows, { name: "other", parts: [["rest", rest]] }] : rows;
  const height = listed.length * line + 30;
  const ticks = niceTicks(0, end, Math.max(2, Math.floor((width - left) / 90))).filter((tick) => tick <= end * 1.0001);
  const x = (value) => left + (value / end) * (width - left - 70);
  const root = svg("svg", {
    width,
    height,
    viewBox: `0 0 ${width} ${height}`,
    role: "img",
    "aria-label": "time of each part of the rollout, in seconds",
  });
  const texts = tickTexts(ticks);
  ticks.forEach((tick, k) =>
    root.append(
      svg("line", { class: "grid", x1: x(tick), x2: x(tick), y1: 0, y2: height - 24 }),
      svg("text", { class: "tick", x: x(tick), y: height - 8, "text-anchor": "middle" }, `${texts[k]} s`),
    ),
  );
  let at = 0;
  listed.forEach((row, k) => {
    const y = k * line;
    root.append(
      svg(
        "text",
        { class: "label", x: left - 8, y: y + 16, "text-anchor": "end" },
        clip(row.name, Math.floor(left / 6.4)),
      ),
    );
    const total = row.parts.reduce((sum, [, value]) => sum + value, 0);
    for (const [kind, value] of row.parts) {
      const shape = svg("rect", {
        class: `span ${kind}`,
        x: x(at),
        y: y + 5,
        width: Math.max(value > 0 ? 1 : 0, x(at + value) - x(at)),
        height: line - 10,
        rx: 1,
      });
      const text = `${row.name}: ${kind === "rest" ? "not measured apart" : kind} ${seconds(value)}`;
      shape.addEventListener("pointermove", (event) => tip.show(event.clientX, event.clientY, text));
      shape.addEventListener("pointerleave", () => tip.hide());
      root.append(shape);
      at += value;
    }
    root.append(
      svg("text", { class: "tick", x: x(at) + 6, y: y + 16 }, row.parts.length ? seconds(total) : "not measured"),
    );
  });
  return root;
}

function timingNotes(rows, rest, known) {
  const notes = ["Parts stand in order; the journal has how long they took, not when they began."];
  if (!rows.some((row) => row.turn.kind === "model" && row.parts.length))
    notes.push("The policy server's times are not recorded here, as with a server that does not measure them.");
  if (rows.some((row) => row.turn.kind === "tool" && !row.parts.length))
    notes.push("NeMo Gym does not report how long a tool took.");
  if (rest !== null && rest > 0 && known > 0)
    notes.push(
      "What was not measured apart (tools, verifier, agent, network, waiting for a connection) is one bar at the end.",
    );
  return el("p", { class: "quiet" }, notes.join(" "));
}

function timingTable(rows, rest, total) {
  const cell = (value) => el("td", { class: "num" }, value);
  const part = (row, kind) => {
    const found = row.parts.find(([name]) => name === kind);
    return cell(found ? seconds(found[1]) : NONE);
  };
  return el(
    "table",
    { class: "plain-table" },
    el(
      "thead",
      {},
      el(
        "tr",
        {},
        ["", "tokens in", "cached", "sampled", "queue", "prefill", "decode", "tool"].map((name, k) =>
          el("th", { class: k ? "num" : "" }, name),
        ),
      ),
    ),
    el(
      "tbody",
      {},
      rows.map((row) =>
        el(
          "tr",
          {},
          el("td", {}, row.name),
          cell(num(row.turn.prompt_tokens)),
          cell(num(row.turn.cached_tokens)),
          cell(num(row.turn.generation_tokens)),
          part(row, "queue"),
          part(row, "prefill"),
          part(row, "decode"),
          part(row, "tool"),
        ),
      ),
    ),
    el(
      "tfoot",
      {},
      el(
        "tr",
        {},
        el("td", {}, "in all"),
        el(
          "td",
          { colspan: "7", class: "num" },
          rest !== null && rest > 0 ? `${seconds(total)} (${seconds(rest)} not measured apart)` : seconds(total),
        ),
      ),
    ),
  );
}
