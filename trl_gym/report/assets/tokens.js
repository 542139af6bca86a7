// A rollout token by token, coloured by who wrote it, by how sure the policy was, or by the gap to the trainer.

const LOGPROB_BINS = [0.01, 0.1, 0.5, 1, 2, 4]; // nats; -log p
const GAP_BINS = [1e-4, 1e-3, 1e-2, 0.1, 0.5, 1]; // nats; |training - sampling|
const LONG_SEGMENT = 3000; // tokens that are drawn before "show all"
const SHORT_PROMPT = 400;
const tokenMode = { name: "mask" };

async function tokensTab(i, content) {
  const [rows, pieces, said] = [await tokenBodiesOf(i), await whole("pieces"), await conversationOf(i)];
  if (!rows.length) {
    const why = !run.tokens(i)
      ? run.get("failure", i)
        ? "It failed, so nothing of it was trained."
        : "None are recorded: the policy was served by a server that gives no token ids."
      : "The page was made with --no-tokens.";
    return content.replaceChildren(el("p", { class: "notice" }, `No tokens are shown. ${why}`));
  }
  const hasGaps = rows.some((body) => body.gaps);
  if (tokenMode.name === "gap" && !hasGaps) tokenMode.name = "logprob";
  const broken = said.drift ? driftedRow(rows, said.drift) : -1;
  const draw = () =>
    content.replaceChildren(
      modeSwitch(hasGaps, draw),
      legend(),
      ...(run.tokenizer
        ? []
        : [
            el(
              "p",
              { class: "notice" },
              "No tokenizer was found in the run's folder when this page was written, so ids are shown. ",
              "Name one: trl-gym view RUN --tokenizer PATH.",
            ),
          ]),
      ...rows.flatMap((body, k) => [
        rows.length > 1 && el("h3", {}, `row ${k + 1} of ${rows.length}`),
        sequence(body, pieces, k === broken ? said.drift : null, k + 1 < rows.length),
      ]).filter(Boolean),
    );
  draw();
}

/** The row that ends before the model call that drifted: calls are counted through all rows. */
function driftedRow(rows, drift) {
  let calls = 0;
  return Math.max(
    rows.findIndex((body) => (calls += body.ends.length) >= drift.turn),
    0,
  );
}

function modeSwitch(hasGaps, draw) {
  const modes = [
    ["mask", "mask", false],
    ["logprob", "sampling logprob", false],
    ["gap", "logprob gap", !hasGaps],
  ];
  return el(
    "div",
    { class: "switch", role: "radiogroup", "aria-label": "colour of tokens" },
    modes.map(([name, label, off]) =>
      el(
        "button",
        {
          type: "button",
          role: "radio",
          "aria-checked": String(tokenMode.name === name),
          disabled: off,
          title: off ? "the trainer's log-probabilities are not recorded in this run" : null,
          onclick: () => {
            tokenMode.name = name;
            draw();
          },
        },
        label,
      ),
    ),
    !hasGaps &&
      el(
        "span",
        { class: "quiet note" },
        "No gap: the trainer's log-probabilities are not recorded in this run, only those of sampling.",
      ),
  );
}

function legend() {
  const item = (cls, text) => el("span", {}, el("i", { class: `swatch ${cls}` }), text);
  if (tokenMode.name === "mask")
    return el(
      "p",
      { class: "legend tokens-legend" },
      item("sampled", "sampled by the policy: trained"),
      item("environment", "put there by the environment: not trained"),
      item("prompt", "prompt"),
    );
  const bins = tokenMode.name === "logprob" ? LOGPROB_BINS : GAP_BINS;
  const edges = bins
    .map((edge, k) => `${k ? num(bins[k - 1]) : "0"}–${num(edge)}`)
    .concat(`≥ ${num(bins[bins.length - 1])}`);
  return el(
    "p",
    { class: "legend tokens-legend" },
    el("span", {}, tokenMode.name === "logprob" ? "−log p, nats" : "|training − sampling|, nats"),
    edges.map((text, k) => item(`p${k}`, text)),
    item("environment", "not sampled"),
  );
}

/** Segments in order: the prompt, then by turns what was sampled and what the environment put there. */
function sequence(body, pieces, drift, isContinued) {
  const host = el("div", { class: `tokens by-${tokenMode.name}` });
  const all = tokenList(body);
  host.append(
    segment(
      "prompt",
      "prompt",
      body.prompt.map((id, at) => ({ id, at: at - body.prompt.length, glyph: body.prompt_glyphs[at] })),
      pieces,
      SHORT_PROMPT,
    ),
  );
  const differs = drift ? all[drift.position - body.prompt.length] : undefined;
  if (differs) differs.differs = true;
  let start = 0,
    call = 0;
  while (start < all.length) {
    let end = start + 1;
    while (end < all.length && all[end].sampled === all[start].sampled) end++;
    const name = all[start].sampled ? `model call ${++call}` : "environment";
    host.append(
      segment(name, all[start].sampled ? "sampled" : "environment", all.slice(start, end), pieces, LONG_SEGMENT),
    );
    start = end;
  }
  if (drift) host.append(driftMark(drift, Boolean(differs), isContinued));
  tokenTips(host, pieces);
  return host;
}

/** What is recorded is what is trained: the row ends before the model call that drifted. */
function driftMark(drift, isMarked, isContinued) {
  return el(
    "p",
    { class: "incident warn" },
    el("b", {}, `Drift (${drift.cause})`),
    `: ${isContinued ? "the row ends here, and the next one begins" : "trained up to here"}. The prompt of model call ${drift.turn + 1} does not start with these tokens; the first `,
    `one that differs is number ${num(drift.position)}, counted from the beginning of the prompt`,
    isMarked ? " (underlined)." : ".",
  );
}

/** The completion, one object per token. */
function tokenList(body) {
  const list = [];
  let sampled = false,
    at = 0,
    known = 0;
  for (const length of body.mask) {
    for (let k = 0; k < length; k++, at++) {
      const token = { id: body.ids[at], at, sampled, glyph: body.glyphs[at] };
      if (sampled) {
        token.logprob = body.logprobs[known];
        token.gap = body.gaps ? body.gaps[known] : undefined;
        known++;
      }
      list.push(token);
    }
    sampled = !sampled;
  }
  return list;
}

function segment(name, kind, tokens, pieces, limit) {
  const text = el("div", { class: "segment-text" });
  const draw = (count) => text.replaceChildren(...tokens.slice(0, count).map((token) => tokenNode(token, pieces)));
  draw(limit);
  const more =
    tokens.length > limit
      ? el(
          "button",
          {
            type: "button",
            class: "plain more",
            onclick: () => {
              draw(tokens.length);
              more.remove();
            },
          },
          `show all ${num(tokens.length)} tokens`,
        )
      : null;
  const logprobs = tokens.map((token) => token.logprob).filter((value) => value !== undefined);
  const sum = logprobs.length
    ? ` · mean −log p ${num(-logprobs.reduce((a, b) => a + b, 0) / logprobs.length, 3)}`
    : "";
  return el(
    "div",
    { class: `segment ${kind}` },
    el("div", { class: "who" }, name, el("span", { class: "facts-line" }, `${plural(tokens.length, "token")}${sum}`)),
    text,
    more,
  );
}

function tokenNode(token, pieces) {
  const [text, isPart] = pieceOf(token, pieces);
  const marks = [pieces.special.includes(token.id) && "special", isPart && "part", token.differs && "differs"];
  const node = el(
    "span",
    {
      class: ["tk", shade(token), ...marks].filter(Boolean).join(" "),
    },
    run.tokenizer ? visible(text) : `${token.id} `,
  );
  node.token = token;
  return node;
}

function pieceOf(token, pieces) {
  if (token.glyph !== undefined) return [token.glyph || "·", token.glyph === ""];
  return [pieces.text[token.id] ?? String(token.id), false];
}

/** A line break is written and taken; other characters that cannot be seen are named. */
function visible(text) {
  return text
    .replace(/\r/g, "␍")
    .replace(/\n/g, "⏎\n")
    .replace(/\t/g, "⇥\t")
    .replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)));
}

function shade(token) {
  if (tokenMode.name === "mask" || token.logprob === undefined) return "";
  if (tokenMode.name === "gap" && token.gap === null) return "";
  const value = tokenMode.name === "logprob" ? -token.logprob : Math.abs(token.gap);
  const bins = tokenMode.name === "logprob" ? LOGPROB_BINS : GAP_BINS;
  const at = bins.findIndex((edge) => value < edge);
  return `p${at < 0 ? bins.length : at}`;
}

function tokenTips(host, pieces) {
  const show = (event) => {
    const token = event.target.token;
    if (!token) return tip.hide();
    const rows = [
      ["token", String(token.id)],
      ["text", JSON.stringify(pieceOf(token, pieces)[0])],
      ["place", token.at < 0 ? "in the prompt" : `${num(token.at)} of the completion`],
    ];
    if (token.logprob !== undefined)
      rows.push(["log p, sampling", num(token.logprob)], ["p", num(Math.exp(token.logprob), 3)]);
    if (token.gap === null) rows.push(["log p, training", "not a finite number"]);
    else if (token.gap !== undefined)
      rows.push(["log p, training", num(token.logprob + token.gap)], ["gap", num(token.gap, 3)]);
    tip.show(
      event.clientX,
      event.clientY,
      el(
        "dl",
        { class: "pairs" },
        rows.map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]),
      ),
    );
  };
  host.addEventListener("pointermove", show);
  host.addEventListener("pointerdown", show);
  host.addEventListener("pointerleave", () => tip.hide());
}
