// One row per optimizer step and set of rollouts.

const failedOf = (stats) => Object.values(stats.failures).reduce((a, b) => a + b, 0);
const othersOf = (stats) => Object.values(stats.others).reduce((a, b) => a + b, 0);

function stepColumns(withAgent) {
  const zeroQuiet = (value, title) => el("span", { class: value ? "" : "quiet", title }, num(value));
  const list = (counts) =>
    Object.entries(counts)
      .map(([name, count]) => `${count} ${name}`)
      .join(", ");
  const track = (least) => `minmax(${least}px, 1fr)`;
  const set = (s) => setName(s.mode, s.dataset);
  const tokens = (s) => (s.sampled_tokens >= 1000 ? num(Math.round(s.sampled_tokens)) : fixed(s.sampled_tokens, 1));
  const get = (name) => (s) => s[name];
  const decimal = (name, decimals) => (s) => fixed(s[name], decimals);
  const reward = (s) => el("b", { title: s.reward }, fixed(s.reward, 4));
  const others = "lines that are not counted: tried again, ended early, superseded";
  return [
    numbers("step", "step", "44px", get("step"), undefined, "optimizer step that trains them; an evaluation follows it"),
    words("set", "set", "minmax(76px, 110px)", set, (s) => [el("i", { class: `dot ${s.mode}` }), set(s)]),
    withAgent && words("env", "environment", "minmax(150px, 3fr)", get("agent")),
    numbers("rollouts", "rollouts", track(62), get("rollouts")),
    numbers("reward", "reward", track(66), get("reward"), reward, "mean reward"),
    numbers("std", "± sd", track(56), get("reward_std"), decimal("reward_std", 3), "standard deviation of rewards"),
    numbers("success", "success", track(62), get("success"), decimal("success", 3)),
    numbers(
      "failed",
      "failed",
      track(50),
      failedOf,
      (s) => zeroQuiet(failedOf(s), list(s.failures)),
      "failed rollouts",
    ),
    numbers("drifted", "drift", track(44), get("drifted"), (s) => zeroQuiet(s.drifted), "rollouts that drifted"),
    numbers(
      "truncated",
      "truncated",
      track(72),
      get("truncated"),
      (s) => zeroQuiet(s.truncated),
      "cut, as NeMo Gym reports it",
    ),
    numbers("turns", "turns", track(48), get("turns"), decimal("turns", 2), "model calls, mean"),
    numbers("tokens", "tokens", track(54), get("sampled_tokens"), tokens, "sampled tokens, mean"),
    numbers(
      "p50",
      "p50 s",
      track(50),
      get("seconds_p50"),
      decimal("seconds_p50", 2),
      "time of a rollout, median, seconds",
    ),
    numbers(
      "p95",
      "p95 s",
      track(50),
      get("seconds_p95"),
      decimal("seconds_p95", 2),
      "time of a rollout, 95th percentile, seconds",
    ),
    run.steps.some(othersOf) &&
      numbers("others", "other", track(46), othersOf, (s) => zeroQuiet(othersOf(s), list(s.others)), others),
  ].filter(Boolean);
}

function stepsView(params) {
  const env = params.get("env") || "";
  const each = env === "each";
  const rows = run.steps.filter((stats) =>
    each ? stats.agent !== null : stats.agent === (run.agents.length > 1 ? env || null : null),
  );
  rows.sort((a, b) => a.step - b.step); // stable: training before evaluation
  const turn = (own, sort) => `#steps${query({ env: own, ...sortQuery(sort) })}`;
  const columns = stepColumns(each);
  const table = new DataTable(columns, {
    label: "steps",
    sort: readSort(params),
    onSort: (sort) => go(turn(env, sort), true),
    href: (stats) =>
      `#rollouts${filterQuery({ env: stats.agent, set: setName(stats.mode, stats.dataset), step: `${stats.step}` })}`,
    card: stepCard,
    cardHeight: 64,
  });
  const choose =
    run.agents.length > 1 &&
    choice("environment", env, [["", "all together"], ["each", "each on its own row"], ...run.agents], (value) =>
      go(turn(value, readSort(params)), true),
    );
  const asked = new URLSearchParams(params);
  if (each) asked.delete("env");
  const node = el(
    "div",
    { class: "listpage" },
    problemsNode(filterProblems(asked, columns)),
    el(
      "div",
      { class: "listhead" },
      el("p", { class: "quiet" }, plural(rows.length, "row"), ". A click shows the rollouts of a step."),
      choose,
    ),
    table.node,
  );
  return { node, mounted: () => table.show(rows), table };
}

function stepCard(stats) {
  return [
    el(
      "div",
      { class: "card-line" },
      el("b", {}, `step ${num(stats.step)}`),
      el("span", { class: "quiet" }, setName(stats.mode, stats.dataset), stats.agent ? ` · ${stats.agent}` : ""),
      el("b", { class: "end" }, fixed(stats.reward, 4)),
    ),
    el(
      "div",
      { class: "card-line quiet" },
      `${plural(stats.rollouts, "rollout")} · ${num(failedOf(stats))} failed · `,
      `${fixed(stats.turns, 1)} turns · ${fixed(stats.seconds_p50, 1)} s`,
    ),
  ];
}

function query(values) {
  const params = new URLSearchParams();
  for (const [key, value] of Object.entries(values)) if (value) params.set(key, value);
  const text = params.toString();
  return text ? `?${text}` : "";
}
