// What went wrong, by kind and by cause. Over all recorded rollouts, also where the page holds a part of them.

function failuresView() {
  return { node: el("div", { class: "page" }, failureKinds(), failureCauses(), driftSection()) };
}

function failureKinds() {
  const kinds = kindsOf(run.causes.listed);
  if (!kinds.length) return section("Failures", el("p", {}, "No rollout failed."));
  const rollouts = overall().reduce((sum, stats) => sum + stats.rollouts, 0);
  const rows = kinds.map(([kind, own]) => [
    named(kind, KINDS[kind], { outcome: `failed:${kind}` }),
    num(own.count),
    bar(own.count, kinds[0][1].count, "bad"),
    num(own.counted),
    share(own.counted, rollouts),
    [...own.agents]
      .sort(([, a], [, b]) => b - a)
      .map(([agent, count]) => el("div", {}, `${agent} `, el("span", { class: "quiet" }, num(count)))),
  ]);
  return section(
    "Failures by kind",
    kindTable(["kind", "attempts", "", "rollouts lost", "of all", "environments"], rows, [1, 3, 4]),
    el(
      "p",
      { class: "quiet" },
      "Attempts include those that were tried again. A rollout is lost when its last attempt failed; it leaves ",
      "loss and baseline.",
    ),
  );
}

/** [[kind, {count, counted, agents}]], the most frequent first. */
function kindsOf(listed) {
  const kinds = new Map();
  for (const cause of listed) {
    const own = kinds.get(cause.kind) || { count: 0, counted: 0, agents: new Map() };
    own.count += cause.count;
    own.counted += cause.counted;
    own.agents.set(cause.agent, (own.agents.get(cause.agent) || 0) + cause.count);
    kinds.set(cause.kind, own);
  }
  return [...kinds].sort(([, a], [, b]) => b.count - a.count);
}

function named(name, meaning, filter) {
  const link = el("a", { href: `#rollouts${filterQuery(filter)}` }, el("b", {}, name));
  return [link, el("div", { class: "quiet" }, meaning || "")];
}

/** A table whose third column is a bar. `numeric`: places of the columns of numbers. */
function kindTable(names, rows, numeric) {
  const kind = (at) => ({ class: at === 2 ? "bar-cell" : numeric.includes(at) ? "num" : "" });
  const cells = (tag, values) =>
    el(
      "tr",
      {},
      values.map((value, at) => el(tag, kind(at), value)),
    );
  const table = el(
    "table",
    { class: "plain-table kinds" },
    el("thead", {}, cells("th", names)),
    el(
      "tbody",
      {},
      rows.map((row) => cells("td", row)),
    ),
  );
  return el("div", { class: "scroll-x" }, table);
}

function failureCauses() {
  if (!run.causes.listed.length) return null;
  return section(
    "Causes",
    el(
      "div",
      { class: "causes" },
      run.causes.listed.map((cause) =>
        el(
          "div",
          { class: "cause" },
          el("div", { class: "cause-count num" }, num(cause.count)),
          el(
            "div",
            {},
            el("p", { class: "text" }, clip(cause.text, 600)),
            el(
              "p",
              { class: "quiet" },
              `${cause.kind} · ${cause.where || cause.agent} · `,
              run.byId.has(cause.example)
                ? el("a", { href: `#rollout=${encodeURIComponent(cause.example)}` }, "an example")
                : `e.g. ${cause.example}`,
            ),
          ),
        ),
      ),
    ),
    run.causes.left_out
      ? el("p", { class: "quiet" }, `${num(run.causes.left_out)} rarer causes are not listed.`)
      : null,
  );
}

const DRIFT_CAUSES = {
  retokenized: "the same text in other tokens: nobody put the sampled ids back",
  retemplated: "the chat template writes a sampled turn differently from how it was sampled",
  history_rewritten: "the agent sent other earlier messages, or other tools, than before",
  message_without_ids: "the agent sent no token ids with a turn that was sampled",
  no_boundary: "the template does not show where the sampled turn ends",
};

function driftSection() {
  if (!run.drift.length)
    return section("Drift", el("p", {}, "No rollout drifted: every prompt starts with the tokens already seen."));
  const largest = Math.max(...run.drift.map((own) => own.count));
  const rows = run.drift.map((own) => [
    named(own.cause, DRIFT_CAUSES[own.cause], { env: own.agent, outcome: `drift:${own.cause}` }),
    num(own.count),
    bar(own.count, largest, "warn"),
    own.agent,
  ]);
  return section("Drift by cause", kindTable(["cause", "rollouts", "", "environment"], rows, [1]));
}
