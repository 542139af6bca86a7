// What is in the page's data elements. The index is unpacked at once, everything else when it is looked at.

const MAX_UNPACKED = 12; // chunks of each kind that are kept

async function unpack(id) {
  const node = byId(id);
  if (!node) return null;
  const packed = node.textContent;
  const bytes = Uint8Array.fromBase64 ? Uint8Array.fromBase64(packed) : decodeBase64(packed);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function decodeBase64(packed) {
  const text = atob(packed);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

/** Unpacks each element once, and forgets the ones that were not asked for lately. */
function unpacker(limit) {
  const kept = new Map();
  return (id) => {
    const found = kept.get(id) || unpack(id);
    kept.delete(id);
    kept.set(id, found);
    if (kept.size > limit) kept.delete(kept.keys().next().value);
    return found;
  };
}

const chunkOf = unpacker(MAX_UNPACKED);
const tokensOf = unpacker(MAX_UNPACKED);
const whole = unpacker(4);

/** The index. Rollouts are numbers: `run.get(name, i)` is a field of one, `run.groups[g]` lists those of a group. */
const run = {
  async load() {
    const index = await unpack("index");
    Object.assign(run, index);
    // Half a surrogate pair cannot stand in an address.
    run.columns.rollout_id = run.columns.rollout_id.map((id) => id.replace(/\p{Surrogate}/gu, "\ufffd"));
    run.size = run.columns.rollout_id.length;
    run.groups = run.previews.map(() => []);
    run.byId = new Map();
    for (let i = 0; i < run.size; i++) {
      run.groups[run.columns.group_id[i]].push(i);
      const id = run.columns.rollout_id[i];
      if (run.byId.has(id)) run.columns.rollout_id[i] = `${id}~${i}`; // every rollout has an address
      run.byId.set(run.columns.rollout_id[i], i);
    }
    run.agents = run.names.agent;
    run.all = Array.from({ length: run.size }, (_, i) => i);
    run.spread = run.groups.map(spreadOf);
    run.hasAdvantages = run.columns.advantage.some((value) => value !== null);
    run.rewardRange = {};
    for (let i = 0; i < run.size; i++) {
      const reward = run.columns.reward[i];
      if (reward === null) continue;
      const range = (run.rewardRange[run.get("agent", i)] ||= [0, 1]);
      range[0] = Math.min(range[0], reward);
      range[1] = Math.max(range[1], reward);
    }
  },
  get(name, i) {
    const value = run.columns[name][i];
    return name in run.names ? run.names[name][value] : value;
  },
  preview: (i) => run.previews[run.columns.group_id[i]],
  members: (i) => run.groups[run.columns.group_id[i]],
  tokens: (i) => run.columns.prompt_tokens[i] + run.columns.environment_tokens[i] + run.columns.sampled_tokens[i],
  isTruncated: (i) => run.get("failure", i) === null && ![null, "stop"].includes(run.get("finish", i)),
  set: (i) => setName(run.get("mode", i), run.get("dataset", i)),
  link: (i) => `#rollout=${encodeURIComponent(run.columns.rollout_id[i])}`,
  groupLink: (i) => `#group=${encodeURIComponent(run.columns.rollout_id[run.members(i)[0]])}`,
};

/** Rewards that count of a group are all the "same", or "differ"; null for fewer than two. */
function spreadOf(members) {
  const known = members.filter((i) => run.get("state", i) === "counted" && run.columns.reward[i] !== null);
  if (known.length < 2) return null;
  return known.every((i) => run.columns.reward[i] === run.columns.reward[known[0]]) ? "same" : "differ";
}

/** The conversation of a rollout, with what it shares with others put in its place. */
async function conversationOf(i) {
  const chunk = await chunkOf(`c${run.columns.chunk[i]}`);
  return resolveConversation(chunk, run.columns.place[i]);
}

function resolveConversation(chunk, place) {
  const own = chunk.rollouts[place];
  return { ...own, input: chunk.shared[own.input], tools: chunk.shared[own.tools], task: chunk.shared[own.task] };
}

/** The tokens of a rollout's rows; none when it has none, or the page was made without. */
async function tokenBodiesOf(i) {
  const chunk = await tokensOf(`t${run.columns.chunk[i]}`);
  const own = chunk ? chunk.rollouts[run.columns.place[i]] : [];
  return own.map((body) => ({ ...body, prompt: chunk.shared[body.prompt] }));
}

function setName(mode, dataset) {
  return dataset ? `${mode} · ${dataset}` : mode;
}
