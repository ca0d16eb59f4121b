"""The exponents of a scaling law are those that its numbers were made with, and a bend shows between sizes."""

from bench.scaling import SHAPES, STAGES, exponents, table


def test_exponents_are_those_of_a_power_law_and_steps_show_a_bend():
    sizes = [1e8, 4e8, 1.6e9]
    assert exponents(sizes, [3 * size**1.5 for size in sizes]) == "1.50 (1.50, 1.50)"
    assert exponents(sizes, [1.0, 4.0, 64.0]) == "1.50 (1.00, 2.00)"
    assert exponents(sizes[:1], [1.0]) == exponents(sizes, [0.0, 1.0, 2.0]) == ""


def test_sizes_that_are_not_measured_yet_are_left_out():
    rows = [
        {
            "model": name,
            "stage": stage,
            "seconds": 5.0 + layers / 1e7,
            "peak": layers,
            "written": layers,
            "layers": layers,
        }
        for name, layers in (("135M", 1e8), ("1B", 4e8))
        for stage in ("imports", STAGES[0])
    ]
    rows[0]["seconds"] = rows[2]["seconds"] = 5.0
    lines = table(rows).splitlines()
    assert lines[0].startswith("| stage; 135M, 1B |") and len(lines) == 2 + len(STAGES)
    assert lines[2].startswith("| prepare | 10, 40 | 1.00 (1.00) | 0.1, 0.4 | 1.00 (1.00) |")
    assert "-, -" in lines[3]
    assert set(SHAPES) == {"135M", "0.5B", "1B"}
