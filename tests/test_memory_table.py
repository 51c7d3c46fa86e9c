"""The table of predicted and measured memory: what it reads from results, and that the page shows what the plan says."""

import pytest

from benchmarks import memory_table, real_geometry, trainers


def result(date, peak, flags=("--compile",)):
    row = next(row for row in real_geometry.ROWS if row.trainer == "lora" and row.resolution == 1024 and row.flags == flags)
    return {"rows": {row.name: {"about": {"date": date}, "uncompiled": {"1": {"peak_allocated": peak}}}}}


def test_the_newest_measurement_of_the_same_flags_counts():
    """Two results; a row that failed, and one whose batch of 1 did not fit, say nothing."""
    checkpointed = result("2026-01-04", 3, ("--gradient_checkpointing", "--compile"))
    results = [result("2026-01-02", 5), result("2026-01-03", 7), result("2026-01-01", 9), checkpointed]
    assert memory_table.measured(results, "lora", 1024, ()) == 7
    assert memory_table.measured(results, "lora", 1024, ("--gradient_checkpointing",)) == 3
    assert memory_table.measured(results, "lora", 512, ()) is None
    assert memory_table.measured(results, "lora", 1024, ("--rank", "128")) is None
    name = next(iter(results[0]["rows"]))
    assert memory_table.measured([{"rows": {name: {"failed": "OutOfMemoryError", "about": {}}}}], "lora", 1024, ()) is None
    assert memory_table.measured([{"rows": {name: {"uncompiled": {"1": None}, "about": {}}}}], "lora", 1024, ()) is None


def test_a_line_by_hand(monkeypatch):
    """10 GiB for one picture, 13 for two, 16 for three; 9 were measured, a tenth less."""

    class Plan:
        def __init__(self, peak):
            self.peak = peak * 2**30

    monkeypatch.setattr(trainers, "planned", lambda setting, batch: Plan(7 + 3 * batch))
    line = memory_table.line("LoRA", "lora", 1024, (), [result("2026-01-01", 9 * 2**30)])
    assert line == "| LoRA | 1024² | 10.0 | 3.00 | 9.0 (-10 %) |"
    assert memory_table.line("LoRA", "lora", 512, (), []) == "| LoRA | 512² | 10.0 | 3.00 |"
    assert memory_table.line("LoRA", "lora", 512, (), [result("2026-01-01", 1)]) == "| LoRA | 512² | 10.0 | 3.00 | not measured |"


ROWS = [(row, side) for _, rows, sides in memory_table.TABLES for side in sides for row in rows]
SHORT = {  # rows take seconds each: one of each way to train
    ("LoRA, rank 16, base in nf4, checkpointed", 1024), ("full, bf16, 8-bit Adam, checkpointed, fused backward", 1024),
    ("ReFL, full, AdamW, checkpointed", 512),
}  # fmt: skip


@pytest.fixture(scope="module")
def shown():
    page = memory_table.PAGE.read_text(encoding="utf-8").split(memory_table.BEGIN)[1].split(memory_table.END)[0]
    return [line for line in page.splitlines() if line and not line.startswith("|---")]


def test_the_page_has_every_row_of_the_table_in_its_order(shown):
    first = [line.split(" | ")[0].removeprefix("| ") for line in shown]
    assert first == [name for model, rows, sides in memory_table.TABLES for name in (model, *(row[0] for _ in sides for row in rows))]


@pytest.mark.slow
@pytest.mark.parametrize(("row", "side"), [
    pytest.param(row, side, id=f"{row[0]}, {side}", marks=() if (row[0], side) in SHORT else pytest.mark.long) for row, side in ROWS
])  # fmt: skip
def test_the_page_shows_the_table_of_today(shown, row, side):
    """If not: python benchmarks/memory_table.py --write"""
    name, trainer, flags = row
    assert memory_table.line(name, trainer, side, flags, memory_table.read_results()) in shown
