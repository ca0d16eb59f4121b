"""The canvas: numbers of many layers have room, and the bytes depend on the data alone."""

import hashlib
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np

from libprune.report.canvas import png
from libprune.report.cut_pictures import draw_kept_share, draw_sensitivity
from libprune.report.gradient_pictures import draw_grad_comparison, draw_grad_heatmap
from tests.support.closure import ROOT
from tests.support.tables import PLAN_META, gradient_rows, plan_rows, sensitivity_rows


def test_eighty_layers_have_room_for_their_numbers():
    rows = gradient_rows(80)
    named = rows | {"parameter": np.array([f"{name}.of.a.long.name" for name in rows["parameter"]], dtype=object)}
    cut = draw_kept_share(plan_rows(80, np.arange(9.0)), PLAN_META)
    for figure, least in ((draw_grad_comparison(rows), 8), (cut, 8), (draw_grad_heatmap(named), 4)):
        png(figure)
        for axes in (one for one in figure.axes if one.get_label() != "<colorbar>"):
            labels = [tick for tick in axes.get_xticklabels() if tick.get_text()]
            boxes = [label.get_window_extent() for label in labels]
            assert len(boxes) >= least
            assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_the_bytes_depend_on_the_table_alone_not_on_home_rc_files_or_backends(tmp_path):
    """The same picture in a process with a home that is not there, a broken matplotlibrc and an unknown backend."""
    lines = ("font.family: Nowhere", "lines.linewidth: wide", "no.such.key: 1", "text.usetex: True")
    (tmp_path / "matplotlibrc").write_text("\n".join(lines))
    program = (
        "import hashlib; from libprune.report.canvas import png; "
        "from libprune.report.cut_pictures import draw_sensitivity; "
        "from tests.support.tables import sensitivity_rows; "
        "print(hashlib.sha256(png(draw_sensitivity(sensitivity_rows(2)))).hexdigest())"
    )
    odd = {"HOME": "/dev/null/home", "MPLCONFIGDIR": "/dev/null/config", "MPLBACKEND": "none such"}
    settings = os.environ | odd | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=settings, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.strip() == hashlib.sha256(png(draw_sensitivity(sensitivity_rows(2)))).hexdigest()
