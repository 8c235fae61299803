"""CalibratedPolicy: plans decided once, from a few batches, and kept per layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from adaattn_core.checks import shown
from adaattn_core.errors import PlanError
from adaattn_core.files import as_path
from adaattn_core.plan import HeadPlan, Plan
from adaattn_core.policies.base import PolicyContext, safer
from adaattn_core.problem import HeadIndex
from adaattn_core.stats import HeadStats, MeasureRequest
from adaattn_core.structure import Dense

NO_FAR_FIELD = "landmarks need a causal or full mask"


class CalibratedPolicy:
    """Use saved plans; nothing is measured, so results are reproducible and batch-invariant.

    Parameters
    ----------
    path : str or Path, optional
        A plan file, or a folder of them, one per layer, as `save` writes it.
    plans : mapping of str to Plan, optional
        Plans by layer name, instead of a path.

    Notes
    -----
    A plan speaks per head. Where it was made for one sequence, it is used for every sequence.
    Landmark heads run dense under masks that leave no far field (windows that cut the first
    keys off, boolean and additive arrays), and the plan's reason says so.
    """

    name = "calibrated"

    def __init__(
        self, path: str | Path | None = None, plans: Mapping[str, Plan] | None = None
    ) -> None:
        if (path is None) == (plans is None):
            raise PlanError(
                got="both a path and plans" if path is not None else "no plan",
                needed="exactly one of path and plans",
                do="pass the file or folder that Plan.save wrote, or plans by layer name",
            )
        self.plans = _load(as_path(path)) if plans is None else _checked(plans)

    @classmethod
    def from_runs(cls, runs: Mapping[str, Iterable[Plan]]) -> CalibratedPolicy:
        """Merge plans of several batches: each head gets the most expensive one seen."""
        merged = {}
        for layer, plans in runs.items():
            heads: dict[HeadIndex, HeadPlan] = {}
            for plan in plans:
                for (_, head), choice in plan.heads.items():
                    index = (0, head)
                    known = heads.get(index)
                    if known is None or choice.cost_estimate > known.cost_estimate:
                        heads[index] = choice
            merged[layer] = Plan(heads=heads, policy=cls.name, layer=layer)
        return cls(plans=merged)

    def save(self, folder: str | Path) -> None:
        """Write one plan file per layer into an existing folder.

        What a file system may take for more than a name (``/``, a leading dot, ...) is written
        as in a URL: layer ``../x`` becomes ``%2E.%2Fx.json``.

        Raises
        ------
        PlanError
            If two layers would share a file.
        FileError
            If the folder cannot be written.
        """
        names = {layer: _file_name(layer) for layer in self.plans}
        if len({name.casefold() for name in names.values()}) != len(names):
            raise PlanError(
                got=f"layers {shown(sorted(names))}",
                needed="names that differ in more than upper and lower case",
                do="rename layers; one without a name is saved as plan.json",
            )
        for layer, plan in self.plans.items():
            replace(plan, layer=layer).save(as_path(folder) / names[layer])

    def request(self, context: PolicyContext) -> MeasureRequest | None:
        """Nothing needs to be measured."""
        return None

    def decide(
        self, stats: Mapping[HeadIndex, HeadStats], context: PolicyContext
    ) -> dict[HeadIndex, HeadPlan]:
        """Return the layer's saved plan, head by head."""
        plan = self.plans.get(context.layer)
        if plan is None and len(self.plans) == 1:
            plan = next(iter(self.plans.values()))
        if plan is None:
            raise PlanError(
                got=f"layer {context.layer!r}",
                needed=f"one of the calibrated layers: {', '.join(sorted(self.plans))}",
                do="pass layer=, or calibrate this layer too",
            )
        out = {}
        for sequence, head in context.shapes:
            choice = plan.heads.get((sequence, head)) or plan.heads.get((0, head))
            if choice is None:
                raise PlanError(
                    got=f"a plan without head {head}",
                    needed=f"a plan for every head of layer {context.layer!r}",
                    do="calibrate with the same model",
                )
            if choice.structure.kind == "landmark" and sequence not in context.prefix:
                choice = replace(choice, structure=Dense(), reason=f"dense: {NO_FAR_FIELD}")
            out[sequence, head] = choice
        return out

    def escalate(
        self, plan: HeadPlan, upper: float, stats: HeadStats, context: PolicyContext
    ) -> HeadPlan | None:
        """Climb the common ladder."""
        return safer(plan, upper, stats, context)


def _file_name(layer: str) -> str:
    name = quote(layer or "plan", safe="", errors="backslashreplace")
    return ("%2E" + name[1:] if name.startswith(".") else name) + ".json"


def _checked(plans: Mapping[str, Plan]) -> dict[str, Plan]:
    if not isinstance(plans, Mapping) or not all(
        isinstance(layer, str) and isinstance(plan, Plan) for layer, plan in plans.items()
    ):
        raise PlanError(
            got=f"plans={shown(plans)}",
            needed="a mapping of layer names to Plan",
            do="read them with Plan.load, or pass the path of their folder",
        )
    return dict(plans)


def _load(path: Path) -> dict[str, Plan]:
    if path.is_dir():
        plans = [Plan.load(file) for file in sorted(path.glob("*.json"))]
        if not plans:
            raise PlanError(
                got=f"{path}: no .json file", needed="saved plans", do="calibrate first"
            )
        by_layer = {plan.layer: plan for plan in plans}
        if len(by_layer) != len(plans):
            raise PlanError(
                got=f"{path}: {len(plans)} plans of {len(by_layer)} layers",
                needed="one plan for each layer",
                do="delete the plans that are out of date",
            )
        return by_layer
    plan = Plan.load(path)
    return {plan.layer: plan}
