"""The report of an ablation: what its tables, page and files say of made-up results."""

import csv
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from dense_lab.errors import InputError
from dense_lab.files import read_json, write_json
from dense_lab.report import write_report
from dense_lab.report.factors import grids
from dense_lab.report.section import section
from dense_lab.report.table import cell
from dense_lab.results import read_study
from dense_lab.statistics import compare
from tests.report import studies

GOLDEN = Path(__file__).parents[1] / "golden"


def test_the_report_of_the_same_results_reads_the_same(small):
    """UPDATE_GOLDEN=1 rewrites the files; a changed table then shows in the diff."""
    written = small.markdown.read_text()
    # Without the sentences at the top: what makes a comparison fair is told elsewhere.
    texts = {"md": written[written.index("## ") :], "tex": (small.page.parent / "verdicts.tex").read_text()}
    for form, text in texts.items():
        golden = GOLDEN / f"report.{form}"
        if os.environ.get("UPDATE_GOLDEN"):
            golden.write_text(text)
        assert text == golden.read_text()


def rows(files, name):
    table = next(table for table in files.sections[0].tables if table.name == name)
    return {cell(row[1]).text: [cell(value) for value in row] for row in table.rows}, dict(table.footnotes)


def test_the_verdicts_are_those_of_the_comparison(small):
    found, _ = rows(small, "verdicts")
    assert {arm: row[-1].text for arm, row in found.items()} == {
        "plain": "baseline",
        studies.AWKWARD: "better",
        "worse": "worse",
        "same": "underpowered",
    }
    values = {arm.name: small.sections[0].ablated.values(arm) for arm in small.sections[0].ablated.arms}
    said = compare(values, "plain", metric="test/loss", smallest_effect=0.01)["worse"]
    low, high = said.t_interval
    assert found["worse"][4].text == f"+{said.difference:.4f} [+{low:.4f}, +{high:.4f}]"


def test_only_the_best_arm_is_bold_and_only_when_it_is_significant(small, tmp_path):
    found, _ = rows(small, "verdicts")
    assert [arm for arm, row in found.items() if row[1].bold] == [studies.AWKWARD]
    arms = {"plain": {}, "luckier": {"model.width": 64}}
    results = read_study(studies.ablation(tmp_path / "equal", arms, {"luckier": -0.001}))
    table = section(results).head[0]
    assert not any(cell(value).bold for row in table.rows for value in row)


def test_a_baseline_that_beats_every_arm_is_bold(tmp_path):
    results = read_study(studies.ablation(tmp_path / "s", {"plain": {}, "bad": {"x": 1}}, {"bad": 0.1}))
    assert [cell(row[1]).text for row in section(results).head[0].rows if cell(row[1]).bold] == ["plain"]


def test_what_a_reader_must_know_stands_in_footnotes(small):
    found, notes = rows(small, "verdicts")
    said = {arm: [notes[mark] for mark in row[1].marks] for arm, row in found.items()}
    assert said["plain"] == []
    assert said[studies.AWKWARD] == ["Tuned to the largest lr of the grid, 0.004: the best may lie outside."]
    assert said["worse"] == ["Not tuned: no tuning trial of this arm is complete."]
    assert len(said["same"]) == 2
    assert "Underpowered" in said["same"][0]
    assert "Seed 3 failed: train/loss is nan" in said["same"][1]
    assert found["same"][2].text == "4 of 5"


def test_the_sentence_at_the_top_and_the_certificate(small):
    lead = small.sections[0].lead
    assert f"better: {studies.AWKWARD} (−0.03" in lead[0]
    assert "19 of 20 cells complete" in lead[0]
    stored = read_json(small.page.parent / "certificate.json")
    assert stored == small.sections[0].certificate
    assert lead[1].startswith("FAIR" if stored["fair"] else "NOT FAIR")


def test_costs_are_relative_to_the_baseline(small):
    found, _ = rows(small, "costs")
    assert found["plain"][2].text == "1M"
    assert found["worse"][2].text == "1.05M (+5.0%)"
    assert found["worse"][4].text == "42.9k (−4.8%)"
    assert found["same"][5].text == "65.5k (=)"


def test_provenance_names_everything_that_was_recorded(small):
    table = next(table for table in small.sections[0].tables if table.name == "provenance")
    said = dict(table.rows)
    assert said["digest"] == "d1b2c3d4e5f6"
    assert said["data"] == "0a1b2c3d4e5f"
    assert said["seed"] == "0; 1; 2; 3; 4; 100"
    assert said["date"].startswith("2026-11-01 12:00 to ")


def test_the_numbers_for_other_programs_are_in_full(small):
    arms = list(csv.DictReader((small.page.parent / "arms.csv").open()))
    verdict = next(v for _, v in small.sections[0].ablated.judged if v.arm == "worse")
    found = next(row for row in arms if row["arm"] == "worse")
    assert float(found["difference"]) == verdict.difference
    assert (float(found["t_interval_low"]), float(found["t_interval_high"])) == verdict.t_interval
    cells = list(csv.DictReader((small.page.parent / "cells.csv").open()))
    assert len(cells) == 4 * 5 + 3 * 3
    assert sum(row["role"] == "cell" and row["state"] == "complete" for row in cells) == 19


class Page(HTMLParser):
    """Tags that were opened and closed, what is fetched, and the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.fetched, self.text, self.wrong = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in {"meta", "br", "img", "path", "use", "stop"}:
            self.open.append(tag)
        values = dict(attrs)
        self.fetched += [values[k] for k in ("src", "href") if k in values and not str(values[k]).startswith("#")]

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if tag in self.open:
            if self.open[-1] != tag:
                self.wrong.append(tag)
            self.open.remove(tag)

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_needs_nothing_from_outside_and_escapes_names(small):
    page = Page(small.page.read_text())
    assert page.open == []
    assert page.wrong == []
    assert page.fetched == []
    assert studies.AWKWARD in "".join(page.text)
    assert "<b>" not in small.page.read_text()
    assert small.page.read_text().count("<svg") == len(small.sections[0].pictures) == 3


def test_markdown_tables_have_as_many_cells_in_every_row(small):
    for block in small.markdown.read_text().split("\n\n"):
        if block.startswith("| "):
            counts = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
            assert len(counts) == 1, block


def test_arms_in_a_grid_get_effects_within_rows_and_interactions(tmp_path):
    made = section(read_study(studies.factorial(tmp_path / "factorial")))
    assert [picture.name for picture in made.pictures] == ["differences", "costs", "curves", "interactions"]
    table = next(table for table in made.tables if table.name == "interactions")
    found = {row[0]: float(row[1].replace("−", "-")) for row in table.rows}
    # (mamba add - mamba none) - (retnet add - retnet none) = (-0.03 - 0.05) - (-0.02), give or take four cells' noise.
    noise = 3 * 2 * 0.004 / 5**0.5
    assert found["dense = add, core = mamba"] == pytest.approx(-0.06, abs=noise)
    assert found["dense = concat, core = mamba"] == pytest.approx(-0.04, abs=noise)


def test_what_belongs_to_an_option_is_part_of_its_level(tmp_path):
    arms = {
        f"{core} {span}": {"model.core": core, "model.dense": "none" if span == 0 else "densessm"}
        | ({} if span == 0 else {"model.dense.densessm.span": span})
        for core in ("retnet", "mamba")
        for span in (0, 1, 2)
    }
    ablated = section(read_study(studies.ablation(tmp_path / "s", arms, {}))).ablated
    (grid,) = grids(ablated)
    assert (grid.row, grid.rows) == ("core", ("retnet", "mamba"))
    assert (grid.column, grid.columns) == ("dense", ("none", "densessm span=1", "densessm span=2"))
    assert grid.values["mamba", "densessm span=2"] == ablated.values(ablated.arms[5])


def test_a_grid_of_three_factors_averages_over_the_third(tmp_path):
    names = [(a, b, c) for a in "xy" for b in "pq" for c in "mn"]
    arms = {"".join(name): dict(zip(("a", "b", "c"), name, strict=True)) for name in names}
    ablated = section(read_study(studies.ablation(tmp_path / "s", arms, {}))).ablated
    found = {(grid.row, grid.column): grid for grid in grids(ablated)}
    assert list(found) == [("a", "b"), ("a", "c"), ("b", "c")]
    values = {arm.name: ablated.values(arm) for arm in ablated.arms}
    assert found["a", "c"].values["y", "m"][2] == pytest.approx((values["ypm"][2] + values["yqm"][2]) / 2)


def test_arms_in_no_grid_get_none(small):
    assert "interactions" not in {table.name for table in small.sections[0].tables}


def test_twenty_arms_with_long_names_are_drawn(tmp_path):
    made = section(read_study(studies.large(tmp_path / "large")))
    assert "19 arms" in made.lead[0]
    assert all(picture.svg.startswith("<svg") for picture in made.pictures)
    assert all(picture.pdf().startswith(b"%PDF") for picture in made.pictures)


def test_a_study_without_any_complete_cell_is_reported_as_that(tmp_path):
    folder = studies.ablation(tmp_path / "s", {"plain": {}, "other": {"x": 1}}, {}, seeds=1, failing=(("plain", 0),))
    made = write_report([read_study(folder)]).sections[0]
    assert "No verdicts: no cell of plain" in made.lead[0]
    assert "1 of 2 cells complete" in made.lead[0]


def test_one_seed_is_underpowered_and_drawn_without_intervals(tmp_path):
    folder = studies.ablation(tmp_path / "s", {"plain": {}, "other": {"x": 1}}, {"other": -1.0}, seeds=1)
    files = write_report([read_study(folder)])
    found, notes = rows(files, "verdicts")
    assert found["other"][-1].text == "underpowered"
    assert "fewer than two seeds" in notes[found["other"][1].marks[0]]


def test_seeds_added_until_decided_are_judged_sequentially(tmp_path):
    folder = studies.ablation(tmp_path / "s", {"plain": {}, "other": {"x": 1}}, {"other": -0.1}, seeds=5)
    manifest = read_json(folder / "manifest.json")
    write_json(folder / "manifest.json", {**manifest, "looks": [4, 8], "added": [["other", 4], ["plain", 4]]})
    study = read_json(folder / "study.json")
    study["x-ablation"]["seeds"] = [0, 1, 2, 3]
    write_json(folder / "study.json", study)
    made = section(read_study(folder))
    assert "seeds were added until arms were decided, 4 to 8" in made.head[0].note
    assert [cell(value).text for value in made.head[0].rows[1]][2] == "5"
    assert "10 of 10 cells complete" in made.lead[0]


def test_the_overhead_is_a_table_when_it_was_measured(tmp_path):
    folder = studies.ablation(tmp_path / "s", {"plain": {}, "dense": {"x": 1}}, {})
    row = {"arm": "dense", "twin": "m = 0", "dense": 90.0, "plain": 100.0, "ratio": 0.9, "low": 0.88, "high": 0.92}
    where = {"device": "cpu", "dtype": "float32", "batch": 8, "seq_len": 256, "rounds": 9}
    speeds = [{**row, **where, "metric": f"{kind}_tokens_per_second"} for kind in ("train", "decode")]
    size = {**row, **where, "metric": "parameters", "ratio": 1.01, "low": 1.01, "high": 1.01, "rounds": 1}
    (folder / "overhead.json").write_text(json.dumps([size, speeds[0], {**speeds[1], "batch": 1}]))
    table = next(table for table in section(read_study(folder)).tables if table.name == "overhead")
    assert table.columns == ("arm", "twin", "parameters", "training tokens/s", "decoding tokens/s")
    assert table.rows == (("dense", "m = 0", "+1.0%", "−10.0% [−12.0%, −8.0%]", "−10.0% [−12.0%, −8.0%]"),)
    assert "training tokens/s: cpu, float32, batch 8, seq_len 256, rounds 9; decoding tokens/s: cpu" in table.note


def test_several_studies_make_one_report(both, tmp_path):
    page = Page(both.page.read_text())
    assert page.open == page.wrong == page.fetched == []
    assert (both.page.parent / "factorial" / "interactions.pdf").exists()
    assert "| small | test/loss against plain | not fair | 19 of 20 | 1 | 1 | 0 | 1 |" in both.markdown.read_text()
    results = both.sections[0].results
    with pytest.raises(InputError, match="one name: small, small"):
        write_report([results, results], tmp_path / "twice")


def test_the_command_prints_verdicts_and_json(tmp_path, monkeypatch):
    from dense_lab.cli.report import command

    monkeypatch.setattr("dense_lab.report.ablation_plots.pictures", lambda *_: [])
    folder = studies.small(tmp_path / "small")
    done = CliRunner().invoke(command, [str(folder)], catch_exceptions=False)
    assert studies.AWKWARD in done.output
    assert "(a) Tuned to the largest lr" in done.output
    done = CliRunner().invoke(command, [str(folder), "--json"], catch_exceptions=False)
    said = json.loads(done.output)
    assert said["studies"][0]["comparison"]["arms"][1]["verdict"] == "better"
