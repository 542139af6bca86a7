// The list of rollouts, and what the lists of rollouts and groups have in common: filter, search, count.

/** The filter above a list. `show(matches)` draws; the address changes with the filter. */
function filtered(view, params, sort, show) {
  const filter = readFilter(params);
  const status = el("span", { role: "status", "aria-live": "polite" });
  const clear = FILTER_KEYS.some((key) => filter[key]) && el("a", { href: `#${view}` }, "clear filters");
  const line = el("p", { class: "quiet count" }, status, " ", clear);
  const change = (next) => go(`#${view}${filterQuery(readFilterOf(next), sortQuery(sort()))}`, true);
  const token = {};
  const start = async () => {
    filtered.newest = token;
    const candidates = matching(filter);
    if (!filter.text) return finish(candidates);
    status.textContent = "searching…";
    const progress = (done, all) => {
      status.textContent = `searching… ${done} of ${all}`;
    };
    const found = await searchText(candidates, filter.text, progress, () => filtered.newest === token);
    if (found) finish(found);
  };
  const finish = (matches) => {
    context.list = matches;
    const scored = matches.map((i) => run.columns.reward[i]).filter((reward) => reward !== null);
    const mean = scored.length
      ? `mean reward ${num(scored.reduce((a, b) => a + b, 0) / scored.length, 4)}`
      : "no rewards";
    status.textContent = `${num(matches.length)} of ${plural(run.size, "rollout")} · ${mean}`;
    show(matches);
    restoreScroll(current.hash);
  };
  return { bar: filterBar(filter, change), status, line, start };
}

function readFilterOf(filter) {
  return Object.fromEntries(FILTER_KEYS.map((key) => [key, filter[key] || ""]));
}

/** The last list that was looked at, in its order: what "next" means on a rollout's page. */
const context = { list: null, from: "#rollouts", last: null };

function rolloutColumns() {
  const col = (name) => (i) => run.columns[name][i];
  const quiet = (text) => el("span", { class: "quiet" }, text);
  const task = (i) => el("span", { class: "task", title: run.preview(i) }, run.preview(i) || NONE);
  const place = (i) => [num(run.columns.group[i]), quiet(` · ${run.columns.member[i]}`)];
  const order = (i) => 1e4 * run.columns.group[i] + run.columns.member[i];
  const named = (i) =>
    outcome(i)
      .map(([text]) => text)
      .join(" ") || null;
  return [
    numbers("reward", "reward", "56px", col("reward"), (i) => rewardChip(i)),
    numbers("step", "step", "44px", col("step")),
    words("set", "set", "minmax(44px, 64px)", run.set, (i) => quiet(run.set(i))),
    run.agents.length > 1 && words("env", "environment", "minmax(120px, 2fr)", (i) => run.get("agent", i)),
    words("task", "task", "minmax(160px, 3fr)", run.preview, task),
    numbers("member", "group", "64px", order, place, "group and member in it"),
    numbers("turns", "turns", "44px", col("turns"), undefined, "model calls"),
    numbers("tools", "tools", "50px", col("tool_calls"), undefined, "tool calls"),
    numbers("tokens", "tokens", "60px", col("sampled_tokens"), undefined, "sampled tokens"),
    numbers("seconds", "time", "64px", col("seconds"), (i) => seconds(run.columns.seconds[i]), "wall time"),
    words("outcome", "outcome", "minmax(112px, 1.2fr)", named, badges),
  ].filter(Boolean);
}

function rolloutsView(params) {
  let sort = readSort(params);
  const table = new DataTable(rolloutColumns(), {
    label: "rollouts",
    sort,
    href: run.link,
    card: rolloutCard,
    cardHeight: 72,
    onSort: (next) => {
      sort = next;
      replaceHash(`#rollouts${filterQuery(readFilter(params), sortQuery(sort))}`);
      table.show(table.items, true);
      context.list = table.items;
    },
  });
  const own = filtered(
    "rollouts",
    params,
    () => sort,
    (matches) => {
      table.show(matches);
      table.mark((i) => i === context.last);
      context.list = table.items;
      empty.hidden = matches.length > 0;
    },
  );
  const empty = el("p", { class: "empty", hidden: true }, "No rollout matches.");
  const node = el("div", { class: "listpage" }, own.bar, own.line, empty, table.node);
  return { node, mounted: own.start, table };
}

function rolloutCard(i) {
  return [
    el("div", { class: "card-line" }, rewardChip(i), el("span", { class: "task" }, run.preview(i) || NONE), badges(i)),
    el(
      "div",
      { class: "card-line quiet" },
      `step ${num(run.columns.step[i])} ${run.set(i)} · group ${run.columns.group[i]}·${run.columns.member[i]} · `,
      `${sizes(i)} · ${seconds(run.columns.seconds[i])}`,
    ),
  ];
}
