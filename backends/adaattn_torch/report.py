"""model_report(): what a budget does to every layer and head of a model, for given inputs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from adaattn_core.budget import ErrorBudget
from adaattn_core.errors import ArgumentError
from adaattn_core.files import atomic_write
from adaattn_core.plan import Plan
from adaattn_core.policies.base import Policy
from adaattn_core.policies.calibrated import CalibratedPolicy
from adaattn_torch.entries.mode import enable
from adaattn_torch.entries.transformers import budgets
from adaattn_torch.info import AttentionInfo, listening
from adaattn_torch.rules import Rule


@dataclass(frozen=True, slots=True)
class HeadReport:
    """One head of one call.

    Attributes
    ----------
    layer : str
    call : int
        Number of the call of that layer, from 0.
    sequence, head : int
    structure, qk, pv : str
        What ran.
    share : float
        Share of the visible scores that entered the softmax.
    upper, confidence, rows : float
        The certificate: with this confidence, this share of the rows errs by at most `upper`.
    guarantee : str
    entropy, saturation : float or None
        Relative entropy and mean largest weight of the held-out rows, where measured.
    """

    layer: str
    call: int
    sequence: int
    head: int
    structure: str
    qk: str
    pv: str
    share: float
    upper: float
    confidence: float
    rows: float
    guarantee: str
    entropy: float | None
    saturation: float | None


@dataclass(frozen=True, slots=True)
class ModelReport:
    """What ran in every layer and head of a model.

    Attributes
    ----------
    heads : tuple of HeadReport
        In the order of the calls.
    plans : mapping of str to list of Plan
        Plans by layer name, one per call.
    fell_back : mapping of str to str
        Layers that PyTorch computed, and why.
    """

    heads: tuple[HeadReport, ...]
    plans: Mapping[str, list[Plan]]
    fell_back: Mapping[str, str]

    def policy(self) -> CalibratedPolicy:
        """Freeze the plans: every head keeps the most expensive plan that it was given."""
        return CalibratedPolicy.from_runs(self.plans)

    def save_plans(self, folder: str | Path) -> None:
        """Write one plan file per layer; ``CalibratedPolicy(folder)`` reads them."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.policy().save(folder)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {
            "heads": [asdict(head) for head in self.heads],
            "fell_back": dict(self.fell_back),
        }

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        text = json.dumps(self.to_json(), indent=1) + "\n"

        def write(file: BinaryIO) -> None:
            file.write(text.encode())

        atomic_write(Path(path), write)

    def __str__(self) -> str:
        """Return a table of layers: structures, share, largest certified error, entropy."""
        lines = [
            f"{'layer':<24} {'heads':>5} {'share':>6} {'upper':>9} {'entropy':>8}  structures"
        ]
        for layer in dict.fromkeys(head.layer for head in self.heads):
            rows = [head for head in self.heads if head.layer == layer]
            kinds = [f"{row.structure} {row.qk}/{row.pv}" for row in rows]
            counts = ", ".join(f"{kinds.count(kind)}x {kind}" for kind in dict.fromkeys(kinds))
            entropies = [row.entropy for row in rows if row.entropy is not None]
            entropy = f"{sum(entropies) / len(entropies):8.2f}" if entropies else f"{'-':>8}"
            share = sum(row.share for row in rows) / len(rows)
            upper = max(row.upper for row in rows)
            lines.append(
                f"{layer:<24} {len(rows):>5} {share:>6.2f} {upper:>9.2e} {entropy}  {counts}"
            )
        lines += [f"{layer:<24} PyTorch: {why}" for layer, why in self.fell_back.items()]
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw share and certified error, heads by layers (needs matplotlib)."""
        import matplotlib as mpl  # noqa: PLC0415 -- an optional package

        mpl.use("Agg")
        import matplotlib.pyplot as plt  # noqa: PLC0415
        import numpy as np  # noqa: PLC0415

        layers = list(dict.fromkeys(head.layer for head in self.heads))
        width = max((head.head for head in self.heads), default=0) + 1
        figure, axes = plt.subplots(1, 2, figsize=(8, 1.5 + 0.2 * len(layers)), squeeze=False)
        for axis, name in zip(axes[0], ("share", "upper"), strict=True):
            values = np.full((len(layers), width), np.nan)
            for head in self.heads:
                at = layers.index(head.layer), head.head
                values[at] = np.fmax(values[at], getattr(head, name))
            image = axis.imshow(values, aspect="auto", cmap="viridis")
            axis.set(xlabel="head", title=f"largest {name}")
            axis.set_yticks(range(len(layers)), layers, fontsize=7)
            figure.colorbar(image, ax=axis)
        figure.tight_layout()
        figure.savefig(path, dpi=130)
        plt.close(figure)


def model_report(
    model: torch.nn.Module,
    inputs: Any,
    budget: ErrorBudget | float | None = None,
    *,
    policy: Policy | str | None = None,
    rules: Iterable[Rule] = (),
) -> ModelReport:
    """Run a model once and report every layer's and head's decision and certificate.

    Works on any model that calls `torch.nn.functional.scaled_dot_product_attention`, and on
    transformers models set to ``"adaattn"`` or ``"sdpa"``; gradients are off.

    Parameters
    ----------
    model : torch.nn.Module
    inputs : mapping, tuple or Tensor
        What the model is called with: keywords, positions, or one tensor.
    budget, policy, rules
        See `adaattn_torch.enable`. For a model set to ``"adaattn"`` they replace the registered
        settings.

    Returns
    -------
    ModelReport

    Raises
    ------
    ArgumentError
        If the model made no attention call that could be seen.
    """
    found: list[AttentionInfo] = []
    rules = tuple(rules)
    mode = enable(budget, policy=policy, rules=rules, model=model)
    with torch.no_grad(), mode, budgets(budget, policy=policy, rules=rules), listening(found):
        if isinstance(inputs, Mapping):
            model(**inputs)
        elif isinstance(inputs, tuple):
            model(*inputs)
        else:
            model(inputs)
    if not found:
        raise ArgumentError(
            got="a model without a call of scaled_dot_product_attention",
            needed="attention that this library can see",
            do='use model.set_attn_implementation("adaattn"), or call PyTorch\'s function',
        )
    return _report(found)


def calibrate(
    model: torch.nn.Module,
    batches: Iterable[Any],
    budget: ErrorBudget | float,
    *,
    policy: Policy | str | None = None,
    rules: Iterable[Rule] = (),
) -> CalibratedPolicy:
    """Freeze what a budget chooses for a few batches: each head's most expensive plan.

    Parameters
    ----------
    model, budget, policy, rules
        See `model_report`.
    batches : iterable
        What the model is called with, once per batch; see `model_report`.

    Returns
    -------
    CalibratedPolicy
        Pass it as `policy`; ``save(folder)`` writes one plan file per layer.

    Raises
    ------
    ArgumentError
        If there is no batch; and as `model_report`.
    """
    rules = tuple(rules)
    plans: dict[str, list[Plan]] = {}
    for inputs in batches:
        report = model_report(model, inputs, budget, policy=policy, rules=rules)
        for layer, known in report.plans.items():
            plans.setdefault(layer, []).extend(known)
    if not plans:
        raise ArgumentError(
            got="no batch, or none that a backend planned for",
            needed="at least one batch through a model whose attention runs on a backend",
            do="pass a list of what the model is called with",
        )
    return CalibratedPolicy.from_runs(plans)


def _report(infos: list[AttentionInfo]) -> ModelReport:
    heads: list[HeadReport] = []
    plans: dict[str, list[Plan]] = {}
    fell_back: dict[str, str] = {}
    for info in infos:
        if info.fell_back is not None or info.plan is None or info.certificate is None:
            fell_back[info.layer] = info.fell_back or "no plan"
            continue
        known = plans.setdefault(info.layer, [])
        for index in info.plan:
            choice, certificate = info.plan[index], info.certificate[index]
            stats = info.stats.heads.get(index) if info.stats is not None else None
            measured = stats is not None and stats.sampled_rows > 0
            heads.append(
                HeadReport(
                    layer=info.layer,
                    call=len(known),
                    sequence=index[0],
                    head=index[1],
                    structure=choice.structure.kind,
                    qk=choice.qk,
                    pv=choice.pv,
                    share=info.facts[index].share,
                    upper=certificate.upper,
                    confidence=certificate.confidence,
                    rows=certificate.rows,
                    guarantee=certificate.guarantee,
                    entropy=stats.entropy_relative if stats is not None and measured else None,
                    saturation=stats.saturation if stats is not None and measured else None,
                )
            )
        known.append(info.plan)
    return ModelReport(tuple(heads), plans, fell_back)
