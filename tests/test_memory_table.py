"""The table of predicted and measured memory: what it reads from results, and that the page shows what the plan says."""

import pytest

from benchmarks import memory_table, real_geometry, trainers


def result(date, peak, flags="compile"):
    row = next(row for row in real_geometry.ROWS if row.trainer == "lora" and row.resolution == 1024 and row.flags == ("--compile",))
    return {"rows": {row.name: {"about": {"date": date}, "uncompiled": {"1": {"peak_allocated": peak}}}}}


def test_the_newest_measurement_of_the_same_flags_counts():
    """Two results; a row that failed, and one whose batch of 1 did not fit, say nothing."""
    results = [result("2026-01-02", 5), result("2026-01-03", 7), result("2026-01-01", 9)]
    assert memory_table.measured(results, "lora", 1024, ()) == 7
    assert memory_table.measured(results, "lora", 512, ()) is None
    assert memory_table.measured(results, "lora", 1024, ("--rank", "128")) is None
    name = next(iter(results[0]["rows"]))
    assert memory_table.measured([{"rows": {name: {"failed": "OutOfMemoryError", "about": {}}}}], "lora", 1024, ()) is None
    assert memory_table.measured([{"rows": {name: {"uncompiled": {"1": None}, "about": {}}}}], "lora", 1024, ()) is None


def test_a_line_by_hand(monkeypatch):
    """10 GiB for one picture, 13 for two, 8 compiled; 9 were measured, a tenth less."""
    class Plan:
        def __init__(self, peak):
            self.peak = peak * 2**30

    monkeypatch.setattr(trainers, "planned", lambda setting, batch: Plan(8 if "--compile" in setting.flags else 7 + 3 * batch))
    line = memory_table.line("LoRA", "lora", 1024, (), [result("2026-01-01", 9 * 2**30)], compiled=True)
    assert line == "| LoRA | 1024² | 10.0 | 3.00 | 8.0 | 9.0 (-10 %) |"
    assert memory_table.line("LoRA", "lora", 512, (), [], compiled=False) == "| LoRA | 512² | 10.0 | 3.00 | not measured |"


@pytest.mark.slow
def test_the_page_shows_the_table_of_today():
    """If not: python benchmarks/memory_table.py --write"""
    shown = memory_table.PAGE.read_text(encoding="utf-8").split(memory_table.BEGIN)[1].split(memory_table.END)[0]
    assert shown.strip() == memory_table.table().strip()
