// One rollout: what was said, its tokens, its times, the record.

const TABS = [
  ["conversation", "c"],
  ["tokens", "t"],
  ["timing", "w"],
  ["record", "x"],
];

function rolloutView(id, params) {
  const i = run.byId.get(id);
  if (i === undefined) return missing("rollout", id);
  const tab = TABS.some(([name]) => name === params.get("tab")) ? params.get("tab") : "conversation";
  const content = el(
    "div",
    { class: "tab-body", role: "tabpanel", "aria-label": tab },
    el("p", { class: "quiet" }, "…"),
  );
  const draw = { conversation: conversationTab, tokens: tokensTab, timing: timingTab, record: recordTab }[tab];
  const asked = params.get("tab");
  const problems = asked && asked !== tab ? [`There is no part ${quoted(asked)}.`] : [];
  const head = el("div", { class: "rollout-head" }, crumbs(i, true), headline(i), tabStrip(i, tab));
  conversationOf(i).then((body) => head.lastChild.before(answersNode(body, true) || ""));
  draw(i, content).catch((error) =>
    content.replaceChildren(el("p", { class: "notice bad" }, `This could not be shown: ${error.message}`)),
  );
  const node = el(
    "div",
    { class: "page rollout" },
    problemsNode(problems),
    head,
    el("div", { class: "split" }, content, sidebar(i)),
  );
  return { node };
}

function tabLink(i, tab) {
  return tab === "conversation" ? run.link(i) : `${run.link(i)}&tab=${tab}`;
}

function tabStrip(i, tab) {
  return el(
    "nav",
    { class: "tabs", role: "tablist", "aria-label": "parts of the rollout" },
    TABS.map(([name, key]) =>
      el(
        "a",
        { href: tabLink(i, name), role: "tab", "aria-selected": String(name === tab), title: `key ${key}` },
        name,
      ),
    ),
  );
}

function crumbs(i, isRollout) {
  const list = context.list || run.all;
  const at = list.indexOf(i);
  const set = run.set(i);
  const step = `#rollouts${filterQuery({ step: String(run.columns.step[i]), set })}`;
  return el(
    "div",
    { class: "crumbs" },
    el(
      "span",
      {},
      el("a", { href: step }, `step ${num(run.columns.step[i])}`),
      el("span", { class: "quiet" }, ` ${set} / `),
      el("a", { href: `#rollouts${filterQuery({ env: run.get("agent", i) })}` }, run.get("agent", i)),
      el("span", { class: "quiet" }, " / "),
      isRollout
        ? el("a", { href: run.groupLink(i) }, `group ${run.columns.group[i]}`)
        : `group ${run.columns.group[i]}`,
      isRollout && el("span", { class: "quiet" }, ` / member ${run.columns.member[i]}`),
    ),
    isRollout &&
      el(
        "span",
        { class: "steer" },
        el("span", { class: "quiet" }, at >= 0 ? `${num(at + 1)} of ${num(list.length)}` : ""),
        el(
          "button",
          {
            type: "button",
            class: "plain",
            title: "previous (k)",
            "aria-label": "previous rollout",
            disabled: at <= 0,
            onclick: () => neighbour(-1),
          },
          "←",
        ),
        el(
          "button",
          {
            type: "button",
            class: "plain",
            title: "next (j)",
            "aria-label": "next rollout",
            disabled: at < 0 || at + 1 >= list.length,
            onclick: () => neighbour(1),
          },
          "→",
        ),
      ),
  );
}

function headline(i) {
  const reward = run.columns.reward[i];
  return el(
    "p",
    { class: "headline" },
    el("span", { class: "quiet" }, "reward "),
    el("b", { class: "big", id: "reward", title: reward }, num(reward)),
    " ",
    badges(i),
    el("span", { class: "task quiet" }, run.preview(i)),
  );
}

function sidebar(i) {
  const get = (name) => run.columns[name][i];
  const total = run.tokens(i);
  const isLate = get("trained") !== null && get("trained") !== get("step");
  const rows = [
    [run.advantages === "recorded" ? "advantage" : "advantage, computed", advantageNode(i)],
    ["prompt", total ? plural(get("prompt_tokens"), "token") : null],
    ["environment", total ? plural(get("environment_tokens"), "token") : null],
    ["sampled", total ? plural(get("sampled_tokens"), "token") : NONE],
    ["rows", get("rows") > 1 ? num(get("rows")) : null],
    ["model calls", num(get("turns"))],
    [
      "tool calls",
      get("tool_errors") ? `${num(get("tool_calls"))}, ${num(get("tool_errors"))} failed` : num(get("tool_calls")),
    ],
    ["time", seconds(get("seconds"))],
    ["finish", run.get("finish", i)],
    ["success", get("success") === null ? null : num(get("success"))],
    ["weights", run.get("version", i)],
    ["sampled for", isLate ? `step ${num(get("step"))}` : null],
    ["trained in", isLate ? `step ${num(get("trained"))}` : null],
    ["batch", get("batch") === null ? null : String(get("batch"))],
    ["attempt", num(get("attempt") + 1)],
    ["ended", get("time") ? new Date(get("time") * 1000).toISOString().slice(0, 19).replace("T", " ") + " UTC" : null],
    ["id", el("code", {}, get("rollout_id"))],
  ];
  const members = run.members(i);
  const verified = el("div", {});
  conversationOf(i).then((body) => append(verified, [verifyNode(body)]));
  return el(
    "aside",
    { class: "side" },
    el(
      "dl",
      { class: "pairs" },
      rows
        .filter(([, value]) => value !== null)
        .map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]),
    ),
    members.length > 1 &&
      el(
        "div",
        { class: "siblings" },
        el("h3", {}, el("a", { href: run.groupLink(i) }, `group of ${members.length}`)),
        el(
          "span",
          { class: "chips" },
          members.map((own) => {
            const chip = rewardChip(own, run.link(own));
            if (own === i) chip.setAttribute("aria-current", "true");
            return chip;
          }),
        ),
      ),
    verified,
  );
}

/** Numbers that the verifier reported, without what it echoes of the task. */
function verifyNode(body) {
  const numbers = (values) =>
    Object.entries(values || {}).filter(([, value]) => ["number", "boolean"].includes(typeof value));
  const own = numbers(body.verify).filter(
    ([name]) => name !== "reward" && !name.startsWith("_ng_") && !(name in body.task),
  );
  const listed = [...numbers(body.components), ...own].slice(0, 30);
  if (!listed.length) return null;
  return el(
    "div",
    { class: "siblings" },
    el("h3", {}, "verifier"),
    el(
      "dl",
      { class: "pairs" },
      listed.map(([name, value]) => [
        el("dt", {}, name),
        el("dd", {}, typeof value === "number" ? num(value) : String(value)),
      ]),
    ),
  );
}

async function recordTab(i, content) {
  const body = await conversationOf(i);
  const parts = [
    ["verify response", body.verify],
    ["reward components", Object.keys(body.components).length ? body.components : null],
    ["failure", body.failure],
    ["drift", body.drift],
    ["task, as in the dataset", body.task],
    ["request", body.request],
    ["tools", body.tools.length ? body.tools : null],
    ["turns", body.turns],
  ];
  content.replaceChildren(
    ...parts
      .filter(([, value]) => value !== null && value !== undefined)
      .map(([name, value]) =>
        el("section", {}, el("h3", {}, name), el("pre", { class: "json" }, JSON.stringify(value, null, 2))),
      ),
  );
}

function neighbour(by, list = context.list || run.all) {
  const i = current.rollout;
  const at = list.indexOf(i);
  const next = list[at + by];
  if (at < 0 || next === undefined) return;
  const tab = new URLSearchParams(current.query).get("tab");
  go(tab ? `${run.link(next)}&tab=${tab}` : run.link(next), true);
}

function missing(what, id) {
  return {
    node: el(
      "div",
      { class: "page" },
      el("h2", {}, `No such ${what}`),
      el(
        "p",
        {},
        `This file holds no ${what} `,
        el("code", {}, clip(id, 200)),
        run.recorded > run.size
          ? ". It may be among those that were left out: write the page again with a higher --max-rollouts."
          : ".",
      ),
      el("p", {}, el("a", { href: "#rollouts" }, "all rollouts")),
    ),
  };
}
