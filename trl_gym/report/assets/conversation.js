// A rollout as a conversation.

const LONG_TEXT = 6000; // characters that are shown before "show all"
const HEAD_TEXT = 3000;
const MESSAGES = ["system", "developer", "user", "assistant", "call", "result", "reasoning", "tool"];

async function conversationTab(i, content) {
  const body = await conversationOf(i);
  content.replaceChildren(...conversationNodes(body, { withInput: true }));
}

/** Messages in order; drift and failure stand where they happened. */
function conversationNodes(body, { withInput }) {
  const nodes = [];
  const drift = body.drift;
  if (withInput) {
    if (body.tools.length) nodes.push(toolsNode(body.tools));
    nodes.push(...body.input.map((item) => messageNode(item)));
  }
  const names = new Map(body.output.filter((item) => item.kind === "call").map((item) => [item.id, item.name]));
  let turn = null,
    drifted = !drift;
  for (const item of body.output) {
    if (item.turn !== null && item.turn !== turn) {
      turn = item.turn;
      if (!drifted && turn >= drift.turn) {
        nodes.push(driftNode(drift, body.failure));
        drifted = true;
      }
      nodes.push(turnRule(turn, body.turns));
    }
    nodes.push(messageNode(item, names));
  }
  if (!drifted) nodes.push(driftNode(drift, body.failure));
  if (body.failure) nodes.push(failureNode(body.failure));
  if (!body.output.length && !body.failure) nodes.push(el("p", { class: "quiet" }, "No answer is recorded."));
  return nodes;
}

function turnRule(turn, turns) {
  const call = turns.filter((own) => own.kind === "model")[turn];
  const times = call
    ? [call.queue_s, call.prefill_s, call.decode_s].filter((value) => value !== null && value !== undefined)
    : [];
  const facts = call
    ? [
        call.prompt_tokens !== null && `${num(call.prompt_tokens)} tokens in`,
        call.cached_tokens ? `${num(call.cached_tokens)} cached` : null,
        call.generation_tokens !== null && `${num(call.generation_tokens)} sampled`,
        times.length ? seconds(times.reduce((a, b) => a + b, 0)) : null,
      ]
        .filter(Boolean)
        .join(" · ")
    : "";
  return el(
    "div",
    { class: "turn-rule" },
    el("span", {}, `model call ${turn + 1}`),
    el("span", { class: "facts-line" }, facts),
  );
}

function messageNode(item, names = new Map()) {
  const label =
    {
      call: "calls",
      result: names.get(item.id) ? `${names.get(item.id)} returned` : "tool returned",
      reasoning: "thinks",
    }[item.kind] || item.role;
  const kind = item.kind === "message" ? item.role : item.kind;
  return el(
    "div",
    {
      class: `message ${MESSAGES.includes(kind) ? kind : "other"}${item.error ? " failed" : ""}`,
    },
    el(
      "div",
      { class: "who" },
      item.kind === "call" ? [label, " ", el("b", {}, item.name)] : item.kind === "other" ? item.name : label,
      item.error && el("span", { class: "badge bad" }, "failed"),
    ),
    item.kind === "call" ? argumentsNode(item.text) : textNode(item.text),
  );
}

/** Arguments as names and values where they are a JSON object, else as they were written. */
function argumentsNode(text) {
  let parsed = null;
  try {
    parsed = JSON.parse(text);
  } catch {
    /* the policy may write anything; then it is shown as it is */
  }
  if (parsed === null || typeof parsed !== "object" || Array.isArray(parsed)) return textNode(text);
  const entries = Object.entries(parsed);
  if (!entries.length) return el("div", { class: "text quiet" }, "no arguments");
  return el(
    "dl",
    { class: "args" },
    entries.map(([name, value]) => [
      el("dt", {}, name),
      el("dd", {}, textNode(typeof value === "string" ? value : JSON.stringify(value, null, 1))),
    ]),
  );
}

function textNode(text) {
  if (text === "" || text === null || text === undefined) return el("div", { class: "text quiet" }, "(empty)");
  if (text.length <= LONG_TEXT) return el("div", { class: "text" }, text);
  const node = el("div", { class: "text" }, text.slice(0, HEAD_TEXT));
  const more = el(
    "button",
    {
      type: "button",
      class: "plain more",
      onclick: () => {
        node.textContent = text;
        more.remove();
      },
    },
    `show all ${num(text.length)} characters`,
  );
  return el("div", {}, node, more);
}

function toolsNode(tools) {
  const names = tools.map((tool) => String(tool.name || (tool.function || {}).name || tool.type));
  return el(
    "details",
    { class: "tools" },
    el("summary", {}, `${plural(tools.length, "tool")}: ${clip(names.join(", "), 200)}`),
    el("pre", { class: "json" }, JSON.stringify(tools, null, 2)),
  );
}

function driftNode(drift, failure) {
  const consequence = failure ? "Nothing of this rollout is trained." : "What comes from here on is not trained.";
  return el(
    "div",
    { class: "incident warn" },
    el(
      "p",
      {},
      el("b", {}, `Drift at model call ${drift.turn + 1}`),
      ` (${drift.cause}): its prompt does not start with the tokens already seen. ${consequence}`,
    ),
    el(
      "dl",
      { class: "drifted" },
      el("dt", {}, "seen"),
      el("dd", {}, markDifference(drift.seen_text, drift.prompt_text)),
      el("dt", {}, "in the prompt"),
      el("dd", {}, markDifference(drift.prompt_text, drift.seen_text)),
    ),
    el("details", {}, el("summary", {}, "in words"), el("p", { class: "text" }, drift.text)),
  );
}

/** The text, with what follows the beginning that both share set off. */
function markDifference(text, other) {
  let same = 0;
  while (same < text.length && text[same] === other[same]) same++;
  return [text.slice(0, same), el("mark", {}, text.slice(same) || "∅")];
}

function failureNode(failure) {
  return el(
    "div",
    { class: "incident bad" },
    el(
      "p",
      {},
      el("b", {}, `Failed: ${failure.kind}`),
      failure.where ? ` at ${failure.where}` : "",
      failure.attempt ? ` (attempt ${failure.attempt + 1})` : "",
    ),
    el("p", { class: "text" }, failure.text),
  );
}
