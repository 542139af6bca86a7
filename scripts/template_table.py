"""Writes the table in docs/token_fidelity.md: what the middleware makes of every chat template that TRL ships.

    .venv/bin/python scripts/template_table.py [--check]

Scripted rollouts are played through the real middleware (tests/policy_server/middleware/templates.py). Needs vLLM, no
server.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.policy_server.middleware.template_chats import Chat, Sampled  # noqa: E402
from tests.policy_server.middleware.template_rollouts import CUT_CALL, Rollout, Step  # noqa: E402
from tests.policy_server.middleware.templates import Client, Template, load_template, template_paths  # noqa: E402

PAGE = ROOT / "docs" / "token_fidelity.md"
BEGIN, END = "<!-- table: scripts/template_table.py -->", "<!-- end of table -->"

_USER, _TOOL = (("user", "go on"),), (("tool", "42"),)
CHATS = [
    Chat(turns=(Sampled(), Sampled("ok then"))),
    Chat(system="be kind", turns=(Sampled(then=(("user", "one"), ("user", "two"))), Sampled())),
    Chat(turns=(Sampled(thought="let me think"), Sampled("yes", thought="hm hm"))),
    Chat(turns=(Sampled(thought="let me think", resent="inline"), Sampled("yes"))),
    Chat(turns=(Sampled("a long answer that is cut off", cut=0.5), Sampled("yes"))),
    Chat(turns=(Sampled(cut=1.0), Sampled("yes"))),
    Chat(turns=(Sampled(thought="let me think for a long time", cut=0.2), Sampled("yes"))),
    Chat(turns=(Sampled(other_end=True), Sampled("yes"))),
    Chat(turns=(Sampled(then=(("system", "new rules"), *_USER)), Sampled("yes"))),
    Chat(system="be kind", turns=(Sampled(then=(("system", "new rules"), *_USER)), Sampled("yes"))),
    Chat(turns=(Sampled(then=(("assistant", "written by the agent"), *_USER)), Sampled("yes"))),
    Chat(turns=(Sampled(then=(*_USER, ("assistant", "written by the agent"), *_USER)), Sampled("yes"))),
    Chat(tools=True, turns=(Sampled("", calls=1, then=_TOOL), Sampled("", calls=1, then=_TOOL), Sampled("yes"))),
    Chat(tools=True, turns=(Sampled("I call", calls=1, then=_TOOL), Sampled("yes"))),
    Chat(tools=True, turns=(Sampled("", thought="hm hm", calls=1, then=_TOOL), Sampled("yes"))),
    Chat(tools=True, turns=(Sampled("", calls=2, then=_TOOL * 2), Sampled("yes"))),
    Chat(tools=True, turns=(Sampled("", calls=1, then=(*_TOOL, *_USER)), Sampled("yes"))),
    Chat(tools=True, turns=(Sampled("", calls=1, cut=0.7), Sampled("yes"))),
    Chat(tools=True, turns=(Sampled("", calls=1, cut=1.0, then=_TOOL), Sampled("yes"))),
]


@dataclass(frozen=True)
class Row:
    """What the middleware makes of one template.

    Attributes:
        obstacles: Why prompts were served as rendered.
        wrong: Details of prompts that were forced and wrong, or not forced without a reason.
        keeps_thinking: Whether prompts kept thinking that the template leaves out.
        ends: Tokens that ended the policy's turns, the usual one first.
    """

    template: str
    obstacles: tuple[str, ...]
    wrong: tuple[str, ...]
    keeps_thinking: bool
    ends: tuple[str, ...]

    @property
    def outcome(self) -> str:
        if self.wrong:
            return "not: wrong prompts"
        kept = "exact, thinking kept" if self.keeps_thinking else "exact"
        return "; but ".join([kept, *self.obstacles])

    def __str__(self) -> str:
        ends = " ".join(f"`` {end} ``" if "`" in end else f"`{end}`" for end in self.ends).replace("|", "\\|")
        return f"| {self.template} | {self.outcome} | {ends} |"


def row_of(template: Template) -> Row:
    """Play all `CHATS` with one middleware: as on a server that has seen some rollouts."""
    client, steps, ends = Client(template), list[Step](), dict[str, None]()
    for chat in CHATS:
        rollout = Rollout(client, chat)
        steps += rollout.play()
        ids = [
            message["generation_token_ids"][-1] for message in rollout.messages if "generation_token_ids" in message
        ]
        if not any(turn.cut or turn.other_end for turn in chat.turns):
            ends |= dict.fromkeys(map(template.tokenizer.convert_ids_to_tokens, ids))
    obstacles = {step.expected.obstacle for step in steps if step.outcome == "drift" and step.expected is not None}
    return Row(
        template.name,
        tuple(sorted(obstacles - {CUT_CALL, ""})),
        tuple(f"{step.outcome}: {step.reason} {step.detail}" for step in steps if not step.is_justified),
        any(step.thinking and step.outcome == "exact" for step in steps),
        tuple(ends),
    )


def table(rows: list[Row]) -> str:
    return "\n".join(["| Template | Prompts | Turn end |", "| --- | --- | --- |", *map(str, rows)])


def with_table(page: str, text: str) -> str:
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the table is not current")
    check = parser.parse_args().check
    rows = [row_of(load_template(path)) for path in template_paths()]
    for row in rows:
        for detail in row.wrong:
            print(f"{row.template}: {detail}", file=sys.stderr)
    page = PAGE.read_text(encoding="utf-8")
    current = with_table(page, table(rows))
    if not check:
        PAGE.write_text(current, encoding="utf-8")
    return int(any(row.wrong for row in rows) or (check and current != page))


if __name__ == "__main__":
    sys.exit(main())
