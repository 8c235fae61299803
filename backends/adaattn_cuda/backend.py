"""The backend ``cuda``: dense attention in f32, tf32, f16 and bf16, on any GPU from Ampere on.

On Hopper, `adaattn_cuda.adaptive` keeps sampled budgets: planned, run and certified on the
device.

A run allocates its two outputs from the caller's library, starts one kernel per pair of formats
on the caller's stream, and returns. It neither waits for the device nor copies anything to it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, cast

from numpy.typing import NDArray

from adaattn_core.backend import Capabilities, Gradients
from adaattn_core.budget import ErrorBudget
from adaattn_core.deciding import Adapted
from adaattn_core.decoding import DevicePages
from adaattn_core.errors import UnsupportedError
from adaattn_core.facts import RawResult, RowErrors, RunFacts
from adaattn_core.mask import Mask
from adaattn_core.plan import Plan
from adaattn_core.policies.table import DecisionTable
from adaattn_core.problem import AttentionProblem, HeadIndex
from adaattn_cuda import paged
from adaattn_cuda.adaptive import NARROW, SIZES, AdaptiveCalls
from adaattn_cuda.backward import attention_backward
from adaattn_cuda.device import driver
from adaattn_cuda.device.launch import Launch
from adaattn_cuda.device.library import library_of
from adaattn_cuda.device.views import contiguous, view
from adaattn_cuda.dispatch import (
    input_views,
    make_task,
    mask_key,
    mask_views,
    sink_view,
)
from adaattn_cuda.facts import LazyFacts
from adaattn_cuda.forward import attention_forward
from adaattn_cuda.groups import STRUCTURES, HeadGroups
from adaattn_cuda.jit.toolchain import nvrtc_version
from adaattn_cuda.kernels import sm80_attn_fwd as sm80
from adaattn_cuda.kernels.listed import Kept, ListedLaunch
from adaattn_cuda.kernels.smxx_exact_rows import oracle_upper, row_figures
from adaattn_cuda.kernels.smxx_operand_norms import FactsPlan, RowFacts
from adaattn_cuda.kernels.task import Recipe
from adaattn_cuda.quantised import QuantisedRun
from adaattn_cuda.recent import Recent
from adaattn_cuda.sampled import FarRun
from adaattn_cuda.starts import LAYOUTS_REMEMBERED, Started, Starts, allocator

__all__ = ["CudaBackend"]


class CudaBackend:
    """See the module's text. One instance serves every device and every thread."""

    name = "cuda"

    def __init__(self) -> None:
        driver.load_driver()
        self._groups = HeadGroups()
        self._starts = Starts()
        self._facts: Recent[FactsPlan] = Recent(LAYOUTS_REMEMBERED)
        self._last = threading.local()
        self._adaptive = AdaptiveCalls()
        self._paged = paged.PagedRuns()

    def capabilities(self) -> Capabilities:
        """Dense, block-sparse and landmarks; nothing is measured for policies or certificates.

        In four formats anywhere; on Hopper also with queries and keys in i8 and with P V in
        e4m3, of bf16 and f16 arrays.
        """
        device = max(driver.current_device(), 0)
        hopper = driver.device_facts(device).arch == "sm_90a"
        return Capabilities(
            qk_formats=sm80.OPERAND_FORMATS + (("i8",) if hopper else ()),
            pv_formats=sm80.OPERAND_FORMATS + (("e4m3",) if hopper else ()),
            structures=STRUCTURES,
            array_devices=("cuda",),
            target="sm90" if hopper else "sm80",
            rules=(("softcap", ("dense",)), ("sinks", ("dense",))),
            sizes=SIZES,
            rule_formats=sm80.OPERAND_FORMATS,
            paged=paged.STRUCTURES,
        )

    def decides(self) -> Capabilities:
        """Landmarks besides, on Hopper, in 16 bits; see `adaattn_core.deciding.Decides`.

        Formats of 8 bits are no candidates of a table, whose errors would have to be judged:
        `Capabilities.narrow` has dense heads run in them, certified, and again if that fails.
        """
        can = self.capabilities()
        if can.target != "sm90":
            return replace(can, structures=("dense",))
        return replace(
            can,
            qk_formats=sm80.OPERAND_FORMATS,
            pv_formats=sm80.OPERAND_FORMATS,
            structures=("dense", "landmark"),
            narrow=NARROW,
        )

    def adapt(
        self,
        problem: AttentionProblem,
        table: DecisionTable,
        budget: ErrorBudget,
        *,
        seed: int | None,
        profile: bool = False,
    ) -> Adapted | str:
        """Plan, run and certify on the device; see `adaattn_core.deciding.Decides.adapt`."""
        found = self._adaptive.adapt(problem, table, budget, seed=seed, profile=profile)
        self._last.launches = self._last.names = ()
        return found

    def repeat(
        self,
        problem: AttentionProblem,
        plan: Plan,
        budget: ErrorBudget,
        *,
        profile: bool = False,
    ) -> Adapted | str:
        """Run a plan of `adapt` again; see `adaattn_core.deciding.Repeats.repeat`."""
        if self.decides().target != "sm90":
            return "the planning kernels are Hopper's"
        found = self._adaptive.repeat(problem, plan, budget, profile=profile)
        self._last.launches = self._last.names = ()
        return found

    def run(
        self,
        problem: AttentionProblem,
        plan: Plan,
        *,
        workspace: Any = None,
        heads: Collection[HeadIndex] | None = None,
        into: RawResult | None = None,
    ) -> RawResult:
        """Start the plan on the caller's stream; see `adaattn_core.backend.Backend.run`.

        Raises
        ------
        UnsupportedError
            If a structure, a format, a dtype or a layout is not one of `capabilities`.
        ShapeError
            If the arrays and the mask are on different devices.
        AdaAttnError
            If device memory runs out, or the driver reports an error.
        """
        if workspace is not None:
            raise UnsupportedError(
                got="a workspace",
                needed="none: this backend measures nothing",
                do="pass the workspace to the backend that made it",
            )
        if problem.paged is not None:
            raw, decodes = self._paged.run(problem, plan, heads, into)
            self._last.launches = tuple(decodes)
            self._last.names = [decode.name for decode in decodes]
            self._last.device = view(problem.query).device
            self._last.workspace_bytes = sum(decode.workspace_bytes for decode in decodes)
            return raw
        query, key, value = input_views(problem)
        library = library_of(problem.query)
        rows, dim_v = query.shape[:3], value.shape[3]
        if into is None:  # the library's own, C-contiguous
            device = query.device
            out, lse, written = library.outputs((*rows, dim_v), problem.dtype, problem.query)
            out_view = contiguous(written[0], (*rows, dim_v), query.dtype, device)
            lse_view = contiguous(written[1], rows, "f32", device)
            groups = (
                self._groups.of_plan(plan)
                if heads is None
                else self._groups.of_heads(plan, heads)
            )
        else:
            out_view, lse_view = view(into.out), view(into.lse)
            groups = self._groups.of_heads(plan, plan.heads if heads is None else heads)
        masks = mask_views(problem.mask, (*rows, problem.len_kv), query.device)
        sinks = sink_view(problem)
        arrays = (query, key, value, out_view, lse_view, *masks)
        stream = library.stream(query.device)
        # Everything but the addresses; of those, only whether rows begin on 16 bytes.
        layout = (
            (query[1:], key[1:], value[1:], out_view[1:]),
            (query.pointer | key.pointer | value.pointer | out_view.pointer) & 15,
            mask_key(problem.mask),
        )
        started: list[Started] = []
        ran_dense: set[HeadIndex] = set()
        for recipe, own in groups.items():
            if recipe.sampled:
                found, odd = self._starts.chosen(
                    problem, plan, arrays, sinks, recipe, own, stream
                )
                started += found
                ran_dense |= odd
                if not odd:
                    continue
                recipe, own = recipe._replace(sampled=False), tuple(sorted(odd))
            one = self._starts.one(problem, arrays, sinks, layout, recipe, own, stream)
            started.append((*one, own))
        launches = [launch for launch, _, _ in started]
        self._last.launches = [launch for launch in launches if not isinstance(launch, FarRun)]
        self._last.names, self._last.device = [x.name for x in launches], query.device
        inputs = (query, key, value, out_view)
        known_by = layout, *(None if mask is None else mask[1:] for mask in masks)
        figures = self._facts.get(known_by)
        if figures is None:
            figures = FactsPlan(problem, inputs, masks, stream)  # may compile
            self._facts.put(known_by, figures)
        allowed, bias = (0 if mask is None else mask.pointer for mask in masks)
        records = RowFacts(figures, inputs, (allowed, bias), problem.query, library, stream)
        kept = records.workspace_bytes + sum(
            launch.workspace_bytes + sum(launch.scratch_bytes) for launch in launches
        )
        self._last.workspace_bytes = kept
        step_keys = min((launch.step_keys for launch in launches), default=1)
        chosen = plan.heads if heads is None else {index: plan[index] for index in heads}
        quantised: dict[HeadIndex, QuantisedRun] = {}
        partial: dict[HeadIndex, Callable[[HeadIndex], Kept]] = {}
        for launch, run, heads_run in started:
            for index in chosen if heads_run is None else heads_run:
                if run is not None:
                    quantised[index] = run
                if isinstance(launch, ListedLaunch | FarRun):
                    partial[index] = launch.kept
        if into is None:
            facts = LazyFacts(problem, records, chosen, step_keys, quantised, partial)
            told = cast("dict[HeadIndex, RunFacts]", facts)
            return RawResult(out, lse, told, ran_dense)
        into.ran_dense |= ran_dense
        cast(LazyFacts, into.facts).replan(records, chosen, step_keys, quantised, partial)
        return into

    def row_errors(
        self,
        problem: AttentionProblem,
        raw: RawResult,
        rows: Mapping[HeadIndex, NDArray[Any]],
        *,
        enough: float = 0.0,
    ) -> dict[HeadIndex, RowErrors]:
        """Compare returned rows with exact ones in f64; see `adaattn_core.backend.Samples`.

        Waits for the device. Whatever is enough: f64 costs little there.
        """
        query, key, value = input_views(problem)
        masks = mask_views(problem.mask, (*query.shape[:3], problem.len_kv), query.device)
        sinks = sink_view(problem)
        arrays = (query, key, value, view(raw.out), view(raw.lse), *masks)
        plain = Recipe(problem.dtype, problem.dtype)
        task = make_task(problem, arrays, plain, None, sinks)
        stream = library_of(problem.query).stream(query.device)
        found = row_figures(task, rows, allocator(problem), stream)
        errors = {}
        for index, figures in found.items():
            facts = raw.facts[index]
            size = problem.scale * facts.query_norm_upper * facts.key_norm_upper
            upper = oracle_upper(
                problem.dim_qk, facts.keys_max, size + facts.bias_max_abs + facts.sink_abs,
                facts.value_norm_upper,
            )  # fmt: skip
            errors[index] = RowErrors(figures[:, 0], figures[:, 1], upper)
        return errors

    def forward(
        self,
        query: Any,
        key: Any,
        value: Any,
        *,
        mask: Mask | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Any = None,
    ) -> tuple[Any, Any]:
        """Compute exact attention without plan, facts or certificate, for the cost of a launch.

        Parameters
        ----------
        query : array, shape (batch, heads_q, len_q, dim_qk)
        key : array, shape (batch, heads_kv, len_kv, dim_qk)
        value : array, shape (batch, heads_kv, len_kv, dim_v)
            Torch tensors or CuPy arrays as they are, other libraries' through DLPack (of
            cuda.core's views CuPy makes arrays): on one CUDA device, all f32, f16 or bf16,
            the last axis contiguous. heads_q must be a multiple of heads_kv; head dims are 1
            to 256.
        mask : Mask, optional
            Any mask; arrays in it on the same device. Default: every key is visible.
        scale : float, optional
            Factor on the scores, > 0. Default 1/sqrt(dim_qk).
        softcap : float, optional
            Scores become ``softcap * tanh(score / softcap)`` before the mask. Default: none.
        sinks : array, optional, shape (heads_q,)
            Contiguous float32 on the same device, of the arrays' library: one more logit in the
            denominator of each head's rows. Default: none.

        Returns
        -------
        out : array, shape (batch, heads_q, len_q, dim_v)
            In the library and dtype of `query`; contiguous; rows that see nothing are 0.
        lse : array of float32, shape (batch, heads_q, len_q)
            Natural log, sinks counted; -inf, or the sink, where a row sees nothing.

        Raises
        ------
        ShapeError, DTypeError, ArgumentError
            If the arguments do not fit together, or are on different devices.
        UnsupportedError
            For float64, host arrays, arrays that require a gradient, a stride other than 1
            along the last axis, head dims above 256, lengths above 2^29; and for the first call
            of a shape while its stream records a CUDA graph.
        KernelCompileError
            If the first call of its kind cannot compile its kernel.
        AdaAttnError
            If device memory runs out, or the driver reports an error.

        Notes
        -----
        It works on the stream that is current in the caller's library and returns without
        waiting. Kernel choice and launch plan are remembered by shapes, strides, dtypes, mask
        and scale.
        """
        return attention_forward(
            query, key, value, mask=mask, scale=scale, softcap=softcap, sinks=sinks
        )

    def backward(
        self,
        query: Any,
        key: Any,
        value: Any,
        grad_out: Any,
        *,
        out: Any = None,
        lse: Any = None,
        grad_lse: Any = None,
        mask: Mask | None = None,
        scale: float | None = None,
        need_bias: bool = False,
        deterministic: bool = False,
        softcap: float | None = None,
        sinks: Any = None,
    ) -> Gradients:
        """Compute gradients; see `adaattn_core.backend.Differentiates.backward`.

        The arrays are those that `forward` takes, and the same errors are raised; a call whose
        gradient no kernel takes is refused with `UnsupportedError`. Without `out` and `lse` the
        exact forward runs first.
        """
        return attention_backward(
            query, key, value, grad_out, out=out, lse=lse, grad_lse=grad_lse, mask=mask,
            scale=scale, need_bias=need_bias, deterministic=deterministic, softcap=softcap,
            sinks=sinks,
        )  # fmt: skip

    def decode(
        self,
        query: Any,
        pages: DevicePages,
        *,
        scale: float,
        causal: bool = True,
        left: int = -1,
        lam: float = 0.0,
    ) -> tuple[Any, Any, Any]:
        """Attend over a growing cache; see `adaattn_core.decoding.Decodes.decode`."""
        return self._paged.decode(query, pages, scale=scale, causal=causal, left=left, lam=lam)

    def provenance(self) -> dict[str, str]:
        """Device, compiler, and kernels and workspace of this thread's last run.

        ``workspace_bytes`` is the device memory beside inputs and outputs: work lists, kept
        with the launch plan, and the figures of the certificate, kept with the result.
        """
        device = getattr(self._last, "device", max(driver.current_device(), 0))
        facts = driver.device_facts(device)
        return {
            "device": facts.name,
            "arch": facts.arch,
            "nvrtc": nvrtc_version(),
            "kernels": "; ".join(getattr(self._last, "names", ())),
            "workspace_bytes": str(getattr(self._last, "workspace_bytes", 0)),
        }

    def last_launches(self) -> tuple[Launch, ...]:
        """Return what this thread's last run started, ready for other addresses."""
        return tuple(getattr(self._last, "launches", ()))
