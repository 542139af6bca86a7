// The list of rollouts, and what the lists of rollouts and groups have in common: filter, search, count.

/** The filter above a list. `show(matches)` draws; the address changes with the filter. */
function filtered(view, params, columns, sort, show) {
  const filter = readFilter(params);
  const status = el("span", { role: "status", "aria-live": "polite" });
  const clear = el("a", { href: `#${view}` }, "clear filters");
  const line = el("p", { class: "quiet count" }, status, " ", clear);
  const address = (own) => `#${view}${filterQuery(own, sortQuery(sort()))}`;
  const change = (next) => go(address(readFilterOf(next)), true);
  const type = (text) => {
    filter.text = text;
    replaceHash(address(filter));
    start();
  };
  let found = null; // of the newest text that was searched to the end: what holds a longer one is among them
  const start = async () => {
    const token = (filtered.newest = {});
    const text = filter.text.toLowerCase();
    clear.hidden = !FILTER_KEYS.some((key) => filter[key]);
    if (!text) return finish(matching(filter));
    const candidates = found && text.includes(found.text) ? found.matches : matching(filter);
    status.textContent = "searching…";
    const progress = (done, all) => {
      status.textContent = `searching… ${done} of ${all}`;
    };
    const matches = await searchText(candidates, text, progress, () => filtered.newest === token);
    if (!matches) return;
    found = { text, matches };
    finish(matches);
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
  const bar = el("div", {}, filterBar(filter, change, type), problemsNode(filterProblems(params, columns)));
  return { bar, status, line, start, address: () => address(filter) };
}

function readFilterOf(filter) {
  return Object.fromEntries(FILTER_KEYS.map((key) => [key, filter[key] || ""]));
}

/** The last list that was looked at, in its order: what "next" means on a rollout's page. */
const context = { list: null, from: "#rollouts", last: null };

const setTrack = () => (sets().some((name) => name.length > 8) ? "minmax(64px, 120px)" : "minmax(44px, 64px)");

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
    run.hasAdvantages &&
      numbers(
        "advantage",
        "adv.",
        "52px",
        col("advantage"),
        (i) => fixed(run.columns.advantage[i], 2),
        `advantage: ${ADVANTAGES[run.advantages]}`,
      ),
    numbers("step", "step", "44px", col("step")),
    words("set", "set", setTrack(), run.set, (i) => quiet(run.set(i))),
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
  const columns = rolloutColumns();
  const table = new DataTable(columns, {
    label: "rollouts",
    sort,
    href: run.link,
    card: rolloutCard,
    cardHeight: 72,
    onSort: (next) => {
      sort = next;
      replaceHash(own.address());
      table.show(table.items, true);
      context.list = table.items;
    },
  });
  const own = filtered(
    "rollouts",
    params,
    columns,
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
    el(
      "div",
      { class: "card-line" },
      rewardChip(i),
      advantageNode(i, "adv. "),
      el("span", { class: "task" }, run.preview(i) || NONE),
      badges(i),
    ),
    el(
      "div",
      { class: "card-line quiet" },
      `step ${num(run.columns.step[i])} ${run.set(i)} · group ${run.columns.group[i]}·${run.columns.member[i]} · `,
      `${sizes(i)} · ${seconds(run.columns.seconds[i])}`,
    ),
  ];
}
