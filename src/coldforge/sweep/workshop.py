"""The stages of real trials: what :mod:`coldforge.pipeline` makes of a recipe, with data and networks shared."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from coldforge import assemble
from coldforge.data import DataSplits, load_data
from coldforge.errors import UsageError
from coldforge.models import ModelSource, check_classifier, model_source, torch_threads
from coldforge.pipeline import arrow, check_trainings, resolve
from coldforge.progress import Progress
from coldforge.records import Record
from coldforge.sealed import write_atomic
from coldforge.spec import spec_hash
from coldforge.stages import Arrow, Shop
from coldforge.store import Store
from coldforge.sweep.graph import Task
from coldforge.sweep.spec import Trial

_KEPT = 4
"""Trials whose networks stay in memory: the stages of one trial follow each other."""


class RecipeWorkshop:
    """Declares and makes the stages of a recipe. Data sets are loaded, and architectures checked, once a process.

    Args:
        store: where stages are kept; shared by all workers.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._data: dict[str, DataSplits] = {}
        self._sources: dict[str, tuple[ModelSource, dict[str, int]]] = {}
        self._shops: OrderedDict[str, tuple[Shop, Arrow]] = OrderedDict()

    def __reduce__(self) -> tuple[type[RecipeWorkshop], tuple[Store]]:
        return RecipeWorkshop, (self._store,)

    def tasks(self, trial: Trial) -> Sequence[Task]:
        """The stages of a trial, in an order in which they can be made."""
        _, made = self._declared(trial)
        return [Task(s.key, s.kind, s.label, s.inputs, s.macs, s.seconds) for s in made]

    def use(self, tasks: Iterable[Task]) -> None:
        """Keep them from :meth:`Store.prune` as long as this process lives."""
        self._store.use((task.kind, task.key) for task in tasks)

    def keep(self, path: Path, tasks: Iterable[Task]) -> None:
        """Keep them from :meth:`Store.prune` as long as that file exists."""
        self._store.register(path, [task.key for task in tasks])

    def has(self, task: Task) -> bool:
        """Whether the store holds it."""
        return self._store.has(task.kind, task.key)

    def make(self, trial: Trial, key: str) -> None:
        """Make one stage of a trial."""
        shop, made = self._declared(trial)
        stage = next((stage for stage in made if stage.key == key), None)
        if stage is None:
            raise UsageError(
                f"expected a stage {key[:16]} in trial {trial.id}, found none: this worker reads other data, or has "
                "other versions of coldforge or onnx, than the process that planned the sweep"
            )
        with torch_threads(shop.recipe.compute.threads):
            shop.make(stage)

    def finish(self, trial: Trial, path: Path) -> None:
        """Write the record of a trial whose stages are all in the store, which keeps them as long as it exists."""
        _, made = self._declared(trial)
        found = self.record(trial).to_json()
        self._store.register(path, [stage.key for stage in made])  # first: a record always has its stages
        write_atomic(path, found)

    def record(self, trial: Trial) -> Record:
        """All that was measured on the stages of a trial."""
        shop, made = self._declared(trial)
        return assemble.record(shop, made, f"coldforge sweep, trial {trial.id}")

    def refuse_missing(self, trial: Trial) -> None:
        """Refuse a trial of which the store does not hold all stages, with the same keys.

        Raises:
            UsageError: some are not there.
        """
        shop, made = self._declared(trial)
        stages = list(made)
        missing = [stage.label for stage in stages if not shop.has(stage)]
        if missing:
            raise UsageError(
                f"the store at {self._store.root} lacks {len(missing)} of the {len(stages)} stages of this trial, "
                f"such as {missing[0]!r}: pruned, or made on another machine or by other versions; --rebuild makes "
                "them here, which takes time and may give other numbers"
            )

    def write_folder(self, trial: Trial, out: Path, progress: Progress | None = None) -> Record:
        """What `coldforge run` would have left of this trial; stages that are not in the store are made again."""
        shop, made = self._declared(trial)
        shop = replace(shop, progress=progress or Progress())
        assemble.check_writable(out)
        with torch_threads(shop.recipe.compute.threads):
            for stage in made:
                shop.make(stage)
        found = self.record(trial)
        assemble.write_folder(shop, made, found, out)
        return found

    def macs_per_second(self, trial: Trial) -> float:
        """Measured throughput of training here, with the threads of the trial."""
        shop, _ = self._declared(trial)
        with torch_threads(shop.recipe.compute.threads):
            return assemble.macs_per_second(shop)

    def _declared(self, trial: Trial) -> tuple[Shop, Arrow]:
        if trial.id in self._shops:
            self._shops.move_to_end(trial.id)
            return self._shops[trial.id]
        recipe = resolve(trial.recipe)
        data_key = spec_hash(recipe.data)
        if data_key not in self._data:
            self._data[data_key] = load_data(recipe.data, cache=self._store.root / "data")
        data = self._data[data_key]
        check_trainings(recipe, data.augment)
        model_key = spec_hash([recipe.model.source, data.fingerprint])
        if model_key not in self._sources:
            source = model_source(recipe.model.source, image_shape=data.image_shape, num_classes=len(data.classes))
            check_classifier(source.build(0), data.image_shape, len(data.classes))
            self._sources[model_key] = source, {}
        source, macs = self._sources[model_key]
        shop = replace(Shop(recipe, data, source, self._store, Progress()), _macs=macs)
        made = arrow(shop)
        self._shops[trial.id] = shop, made
        while len(self._shops) > _KEPT:
            self._shops.popitem(last=False)
        return shop, made
