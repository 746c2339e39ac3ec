"""What the proof has shown so far in this session: field by architecture, and how many configurations."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from tests.parity.build import RECIPES
from tests.parity.world import World

HEAD_ROW = "modules_to_save: the task's head"


class Results:
    """``runs``: (architecture, task, recipe) -> the seeds it ran with. ``cases``: architectures, tasks, seeds."""

    def __init__(self) -> None:
        self.runs: dict[tuple[str, str, str], set[int]] = defaultdict(set)
        self.cases: set[tuple[str, str, int]] = set()
        self._cells: dict[tuple[str, str], set[str]] = defaultdict(set)

    def add(self, architecture: str, task: str, seed: int, world: World) -> None:
        """What one engine showed; an adapter with a problem counts as wrong."""
        self.cases.add((architecture, task, seed))
        wrong = {problem.split(":")[0].split(" ")[0] for problem in world.problems}
        outcomes = {a.name: "wrong" if f"{task}-{a.name}" in wrong else "exact" for a in world.adapters}
        outcomes |= dict.fromkeys(world.refused, "refused")
        for name, outcome in outcomes.items():
            self.runs[architecture, task, name].add(seed)
            self._cells[RECIPES[name].row, architecture].add(outcome)
        for adapter in world.adapters:
            if adapter.site.brings_head:
                self._cells[HEAD_ROW, architecture].add(outcomes[adapter.name])

    def write(self, path: Path) -> None:
        """One cell for each row of the table and architecture: what was found there, of all recipes and seeds."""
        table: dict[str, dict[str, list[str]]] = defaultdict(dict)
        for (row, architecture), outcomes in self._cells.items():
            table[row][architecture] = sorted(outcomes)
        adapters = sum(map(len, self.runs.values()))
        document = {"configurations": len(self.runs), "adapters": adapters, "table": table}
        path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")


RESULTS = Results()
