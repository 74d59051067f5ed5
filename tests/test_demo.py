"""The demo, run once in its quick form: what it writes, prints and counts. The full one is run by `make demo` and .ci/run."""

import contextlib
import gc
import io
import itertools
import json
import math
import re
import warnings

import pytest
import torch
from transformers.utils import logging

from prior_hub import PriorModel
from prior_hub import demo as module
from prior_hub.demo import ISOTROPIC, LEARNED, METHODS, PLAIN, run_demo


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(result, folder, standard output) of one quick run with two seeds, without bars; any warning is an error."""
    folder = tmp_path_factory.mktemp("demo")
    text, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(errors), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="matplotlib|pyparsing")  # 3.9 with a new one
        result = run_demo(folder, seeds=2, quick=True, progress=False)
    assert errors.getvalue() == ""
    return result, folder, text.getvalue()


def test_it_writes_a_prior_a_figure_and_the_numbers(run):
    result, folder, _ = run
    assert sorted(p.name for p in folder.iterdir()) == ["demo.png", "prior", "prior.png", "results.json"]
    assert sorted(p.name for p in (folder / "prior").iterdir()) == ["README.md", "prior.safetensors", "prior_config.json"]
    assert result.figure.read_bytes()[:4] == b"\x89PNG"
    assert (result.prior, result.results) == (folder / "prior", folder / "results.json")


@pytest.mark.slow
def test_progress_bars_are_on_standard_error_where_they_are_wanted(run, tmp_path):
    _, _, without = run
    text, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(errors):
        run_demo(tmp_path, seeds=1, quick=True, progress=True)
    for bar in ("source task", "settings", "reported runs"):
        assert re.search(rf"{bar}: +[1-9]\d*%\|", errors.getvalue()), bar  # it moves
    for printed in (without, text.getvalue()):
        assert "%|" not in printed


def test_the_prior_loads_back_and_fits_the_target_model(run):
    prior = PriorModel.from_pretrained(run[1] / "prior")
    assert prior.rank == module._QUICK.rank
    match = prior.match(module.DigitsClassifier(5))
    assert set(match.new) == {"timm_model.classifier.weight", "timm_model.classifier.bias"}
    assert len(match.pairs) == len(prior.mean)
    card = (run[1] / "prior" / "README.md").read_text()
    assert "digit" in card
    assert "cc-by-4.0" in card


def test_the_table_has_every_method_at_every_n(run):
    result, _, text = run
    assert result.table in text
    assert result.verdict in text
    for method in METHODS:
        assert result.table.count(method) == len(module._QUICK.numbers)
    assert "± standard deviation over 2 seeds" in text
    assert "quick run" in text


def test_numbers_in_the_file_are_the_means_and_spreads_of_its_runs(run):
    """Recomputed from the runs with torch, and found again in the table."""
    result, folder, _ = run
    written = json.loads((folder / "results.json").read_text())
    assert len(written["runs"]) == 3 * len(module._QUICK.numbers) * 2
    assert written["runs"] == list(result.rows)
    assert len(written["summary"]) == 3 * len(module._QUICK.numbers)
    for entry in written["summary"]:
        mine = [r for r in written["runs"] if (r["method"], r["n"]) == (entry["method"], entry["n"])]
        for key in ("accuracy", "nll"):
            values = torch.tensor([r[key] for r in mine], dtype=torch.float64)
            assert entry[f"{key}_mean"] == pytest.approx(float(values.mean()), rel=1e-12)
            assert entry[f"{key}_spread"] == pytest.approx(float(values.std(correction=1)), rel=1e-9, abs=1e-15)
        assert f"{entry['nll_mean']:.3f} ± {entry['nll_spread']:.3f}" in result.table


def test_every_method_gets_the_same_effort_and_the_same_few_shot_sets(run):
    written = json.loads((run[1] / "results.json").read_text())
    tried = [[(r["n"], r["seed"]) for r in written["development"] if r["method"] == m] for m in METHODS]
    reported = [[(r["n"], r["seed"]) for r in written["runs"] if r["method"] == m] for m in METHODS]
    assert tried[0] == tried[1] == tried[2]
    assert reported[0] == reported[1] == reported[2]
    plan = module._Plan()
    assert len(plan.weight_decays) == len(plan.variances)


def test_test_images_are_never_trained_or_tuned_on():
    _, target = module._tasks(8)
    parts = [target.development, target.validation, target.training, target.test]
    assert sorted(itertools.chain(*parts)) == list(range(len(target.labels)))  # disjoint, and nothing lost
    assert target.labels.unique().tolist() == [0, 1, 2, 3, 4]
    for n in module._Plan().numbers:
        few = target.few(target.training, n, seed=1)
        assert len(set(few)) == n
        assert set(few) <= set(target.training)
        assert target.labels[few].bincount().tolist() == [n // 5] * 5
        assert few != target.few(target.training, n, seed=2)


def test_source_and_target_have_no_digit_in_common():
    source, _ = module._tasks(8)
    assert source.labels.unique().tolist() == source.held_out_labels.unique().tolist() == list(range(20))
    first = len(source.labels) // 4
    assert torch.equal(torch.rot90(source.images[:first], 1, (2, 3)), source.images[first : 2 * first])
    assert torch.equal(source.labels[:first] + 5, source.labels[first : 2 * first])


def rows(*values):
    """Rows of two seeds at n = 10; (accuracies, NLLs) of plain, isotropic, learned."""
    return [
        {"method": m, "n": 10, "seed": s, "accuracy": a, "nll": b}
        for m, pairs in zip(METHODS, values, strict=True)
        for s, (a, b) in enumerate(pairs)
    ]


def test_the_verdict_says_when_plain_fine_tuning_wins():
    text = module._verdict(rows([(0.9, 0.1), (0.92, 0.12)], [(0.8, 0.3), (0.81, 0.4)], [(0.8, 0.2), (0.82, 0.22)]))
    assert f"best accuracy: {PLAIN}; best NLL: {PLAIN}" in text
    assert "accuracy -10.0 ± 0.0 (worse), NLL +0.100 ± 0.000 (worse)" in text  # learned - plain
    assert "NLL -0.140 ± 0.057 (not told apart)" in text  # learned - isotropic, two seeds


def test_the_verdict_names_ties_and_what_is_not_told_apart():
    text = module._verdict(rows([(0.75, 0.4), (0.5, 0.2)], [(0.75, 0.3), (0.75, 0.3)], [(0.75, 0.2), (0.75, 0.35)]))
    assert f"best accuracy: {ISOTROPIC} and {LEARNED}; " in text
    assert "not told apart" in text
    assert f"best NLL: {LEARNED}" in text


@pytest.mark.parametrize("count", [2, 3, 5, 9, 10])
def test_a_difference_counts_where_the_paired_t_test_at_95_percent_says_so(count):
    from scipy.stats import ttest_1samp

    generator = torch.Generator().manual_seed(count)
    verdicts = set()
    for shift in torch.linspace(-6, 6, 49, dtype=torch.float64):
        values = (torch.randn(count, generator=generator, dtype=torch.float64) + shift).tolist()
        p = ttest_1samp(values, 0).pvalue
        if abs(p - 0.05) < 1e-3:  # the quantiles have three digits
            continue
        words = "not told apart" if p > 0.05 else "better" if sum(values) > 0 else "worse"
        assert f"({words})" in module._difference(values, 3, 1)
        verdicts.add(words)
    assert "not told apart" in verdicts
    assert count == 2 or len(verdicts) == 3


def test_one_seed_has_no_spread():
    single = [r for r in rows(*[[(0.5, 1.0), (0.5, 1.0)]] * 3) if r["seed"] == 0]
    assert "±" not in module._table(single)
    assert "(one seed)" in module._verdict(single)
    assert module._summary(single)[0]["nll_spread"] is None


def test_statistics_stay_frozen_in_fine_tuning():
    model = module.DigitsClassifier(5, freeze_statistics=True).train()
    before = {n: b.clone() for n, b in model.named_buffers()}
    model(torch.randn(4, 1, 16, 16))
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    assert model.training
    assert model.timm_model.classifier.training


def test_the_process_is_left_as_it_was_after_an_error_too():
    threads, before = torch.get_num_threads(), logging.get_verbosity()
    logging.set_verbosity(logging.INFO)
    steady = module._steady_process()
    steady.__enter__()
    logging.set_verbosity(logging.ERROR)  # as a Trainer with log_level="error" does
    assert torch.get_num_threads() == 1
    assert gc.get_freeze_count() > 0
    with pytest.raises(RuntimeError):
        steady.gen.throw(RuntimeError())
    assert torch.get_num_threads() == threads
    assert logging.get_verbosity() == logging.INFO
    logging.set_verbosity(before)
    assert gc.get_freeze_count() == 0


def test_less_than_one_seed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="seeds is 0"):
        run_demo(tmp_path, seeds=0)


def test_results_are_plain_json(run):
    text = (run[1] / "results.json").read_text()
    assert "NaN" not in text
    assert math.isfinite(json.loads(text)["seconds"])
