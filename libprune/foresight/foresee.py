"""All faults of a params file that can be known before anything runs."""

from pathlib import Path

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
    faults = [*setting_faults(params), *given_faults(params)]
    faults += [] if faults else budget_faults(params)
    if faults:
        raise params_error(str(path), faults, lines)
    return params
