// Numbers and names as people read them.

const MINUS = "\u2212";
const NONE = "–";
const SPACE = "\u00a0"; // a number and its unit stay on one line

/** Up to `digits` significant digits, no trailing zeros, no exponent where it can be helped. */
function num(value, digits = 4) {
  if (value === null || value === undefined) return NONE;
  if (value === 0) return "0";
  const size = Math.abs(value);
  let text;
  if (size >= 1e6 || size < 1e-4) text = tidyExponent(value.toExponential(Math.max(0, digits - 2)));
  else if (Number.isInteger(value)) text = value.toLocaleString("en-US");
  else if (size >= 1000) text = Math.round(value).toLocaleString("en-US");
  else text = String(Number(value.toPrecision(digits)));
  return text.replace("-", MINUS);
}

/** Ticks of an axis as texts that differ from each other. */
function tickTexts(ticks) {
  for (let digits = 3; digits < 15; digits++) {
    const texts = ticks.map((tick) => num(tick, digits));
    if (new Set(texts).size === texts.length) return texts;
  }
  return ticks.map((tick) => String(tick).replace("-", MINUS));
}

function tidyExponent(text) {
  const [digits, power] = text.split("e");
  return `${Number(digits)}e${Number(power)}`;
}

/** Always so many decimals, for columns. */
function fixed(value, decimals) {
  return value === null || value === undefined ? NONE : value.toFixed(decimals).replace("-", MINUS);
}

function seconds(value) {
  if (value === null || value === undefined) return NONE;
  if (value < 0.0005) return value === 0 ? `0${SPACE}s` : `<1${SPACE}ms`;
  if (value < 1) return `${Math.round(value * 1000)}${SPACE}ms`;
  if (value < 100) return `${value.toFixed(value < 10 ? 2 : 1)}${SPACE}s`;
  const minutes = Math.round(value / 60);
  if (value < 3600) return `${Math.floor(value / 60)}${SPACE}min${SPACE}${Math.round(value % 60)}${SPACE}s`;
  return `${Math.floor(minutes / 60)}${SPACE}h${SPACE}${minutes % 60}${SPACE}min`;
}

function share(part, whole) {
  if (!whole) return NONE;
  if (part === 0) return "0 %";
  const percent = (100 * part) / whole;
  return percent < 0.1 ? "<0.1 %" : `${percent < 10 ? percent.toFixed(1) : Math.round(percent)} %`;
}

function plural(count, one, many = `${one}s`) {
  return `${num(count)} ${count === 1 ? one : many}`;
}

function clip(text, length) {
  return text.length > length ? `${text.slice(0, length - 1)}…` : text;
}

const sizes = (i) => `${plural(run.columns.turns[i], "turn")} · ${plural(run.columns.sampled_tokens[i], "token")}`;

/** What became of a rollout, in a few words: [text, class, title]. */
function outcome(i) {
  const failure = run.get("failure", i);
  const drift = run.get("drift", i);
  const state = run.get("state", i);
  const marks = [];
  if (state === "cancelled") marks.push([state, "note", STATES[state]]);
  else if (failure) marks.push([failure, "bad", `failed: ${failure}`]);
  if (drift) marks.push(["drift", "warn", `drift: ${drift}`]);
  if (run.isTruncated(i)) marks.push(["truncated", "warn", `truncated: ${run.get("finish", i)}`]);
  const errors = run.columns.tool_errors[i];
  if (errors) marks.push([plural(errors, "tool error"), "note", "tool results that say that the call failed"]);
  if (!["counted", "cancelled"].includes(state)) marks.push([state, "note", STATES[state]]);
  return marks;
}

const STATES = {
  counted: "counted in the numbers per step",
  retried: "failed and tried again under a new id; not counted",
  lost: "the policy server was lost as it ended; tried again under a new id; not counted",
  cancelled: "ended early: its group had enough or was too stale, or its batch was given up; not counted",
  superseded: "the rollout, or its step, was sampled again later; not counted",
};

const KINDS = {
  infrastructure: "connection dropped, server died, 5xx without a cause: says nothing about policy or task",
  deadline: "took longer than its deadline",
  environment: "tool, verifier or agent raised, or the answer has no usable reward",
  policy: "nothing to train on: no sampled token, or excluded for drift",
  cancelled: "ended early, alone or with its batch; never trained, never retried",
};

function badges(i) {
  return outcome(i).map(([text, kind, title]) => el("span", { class: `badge ${kind}`, title }, text));
}

const ADVANTAGES = {
  recorded: "as trained; none for what is not trained, or not yet",
  computed:
    "(reward − mean) / (sd + 0.0001) over its group's rewards: TRL's default. " +
    "This run has not recorded the advantages that it trained with",
};

/** The advantage of a rollout; null where it is not known. */
function advantageNode(i, name = "") {
  const value = run.columns.advantage[i];
  if (value === null) return null;
  const title = `advantage: ${ADVANTAGES[run.advantages]}`;
  return el("span", { class: "quiet advantage", title }, name, fixed(value, 2));
}

/** A reward as a chip whose depth is its place between the lowest and highest of its environment (at least 0 to 1). */
function rewardChip(i, href = null) {
  const reward = run.columns.reward[i];
  const failure = run.get("failure", i);
  if (run.get("state", i) === "cancelled")
    return el(href ? "a" : "span", { class: "chip uncounted", title: STATES.cancelled, href }, NONE);
  if (reward === null) {
    const text = failure ? "fail" : NONE;
    return el(
      href ? "a" : "span",
      { class: "chip failed", title: failure ? `failed: ${failure}` : "no reward", href },
      text,
    );
  }
  const [low, high] = run.rewardRange[run.get("agent", i)];
  const depth = high > low ? (reward - low) / (high - low) : 0;
  const level = Math.round(6 * depth);
  const kind = run.get("state", i) === "counted" ? "" : " uncounted";
  return el(href ? "a" : "span", { class: `chip r${level}${kind}`, title: `reward ${reward}`, href }, num(reward, 3));
}
