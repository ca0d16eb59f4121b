"""All faults of a params file that can be known before anything runs."""

from pathlib import Path

from libprune.engine.yaml_file import NO_LINES, Lines
from libprune.foresight.budget import budget_faults
from libprune.foresight.given import given_faults
from libprune.foresight.settings import setting_faults
from libprune.pipeline.faults import params_error
from libprune.pipeline.params import Params, read_params


def foresee(path: Path) -> Params:
    """The params of a file, of which everything is checked that can be known beforehand in seconds.

    A file with keys or values that are not understood is not looked at further. Of models and texts of the hub nothing
    is said, for nothing is fetched.

    Raises:
        ParamsError: with every fault, each with its line.
    """
    params, lines = read_params(path)
    require_possible(params, str(path), lines)
    return params


def require_possible(params: Params, where: str, lines: Lines = NO_LINES) -> None:
    """Stop if params ask for what cannot be.

    Args:
        params: valid each by itself.
        where: the name of their file.
        lines: of the file, if there is one.

    Raises:
        ParamsError: with every fault.
    """
    faults = [*setting_faults(params), *given_faults(params)]
    faults += [] if faults else budget_faults(params)
    if faults:
        raise params_error(where, faults, lines)
