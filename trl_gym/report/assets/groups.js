// Groups: the rollouts of one task beside each other, as a list of rows and one group in columns.

function groupFacts(group) {
  const members = run.groups[group].filter((i) => run.get("state", i) === "counted");
  const rewards = members.map((i) => run.columns.reward[i]).filter((reward) => reward !== null);
  const mean = rewards.length ? rewards.reduce((a, b) => a + b, 0) / rewards.length : null;
  const sd =
    rewards.length > 1 ? Math.sqrt(rewards.reduce((sum, r) => sum + (r - mean) ** 2, 0) / (rewards.length - 1)) : null;
  return {
    group,
    first: run.groups[group][0],
    size: run.groups[group].length,
    mean,
    sd,
    failed: members.length - rewards.length,
  };
}

function groupColumns() {
  const quiet = (text, isQuiet = true) => el("span", { class: isQuiet ? "quiet" : "" }, text);
  const preview = (g) => run.preview(g.first);
  const task = (g) => el("span", { class: "task", title: preview(g) }, preview(g) || NONE);
  const failed = (g) => el("span", { class: g.failed ? "bad-text" : "quiet" }, num(g.failed));
  const noSpread = "standard deviation of rewards; at 0 there is nothing to learn from";
  return [
    numbers("step", "step", "44px", (g) => run.columns.step[g.first]),
    words(
      "set",
      "set",
      setTrack(),
      (g) => run.set(g.first),
      (g) => quiet(run.set(g.first)),
    ),
    run.agents.length > 1 && words("env", "environment", "minmax(110px, 0.8fr)", (g) => run.get("agent", g.first)),
    words("task", "task", "minmax(150px, 1.6fr)", preview, task),
    words("members", "rewards of its rollouts", "minmax(260px, 2.4fr)", null, (g) => memberChips(g.group)),
    numbers(
      "mean",
      "mean",
      "72px",
      (g) => g.mean,
      (g) => el("b", {}, num(g.mean, 3)),
      "mean reward",
    ),
    numbers(
      "sd",
      "± sd",
      "72px",
      (g) => g.sd,
      (g) => quiet(num(g.sd, 3), g.sd === 0),
      noSpread,
    ),
    numbers("failed", "failed", "64px", (g) => g.failed, failed),
  ].filter(Boolean);
}

function memberChips(group) {
  return el(
    "span",
    { class: "chips" },
    run.groups[group].slice(0, 32).map((i) => rewardChip(i)),
    run.groups[group].length > 32 && el("span", { class: "quiet" }, ` +${run.groups[group].length - 32}`),
  );
}

function groupsView(params) {
  let sort = readSort(params);
  const columns = groupColumns();
  const table = new DataTable(columns, {
    label: "groups",
    sort,
    href: (g) => run.groupLink(g.first),
    card: groupCard,
    cardHeight: 92,
    rowHeight: 40,
    onSort: (next) => {
      sort = next;
      replaceHash(own.address());
      table.show(table.items, true);
    },
  });
  const own = filtered(
    "groups",
    params,
    columns,
    () => sort,
    (matches) => {
      const groups = [...new Set(matches.map((i) => run.columns.group_id[i]))].map(groupFacts);
      table.show(groups);
      table.mark((g) => context.last !== null && run.columns.group_id[context.last] === g.group);
      own.status.prepend(`${plural(groups.length, "group")} with a rollout that matches · `);
    },
  );
  return { node: el("div", { class: "listpage" }, own.bar, own.line, table.node), mounted: own.start, table };
}

function groupCard(g) {
  return [
    el(
      "div",
      { class: "card-line" },
      el("b", {}, `step ${num(run.columns.step[g.first])}`),
      el("span", { class: "quiet" }, run.set(g.first)),
      el("span", { class: "task" }, run.preview(g.first)),
    ),
    el("div", { class: "card-line chips-line" }, memberChips(g.group)),
    el(
      "div",
      { class: "card-line quiet" },
      `mean ${num(g.mean, 3)} ± ${num(g.sd, 3)}${g.failed ? ` · ${g.failed} failed` : ""}`,
    ),
  ];
}

function groupView(id) {
  const first = run.byId.get(id);
  if (first === undefined) return missing("group", id);
  const members = run.members(first);
  const facts = groupFacts(run.columns.group_id[first]);
  const task = el("div", { class: "task-box" }, el("p", { class: "quiet" }, "…"));
  const head = el(
    "div",
    { class: "rollout-head" },
    crumbs(first, false),
    el(
      "p",
      { class: "headline" },
      el("b", {}, `${plural(members.length, "rollout")} of one task`),
      el(
        "span",
        { class: "quiet" },
        ` mean reward ${num(facts.mean)} ± ${num(facts.sd, 3)}${facts.failed ? `, ${facts.failed} failed` : ""}`,
      ),
    ),
  );
  const columns = el("div", { class: "columns" }, members.map(memberColumn));
  conversationOf(first).then((body) => {
    task.replaceChildren(...body.input.map((item) => messageNode(item)));
    append(head, [answersNode(body, false)]);
  });
  return {
    node: el(
      "div",
      { class: "page wide" },
      head,
      el("details", { class: "task-fold", open: true }, el("summary", {}, "task"), task),
      columns,
    ),
  };
}

function memberColumn(i) {
  const body = el("div", { class: "column-body" }, el("p", { class: "quiet" }, "…"));
  conversationOf(i).then((said) => {
    body.replaceChildren();
    append(body, [givenNode(said), conversationNodes(said, { withInput: false })]);
  });
  return el(
    "article",
    { class: "column" },
    el(
      "a",
      { class: "column-head", href: run.link(i) },
      el(
        "span",
        { class: "card-line" },
        rewardChip(i),
        advantageNode(i, "advantage "),
        badges(i),
        el("span", { class: "quiet end" }, `member ${run.columns.member[i]}`),
      ),
      el(
        "span",
        { class: "card-line quiet" },
        `${sizes(i)} · ${plural(run.columns.tool_calls[i], "tool call")} · ${seconds(run.columns.seconds[i])}`,
      ),
    ),
    body,
  );
}
