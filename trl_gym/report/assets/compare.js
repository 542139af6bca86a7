// This run beside others: their curves in one plot, their last and best numbers in one table.

const RUN_KINDS = ["train", "other o0", "other o1", "other o2", "other o3"];
const runKind = (k, isEval) => `${RUN_KINDS[k % RUN_KINDS.length]}${isEval ? " dashed" : ""}`;

/** All runs of the page, this one first: [{name, agents, steps, lines}]. */
async function allRuns() {
  const own = { name: run.run, agents: run.agents, steps: run.steps, lines: (await whole("metrics")) || [] };
  const others = (await whole("others")) || [];
  return [own, ...others.map((one) => ({ ...one, name: one.run, lines: one.metrics }))];
}

function compareView() {
  const node = el("div", { class: "page" }, el("p", { class: "quiet" }, "…"));
  allRuns().then((runs) =>
    node.replaceChildren(
      runLegend(runs),
      comparedRewards(runs),
      section("Last and best", el("div", { class: "scroll-x" }, comparedNumbers(runs))),
      metricsSection(async () => runs),
    ),
  );
  return { node };
}

function runLegend(runs) {
  return el(
    "p",
    { class: "legend runs" },
    runs.map((one, k) => el("span", {}, el("i", { class: `key ${runKind(k, false)}` }), one.name)),
    el("span", {}, el("i", { class: "key neutral dashed" }), "evaluation"),
  );
}

/** Numbers of one environment over steps; a run with a single one has them as those of all. */
function statsOf(one, agent) {
  if (one.agents.length > 1) return one.steps.filter((stats) => stats.agent === agent);
  return one.agents[0] === agent ? one.steps.filter((stats) => stats.agent === null) : [];
}

function comparedRewards(runs) {
  const agents = [...new Set(runs.flatMap((one) => one.agents))].sort();
  const panels = agents.map((agent) => {
    const series = runs.flatMap((one, k) =>
      seriesOf(statsOf(one, agent), (stats) => stats.reward).map((own) => ({
        ...own,
        name: `${one.name} · ${own.name}`,
        kind: runKind(k, own.kind !== "train"),
      })),
    );
    const height = agents.length > 1 ? 190 : 260;
    return panel(agent, series, { unit: true, bare: true, label: "mean reward", height });
  });
  return section("Reward", el("div", { class: agents.length > 1 ? "panels" : "panels one" }, panels));
}

function comparedNumbers(runs) {
  const reached = (name) => [name, "best", "at step"];
  const head = ["run", "set", "last step", ...reached("reward"), ...reached("success"), "failed", "tokens"];
  const rows = runs.flatMap((one, k) => {
    const all = one.steps.filter((stats) => stats.agent === null);
    return [...new Set(all.map((stats) => setName(stats.mode, stats.dataset)))].map((set) => {
      const own = all.filter((stats) => setName(stats.mode, stats.dataset) === set);
      const last = own.reduce((a, b) => (b.step > a.step ? b : a));
      return [
        [el("i", { class: `key ${runKind(k, false)}` }), one.name],
        set,
        num(last.step),
        ...lastAndBest(own, last, "reward"),
        ...lastAndBest(own, last, "success"),
        share(
          own.reduce((sum, stats) => sum + failedOf(stats), 0),
          own.reduce((sum, stats) => sum + stats.rollouts, 0),
        ),
        fixed(last.sampled_tokens, 1),
      ];
    });
  });
  const cells = (tag, values) =>
    el(
      "tr",
      {},
      values.map((value, at) => el(tag, { class: at > 1 ? "num" : "" }, value)),
    );
  return el(
    "table",
    { class: "plain-table compared" },
    el("thead", {}, cells("th", head)),
    el(
      "tbody",
      {},
      rows.map((row) => cells("td", row)),
    ),
  );
}

function lastAndBest(own, last, name) {
  const known = own.filter((stats) => stats[name] !== null);
  if (!known.length) return [NONE, NONE, NONE];
  const best = known.reduce((a, b) => (b[name] > a[name] ? b : a));
  return [fixed(last[name], 3), el("b", {}, fixed(best[name], 3)), num(best.step)];
}
