// What a task expects beside what was given, where its row and the verifier say so. Names are those of NeMo Gym's
// environments; what has another one is in the record.

const EXPECTED = [
  ...["expected_answer", "expected_answers", "answer", "answers", "ground_truth", "expected_output"],
  ...["expected_result", "expected_action", "expected_call", "expected_judgement", "expected_count", "expected"],
  ...["correct_answer", "gold_answer", "gold", "target_answer", "target", "solution", "reference_solution"],
  ...["reference_answer", "reference_response", "reference", "label", "labels", "correct_index", "outputs"],
  ...["translation", "sql", "patch"],
];
const ALSO_EXPECTED = /^(expected|exp|gold|gt|ground_truth)_/;
const HOLDERS = ["verifier_metadata", "metadata", "verifier"];
const GIVEN = /^(extracted|predicted|prediction|pred$|parsed|submitted|final_answer|model_out)/;
const LONG_ANSWER = 600; // characters

const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
const isTold = (value) => ![undefined, null, ""].includes(value) && !(Array.isArray(value) && !value.length);
const isCall = (value) => isObject(value) && "name" in value && "arguments" in value;
const calls = (value) => [value].flat().length > 0 && [value].flat().every(isCall);

/** [name, value], or null. */
function expectedOf(task) {
  for (const holder of [task, ...HOLDERS.map((name) => task[name])].filter(isObject)) {
    const name = EXPECTED.find((own) => Object.hasOwn(holder, own) && isTold(holder[own]));
    if (name) return [name, holder[name]];
    const others = Object.entries(holder).filter(([own, value]) => ALSO_EXPECTED.test(own) && isTold(value));
    if (others.length === 1) return others[0];
    if (others.length) return [others.map(([own]) => own).join(", "), Object.fromEntries(others)];
  }
  return null;
}

/** [where it is from, value]: calls where calls are expected, else what the verifier found, else the last message. */
function givenOf(body, expected) {
  if (calls(expected)) {
    const made = body.output.filter((item) => item.kind === "call");
    return ["tool calls", made.map((item) => ({ name: item.name, arguments: item.text }))];
  }
  const found = Object.entries(body.verify || {}).find(
    ([name, value]) => GIVEN.test(name) && !(name in body.task) && isTold(value) && !isObject(value),
  );
  if (found) return found;
  const said = body.output.filter((item) => item.kind === "message" && item.role === "assistant");
  return said.length ? ["last message", said[said.length - 1].text] : ["", NONE];
}

function answerText(value) {
  const text = (own) => (typeof own === "string" ? own : JSON.stringify(own));
  if (Array.isArray(value) && !value.length) return NONE;
  if (!calls(value)) return text(value);
  return [value]
    .flat()
    .map((call) => `${call.name}(${text(call.arguments)})`)
    .join("\n");
}

function answerNode(what, [from, value]) {
  return el(
    "div",
    { class: `answer ${what}` },
    el("dt", {}, what, " ", el("span", { class: "facts-line" }, clip(from, 80))),
    el("dd", { class: "text" }, clip(answerText(value), LONG_ANSWER)),
  );
}

/** Expected and, for one rollout, given; null where nothing is expected. */
function answersNode(body, withGiven) {
  const expected = expectedOf(body.task);
  if (!expected) return null;
  return el(
    "dl",
    { class: "answers" },
    answerNode("expected", expected),
    withGiven && answerNode("given", givenOf(body, expected[1])),
  );
}

function givenNode(body) {
  const expected = expectedOf(body.task);
  return expected && el("dl", { class: "answers" }, answerNode("given", givenOf(body, expected[1])));
}
