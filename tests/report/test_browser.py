"""The page in a browser: its numbers are the journal's, its links and keys work, hostile text stays text."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.report.browser import Browser, PageError
from tests.report.conftest import Viewed
from tests.report.synthetic import AGENTS, Plan, make_tokenizer, write_repeated, write_run
from trl_gym.report import PageOptions, open_run, show, write_page
from trl_gym.rollouts.journal import Journal

ROWS = "#view .rows .row"


@pytest.fixture(autouse=True)
def no_errors(chromium: Browser) -> Any:
    chromium.errors.clear()
    chromium.requests.clear()
    yield
    assert chromium.errors == []
    assert [url for url in chromium.requests if not url.startswith(("file:", "data:", "about:"))] == []


def visit(chromium: Browser, hash_: str, ready: str) -> None:
    """Go to an address and wait for what is there."""
    chromium.go(hash_)
    chromium.wait(f"current.hash === {json.dumps(hash_)} && ({ready})")


def cells(chromium: Browser) -> list[list[str]]:
    """The text of the cells of the rows that are seen."""
    return chromium.run(
        f"[...document.querySelectorAll('{ROWS}')].map((row) => [...row.children].map((own) => own.innerText.trim()))"
    )


def counted(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if not record["retried"]]


def final_text(record: dict[str, Any]) -> str:
    return str(record["response"]["output"][-1]["content"][0]["text"])


def link(record: dict[str, Any]) -> str:
    return f"#rollout={quote(record['rollout_id'])}"


def test_numbers_per_step_are_the_journals(chromium: Browser, viewed: Viewed) -> None:
    steps: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for record in counted(viewed.records):
        steps[str(record["step"]), record["mode"]].append(record)
    chromium.open(viewed.page, "#steps")
    chromium.wait(f"document.querySelectorAll('{ROWS}').length === {len(steps)}")
    shown = {(row[0], row[1]): row[2:] for row in cells(chromium)}
    assert shown.keys() == steps.keys()
    for key, own in steps.items():
        rewards = [record["reward"] for record in own if record["failure"] is None]
        num_failed = sum(record["failure"] is not None for record in own)
        num_drifted = sum(record["drift"] is not None for record in own)
        expected = [len(own), f"{statistics.fmean(rewards):.4f}", f"{statistics.stdev(rewards):.3f}"]
        assert shown[key][:3] == [str(value) for value in expected], key
        assert shown[key][4:6] == [str(num_failed), str(num_drifted)], key


def test_curves_are_of_the_same_numbers(chromium: Browser, viewed: Viewed) -> None:
    chromium.open(viewed.page)
    assert chromium.texts(".panel .name")[:3] == sorted(AGENTS)
    labels = chromium.run(
        "[...document.querySelectorAll('.panel svg')].slice(0, 3).map((svg) => svg.getAttribute('aria-label'))"
    )
    for agent, label in zip(sorted(AGENTS), labels, strict=True):
        first = [
            r["reward"] for r in counted(viewed.records) if (r["step"], r["mode"], r["agent"]) == (1, "train", agent)
        ]
        mean = statistics.fmean(reward for reward in first if reward is not None)
        assert f"training from {float(f'{mean:.4g}'):g}" in label
    facts = dict(zip(chromium.texts(".facts dt"), chromium.texts(".facts dd"), strict=True))
    assert facts["rollouts"] == f"{len(counted(viewed.records)):,}"
    assert facts["steps"] == "0–12" and facts["environments"] == "3"
    assert {"mean@2", "pass@1", "pass@2"} <= set(chromium.texts(".legend > span"))  # of evaluations, by their attempts


def test_what_an_axis_says_differs_from_tick_to_tick(chromium: Browser, viewed: Viewed) -> None:
    chromium.open(viewed.page)
    chromium.wait("document.querySelectorAll('.panel svg').length > 12")  # metrics too
    axes = "[...document.querySelectorAll('.panel svg')].flatMap((s) => [[s, 'end'], [s, 'middle']])"
    texts = f"{axes}.map(([s, a]) => [...s.querySelectorAll(`.tick[text-anchor=${{a}}]`)].map((t) => t.textContent))"
    shown = chromium.run(texts)
    assert all(len(set(own)) == len(own) for own in shown) and len(shown) > 24
    for low, high in ((1000.1, 1000.3), (-1e-9, 1e-9), (12345678, 12345679), (0.99999, 1.00001), (0, 0)):
        ticks = chromium.run(f"tickTexts(niceTicks({low}, {high}, 4))")
        assert len(set(ticks)) == len(ticks) > 1


def test_metrics_that_are_always_0_are_not_drawn_and_are_named(chromium: Browser, viewed: Viewed) -> None:
    chromium.open(viewed.page)
    chromium.wait("document.querySelectorAll('.panel').length > 12")
    assert "Left out as always 0: 1." in chromium.text(".metric-bar")
    chromium.run("byId('metric-search').focus()")
    chromium.send("Input.insertText", text="l")
    chromium.wait("document.querySelector('.metric-bar').innerText.includes('Always 0: tools/call_frequency')")
    [label] = chromium.run(
        "[...document.querySelectorAll('svg')].map((s) => s.getAttribute('aria-label')).filter((l) => /^loss/.test(l))"
    )
    assert "training" in label and "evaluation" not in label


def test_a_table_is_sorted_by_a_click_and_the_address_remembers_it(chromium: Browser, viewed: Viewed) -> None:
    chromium.open(viewed.page, "#rollouts?step=4&set=train")
    chromium.wait(f"document.querySelectorAll('{ROWS}').length > 9")
    chromium.run("[...document.querySelectorAll('button.sort')].find((b) => b.innerText.startsWith('tokens')).click()")
    tokens = [int(row[9].replace(",", "")) for row in cells(chromium)]
    assert tokens == sorted(tokens, reverse=True) and len(set(tokens)) > 3
    assert chromium.run("location.hash").endswith("sort=tokens-")
    largest = max(r["env_mask"].count(1) for r in viewed.records if r["step"] == 4 and r["mode"] == "train")
    assert tokens[0] == largest


@pytest.mark.parametrize(
    ("query", "keeps"),
    [
        (f"env={AGENTS[1]}", lambda r: r["agent"] == AGENTS[1]),
        ("step=2-4&set=train", lambda r: 2 <= r["step"] <= 4 and r["mode"] == "train"),
        ("min=0.3&max=0.8", lambda r: r["reward"] is not None and 0.3 <= r["reward"] <= 0.8),
        ("outcome=failed%3Adeadline", lambda r: r["failure"] is not None and r["failure"]["kind"] == "deadline"),
        ("outcome=drift", lambda r: r["drift"] is not None),
        ("outcome=truncated", lambda r: r["finish_reason"] == "max_output_tokens"),
        ("outcome=state%3Aretried", lambda r: r["retried"]),
        ("version=7", lambda r: r["weight_versions"] == ["7"]),
        ("text=NO%20SUCH%20CALENDAR", lambda r: "no such calendar" in json.dumps(r).lower()),
        ("text=Zo%C3%AB&step=3", lambda r: r["step"] == 3 and r["agent"] == AGENTS[1]),
        ("text=" + quote('"found": 42'), lambda r: '{\\"found\\": 42}' in json.dumps(r["response"])),
    ],
)  # fmt: skip
def test_filters_keep_what_they_say(chromium: Browser, viewed: Viewed, query: str, keeps: Any) -> None:
    expected = [record["rollout_id"] for record in viewed.records if keeps(record)]
    assert expected
    if not chromium.run("location.href").startswith(viewed.page.as_uri()):
        chromium.open(viewed.page)
    visit(chromium, f"#rollouts?{query}", "/^[0-9,]+ of/.test(document.querySelector('.count').innerText)")
    found = chromium.run("context.list.map((i) => run.columns.rollout_id[i])")
    assert sorted(found) == sorted(expected)
    assert chromium.text(".count").startswith(f"{len(expected):,} of {len(viewed.records):,} rollouts")


def test_groups_whose_rewards_are_all_the_same_are_found(chromium: Browser, viewed: Viewed) -> None:
    groups: defaultdict[tuple[Any, ...], list[float]] = defaultdict(list)
    for record in counted(viewed.records):
        if record["reward"] is not None:
            groups[record["mode"], record["step"], record["group"]].append(record["reward"])
    several = [rewards for rewards in groups.values() if len(rewards) > 1]
    chromium.open(viewed.page)
    for spread, number in (
        ("same", sum(min(rewards) == max(rewards) for rewards in several)),
        ("differ", sum(min(rewards) < max(rewards) for rewards in several)),
    ):
        visit(
            chromium, f"#groups?spread={spread}", "/^[0-9,]+ groups/.test(document.querySelector('.count').innerText)"
        )
        assert number and chromium.text(".count").startswith(f"{number} groups")


def test_lists_show_where_tasks_differ(chromium: Browser, viewed: Viewed) -> None:
    """The tasks of the second environment begin alike, with forty characters."""
    chromium.open(viewed.page, f"#groups?env={AGENTS[1]}")
    chromium.wait(f"document.querySelectorAll('{ROWS} .task').length > 3")
    assert {text.split()[0] for text in chromium.texts(f"{ROWS} .task")} <= {"…2", "…5", "…8"}


def test_a_filter_that_matches_nothing_says_so(chromium: Browser, viewed: Viewed) -> None:
    chromium.open(viewed.page, "#rollouts?text=nobody said this")
    chromium.wait("document.querySelector('.empty') && !document.querySelector('.empty').hidden")
    assert chromium.texts(ROWS) == []


def test_a_rollout_is_its_conversation(chromium: Browser, viewed: Viewed) -> None:
    record = next(r for r in viewed.records if len([t for t in r["turns"] if t["kind"] == "tool"]) == 2)
    chromium.open(viewed.page, link(record))
    chromium.wait("document.querySelectorAll('.message').length > 2")
    calls = [item for item in record["response"]["output"] if item["type"] == "function_call"]
    results = [item["output"] for item in record["response"]["output"] if item["type"] == "function_call_output"]
    assert chromium.texts(".message.call .who b") == [call["name"] for call in calls]
    assert [text.split("\n")[-1] for text in chromium.texts(".message.result")] == results
    assert chromium.texts(".message.call dd")[0] == json.loads(calls[0]["arguments"])["query"].strip()
    assert chromium.texts(".answers dd") == [record["row"]["expected_answer"], final_text(record)]
    assert chromium.texts(".message.user .text") == [record["row"]["responses_create_params"]["input"][1]["content"]]
    assert chromium.run("byId('reward').title") == json.dumps(record["reward"]).removesuffix(".0")
    facts = dict(zip(chromium.texts(".side dt"), chromium.texts(".side dd"), strict=True))
    assert facts["sampled"] == f"{record['env_mask'].count(1):,} tokens" and facts["id"] == record["rollout_id"]


def test_tokens_are_the_recorded_ones_with_their_mask_and_log_probabilities(chromium: Browser, viewed: Viewed) -> None:
    record = next(r for r in viewed.records if r["agent"] == AGENTS[2] and r["turns"][1:] and r["mode"] == "train")
    chromium.open(viewed.page, f"{link(record)}&tab=tokens")
    chromium.wait("document.querySelectorAll('.tk').length > 0")
    shown = chromium.run(
        "[...document.querySelectorAll('.tk')].map((n) => [n.token.id, n.token.at, Boolean(n.token.sampled), "
        "n.token.logprob ?? null])"
    )
    assert [token[0] for token in shown] == record["prompt_ids"] + record["completion_ids"]
    completion = [token for token in shown if token[1] >= 0]
    assert [int(token[2]) for token in completion] == record["env_mask"]
    known = [float(f"{value:.4g}") for value, mask in zip(record["logprobs"], record["env_mask"], strict=True) if mask]
    assert [token[3] for token in completion if token[2]] == known
    spelled = chromium.run("[...document.querySelectorAll('.tk:not(.part)')].map((n) => n.textContent).join('')")
    text = make_tokenizer().decode(record["prompt_ids"] + record["completion_ids"], skip_special_tokens=False)
    assert spelled.replace("⏎", "") == text and "图书馆 📚" in text


def test_every_row_of_a_rollout_is_shown(chromium: Browser, tmp_path: Path) -> None:
    records = write_run(tmp_path / "run", Plan(steps=1))
    drifted = next(r for r in records if r["drift"] and r["mode"] == "train")
    tokens = ("prompt_ids", "completion_ids", "env_mask", "logprobs", "turn_ends")
    further = {name: drifted[name] for name in tokens} | {"prompt_ids": drifted["prompt_ids"] + [7, 8]}
    path = next((tmp_path / "run" / "rollouts").glob("step-1.*"))
    lines = map(json.loads, path.read_text().splitlines())
    known = {"further_rows": [further]}
    path.write_text(
        "".join(json.dumps(r | (known if r["rollout_id"] == drifted["rollout_id"] else {})) + "\n" for r in lines)
    )
    page = tmp_path / "view.html"
    write_page(open_run(tmp_path / "run"), page)
    chromium.open(page, f"{link(drifted)}&tab=tokens")
    chromium.wait("document.querySelectorAll('.tokens').length === 2")
    assert chromium.texts(".tab-body h3") == ["row 1 of 2", "row 2 of 2"]
    shown = chromium.run("[...document.querySelectorAll('.tokens')].map((n) => n.querySelectorAll('.tk').length)")
    length = len(drifted["prompt_ids"]) + len(drifted["completion_ids"])
    assert shown == [length, length + 2]
    assert "the next one begins" in chromium.text(".tokens > :last-child")
    assert chromium.run("document.querySelectorAll('.tokens .incident').length") == 1
    facts = dict(zip(chromium.texts(".side dt"), chromium.texts(".side dd"), strict=True))
    assert facts["rows"] == "2" and facts["sampled"] == f"{2 * drifted['env_mask'].count(1):,} tokens"


def test_colours_follow_the_gap_to_the_trainer(chromium: Browser, viewed: Viewed) -> None:
    record = next(r for r in viewed.records if r["mode"] == "train" and r["completion_ids"])
    lines = (viewed.folder / "training_logprobs" / "step-0.rank-0.jsonl").read_text().splitlines()
    training = next(own for own in map(json.loads, lines) if own["rollout_id"] == record["rollout_id"])["logprobs"]
    chromium.open(viewed.page, f"{link(record)}&tab=tokens")
    chromium.wait("document.querySelectorAll('.switch button').length === 3")
    chromium.run("document.querySelectorAll('.switch button')[2].click()")
    shown = chromium.run(
        "[...document.querySelectorAll('.sampled .tk')].map((n) => [n.token.at, Number(/ "
        "p(\\d)/.exec(n.className)[1])])"
    )
    bins = [1e-4, 1e-3, 1e-2, 0.1, 0.5, 1]
    for at, depth in shown:
        gap = abs(training[at] - record["logprobs"][at])
        assert depth == sum(gap >= edge for edge in bins) or min(abs(gap - edge) / edge for edge in bins) < 0.01


def test_where_the_trainers_side_is_not_recorded_the_page_says_so(chromium: Browser, viewed: Viewed) -> None:
    record = next(r for r in viewed.records if r["mode"] == "eval" and r["completion_ids"])
    chromium.open(viewed.page, f"{link(record)}&tab=tokens")
    chromium.wait("document.querySelectorAll('.switch button').length === 3")
    assert chromium.run("document.querySelectorAll('.switch button')[2].disabled") is True
    assert "not recorded in this run" in chromium.text(".switch")


def test_times_are_the_recorded_ones(chromium: Browser, viewed: Viewed) -> None:
    record = next(r for r in viewed.records if len(r["turns"]) == 3)
    chromium.open(viewed.page, f"{link(record)}&tab=timing")
    chromium.wait("document.querySelectorAll('rect.span').length > 0")
    parts = [
        turn[key]
        for turn in record["turns"]
        if turn["kind"] == "model"
        for key in ("queue_s", "prefill_s", "decode_s")
    ]
    widths = chromium.run("[...document.querySelectorAll('rect.span')].map((n) => n.width.baseVal.value)")
    rest = record["seconds"] - sum(parts)
    assert len(widths) == len(parts) + 1
    assert widths[-1] / widths[2] == pytest.approx(rest / parts[2], rel=0.02)
    assert f"({rest:.2f} s not measured apart)" in chromium.text("tfoot").replace("\u00a0", " ")


def test_drift_and_failure_stand_where_they_happened(chromium: Browser, viewed: Viewed) -> None:
    drifted = next(r for r in viewed.records if r["drift"])
    chromium.open(viewed.page, link(drifted))
    chromium.wait("document.querySelector('.incident')")
    order = chromium.run("[...document.querySelectorAll('.turn-rule, .incident')].map((n) => n.className)")
    assert order[:3] == ["turn-rule", "incident warn", "turn-rule"]
    assert chromium.texts("mark") == ["both calendars", "the calendar"]
    visit(chromium, f"{link(drifted)}&tab=tokens", "document.querySelector('.tk.differs')")
    place = chromium.run("document.querySelector('.tk.differs').token.at")
    assert place == drifted["drift"]["position"] - len(drifted["prompt_ids"])
    assert "trained up to here" in chromium.text(".tokens > :last-child")
    failed = next(r for r in viewed.records if r["failure"] and not r["retried"])
    visit(chromium, link(failed), "document.querySelector('.incident.bad')")
    assert failed["failure"]["text"] in chromium.text(".incident.bad")
    facts = dict(zip(chromium.texts(".side dt"), chromium.texts(".side dd"), strict=True))
    assert [facts[name] for name in ("sampled", "model calls", "tool calls")] == ["–"] * 3  # not known, and not 0


def test_a_group_is_shown_side_by_side(chromium: Browser, viewed: Viewed) -> None:
    own = [r for r in viewed.records if (r["step"], r["mode"], r["group"]) == (5, "train", 4)]
    chromium.open(viewed.page, f"#group={quote(own[3]['rollout_id'])}")
    chromium.wait("document.querySelectorAll('.column').length > 0")
    shown = chromium.texts(".column .chip")
    assert shown == ["fail" if r["reward"] is None else f"{r['reward']:.3g}" for r in own]
    rewards = [r["reward"] for r in counted(own) if r["reward"] is not None]
    mean, spread = statistics.fmean(rewards), statistics.stdev(rewards) + 1e-4
    assert f"mean reward {float(f'{mean:.4g}'):g}" in chromium.text(".headline")
    expected = [
        f"advantage {(r['reward'] - mean) / spread:.2f}".replace("-", "−") for r in own if r["reward"] is not None
    ]
    assert chromium.texts(".column .advantage") == expected
    assert "has not recorded" in chromium.run("document.querySelector('.column .advantage').title")
    chromium.wait(
        "document.querySelectorAll('.column .answers').length === document.querySelectorAll('.column').length"
    )
    assert chromium.texts(".rollout-head .answers dd") == [own[0]["row"]["expected_answer"]]
    given = [final_text(r) if r["response"] else "–" for r in own]
    assert chromium.texts(".column .answers dd") == given


def test_failures_are_counted_by_kind(chromium: Browser, viewed: Viewed) -> None:
    kinds: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in viewed.records:
        if record["failure"]:
            kinds[record["failure"]["kind"]].append(record)
    chromium.open(viewed.page, "#failures")
    rows = chromium.run(
        "[...document.querySelectorAll('.kinds')[0].tBodies[0].rows].map((row) => [...row.cells].map((c) => "
        "c.innerText.trim()))"
    )
    shown = {row[0].split("\n")[0]: (row[1], row[3]) for row in rows}
    assert shown == {kind: (str(len(own)), str(len(counted(own)))) for kind, own in kinds.items()}


def test_keys(chromium: Browser, viewed: Viewed) -> None:
    chromium.open(viewed.page, "#rollouts?step=1&set=train")
    chromium.wait(f"document.querySelectorAll('{ROWS}').length > 5")
    for key in ("j", "j", "j", "k", "Enter"):
        chromium.press(key)
    chromium.wait("current.view === 'rollout'")
    opened = chromium.run("[current.rollout, context.list[1]]")
    assert opened[0] == opened[1]
    for key, there in (("t", "tab=tokens"), ("w", "tab=timing"), ("j", "tab=timing"), ("g", "#group=")):
        chromium.press(key)
        chromium.wait(f"current.hash.includes({there!r})")
    chromium.press("u")
    chromium.press("4")
    chromium.wait("current.hash === '#rollouts'")
    chromium.press("/")
    chromium.wait("document.activeElement.id === 'f-search'")
    chromium.press("j")
    assert chromium.run("document.activeElement.value") == "j"
    chromium.press("Escape")
    chromium.press("?")
    chromium.wait("document.querySelector('dialog').open")
    chromium.press("Escape")


def test_an_address_that_leads_nowhere_says_so(chromium: Browser, viewed: Viewed) -> None:
    chromium.open(viewed.page, "#rollout=%E0%A4%A")
    assert "No such rollout" in chromium.text()
    visit(chromium, "#nonsense", "document.querySelector('.facts')")
    assert "There is no view “nonsense”" in chromium.text(".notice")


@pytest.mark.parametrize(
    ("address", "told", "kept"),
    [
        ("env=nowhere", "environment “nowhere”", 0),
        ("set=test", "set “test”", 0),
        ("version=99", "weight version “99”", 0),
        ("outcome=fail", "outcome “fail”", 0),
        ("outcome=failed%3Aboredom", "outcome “failed:boredom”", 0),
        ("spread=none", "spread of rewards “none”", 0),
        ("step=last", "“last” is no step or range of steps, and filters nothing", None),
        ("min=high", "“high” is no number, and filters nothing", None),
        ("environment=x", "no filter “environment”", None),
        ("sort=beauty-", "no column “beauty” to sort by", None),
    ],
)
def test_what_an_address_asks_for_in_vain_is_reported(
    chromium: Browser, viewed: Viewed, address: str, told: str, kept: int | None
) -> None:
    if not chromium.run("location.href").startswith(viewed.page.as_uri()):
        chromium.open(viewed.page)
    visit(chromium, f"#rollouts?{address}", "/^[0-9,]+ of/.test(document.querySelector('.count').innerText)")
    assert told in chromium.text("[role=alert]")
    assert chromium.run("context.list.length") == (len(viewed.records) if kept is None else kept)


def test_on_a_narrow_screen_nothing_is_wider_than_it(chromium: Browser, viewed: Viewed) -> None:
    record = next(r for r in viewed.records if len(r["turns"]) == 3)
    chromium.resize(390, 844)
    try:
        chromium.open(viewed.page)
        for place in (
            "#overview",
            "#steps",
            "#groups",
            "#rollouts",
            "#failures",
            link(record),
            f"{link(record)}&tab=tokens",
        ):
            visit(chromium, place, "true")
            assert chromium.run("document.documentElement.scrollWidth") <= 390, place
            assert chromium.run("byId('view').scrollWidth") <= 390, place
    finally:
        chromium.resize(1280, 860)


# -- hostile text --

HOSTILE = (
    "<img src=x onerror=pwned()></script><script>pwned()</script>\"'`${pwned()}&lt;b&gt; "
    "javascript:pwned() \u202e\x00\ud800"
)


def poisoned(value: Any) -> Any:
    """Every text in a JSON value, keys included, turned hostile."""
    if isinstance(value, str):
        return value + HOSTILE
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    if isinstance(value, dict):
        return {key: poisoned(item) for key, item in value.items()} | {HOSTILE: HOSTILE}
    return value


def test_hostile_text_stays_text(chromium: Browser, tmp_path: Path) -> None:
    records = write_run(tmp_path / "clean", Plan(steps=2, tasks=3, generations=3))
    folder = tmp_path / "<img src=x onerror=pwned()>"
    kept = {"mode", "type", "kind", "role"}  # what decides how a text is shown
    journal = Journal(folder / "rollouts")
    for record in records:
        texts = {key: poisoned(value) for key, value in record.items() if key not in kept and key not in ("turns",)}
        texts["response"] = (
            None
            if record["response"] is None
            else {
                "output": [
                    poisoned(item) | {k: v for k, v in item.items() if k in kept}
                    for item in record["response"]["output"]
                ]
            }
        )
        journal.append(record | texts)
    journal.close()
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, f"loss{HOSTILE}": 1.0, "loss": 2.0}) + "\n")
    write_page(open_run(folder), tmp_path / "v.html", None, [open_run(folder)])
    chromium.send("Page.addScriptToEvaluateOnNewDocument", source="window.pwned = () => { window.isPwned = true; };")
    chromium.open(tmp_path / "v.html")
    ids = chromium.run("run.columns.rollout_id")
    assert HOSTILE[:20] in ids[0]
    places = [
        "#overview",
        "#steps?env=each",
        "#groups",
        "#rollouts",
        "#failures",
        "#compare",
        f"#rollouts?text={quote('<IMG SRC')}",
        f"#rollouts?env={quote(HOSTILE[:40])}&{quote(HOSTILE[:40], safe='')}=1",
    ]
    for name in (ids[0], next(r["rollout_id"] + HOSTILE for r in records if r["reward"])):
        place = f"rollout={quote(name.replace(chr(0xD800), chr(0xFFFD)), safe='')}"
        places += [
            f"#{place}",
            f"#{place}&tab=tokens",
            f"#{place}&tab=timing",
            f"#{place}&tab=record",
            place.replace("rollout=", "#group="),
        ]
    for place in places:
        chromium.go(place)
        chromium.wait(
            "document.querySelector('#view').innerText.length > 20 && "
            "!document.querySelector('#view').innerText.startsWith('…')"
        )
        assert "onerror" in chromium.run("document.querySelector('#view').innerText + document.title"), place
        assert (
            chromium.run("document.querySelectorAll('#view img, #view script, #view iframe, #view b > img').length")
            == 0
        )
        assert chromium.run("window.isPwned ?? false") is False
        assert chromium.run("[...document.querySelectorAll('a')].every((a) => a.getAttribute('href').startsWith('#'))")


def test_the_policy_forbids_what_is_not_the_pages_own(chromium: Browser, viewed: Viewed) -> None:
    chromium.open(viewed.page)
    chromium.run(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = true'}))"
    )
    chromium.run(
        "document.body.append(Object.assign(document.createElement('img'), {src: 'http://127.0.0.1:9/x.png'}))"
    )
    with pytest.raises(PageError):
        chromium.run("fetch('http://127.0.0.1:9/x')")
    assert chromium.run("window.ran ?? null") is None
    chromium.wait("true")
    assert chromium.errors and all("Content Security Policy" in text for text in chromium.errors)
    chromium.errors.clear()
    chromium.requests.clear()


# -- beside other runs, while it goes on, in a notebook, and large --


def test_runs_are_shown_beside_each_other(chromium: Browser, viewed: Viewed, tmp_path: Path) -> None:
    records = write_run(tmp_path / "other", Plan(steps=3, seed=5))
    write_page(
        open_run(viewed.folder), tmp_path / "v.html", PageOptions(max_rollouts=50), [open_run(tmp_path / "other")]
    )
    for width in (1280, 390):
        chromium.resize(width, 860)
        chromium.open(tmp_path / "v.html", "#compare")
        chromium.wait("document.querySelectorAll('.panel').length > 5")
        assert chromium.run("byId('view').scrollWidth") <= width
    chromium.resize(1280, 860)
    assert chromium.texts(".legend.runs > span") == [viewed.folder.name, "other", "evaluation"]
    labels = chromium.run("[...document.querySelectorAll('svg')].map((s) => s.getAttribute('aria-label'))")
    for agent, label in zip(sorted(AGENTS), labels, strict=False):
        assert label.startswith(agent) and label.count("training from") == label.count("evaluation from") == 2
    rows = chromium.run("[...document.querySelector('.compared').tBodies[0].rows].map((r) => r.innerText.split('\t'))")
    assert [row[:3] for row in rows] == [
        [name, mode, last]
        for name, modes in (
            (viewed.folder.name, (("train", "12"), ("eval", "12"))),
            ("other", (("train", "3"), ("eval", "3"))),
        )
        for mode, last in modes
    ]
    means = {}
    for step in (1, 2, 3):
        own = [r for r in counted(records) if (r["mode"], r["step"]) == ("train", step) and r["reward"] is not None]
        means[step] = statistics.fmean(r["reward"] for r in own)
    best = max(means, key=lambda step: means[step])
    assert rows[2][3:6] == [f"{means[3]:.3f}", f"{means[best]:.3f}", str(best)]


def test_a_page_of_a_run_that_goes_on_reads_its_file_again(chromium: Browser, tmp_path: Path) -> None:
    """At the same address and place; not while a rollout is looked at, which changes no more."""
    records = write_run(tmp_path / "run", Plan(steps=2))
    page, more = tmp_path / "v.html", tmp_path / "run" / "rollouts" / "step-99.rank-0.jsonl"

    def write(reload_s: float) -> int:
        return write_page(open_run(tmp_path / "run"), page, PageOptions(reload_s=reload_s, with_tokens=False)).recorded

    num_first = write(reload_s=3600)
    chromium.open(page, "#rollouts?set=train&sort=seconds")
    chromium.wait(f"document.querySelectorAll('{ROWS}').length > 5")
    assert chromium.text(".live").startswith("as of ")
    more.write_text(json.dumps(records[0] | {"step": 99}) + "\n")
    assert write(reload_s=0.1) == num_first + 1
    chromium.run(f"document.querySelector('{ROWS}').click()")
    chromium.wait("current.view === 'rollout'")
    chromium.run("window.isFirst = true; reload()")
    assert chromium.run("window.isFirst && run.recorded") == num_first
    chromium.run("history.back()")
    chromium.wait("current.view === 'rollouts'")
    chromium.run("document.querySelector('.scroller').scrollTop = 900; setTimeout(reload, 0)")
    chromium.wait(f"typeof run === 'object' && run.recorded === {num_first + 1}")
    chromium.wait("document.querySelector('.scroller')?.scrollTop === 900")
    write(reload_s=0)  # the last one, which the page finds by itself
    chromium.wait("typeof run === 'object' && run.reload_s === 0 && current.view === 'rollouts'")
    assert chromium.run("location.hash") == "#rollouts?set=train&sort=seconds"
    assert chromium.text(".live") == ""


def test_the_frame_of_a_notebook_works_and_has_no_access_to_it(
    chromium: Browser, viewed: Viewed, tmp_path: Path
) -> None:
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<!doctype html><body>{show(viewed.folder, max_rollouts=60)._repr_html_()}</body>")
    chromium.send("Page.navigate", url=notebook.as_uri())
    chromium.wait("document.querySelector('iframe') !== null")
    reach = "(() => { try { return parent.document.title } catch (error) { return error.name } })()"
    with chromium.inside_frame():
        chromium.wait("document.querySelector('.facts') !== null")
        assert chromium.run(reach) == "SecurityError"
        chromium.run("document.querySelectorAll('#bar nav a')[3].click()")
        chromium.wait(f"document.querySelectorAll('{ROWS}').length > 3")
        chromium.run(f"document.querySelector('{ROWS}').click()")
        chromium.wait("document.querySelectorAll('.message').length > 0")
        chromium.run("act('t')")
        chromium.wait("document.querySelectorAll('.tk').length > 0")


def test_five_thousand_rollouts(chromium: Browser, viewed: Viewed, tmp_path: Path) -> None:
    assert write_repeated(tmp_path / "run", viewed.records, times=6) > 5000
    write_page(open_run(tmp_path / "run"), tmp_path / "v.html")
    chromium.open(tmp_path / "v.html", "#rollouts")
    chromium.wait(f"document.querySelectorAll('{ROWS}').length > 5")
    assert chromium.run(f"document.querySelectorAll('{ROWS}').length") < 60  # only what is seen is in the document
    chromium.run("document.querySelector('.scroller').scrollTop = 1e9")
    last = chromium.run("run.columns.rollout_id[context.list[context.list.length - 1]]")
    chromium.wait(
        f"[...document.querySelectorAll('{ROWS}')].some((row) => "
        f"row.getAttribute('href').includes({json.dumps(quote(last))}))"
    )
    chromium.run("document.querySelector('.scroller').scrollTop = 20000")
    chromium.wait(f"document.querySelector('{ROWS}').getAttribute('aria-rowindex') > 500")
    chromium.run(f"document.querySelectorAll('{ROWS}')[12].click()")
    chromium.wait("current.view === 'rollout'")
    chromium.run("history.back()")  # the list is where it was left
    chromium.wait("current.view === 'rollouts' && document.querySelector('.scroller').scrollTop === 20000")
    searched = "/^[0-9,]+ of/.test(document.querySelector('.count').innerText)"
    visit(chromium, "#rollouts?set=train", searched)
    chromium.run("window.field = byId('f-search'); field.focus()")
    for typed, text in (("calen", "calen"), ("dars", "calendars"), (" first", "calendars first")):  # as it is typed
        for key in typed:
            chromium.press(key)
        chromium.wait(f"current.hash.includes({('text=' + text.replace(' ', '+'))!r}) && {searched}")
        said = [
            r for r in viewed.records if r["mode"] == "train" and text in json.dumps([r["response"], r["failure"]])
        ]
        assert chromium.run("context.list.length") == 6 * len(said) > 0
        assert chromium.run("byId('f-search') === field && document.activeElement === field")
    assert chromium.run("field.value") == "calendars first"
