"""The file that `trl-gym view` writes, and what it says when there is nothing to write."""

from __future__ import annotations

import base64
import gzip
import html
import itertools
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.report.conftest import Viewed
from tests.report.synthetic import AGENTS, Plan, write_run
from trl_gym.cli import build_parser, main
from trl_gym.commands.view import watch
from trl_gym.errors import ConfigError
from trl_gym.report import PageOptions, open_run, show, write_page
from trl_gym.report.source import read_trained


def blob(page: Path | str, name: str) -> Any:
    text = page if isinstance(page, str) else page.read_text()
    match = re.search(f'id="{name}">([^<]*)<', text)
    assert match is not None
    return json.loads(gzip.decompress(base64.b64decode(match[1])))


def test_the_same_run_gives_the_same_page(viewed: Viewed, tmp_path: Path) -> None:
    write_page(open_run(viewed.folder), tmp_path / "again.html")
    first, second = blob(viewed.page, "index"), blob(tmp_path / "again.html", "index")
    assert {**first, "written": 0} == {**second, "written": 0}
    assert blob(viewed.page, "c0") == blob(tmp_path / "again.html", "c0")


def test_nothing_of_the_page_is_elsewhere(viewed: Viewed) -> None:
    markup = re.sub(r'(?s)<script type="application/octet-stream".*?</script>', "", viewed.page.read_text())
    assert not re.search(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=(?!\"data:,)", markup)
    assert "url(" not in markup and "@import" not in markup and "innerHTML" not in markup
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', markup)
    assert policy is not None and policy[1].startswith("default-src 'none'") and "unsafe" not in policy[1]
    assert f"<title>{html.escape(viewed.folder.name)} · trl-gym</title>" in markup


def test_a_sample_says_so_and_counts_everything(viewed: Viewed, tmp_path: Path) -> None:
    page = write_page(open_run(viewed.folder), tmp_path / "small.html", PageOptions(max_rollouts=50))
    assert (page.recorded, page.shown) == (len(viewed.records), len(blob(page.path, "index")["columns"]["step"]))
    assert 40 <= page.shown <= 50
    assert blob(page.path, "index")["steps"] == blob(viewed.page, "index")["steps"]


def test_without_tokens_there_are_none(viewed: Viewed, tmp_path: Path) -> None:
    page = write_page(open_run(viewed.folder), tmp_path / "v.html", PageOptions(with_tokens=False))
    assert 'id="t0"' not in page.path.read_text() and page.size < viewed.page.stat().st_size / 2


def test_the_torn_last_line_of_a_run_that_goes_on_is_left_out(tmp_path: Path) -> None:
    records = write_run(tmp_path / "run", Plan(steps=1, tasks=1))
    journal = tmp_path / "run" / "rollouts" / "step-1.rank-0.jsonl"
    with open(journal, "a") as file:
        file.write('{"step": 0, "mode": "tr')
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 9, "rew')
    page = write_page(open_run(tmp_path / "run"), tmp_path / "v.html")
    assert page.recorded == len(records)


def test_odd_files_of_a_run_are_named_or_left_out(tmp_path: Path) -> None:
    records = write_run(tmp_path / "run", Plan(steps=1, tasks=1))
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "reward": 1e999}\n{"step": 2}\n')
    folder = tmp_path / "run" / "training_logprobs"
    folder.mkdir(exist_ok=True)
    (folder / "step-0.rank-1.jsonl").write_text('{"rollout_id": 5}\n{"x": 1}\n{"rollout_id": "x", "logprobs": "y"}\n')
    assert write_page(open_run(tmp_path / "run"), tmp_path / "v.html").recorded == len(records)
    for text in ("{garbage", "[]", ""):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ConfigError, match=r"The tokenizer .*tokenizer\.json cannot be read"):
            write_page(open_run(tmp_path / "run", tmp_path), tmp_path / "v.html")


def test_a_full_disk_or_a_diverged_run_does_not_end_the_view(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A line that a full disk tore stands in the middle of a file once the run went on; divergence leaves NaN."""
    records = write_run(tmp_path / "run", Plan(steps=1, tasks=1))
    trained = next(record for record in records if record["completion_ids"])
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text('{"step": 8, "rew{"step": 9, "reward": NaN}\n7\n' + metrics.read_text())
    folder = tmp_path / "run" / "training_logprobs"
    folder.mkdir(exist_ok=True)
    values = [float("nan")] * len(trained["completion_ids"])
    line = json.dumps({"rollout_id": trained["rollout_id"], "logprobs": values})
    (folder / "step-0.rank-1.jsonl").write_text(f'{{"rollout_id": "x", "logp\n{line}\n{{"rollout_id": "y", "lo')
    with caplog.at_level("WARNING"):
        page = write_page(open_run(tmp_path / "run"), tmp_path / "v.html")
    assert page.recorded == len(records)
    assert [message.partition(" is ")[0].rpartition("/")[2] for message in caplog.messages] == [
        "step-0.rank-1.jsonl, line 1",
        "step-0.rank-1.jsonl, line 3",
        "metrics.jsonl, line 1",
        "metrics.jsonl, line 2",
    ]
    gaps = [body["gaps"] for bodies in blob(page.path, "t0")["rollouts"] for body in bodies]
    assert any(own and set(own) == {None} for own in gaps)


def test_log_probabilities_are_found_wherever_a_rollout_was_trained(tmp_path: Path) -> None:
    """Later than it was sampled, perhaps; after a resume a second time, which counts."""
    [trained, *_] = [r for r in write_run(tmp_path / "run", Plan(steps=1, tasks=1)) if r["completion_ids"]]
    folder, name = tmp_path / "run" / "training_logprobs", trained["rollout_id"]
    for step in (10, 9):
        line = {"rollout_id": name, "step": step, "logprobs": [-float(step)] * len(trained["completion_ids"])}
        (folder / f"step-{step}.rank-0.jsonl").write_text(json.dumps(line))
    found = {one.rollout_id: one for one in read_trained(open_run(tmp_path / "run"))}[name]
    [logprobs] = found.logprobs
    assert (found.step, found.advantage, set(logprobs)) == (11, None, {-10.0})  # earlier versions counted from 0


def test_advantages_are_the_recorded_ones_where_there_are_any(tmp_path: Path) -> None:
    """Then a rollout without one was not trained. Without tokens in the page too."""
    records = [
        r for r in write_run(tmp_path / "run", Plan(steps=1, tasks=1)) if r["mode"] == "train" and not r["retried"]
    ]
    options = PageOptions(with_tokens=False)
    index = blob(write_page(open_run(tmp_path / "run"), tmp_path / "v.html", options).path, "index")
    computed = dict(zip(*(index["columns"][name] for name in ("rollout_id", "advantage")), strict=True))
    rewards = [r["reward"] for r in records if r["reward"] is not None]
    mean, spread = statistics.fmean(rewards), statistics.stdev(rewards)
    first = next(r for r in records if r["reward"] is not None)
    assert index["advantages"] == "computed"
    assert computed[first["rollout_id"]] == pytest.approx((first["reward"] - mean) / (spread + 1e-4))
    line = {"rollout_id": first["rollout_id"], "step": 0, "advantage": 0.75, "logprobs": []}
    (tmp_path / "run" / "training_logprobs" / "step-0.rank-1.jsonl").write_text(json.dumps(line))
    index = blob(write_page(open_run(tmp_path / "run"), tmp_path / "v.html", options).path, "index")
    assert index["advantages"] == "recorded"
    recorded = zip(index["columns"]["rollout_id"], index["columns"]["advantage"], strict=True)
    assert {name: value for name, value in recorded if value is not None} == {first["rollout_id"]: 0.75}


def test_damage_elsewhere_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    write_run(tmp_path / "run", Plan(steps=1, tasks=1))
    journal = tmp_path / "run" / "rollouts" / "step-1.rank-0.jsonl"
    journal.write_text("{torn\n" + journal.read_text())
    with pytest.raises(ConfigError, match=r"line 1: not JSON.*Delete that line"):
        write_page(open_run(tmp_path / "run"), tmp_path / "v.html")
    assert list(tmp_path.glob("*v.html*")) == []


def test_what_is_no_run_is_named_with_what_one_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"of a run does not exist.*`output_dir`"):
        open_run(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"has no journal: it has no `rollouts/step-\*.jsonl`"):
        open_run(tmp_path)
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "step-0.rank-0.jsonl").touch()
    with pytest.raises(ConfigError, match="holds no finished rollout yet"):
        write_page(open_run(tmp_path), tmp_path / "v.html")


def test_a_run_is_its_folder_or_its_journals(viewed: Viewed) -> None:
    inside, outside = open_run(viewed.folder / "rollouts"), open_run(viewed.folder)
    assert (inside.name, inside.metrics, inside.tokenizer) == (outside.name, outside.metrics, outside.tokenizer)
    assert outside.tokenizer is not None and outside.tokenizer.parent.name == "checkpoint-12"


def test_the_newest_checkpoints_tokenizer_is_taken(tmp_path: Path) -> None:
    write_run(tmp_path / "run", Plan(steps=1, tasks=1))
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-last"):
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / "tokenizer.json").write_text("{}")
    found = open_run(tmp_path / "run").tokenizer
    assert found is not None and found.parent.name == "checkpoint-10"


def test_before_the_first_checkpoint_it_is_the_one_that_the_run_saved(tmp_path: Path) -> None:
    write_run(tmp_path / "run", Plan(steps=1, tasks=1))
    (tmp_path / "run" / "checkpoint-1").rename(tmp_path / "run" / "tokenizer")
    assert open_run(tmp_path / "run").tokenizer == tmp_path / "run" / "tokenizer" / "tokenizer.json"


def test_a_tokenizer_that_is_not_there_is_an_error(viewed: Viewed, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`--tokenizer` is .* no tokenizer\.json is there"):
        open_run(viewed.folder, tmp_path)


def test_the_command(viewed: Viewed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out.html"
    assert main(["view", str(viewed.folder), "--output", str(target), "--max-rollouts", "50"]) == 0
    assert f"of {len(viewed.records)} rollouts" in capsys.readouterr().out and target.exists()
    assert main(["view", str(viewed.folder), "--output", str(tmp_path / "no" / "where.html")]) == 1
    assert "Choose another file with `--output`" in capsys.readouterr().err
    assert main(["view", str(viewed.folder), "--max-rollouts", "-1"]) == 1
    assert "`--max-rollouts` is -1" in capsys.readouterr().err


def test_runs_beside_it_are_told_apart(viewed: Viewed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, other = tmp_path / "out.html", tmp_path / "b" / viewed.folder.name
    write_run(other, Plan(steps=1, tasks=1))
    assert main(["view", str(viewed.folder), str(other), "--output", str(target), "--max-rollouts", "9"]) == 0
    [beside] = blob(target, "others")
    assert (beside["run"], beside["agents"]) == (str(other), [AGENTS[0]])  # the same name: both are called `run`
    assert [stats["step"] for stats in beside["steps"]] == [1, 0, 1] and len(beside["metrics"]) == 1
    assert main(["view", str(viewed.folder), *[str(other)] * 5, "--output", str(target)]) == 1
    assert "5 runs are named behind the first, and 4 can be told apart" in capsys.readouterr().err
    assert main(["view", str(viewed.folder), str(tmp_path / "nowhere"), "--watch", "--output", str(target)]) == 1
    assert "nowhere' of a run does not exist" in capsys.readouterr().err


def test_a_run_that_goes_on_is_written_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From before its first rollout until Ctrl-C, whenever there is something new."""
    run, target = tmp_path / "run", tmp_path / "v.html"
    run.mkdir()
    options = build_parser().parse_args(["view", str(run), "--watch", "--output", str(target)])
    seen: list[tuple[int, float] | None] = []

    def pause(seconds: float) -> None:
        assert seconds >= 10
        index = blob(target, "index") if target.exists() else None
        seen.append(index and (index["recorded"], index["reload_s"]))
        if len(seen) == 1:
            (run / "rollouts").mkdir()
            (run / "rollouts" / "step-1.rank-0.jsonl").touch()  # a rollout has begun
        elif len(seen) == 2:
            write_run(run, Plan(steps=1, tasks=1))
        elif len(seen) == 4:
            with open(run / "rollouts" / "step-2.rank-0.jsonl", "w") as file:
                file.write((run / "rollouts" / "step-1.rank-0.part-1.jsonl").read_text())
        elif len(seen) == 5:
            raise KeyboardInterrupt

    assert watch(options, pause) == 0
    recorded = blob(target, "index")["recorded"]
    (first, second, third, fourth, fifth) = seen
    assert first is second is None and third == fourth and third is not None and fifth is not None
    assert (third[1], fifth[0], fifth[1] > 0) == (10.0, recorded, True) and fifth[0] > third[0]
    assert blob(target, "index")["reload_s"] == 0
    told = capsys.readouterr()
    assert told.out.count("v.html") == 3 and told.err.count("waiting for the first rollout") == 1


def test_what_cannot_be_read_yet_does_not_end_the_watch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first line is being written, then one is damaged, then the run goes on, then its folder is gone."""
    run, target = tmp_path / "run", tmp_path / "v.html"
    (run / "rollouts").mkdir(parents=True)
    options = build_parser().parse_args(["view", str(run), "--watch", "--output", str(target)])
    torn = run / "rollouts" / "step-7.rank-0.jsonl"
    torn.write_text('{"step": 7, "mo')
    shown: list[tuple[float, float, int]] = []
    seconds = itertools.count(0, 3)

    def pause(waited: float) -> None:
        if not target.exists():
            torn.write_text("damaged\n")
            write_run(run, Plan(steps=1, tasks=1))
            return
        index = blob(target, "index")
        shown.append((waited, index["reload_s"], index["recorded"]))
        if len(shown) == 1:
            shutil.copy(run / "rollouts" / "step-1.rank-0.jsonl", run / "rollouts" / "step-2.rank-0.jsonl")
        else:
            run.rename(tmp_path / "elsewhere")

    with pytest.raises(ConfigError, match="run' of a run does not exist"):
        watch(options, pause, lambda: next(seconds))
    (first, second) = shown
    assert first[:2] == second[:2] == (30, 30)  # writing takes 3 s, a tenth
    assert 0 < first[2] < second[2] == blob(target, "index")["recorded"]
    assert blob(target, "index") == {**blob(target, "index"), "reload_s": 0} and blob(target, "c0")
    told = capsys.readouterr().err
    assert told.count("holds no finished rollout yet") == told.count("torn by a crash after 15 bytes; left out") == 1
    assert told.count("step-7.rank-0.jsonl, line 1: not JSON") == 1


def test_a_page_can_be_written_below_the_home_folder(
    viewed: Viewed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    page = write_page(open_run(viewed.folder), "~/v.html", PageOptions(max_rollouts=1))
    assert page.path == tmp_path / "v.html" and page.path.is_file()


def test_in_a_notebook_it_is_a_frame_of_its_own(viewed: Viewed) -> None:
    view = show(viewed.folder, max_rollouts=20, height=500)
    markup = view._repr_html_()
    assert 'sandbox="allow-scripts"' in markup and "height:500px" in markup
    document = html.unescape(markup.split('srcdoc="')[1].split('"')[0])
    assert document == view.document and len(blob(document, "index")["columns"]["step"]) <= 20


def test_it_needs_neither_torch_nor_transformers() -> None:
    code = "import sys, trl_gym.report; print({'torch', 'vllm', 'transformers', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
