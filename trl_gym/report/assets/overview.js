// The first page: facts, reward curves per environment, how rollouts went, every metric that was logged.

const CURATED = [
  /^logprob_gap\/mean$/,
  /^loss$/,
  /^entropy$/,
  /^grad_norm$/,
  /^learning_rate$/,
  /^kl$/,
  /^rollouts\/groups\/zero_variance_fraction$/,
  /^frac_reward_zero_std$/,
  /^rollouts\/staleness\/mean$/,
  /^sampling\/importance_sampling_ratio\/mean$/,
  /^seconds\//,
];
const MAX_METRIC_PANELS = 36;

function overviewView() {
  const isOneStep = new Set(run.steps.map((stats) => stats.step)).size === 1;
  const main = isOneStep ? [results()] : [rewards(), behaviour()]; // a curve of one point shows less than its number
  return el("div", { class: "page" }, notices(), facts(), main, metricsSection());
}

function notices() {
  const left = run.recorded - run.size;
  if (!left) return null;
  return el(
    "p",
    { class: "notice" },
    `This file holds ${num(run.size)} of ${num(run.recorded)} recorded rollouts: whole groups, chosen by a hash of `,
    "what names them, so the choice is the same every time. ",
    `Curves, steps and failures are of all ${num(run.recorded)}.`,
  );
}

function overall() {
  return run.steps.filter((stats) => stats.agent === null);
}

function facts() {
  const all = overall();
  const total = (pick) => all.reduce((sum, stats) => sum + pick(stats), 0);
  const rollouts = total((stats) => stats.rollouts);
  const failed = total(failedOf);
  const other = total(othersOf);
  const steps = all.map((stats) => stats.step);
  const times = run.columns.time.filter((time) => time > 0);
  const drifted = total((stats) => stats.drifted);
  const listed = [
    [
      "rollouts",
      num(rollouts),
      other ? `and ${num(other)} lines that are not counted (tried again, ended early, superseded)` : "",
    ],
    [
      Math.min(...steps) === Math.max(...steps) ? "step" : "steps",
      [...new Set([Math.min(...steps), Math.max(...steps)])].map((step) => num(step)).join("–"),
      "optimizer steps with whose weights rollouts began",
    ],
    ["environments", num(run.agents.length), run.agents.join("\n")],
    ["failed", share(failed, rollouts), plural(failed, "rollout")],
    ["drifted", share(drifted, rollouts), plural(drifted, "rollout")],
    [
      "truncated",
      share(
        total((stats) => stats.truncated),
        rollouts,
      ),
      "as NeMo Gym reports it",
    ],
  ];
  if (times.length > 1)
    listed.push([
      "recorded over",
      seconds(Math.max(...times) - Math.min(...times)),
      "from the first rollout's end to the last one's",
    ]);
  return el(
    "dl",
    { class: "facts" },
    listed.map(([name, value, title]) => el("div", { title }, el("dt", {}, name), el("dd", {}, value))),
  );
}

/** Series over steps of a number of `steps`: training as a line, each evaluation set as marks. */
function seriesOf(stats, pick, note) {
  const bySet = new Map();
  for (const one of stats) {
    const name = setName(one.mode, one.dataset);
    if (!bySet.has(name))
      bySet.set(name, {
        name: SET_NAMES[name] || name,
        kind: one.mode === "train" ? "train" : one.dataset ? `other o${bySet.size % 4}` : "eval",
        points: [],
      });
    const value = pick(one);
    if (value !== null) bySet.get(name).points.push([one.step, value, note && note(one)]);
  }
  return [...bySet.values()];
}

const SET_NAMES = { train: "training", eval: "evaluation" };

/** What came of a single step, e.g. of `trl-gym eval`: one row per environment and set. */
function results() {
  const rows = run.steps.filter((stats) => run.agents.length === 1 || stats.agent !== null);
  const columns = stepColumns(false).filter((column) => column.key !== "step");
  const name = (stats) => stats.agent || run.agents[0];
  const link = (stats) => `#rollouts${filterQuery({ env: name(stats), set: setName(stats.mode, stats.dataset) })}`;
  const kind = (column) => ({ class: column.num ? "num" : "", title: column.title });
  const head = [el("th", {}, "environment"), columns.map((column) => el("th", kind(column), column.label))];
  const row = (stats) => [
    el("td", {}, el("a", { href: link(stats) }, name(stats))),
    columns.map((column) => el("td", { class: column.num ? "num" : "" }, column.cell(stats))),
  ];
  const table = el(
    "table",
    { class: "plain-table" },
    el("thead", {}, el("tr", {}, head)),
    el(
      "tbody",
      {},
      rows.map((stats) => el("tr", {}, row(stats))),
    ),
  );
  return section("Results", el("div", { class: "scroll-x" }, table));
}

function rewards() {
  const agents = run.agents.length > 1 ? run.agents : [null];
  const panels = agents.map((agent) => {
    const own = run.steps.filter((stats) => stats.agent === agent);
    const pick = (step) => go(`#rollouts${filterQuery({ env: agent || "", step: String(step) })}`);
    return panel(
      agent || run.agents[0],
      seriesOf(
        own,
        (stats) => stats.reward,
        (stats) => `of ${num(stats.rollouts)}`,
      ),
      { unit: true, pick, height: agents.length > 1 ? 190 : 260, label: "mean reward", legend: true },
    );
  });
  if (!panels.some(Boolean)) return section("Reward", el("p", { class: "quiet" }, "No rollout has a reward yet."));
  return section("Reward", el("div", { class: agents.length > 1 ? "panels" : "panels one" }, panels));
}

function behaviour() {
  const all = overall();
  const shares = [
    ["Failed", failedOf],
    ["Drifted", (stats) => stats.drifted],
    ["Truncated", (stats) => stats.truncated],
  ];
  const never = shares.filter(([, count]) => !all.some(count)).map(([name]) => name.toLowerCase());
  const panels = [
    ...shares
      .filter(([, count]) => all.some(count))
      .map(([name, count]) =>
        panel(
          `${name}, share of rollouts`,
          seriesOf(all, (stats) => (stats.rollouts ? count(stats) / stats.rollouts : null)),
          { zero: true, bare: true },
        ),
      ),
    panel(
      "Sampled tokens, mean",
      seriesOf(all, (stats) => stats.sampled_tokens),
      { zero: true, bare: true },
    ),
    panel(
      "Model calls, mean",
      seriesOf(all, (stats) => stats.turns),
      { zero: true, bare: true },
    ),
    panel(
      "Seconds, 95th percentile",
      seriesOf(all, (stats) => stats.seconds_p95),
      { zero: true, bare: true },
    ),
  ].filter(Boolean);
  const note = never.length
    ? el("p", { class: "quiet" }, `No rollout ${never.join(" or ")}.`.replace("truncated", "was truncated"))
    : null;
  return panels.length ? section("Rollouts", note, el("div", { class: "panels small" }, panels)) : null;
}

function metricsSection() {
  const grid = el("div", { class: "panels small" });
  const note = el("p", { class: "quiet" });
  const input = el("input", {
    type: "search",
    id: "metric-search",
    placeholder: "e.g. gym/ or seconds",
    autocomplete: "off",
    spellcheck: "false",
  });
  const node = section(
    "Metrics",
    el("div", { class: "metric-bar" }, el("label", { class: "field" }, el("span", {}, "name"), input), note),
    grid,
  );
  node.hidden = true;
  whole("metrics").then((lines) => {
    if (!lines || !lines.length) return;
    node.hidden = false;
    const names = metricNames(lines);
    const draw = () => drawMetrics(lines, names, input.value.trim().toLowerCase(), grid, note);
    input.addEventListener("input", draw);
    draw();
  });
  return node;
}

/** Names without `eval_`, which is drawn into the same panel. */
function metricNames(lines) {
  const names = new Set();
  for (const line of lines)
    for (const [name, value] of Object.entries(line))
      if (typeof value === "number" && name !== "step" && name !== "epoch") names.add(name.replace(/^eval_/, ""));
  return [...names].sort();
}

function drawMetrics(lines, names, text, grid, note) {
  const wanted = names.filter((name) =>
    text ? name.toLowerCase().includes(text) : CURATED.some((pattern) => pattern.test(name)),
  );
  const shown = wanted.slice(0, MAX_METRIC_PANELS);
  const more = wanted.length - shown.length;
  note.textContent = text
    ? `${plural(wanted.length, "metric")} of ${num(names.length)}${more ? `, the first ${shown.length} shown` : ""}`
    : `a choice of the ${num(names.length)} in metrics.jsonl; type to see others`;
  if (lines.length === 1) {
    grid.replaceChildren(
      el(
        "dl",
        { class: "pairs" },
        shown.map((name) => [el("dt", {}, name), el("dd", {}, num(lines[0][name] ?? lines[0][`eval_${name}`]))]),
      ),
    );
    return;
  }
  const pointsOf = (name) =>
    lines.filter((line) => typeof line[name] === "number").map((line) => [line.step, line[name]]);
  grid.replaceChildren(
    ...shown
      .map((name) =>
        panel(
          name,
          [
            { name: "training", kind: "train", points: pointsOf(name) },
            { name: "evaluation", kind: "eval", points: pointsOf(`eval_${name}`) },
          ],
          { bare: true },
        ),
      )
      .filter(Boolean),
  );
}

function section(title, ...children) {
  return el("section", {}, el("h2", {}, title), children);
}
