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

function overviewView(asked = "overview") {
  const isKnown = asked === "overview";
  const isOneStep = new Set(run.steps.map((stats) => stats.step)).size === 1;
  // A curve of one point shows less than its number.
  const main = isOneStep ? [results()] : [rewards(), attempts(), behaviour()];
  return el(
    "div",
    { class: "page" },
    problemsNode(isKnown ? [] : [`There is no view ${quoted(asked)}.`]),
    notices(),
    facts(),
    main,
    metricsSection(async () => [{ name: "", lines: await whole("metrics") }]),
  );
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
  const shareOf = (pick) => {
    const known = all.filter((stats) => pick(stats) !== null);
    const [part, of] = [pick, (stats) => stats.rollouts].map((get) => known.reduce((sum, own) => sum + get(own), 0));
    return known.length ? [share(part, of), plural(part, "rollout")] : [NONE, "not recorded"];
  };
  const listed = [
    [
      "rollouts",
      num(rollouts),
      other ? `and ${num(other)} lines that are not counted (tried again, ended early, superseded)` : "",
    ],
    [
      Math.min(...steps) === Math.max(...steps) ? "step" : "steps",
      [...new Set([Math.min(...steps), Math.max(...steps)])].map((step) => num(step)).join("–"),
      "optimizer steps that train them, from 1; an evaluation follows its step",
    ],
    ["environments", num(run.agents.length), run.agents.join("\n")],
    ["failed", share(failed, rollouts), plural(failed, "rollout")],
    ["drifted", ...shareOf((stats) => stats.drifted)],
    ["truncated", ...shareOf((stats) => stats.truncated)],
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
  columns.splice(1 + columns.findIndex((column) => column.key === "success"), 0, ...attemptColumns(rows));
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
    { class: "plain-table results" },
    el("thead", {}, el("tr", {}, head)),
    el(
      "tbody",
      {},
      rows.map((stats) => el("tr", {}, row(stats))),
    ),
  );
  return section("Results", el("div", { class: "scroll-x" }, table));
}

const isEstimate = (name) => /^(mean|pass)@\d+$/.test(name);

/** pass@k and mean@k, where tasks have several attempts. */
function attemptColumns(rows) {
  const names = [...new Set(rows.flatMap((stats) => Object.keys(stats.attempts)))].filter(isEstimate);
  const title = (name) =>
    name.startsWith("pass")
      ? "chance that one of so many attempts succeeds, unbiased, mean over tasks"
      : "success of so many attempts, mean over tasks";
  return names.map((name) =>
    numbers(name, name, "60px", null, (stats) => fixed(stats.attempts[name], 3), title(name)),
  );
}

/** Curves of pass@k and mean@k, one panel for each set that is not trained on. */
function attempts() {
  const all = overall().filter((stats) => Object.keys(stats.attempts).length);
  const panels = [...new Set(all.map((stats) => setName(stats.mode, stats.dataset)))].map((set) => {
    const own = all.filter((stats) => setName(stats.mode, stats.dataset) === set);
    const names = attemptColumns(own).map((column) => column.key);
    const series = names.map((name, k) => ({
      name,
      kind: `other ${k ? `o${(k - 1) % 4}` : ""} dashed`,
      points: own.filter((stats) => name in stats.attempts).map((stats) => [stats.step, stats.attempts[name]]),
    }));
    return panel(SET_NAMES[set] || set, series, { unit: true, legend: true });
  });
  return panels.length
    ? section("Several attempts", el("div", { class: "panels small" }, panels))
    : null;
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
  const isKnown = ([, count]) => all.some((stats) => count(stats) !== null);
  const never = shares.filter((own) => isKnown(own) && !all.some(own[1])).map(([name]) => name.toLowerCase());
  const panels = [
    ...shares
      .filter(([, count]) => all.some(count))
      .map(([name, count]) =>
        panel(
          `${name}, share of rollouts`,
          seriesOf(all, (stats) => (stats.rollouts && count(stats) !== null ? count(stats) / stats.rollouts : null)),
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

/** Curves of `metrics.jsonl`. `load()` resolves to runs: [{name, lines}], one without a name. */
function metricsSection(load) {
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
  load().then((runs) => {
    if (!runs.some((one) => one.lines && one.lines.length)) return;
    node.hidden = false;
    const names = metricNames(runs.flatMap((one) => one.lines));
    const draw = () => drawMetrics(runs, names, input.value.trim().toLowerCase(), grid, note);
    onTyping(input, draw);
    draw();
  });
  return node;
}

/** Names without `eval_`, which is drawn into the same panel: those that are ever not 0, and the others. */
function metricNames(lines) {
  const [all, told] = [new Set(), new Set()];
  for (const line of lines)
    for (const [key, value] of Object.entries(line)) {
      if (typeof value !== "number" || key === "step" || key === "epoch") continue;
      const name = key.replace(/^eval_/, "");
      all.add(name);
      if (value !== 0) told.add(name);
    }
  return { told: [...told].sort(), zero: [...all].filter((name) => !told.has(name)).sort() };
}

function drawMetrics(runs, names, text, grid, note) {
  const isWanted = (name) =>
    text ? name.toLowerCase().includes(text) : CURATED.some((pattern) => pattern.test(name));
  const wanted = names.told.filter(isWanted);
  const shown = wanted.slice(0, MAX_METRIC_PANELS);
  note.textContent = metricsNote(names, text, wanted.length, shown.length, names.zero.filter(isWanted));
  if (runs.length === 1 && runs[0].lines.length === 1) {
    const [line] = runs[0].lines;
    const pair = (name) => [el("dt", {}, name), el("dd", {}, num(line[name] ?? line[`eval_${name}`]))];
    return grid.replaceChildren(el("dl", { class: "pairs" }, shown.map(pair)));
  }
  const series = (one, k, key, isEval) => ({
    name: [one.name, isEval && "evaluation"].filter(Boolean).join(" · ") || "training",
    kind: one.name ? runKind(k, isEval) : isEval ? "eval" : "train",
    points: pointsOf(one.lines, key),
  });
  const drawn = (name) =>
    panel(
      name,
      runs.flatMap((one, k) => [series(one, k, name, false), series(one, k, `eval_${name}`, true)]),
      { bare: true },
    );
  grid.replaceChildren(...shown.map(drawn).filter(Boolean));
}

function metricsNote(names, text, numWanted, numShown, zero) {
  if (!text)
    return (
      `a choice of the ${num(names.told.length)} in metrics.jsonl; type to see others. ` +
      `Left out as always 0: ${num(names.zero.length)}.`
    );
  const cut = numWanted > numShown ? `, the first ${numShown} shown` : "";
  const always = zero.length ? `. Always 0: ${clip(zero.join(", "), 300)}` : "";
  return `${plural(numWanted, "metric")} of ${num(names.told.length)}${cut}${always}`;
}

/** Values over steps; none where they are 0 throughout, which TRL logs for what it does not measure. */
function pointsOf(lines, key) {
  const points = lines.filter((line) => typeof line[key] === "number").map((line) => [line.step, line[key]]);
  return points.some(([, value]) => value !== 0) ? points : [];
}

function section(title, ...children) {
  return el("section", {}, el("h2", {}, title), children);
}
