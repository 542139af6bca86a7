// Which rollouts are looked at: a filter that lives in the address, so that it can be linked to.

const FILTER_KEYS = ["env", "set", "step", "min", "max", "outcome", "spread", "version", "text"];
const OUTCOMES = ["scored", "failed", "drift", "truncated", "state"];
const SPREADS = [
  ["", "all"],
  ["differ", "rewards differ"],
  ["same", "rewards all the same"],
];

function readFilter(params) {
  const filter = {};
  for (const key of FILTER_KEYS) filter[key] = params.get(key) || "";
  return filter;
}

function filterQuery(filter, more = {}) {
  const params = new URLSearchParams();
  for (const key of FILTER_KEYS) if (filter[key]) params.set(key, filter[key]);
  for (const [key, value] of Object.entries(more)) if (value) params.set(key, value);
  const text = params.toString();
  return text ? `?${text}` : "";
}

/** What an address asks for that this page does not know, in words. What cannot be read filters nothing. */
function filterProblems(params, columns) {
  const filter = readFilter(params);
  const problems = [...params.keys()]
    .filter((key) => key !== "sort" && !FILTER_KEYS.includes(key))
    .map((key) => `There is no filter ${quoted(key)}.`);
  const unread = (key, what) => problems.push(`${quoted(filter[key])} is no ${what}, and filters nothing.`);
  if (filter.step && !stepRange(filter.step)) unread("step", "step or range of steps");
  for (const key of ["min", "max"]) if (limitOf(filter[key]) === null) unread(key, "number");
  const known = { env: run.agents, set: sets(), spread: SPREADS.map(([own]) => own), version: versionNames() };
  for (const [key, names] of Object.entries(known))
    if (filter[key] && !names.includes(filter[key]))
      problems.push(`No rollout here has the ${FILTER_NAMES[key]} ${quoted(filter[key])}.`);
  const [kind, name] = filter.outcome.split(":");
  const names = { failed: run.names.failure, drift: run.names.drift, state: run.names.state };
  if (kind && (!OUTCOMES.includes(kind) || (name !== undefined && !(names[kind] || []).includes(name))))
    problems.push(`No rollout here has the outcome ${quoted(filter.outcome)}.`);
  const sort = readSort(params);
  if (sort && !columns.some((column) => column.key === sort.key))
    problems.push(`There is no column ${quoted(sort.key)} to sort by.`);
  return problems;
}

const FILTER_NAMES = { env: "environment", set: "set", spread: "spread of rewards", version: "weight version" };
const quoted = (text) => `“${clip(text, 80)}”`;

function problemsNode(problems) {
  return problems.length
    ? el("p", { class: "notice asked", role: "alert" }, "The address asks for what is not here. ", problems.join(" "))
    : null;
}

/** Numbers of the rollouts that match everything but the text, in the order of the index. */
function matching(filter) {
  const steps = stepRange(filter.step);
  const [min, max] = [limitOf(filter.min) ?? NaN, limitOf(filter.max) ?? NaN];
  const limited = !Number.isNaN(min) || !Number.isNaN(max);
  return run.all.filter((i) => {
    const reward = run.columns.reward[i];
    return (
      (!filter.env || run.get("agent", i) === filter.env) &&
      (!filter.set || run.set(i) === filter.set) &&
      (!steps || (run.columns.step[i] >= steps[0] && run.columns.step[i] <= steps[1])) &&
      (!limited || (reward !== null && !(reward < min) && !(reward > max))) &&
      (!filter.spread || run.spread[run.columns.group_id[i]] === filter.spread) &&
      (!filter.version || run.get("version", i).split(", ").includes(filter.version)) &&
      (!filter.outcome || hasOutcome(i, filter.outcome))
    );
  });
}

/** A number; NaN for none, null for a text that is no number. */
function limitOf(text) {
  if (text === "") return NaN;
  return text.trim() === "" || Number.isNaN(Number(text)) ? null : Number(text);
}

/** "12" or "10-20" or "10-"; null for anything else, which filters nothing. */
function stepRange(text) {
  const match = /^\s*(\d+)\s*(?:([-–])\s*(\d*)\s*)?$/.exec(text);
  if (!match) return null;
  const first = Number(match[1]);
  if (!match[2]) return [first, first];
  return [first, match[3] ? Number(match[3]) : Infinity];
}

function hasOutcome(i, wanted) {
  const [kind, name] = wanted.split(":");
  if (kind === "scored") return run.get("failure", i) === null;
  if (kind === "failed") return name ? run.get("failure", i) === name : run.get("failure", i) !== null;
  if (kind === "drift") return name ? run.get("drift", i) === name : run.get("drift", i) !== null;
  if (kind === "truncated") return run.isTruncated(i);
  return kind === "state" && run.get("state", i) === name;
}

/** Of these rollouts, the ones whose id, conversation or failure holds the text, whatever its case. */
async function searchText(candidates, text, onProgress, isWanted) {
  const needle = text.toLowerCase();
  const byChunk = new Map();
  for (const i of candidates) {
    const chunk = run.columns.chunk[i];
    if (!byChunk.has(chunk)) byChunk.set(chunk, []);
    byChunk.get(chunk).push(i);
  }
  const found = new Set();
  let done = 0;
  for (const [number, own] of byChunk) {
    const chunk = await unpack(`c${number}`);
    if (!isWanted()) return null;
    const said = new Map(); // a task is looked at once for all of its rollouts
    for (const i of own) {
      const body = chunk.rollouts[run.columns.place[i]];
      if (!said.has(body.input)) said.set(body.input, holds(chunk.shared[body.input], needle));
      const failure = body.failure ? String(body.failure.text) : "";
      const matches =
        said.get(body.input) ||
        run.columns.rollout_id[i].toLowerCase().includes(needle) ||
        failure.toLowerCase().includes(needle) ||
        holds(body.output, needle);
      if (matches) found.add(i);
    }
    onProgress(++done, byChunk.size);
  }
  return candidates.filter((i) => found.has(i));
}

function holds(items, needle) {
  return items.some((item) =>
    [item.text, item.name].some((own) => own && own.toLowerCase().includes(needle)),
  );
}

/** The bar of controls. `change(filter)` is called with each new filter, `type(text)` while a text is typed. */
function filterBar(filter, change, type) {
  const set = (key, value) => change({ ...filter, [key]: value });
  const count = FILTER_KEYS.filter((key) => key !== "text" && filter[key]).length;
  const controls = el(
    "div",
    { class: "controls" },
    run.agents.length > 1 && choice("environment", filter.env, ["", ...run.agents], (value) => set("env", value)),
    sets().length > 1 && choice("set", filter.set, ["", ...sets()], (value) => set("set", value)),
    field("step", "step", filter.step, "3 or 3-9", (value) => set("step", value)),
    el(
      "span",
      { class: "pair" },
      field("min", "reward from", filter.min, "min", (value) => set("min", value), "number"),
      field("max", "to", filter.max, "max", (value) => set("max", value), "number"),
    ),
    choice("outcome", filter.outcome, outcomes(), (value) => set("outcome", value)),
    run.spread.some((own) => own) && choice("group", filter.spread, SPREADS, (value) => set("spread", value)),
    versionNames().length > 1 &&
      field("version", "weights", filter.version, "version", (value) => set("version", value)),
  );
  const fold = el(
    "details",
    { class: "fold", open: !isNarrow() },
    el("summary", {}, count ? `filters (${count})` : "filters"),
    controls,
  );
  const hint = "text in task, answer, tool calls, failure";
  const search = field("search", "search", filter.text, hint, null, "search");
  search.classList.add("grow");
  onTyping(search.querySelector("input"), type);
  return el("form", { class: "filters", role: "search", onsubmit: (event) => event.preventDefault() }, search, fold);
}

function field(id, label, value, placeholder, set, type = "text") {
  const input = el("input", {
    id: `f-${id}`,
    type,
    value,
    placeholder,
    autocomplete: "off",
    spellcheck: "false",
    pattern: id === "step" ? "\\s*\\d+\\s*([\\-–]\\s*\\d*)?\\s*" : null,
    step: type === "number" ? "any" : null,
  });
  if (set) input.addEventListener("change", () => set(input.value.trim()));
  return el("label", { class: `field ${id}` }, el("span", {}, label), input);
}

const TYPING_MS = 150;

/** Calls `type(text)` when typing pauses, at once with Enter. */
function onTyping(input, type) {
  let waiting = 0,
    last = input.value.trim();
  const tell = () => {
    clearTimeout(waiting);
    const text = input.value.trim();
    if (input.isConnected && text !== last) type((last = text));
  };
  input.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(tell, TYPING_MS);
  });
  input.addEventListener("change", tell);
}

function choice(label, value, options, set) {
  const listed = options.map((option) => (Array.isArray(option) ? option : [option, option || "all"]));
  if (!listed.some(([own]) => own === value)) listed.push([value, `${clip(value, 40)} (not here)`]);
  const select = el(
    "select",
    { id: `f-${label}` },
    listed.map(([own, text]) => el("option", { value: own, selected: own === value }, text)),
  );
  select.addEventListener("change", () => set(select.value));
  return el("label", { class: "field" }, el("span", {}, label), select);
}

const sets = () => [...new Set(run.steps.map((stats) => setName(stats.mode, stats.dataset)))];
const versionNames = () => [...new Set(run.names.version.flatMap((names) => names.split(", ")))];

function outcomes() {
  const known = (name) => run.names[name].filter((own) => own !== null);
  const listed = [
    ["", "all"],
    ["scored", "with a reward"],
  ];
  if (known("failure").length)
    listed.push(["failed", "failed"], ...known("failure").map((kind) => [`failed:${kind}`, `failed: ${kind}`]));
  if (known("drift").length)
    listed.push(["drift", "drifted"], ...known("drift").map((cause) => [`drift:${cause}`, `drift: ${cause}`]));
  if (run.all.some(run.isTruncated)) listed.push(["truncated", "truncated"]);
  if (known("state").length > 1) listed.push(...known("state").map((state) => [`state:${state}`, `state: ${state}`]));
  return listed;
}
