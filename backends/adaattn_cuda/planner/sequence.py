"""The launches of an adaptive call in order, with the addresses that they lack."""

from __future__ import annotations

from adaattn_cuda.device import driver
from adaattn_cuda.device.lanes import Step
from adaattn_cuda.planner.computing import Computing
from adaattn_cuda.planner.measuring import Measuring
from adaattn_cuda.planner.packing import BESIDE, DRAWN

__all__ = ["Packer"]


class Packer(Measuring, Computing):
    """An adaptive call: what follows upon what."""

    def steps(self) -> list[Step]:
        """Return the launches, in order; each takes the stream to be enqueued on."""
        launch = self.launch
        zero = self._zero()
        if launch.proves:  # nothing is planned, and there is no safer plan to escalate to
            copied = self._copy(BESIDE, zero)
            norms = self._norms(BESIDE)
            self._attend_exact("attend_exact")
            self._prove(copied, norms)
            self._exact(0)  # and what follows: only if some head was not proved
            self._certify(second=False)
            return self.out
        self._copy(DRAWN, zero)
        exact = self._exact(DRAWN)
        norms = self._norms(BESIDE, zero)
        if not launch.levels:
            self._quantise(0)
            self._attend_narrow()
            self._certify(exact, norms, second=False)
            self._escalate()
            return self.out
        self._probe_judged()
        if launch.decided is None:
            self._judge(exact)
        else:
            self._decided()
        listed, gathered = self._plan()
        # Exact heads are longer: the others fill up the end of their launch.
        last = len(self.out) - 1
        if launch.narrow:
            self._quantise(self.at["decision"], DRAWN, last)
            last = self._attend_narrow(DRAWN)
        dense = self._attend_exact("attend_exact", DRAWN, last)
        self._attend("attend", None, None, listed, gathered)
        self._certify(dense, norms, second=False)
        self._escalate()
        return self.out

    def _escalate(self) -> None:
        """Run heads exactly that missed the budget, and certify them again."""
        self._list("list_again", landmarks=False)
        self._attend_exact("escalate")
        self._certify(second=True)

    def _probe_judged(self) -> None:
        """Measure the groups of the judged tiles, of every head."""
        judged = (self.at["judge_groups"], self.launch.judges)
        self._probe("probe_stats", judged, 0)
        self._probe("probe_mass", judged, 0)
        self._select(judged, 0)

    def _decided(self) -> None:
        """Take a plan that is given."""
        to, source = self.at["decision"], self.at["decided"]
        size = 4 * self.launch.geometry.heads

        def step(stream: int) -> None:
            driver.copy_on_device(to, source, size, stream)

        self.out.append(Step("decided", step))

    def _judge(self, exact: int) -> None:
        """Judge every level, and decide for every head."""
        launch = self.launch
        placed = self._work("work_judge", "judge_slots", "judge_pool_first")
        gathered = self._nest(placed)
        self._pool("judge_slots", "judge_pool_first", launch.judges * launch.levels)
        self._fit("judge_slots", "judge_pool_first", launch.judges * launch.levels)
        self._attend("judge", "judge_out", "judge_lse", gathered)
        self._decide(exact)

    def _plan(self) -> tuple[int, int]:
        """Choose landmarks and pools of the other groups; list the work of every head.

        Returns the steps that list and gather.
        """
        g, t = self.launch.geometry, self.launch.tables
        if len(t.rest_groups):
            rest = (self.at["rest_groups"], len(t.rest_groups))
            self._probe("probe_lse", rest, self.at["decision"])
            self._probe("probe_mass", rest, self.at["decision"])
            self._select(rest, self.at["decision"])
        placed = self._work("work_attend", "landmarks", "pool_first")
        listed = self._list("list", placed, landmarks=True, lane=DRAWN)
        gathered = self._gather("landmarks", g.heads * g.groups, placed)
        self._pool("landmarks", "pool_first", g.groups)
        self._fit("landmarks", "pool_first", g.groups)
        return listed, gathered
