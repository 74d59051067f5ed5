"""The benchmarks run, write figures that RESULTS.md can hold, and measure what they say: no test looks at seconds."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"
NAMES = (
    "penalty",
    "bandwidth",
    "growth",
    "trainer_step",
    "swag_snapshot",
    "load",
    "sharded",
    "billion",
    "prior_update",
    "samplers",
)
FIELDS = {"benchmark", "claim", "command", "machine", "rows", "claims", "notes"}


@pytest.fixture
def module(monkeypatch):
    """A module of benchmarks/ by name; none of them stays imported."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__).parent == FOLDER:
            del sys.modules[name]


def checked(file: Path, name: str) -> dict[str, Any]:
    """The figures in a file, which must be complete."""
    found = json.loads(file.read_text())
    assert found.keys() >= FIELDS
    assert found["benchmark"] == name
    assert found["machine"].keys() >= {"kind", "cpu", "cores", "threads", "memory_gb", "gpu", "versions", "date"}
    assert found["rows"]
    assert f"benchmarks/{name}.py" in found["command"]
    assert "--json" not in found["command"]
    assert all(claim.keys() >= {"claim", "measured", "met"} for claim in found["claims"])
    return found


# ------------------------------------------------------------------------------------------------------ what they share


def test_methods_are_timed_in_turns_after_a_warm_up(module):
    called: list[str] = []
    found = module("common").times({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 3)
    assert called == ["a", "b"] * 4
    assert {name: len(values) for name, values in found.items()} == {"a": 3, "b": 3}


def test_a_time_is_of_one_call_however_many_are_timed_together(module):
    found = module("common").median_times({"wait": partial(time.sleep, 2e-3)}, 2, at_least=0.02)
    assert 2e-3 <= found["wait"] < 20e-3


def test_the_quartiles_of_few_values(module):
    common = module("common")
    assert common.quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert common.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (12_345, "12,345"),
        (0.0, "0"),
        (3.14159, "3.14"),
        (31_415.9, "31,416"),
        (0.0123456, "0.0123"),
        (1.5e-9, "1.5e-09"),
        (1e12, "1.0e+12"),
        (float("inf"), "inf"),
        (True, "yes"),
        ("text", "text"),
    ],
)
def test_numbers_are_written_with_three_digits(module, value, text):
    assert module("common").number(value) == text


def test_a_table_has_the_columns_of_all_rows_and_a_title_each(module):
    rows = [{"method": "a", "ms": 1.0}, {"method": "b", "MB": 2}, {"table": "Other", "K": 5}]
    assert module("common").table(rows).splitlines() == [
        "| method |   ms |  MB |",
        "| ------ | ---: | --: |",
        "| a      | 1.00 |     |",
        "| b      |      |   2 |",
        "",
        "Other",
        "",
        "|   K |",
        "| --: |",
        "|   5 |",
    ]


def test_quick_lowers_the_repeats_unless_they_are_given(module):
    common = module("common")
    assert common.options(common.parser("", repeats=9), []).repeats == 9
    assert common.options(common.parser("", repeats=9), ["--quick"]).repeats == 2
    assert common.options(common.parser("", repeats=9), ["--quick", "--repeats", "4"]).repeats == 4
    with pytest.raises(SystemExit):
        common.options(common.parser(""), ["--threads", "0"])


def test_the_command_is_told_without_the_file_it_writes_to(module, monkeypatch, tmp_path):
    for json_option in (["--json", str(tmp_path / "a.json")], [f"--json={tmp_path / 'a.json'}"]):
        monkeypatch.setattr(sys, "argv", ["x.py", "--rank", "3", *json_option, "--quick"])
        module("common").finish("x", "a claim", [{"K": 3}], tmp_path / "a.json")
        assert checked(tmp_path / "a.json", "x")["command"] == "python benchmarks/x.py --rank 3 --quick"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("anonymous", [False, True])
def test_peak_memory_is_what_a_call_needs_beside_what_was_prepared(module, anonymous):
    found = module("common").peak_memory(partial(torch.mul, other=2), partial(torch.ones, 25_000_000), anonymous=anonymous)
    assert 95e6 < found < 130e6


# ---------------------------------------------------------------------------------------------------- what they measure


def test_the_reference_in_blocks_equals_the_dense_solution(module):
    problems = module("problems")
    of = problems.problem({"a": (6, 5), "b": (), "c": (7,)}, 3)
    rows = of.flat_rows().double()
    sigma = of.diagonal.double().diag() + rows.T @ rows
    delta = of.theta.double() - of.mean.double()
    right = torch.linalg.solve(sigma, delta)
    found = problems.exact(of)
    assert found.value == pytest.approx(0.5 * float(delta @ right), rel=1e-9)
    wrong = problems.gradient_errors(of, found, {"right": right, "off": right * 1.01}, torch.float32)
    assert wrong["right"] < 1e-8
    assert wrong["off"] == pytest.approx(0.01, rel=1e-6)
    assert delta.shape == (30 + 1 + 7,)


def test_weights_are_a_draw_from_the_prior_they_are_measured_under(module):
    # of 10^4 weights the penalty is chi-squared / 2: mean 5000, standard deviation 71
    problems = module("problems")
    assert abs(problems.exact(problems.problem({"w": (100, 100)}, 3)).value - 5000) < 5 * 71


@pytest.mark.slow
def test_the_problems_have_the_tensors_of_real_models(module):
    problems = module("problems")
    shapes = problems.shapes_of("bert")
    assert problems.count(shapes) == 109_482_240
    assert problems.count(problems.shapes_of("resnet50")) == 23_508_032  # as published: FIELD_NOTES, section 3
    assert problems.count(problems.shapes_of("1e6")) == 1_000_000


def test_both_ways_to_take_a_step_give_the_same_gradient(module):
    penalty, problems = module("penalty"), module("problems")
    of = problems.problem({"a": (6, 5), "b": (7,)}, 3, variance=1e-2)
    gradients = []
    for step in (penalty.our_step(of), penalty.TheirStep(of, of.flat_rows())):
        of.gradient.zero_()
        step()
        gradients.append(of.gradient.clone())
    assert gradients[0].norm() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_a_line_and_a_power_are_found_again(module):
    fit = module("growth").fit
    x = [1.0, 2.0, 4.0, 8.0]
    line = fit(x, [3.0 + 2.0 * value for value in x])
    assert line["slope"] == pytest.approx(2.0)
    assert line["intercept"] == pytest.approx(3.0)
    assert line["away"] == pytest.approx(0.0, abs=1e-9)
    power = fit(x, [5.0 * value**1.3 for value in x])
    assert power["exponent"] == pytest.approx(1.3)
    assert power["error"] == pytest.approx(0.0, abs=1e-7)
    assert power["away"] > 0.05


def test_the_exponent_s_standard_error_is_that_of_linear_regression(module):
    from scipy.stats import linregress

    x, y = [1.0, 2.0, 4.0, 8.0, 16.0], [1.1, 1.9, 4.3, 7.7, 17.0]
    expected = linregress([torch.tensor(v).log().item() for v in x], [torch.tensor(v).log().item() for v in y])
    found = module("growth").fit(x, y)
    assert found["exponent"] == pytest.approx(expected.slope, rel=1e-5)
    assert found["error"] == pytest.approx(expected.stderr, rel=1e-4)


def test_trainers_take_turns_and_only_one_moves(module):
    turns = module("trainer_step").Turns(3, 4)
    moving, most, seen = 0, 0, []

    def work(member: int) -> None:
        nonlocal moving, most
        for _ in range(4):
            turns.wait(member)
            moving += 1
            most = max(most, moving)
            time.sleep(1e-3)
            seen.append(member)
            moving -= 1
            turns.over()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert most == 1
    assert [sorted(seen[i : i + 3]) for i in range(0, 12, 3)] == [[0, 1, 2]] * 4


def test_a_trainer_that_fails_ends_the_wait_of_the_others(module):
    turns = module("trainer_step").Turns(2, 1)
    turns.fail(ValueError("out of memory"))
    with pytest.raises(RuntimeError, match="another trainer failed"):
        turns.wait(turns.order[-1])


def test_slower_is_the_ratio_of_medians_within_its_interval(module):
    slower = module("trainer_step").slower
    base = [1.0, 1.1, 0.9, 1.0, 5.0]  # what disturbs one disturbs the other
    middle, low, high = slower(base, [1.03 * value for value in base])
    assert middle == pytest.approx(3.0)
    assert low <= middle <= high
    assert slower([2.0], [2.0]) == (0.0, 0.0, 0.0)


def test_a_slow_trainer_is_not_called_fast_because_the_machine_is_noisy(module):
    row = {"model": "resnet18", "batch": 16, "accumulation": 1, "K": 5, "deviations": "fp32", "penalty %": 2.0}
    judged = module("trainer_step").claims
    for middle, low, high, met in (
        (2.9, 1.0, 4.0, True),
        (3.1, 1.0, 4.0, False),  # narrow: by the ratio itself
        (5.0, -9.0, 20.0, True),  # wide: by the penalty's share
        (9.0, 4.0, 20.0, False),  # wide, but all of it above
    ):
        found = judged([row | {"slower %": middle, "from": low, "to": high}], "cpu")
        assert [claim["met"] for claim in found] == [met]
    (found,) = judged([row | {"slower %": 1.0, "from": -9.0, "to": 20.0, "penalty %": 3.5}], "cpu")
    assert not found["met"]


def test_a_limit_that_was_disturbed_and_a_fit_that_is_noise_show_nothing(module):
    row = {"model": "resnet50", "K": 5, "deviations": "fp32"}
    found = module("bandwidth").claims([row | {"step / limit": ratio} for ratio in (0.9, 1.2, 1.4, 1.6)], "cpu")
    assert [claim["met"] for claim in found] == [None, True, True, False]
    found = module("bandwidth").claims([row | {"step / limit": 1.4}], "cuda")
    assert [claim["met"] for claim in found] == [False]
    in_k = {"away": 0.1}
    for exponent, error, met in ((1.04, 0.5, True), (1.2, 0.15, None), (1.2, 0.05, False)):
        assert module("growth").claims({"exponent": exponent, "error": error}, in_k)[0]["met"] is met


def test_what_is_left_out_is_shown_as_not_measured(module):
    penalty = module("penalty")
    row = {"model": "resnet50", "K": 5, "extra MB": 1.0, "error of value": 1e-7, "of gradient": 1e-7}
    ours, theirs = (row | {"method": name, "times faster": 5.0} for name in ("prior_hub, fp32", penalty.THEIRS))
    judged = {claim["claim"]: claim["met"] for claim in penalty.claims([ours, theirs | {"extra MB": 9.0}], "cpu", [5, 20])}
    assert len(judged) == 9
    assert [met for claim, met in judged.items() if "K = 5" in claim] == [True] * 3
    assert [met for claim, met in judged.items() if "K = 20" in claim] == [None] * 6
    assert len(penalty.claims([ours, theirs], "cpu", [5])) == 3


# --------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize(("name", "more"), [("penalty", ["--no-memory"]), ("bandwidth", []), ("growth", [])])
def test_the_penalty_s_benchmarks_run(module, monkeypatch, tmp_path, capsys, name, more):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quick", "--json", str(tmp_path / "a.json"), "--device", "cpu", *more])
    module(name).main()
    found = checked(tmp_path / "a.json", name)
    assert found["claim"] in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_runs_from_the_command_line(name, tmp_path):
    program = FOLDER / f"{name}.py"
    if not program.exists():
        pytest.skip("not there")
    environment = os.environ | {"PYTHONPATH": str(FOLDER.parent)}
    command = [sys.executable, str(program), "--quick", "--json", str(tmp_path / "a.json")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    checked(tmp_path / "a.json", name)


def test_make_bench_knows_every_benchmark(module):
    assert {one.name for one in module("run_all").BENCHMARKS} == set(NAMES)
    programs = {file.stem for file in FOLDER.glob("*.py") if 'if __name__ == "__main__"' in file.read_text()}
    assert programs - {"run_all"} <= set(NAMES)


def test_a_benchmark_that_fails_is_shown_and_does_not_stop_the_others(module, monkeypatch, tmp_path, capsys):
    run_all = module("run_all")
    figures = {"benchmark": "good", "claim": "it is good", "command": "python good.py", "claims": [], "notes": ["a note"]}
    figures |= {"machine": module("common").machine("cpu"), "rows": [{"ms": 1.5}]}
    good = f"import sys, pathlib; pathlib.Path(sys.argv[-1]).write_text({json.dumps(figures)!r})"
    (tmp_path / "good.py").write_text(good)  # is given no --threads: --json is last
    (tmp_path / "bad.py").write_text("raise SystemExit('no memory left')")
    monkeypatch.setattr(run_all, "HERE", tmp_path)
    monkeypatch.setattr(run_all, "BENCHMARKS", tuple(run_all.Benchmark(n) for n in ("bad", "missing", "good")))
    monkeypatch.setattr(sys, "argv", ["run_all.py"])
    assert run_all.main() == 1
    text = (tmp_path / "RESULTS.md").read_text()
    assert "no memory left" in text
    assert "the benchmark failed" in text
    assert "| 1.50 |" in text
    assert "a note" in text
    assert "failed: bad" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--only", "good"])
    assert run_all.main() == 0
    assert (tmp_path / "RESULTS.md").read_text() == text  # the other's last figures are kept


def test_a_benchmark_that_is_stopped_is_not_waited_for_by_way_of_its_children(module, tmp_path):
    run_all, lines, child = module("run_all"), deque(), "import time; time.sleep(60)"
    program = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    began = time.monotonic()
    assert run_all.watched([sys.executable, "-c", program], dict(os.environ), lines, 1.0) == "none, stopped after 1 s"
    assert time.monotonic() - began < 30


def test_results_show_each_claim_with_its_figure_machine_and_reason(module, tmp_path):
    run_all = module("run_all")
    machine = {"kind": "cpu-a", "cpu": "A", "cores": 2, "threads": 2, "memory_gb": 24.0, "gpu": None, "system": "Linux"}
    machine |= {"python": "3.12", "versions": {"torch": "9.0"}, "date": "2026-01-02"}
    claims = [
        {"claim": "fast | faster", "measured": "5 times", "met": True},
        {"claim": "small", "measured": "7 MB", "met": False},
        {"claim": "exact", "measured": "1e-3", "met": False, "why": "float16"},
        {"claim": "on a GPU", "measured": "", "met": None},
    ]
    one = {"benchmark": "penalty", "claim": "it is fast", "command": "python x", "machine": machine, "rows": [{"ms": 1}]}
    reasons = tmp_path / "reasons.toml"
    reasons.write_text(
        '[[reason]]\nbenchmark = "penalty"\nclaim = "small"\nwhy = "a copy"\n'
        '[[reason]]\nbenchmark = "penalty"\nclaim = "small"\nmachine = "other"\nwhy = "never"\n'
    )
    other = one | {"machine": machine | {"kind": "gpu-b", "gpu": "GPU B"}, "claims": [], "rows": [{"ms": 2}]}
    text = run_all.report([one | {"claims": claims, "notes": []}, other], reasons)
    cells = [[cell.strip() for cell in line.split(" | ")] for line in text.splitlines() if "| penalty" in line]
    assert [row[-1].rstrip(" |") for row in cells] == [
        "met",
        "**not met**: a copy",
        "**not met**: float16",
        "not measured here",
    ]
    assert "fast \\| faster" in text
    assert text.index("### A, 2 cores") < text.index("### GPU B")
    assert "`python x`, 2026-01-02, 2 threads, 24 GB, Linux, Python 3.12, torch 9.0" in text
    assert text.count("## penalty") == 1
