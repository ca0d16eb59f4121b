"""Pruning a network of the user's own: statistics once, then any number of settings."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from libprune.allocation.block_worth import require_comparable
from libprune.allocation.of_modules import allocate_network
from libprune.collection.calibration import HELD_OUT_EVERY, Run
from libprune.engine.describe_module import describe_module
from libprune.engine.errors import LibpruneError
from libprune.engine.module_family import NetworkFamily
from libprune.engine.plan import Plan
from libprune.engine.surgery import masked
from libprune.engine.tables import Columns
from libprune.models.compute import require_known, require_precise
from libprune.models.folder import WeightFiles
from libprune.models.parallel import World
from libprune.models.samples import Samples, digest, loss_signature
from libprune.pipeline.artifacts import read_json, write_architecture, write_units
from libprune.pipeline.atomic import remove, writing_folder
from libprune.pipeline.layout import Layout
from libprune.pipeline.sections import Activations, Allocate, Compute, Gradients, Hessian, Score
from libprune.pipeline.shards import read_meta
from libprune.repair.blocks import Epochs
from libprune.repair.least_squares import Fit
from libprune.repair.of_modules import (
    EPOCHS,
    fitted_state,
    repair_modules,
    repair_modules_in_order,
    set_weights,
    train_modules,
)
from libprune.results.module_folder import (
    WEIGHTS,
    Pruned,
    difference,
    outputs,
    require_alike,
    require_fits,
    sliced,
    stored,
)
from libprune.results.proof import agrees
from libprune.scoring.criteria import find_criterion
from libprune.scoring.expression import named_criteria
from libprune.scoring.fusion import READS_LOSSES
from libprune.scoring.score import score_layout
from libprune.statistics.of_modules import (
    estimation,
    measure_module_activations,
    measure_module_gradients,
    measure_module_hessian,
)
from libprune.statistics.weights import weight_columns

_CHECKED = 8
"""Samples on which the sliced network is compared with the masked one."""


class Network:
    """A network with its family, calibration samples, and a folder for what is collected of them.

    The statistics that a criterion or a repair reads are collected when they are first asked for, and kept in the
    folder: other criteria, ratios and repairs start from there, also in another process. What belongs to other
    weights or samples is collected anew.

    Attributes:
        architecture: the description.
    """

    def __init__(
        self,
        network: nn.Module,
        family: NetworkFamily | Path | str,
        samples: Samples,
        folder: Path | str,
        batch: int = 64,
        hessian: Hessian | None = None,
    ) -> None:
        """Describe a network.

        Args:
            network: any module; a copy in evaluation mode is worked on.
            family: its description, or the file of it.
            samples: what the statistics are collected on. Every eighth is held out from repairs to judge them by.
            folder: for the artifacts.
            batch: samples in one pass.
            hessian: how second order is estimated; the empirical Fisher information if not given.

        Raises:
            FamilyError: if the family does not describe the network.
            LibpruneError: if it does not take and give one tensor, computes in half precision or on a device of another
                kind than `cpu` and `cuda`, the folder holds other things or is a file, the batch holds no sample, or
                second order is not to be estimated.
        """
        if batch < 1:
            raise LibpruneError(f"batch = {batch} is no number of samples; give a whole number from 1")
        if Path(folder).exists() and not Path(folder).is_dir():
            raise LibpruneError(f"{folder} is a file; name a folder for what is collected")
        if hessian is not None and hessian.estimator == "none":
            raise LibpruneError("hessian.estimator is none; choose fisher, fisher_sample or hutchinson")
        self.family = NetworkFamily.of(family)
        self._network = copy.deepcopy(network).eval()
        self._samples, self._layout = samples, Layout(Path(folder))
        self._hessian = hessian or Hessian(estimator="fisher")
        require_precise(self._network)
        self._device = next(self._network.parameters()).device
        require_known(self._device)
        name = digest(stored(self._network).items(), self.family.model_dump_json())
        few = samples[:_CHECKED].to(self._device)
        outputs(self._network, few.inputs)
        self.architecture = describe_module(self._network, self.family, few[:2].inputs, name)
        self._prepare()
        self._run = Run(
            architecture=self.architecture,
            weights=WeightFiles(self._layout.model),
            sequences=samples,
            device=self._device,
            compute=Compute(),
            world=World(),
            meta={
                "model": name,
                "tokens": digest(
                    [("inputs", samples.inputs), ("targets", samples.targets)], loss_signature(few, self._network)
                ),
                "sequences": len(samples),
            },
            work=self._layout.root / ".work",
            at_once=batch,
        )

    def scores(self, score: Score) -> tuple[Columns, dict[str, Any]]:
        """The importance of every unit, and the table's metadata.

        Raises:
            LibpruneError: for criteria that are unknown, do not go together, or need a language model.
        """
        if score.fusion in READS_LOSSES:
            raise LibpruneError(f"fusion = {score.fusion!r} needs the ablation stage, which networks do not have")
        if score.fisher_over == "token":
            raise LibpruneError("fisher_over = 'token' needs a language model; networks have samples; set 'sequence'")
        self._prepare()
        for name in named_criteria(score):
            for stage in find_criterion(name).stages:
                self._collect(stage)
        return score_layout(self._layout, score)

    def plan(self, score: Score, allocate: Allocate) -> Plan:
        """Decide which units stay.

        Args:
            score: the criterion.
            allocate: ratio, method (`uniform`, `global`, `retention`), objective (`parameters`, `macs`), floors.

        Raises:
            BudgetError: if the ratio cannot be reached.
        """
        table, meta = self.scores(score)
        require_comparable(meta, allocate)
        return allocate_network(self.architecture, table, allocate)

    def prune(self, plan: Plan, repair: str = "local", damping: float | None = None, epochs: Epochs = EPOCHS) -> Pruned:
        """Slice, repair, and prove that the sliced network computes what the masked one does.

        Args:
            plan: which units stay.
            repair: `none`; `local`, from cached moments; `sequential`, map by map on what the pruned network hands on;
                `block`, `local` and then a training of all weights to give the dense network's outputs.
            damping: ridge of the repair; None to choose it on held-out samples.
            epochs: how `block` trains.

        Raises:
            LibpruneError: for another repair, a damping that is not above 0, a plan of another network, too few samples
                for the repair, outputs that cannot be trained, or if the outputs differ.
        """
        if repair not in self._repairs:
            raise LibpruneError(f"repair = {repair!r} is unknown; choose {', '.join(self._repairs)}")
        require_fits(self.architecture, plan)
        self._require_held_out(repair, damping)
        fits = self._repairs[repair](plan, damping)
        if repair == "block":
            samples = self._samples.to(self._device)
            fits = train_modules(self._network, self.architecture, plan, samples, fits, epochs)
        whole = copy.deepcopy(self._network)
        set_weights(whole, fits)
        smaller, numbers = sliced(whole, self.architecture, plan, self.family.numbers(whole))
        return Pruned(smaller, self.architecture, plan, repair, fits, numbers, self._prove(whole, smaller, plan))

    @property
    def _repairs(self) -> dict[str, Callable[[Plan, float | None], list[Fit]]]:
        """By name the fits of a repair; of `block` those with which the training begins."""
        fitted = {"local": self._local, "sequential": self._sequential, "block": self._local}
        return {"none": lambda plan, damping: [], **fitted}

    def _require_held_out(self, repair: str, damping: float | None) -> None:
        if repair == "none" or len(self._samples) >= HELD_OUT_EVERY:
            return
        few = f"there are {len(self._samples)} samples, of which none is held out to"
        if repair == "block":
            raise LibpruneError(f"{few} judge the training by; take at least {HELD_OUT_EVERY}")
        if damping is None:
            raise LibpruneError(
                f"{few} choose the damping of a repair by; take at least {HELD_OUT_EVERY}, or name one, such as "
                "damping=0.001"
            )

    def _local(self, plan: Plan, damping: float | None) -> list[Fit]:
        self._prepare()
        self._collect("activations")
        state = {name: tensor.cpu() for name, tensor in fitted_state(self._network).items()}
        return repair_modules(self._layout, self.architecture, plan, state, damping)

    def _sequential(self, plan: Plan, damping: float | None) -> list[Fit]:
        batches = [batch.to(self._device) for batch in self._samples.passes(self._run.at_once)]
        return repair_modules_in_order(self._network, self.architecture, plan, batches, damping)

    def _prove(self, whole: nn.Module, smaller: nn.Module, plan: Plan) -> dict[str, float]:
        inputs = self._samples[:_CHECKED].to(self._device).inputs
        differs, scale = self._compared(whole, smaller, plan, inputs)
        if not agrees(differs, scale) and inputs.dtype != torch.float64:
            # Sums over fewer terms round otherwise, and a unit near its threshold may fire for that alone.
            exact = inputs.double() if inputs.is_floating_point() else inputs
            differs, scale = self._compared(copy.deepcopy(whole).double(), copy.deepcopy(smaller).double(), plan, exact)
        require_alike(differs, scale, self.family.family, "the sliced network's outputs differ from the masked one's")
        return {"difference": differs, "scale": scale}

    def _compared(self, whole: nn.Module, smaller: nn.Module, plan: Plan, inputs: Tensor) -> tuple[float, float]:
        with masked(whole, self.architecture, plan), torch.no_grad():
            expected = whole(inputs)
        return difference(smaller, inputs, expected)

    def _prepare(self) -> None:
        """Write the dense weights and their description, if they are not there, and remove those of another network.

        Raises:
            LibpruneError: if something else is in their place.
        """
        layout, name = self._layout, self.architecture.fingerprint
        collected = (layout.gradients, layout.hessian, layout.activations)
        there = [path for path in (layout.weights, layout.model, *collected) if path.exists()]
        known = read_json(layout.architecture, "prepare") if layout.architecture.exists() else {}
        if layout.weights.exists() and known.get("fingerprint") == name:
            return
        if (known or there) and known.get("head") != self.architecture.head:
            raise LibpruneError(
                f"{(there or [layout.architecture])[0]} is not of a network that was pruned here; name another folder"
            )
        for path in there:
            remove(path)
        write_architecture(layout, self.architecture)
        with writing_folder(layout.model) as folder:
            save_file({name: tensor.contiguous() for name, tensor in stored(self._network).items()}, folder / WEIGHTS)
        columns = partial(weight_columns, self.architecture, dict(self._network.named_parameters()))
        write_units(layout.weights, self.architecture, columns, {"model": name})

    def _collect(self, stage: str) -> None:
        """Run a collecting stage, unless its artifact is there and of this network and these samples."""
        target = self._layout.root / stage
        wanted = self._run.meta | (estimation(self._hessian) if stage == "hessian" else {})
        if target.exists() and read_meta(target, stage).items() >= wanted.items():
            return
        if stage == "gradients":
            measure_module_gradients(self._run, self._network, target, Gradients(storage_dtype="float32"))
        elif stage == "hessian":
            measure_module_hessian(self._run, self._network, target, self._hessian)
        else:
            measure_module_activations(self._run, self._network, target, Activations())
