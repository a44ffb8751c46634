"""Placing trials on GPUs: the one file that imports ray.

Ray Tune drives, we hand it small adapters: a Searcher that asks the conductor, a Callback that tells it,
and a Trainable that runs one trial after another on the base that its actor keeps.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import signal
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import ray
from ray import tune
from ray.exceptions import RayError
from ray.tune import Callback, CheckpointConfig, FailureConfig, RunConfig, Trainable, TuneConfig, Tuner
from ray.tune.error import TuneError
from ray.tune.experiment import Trial
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from sweeps.errors import CannotContinue, CannotStart, Interrupted, TrialError, failure_class
from sweeps.result import Failure, Progress, TrialResult
from sweeps.signals import handled
from sweeps.spec import TrialSpec
from sweeps.sweep import CHECKPOINT_MINUTES, Resources
from sweeps.trial.causes import disk_full
from sweeps.trial.keeping import Keeping
from sweeps.trial.paths import TrialFolder
from sweepsvc.protocols import Conductor, Later, Proposal

REAL_TRIALS = "sweeps.trial.run:TrialRunner"

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a trial's relative paths are the driver's
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the newer one prints a box even at verbose=0
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_THRESHOLD_S": "10",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # stopping gently is the sweep's own business
    # The study is the ledger: Tune's own snapshots are never read, so write hardly any.
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
}


_MUTED = ("ray.tune.tune", "ray.tune.execution.experiment_state")
"""Loggers of Tune: which trials failed, we say; that its snapshots find no room, nobody needs to know."""


class Runner(Protocol):
    """What an actor keeps from trial to trial."""

    def __call__(
        self, spec: TrialSpec, folder: Path, keeping: Keeping
    ) -> Generator[Progress, None, None]: ...


class RayScheduler:
    """Runs one trial per GPU (or per set of CPUs), each in an actor that keeps its base model.

    Trials write a checkpoint every `checkpoint_minutes`, and end as interrupted once the file `stop` is
    there.
    `runner` names, as `module:name`, the class that an actor makes once and calls for every trial.
    """

    def __init__(
        self,
        resources: Resources,
        storage: Path,
        stop: Path | None = None,
        checkpoint_minutes: float = CHECKPOINT_MINUTES,
        runner: str = REAL_TRIALS,
        address: str | None = None,
    ) -> None:
        self._resources = resources
        self._storage = storage
        self._stop = stop
        self._checkpoint_minutes = checkpoint_minutes
        self._runner = runner
        self._address = address

    def __enter__(self) -> RayScheduler:
        os.environ.update({name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()})
        address = self._address or os.environ.get("RAY_ADDRESS") or "local"
        local = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"} if address == "local" else {}
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **local)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise CannotStart(
                f"Ray must start or be reachable, got {address}: {error}; check RAY_ADDRESS"
            ) from error
        for name in _MUTED:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        return self

    def __exit__(self, *exception: object) -> None:
        ray.shutdown()

    def check(self) -> None:
        """Raise `CannotStart` if no node can ever hold one trial."""
        self._slots()

    def run(self, conductor: Conductor) -> None:
        """Run until the conductor has nothing left and every placed proposal has ended.

        Cut off by an exception, such as a `KeyboardInterrupt`, it ends what is running as interrupted.
        Raises `CannotContinue` where Ray fails before that.
        """
        slots = self._slots()
        placed = _Placed(conductor)
        forgetting = _Forgetting()
        actor = tune.with_resources(TrialActor, tune.PlacementGroupFactory([self._bundle()]))
        tuner = Tuner(
            actor,
            param_space={
                "runner": self._runner,
                "threads": self._threads(),
                "on_cpu": not self._resources.gpus,
                "checkpoint_minutes": self._checkpoint_minutes,
                "stop": str(self._stop) if self._stop else "",
            },
            tune_config=TuneConfig(
                search_alg=_Proposer(placed),
                scheduler=forgetting,
                num_samples=-1,
                max_concurrent_trials=slots,
                reuse_actors=True,
            ),
            run_config=RunConfig(
                name=f"tune-{time.time_ns()}",  # a resumed sweep is a new run of Tune
                storage_path=str(self._storage),
                callbacks=[_Listener(placed), _StepEnd(forgetting)],
                failure_config=FailureConfig(max_failures=0),
                checkpoint_config=CheckpointConfig(checkpoint_at_end=False),  # a trial keeps its own
                verbose=0,
            ),
        )
        try:
            tuner.fit()
        except Exception as error:
            if placed.failure is not None:
                raise placed.failure from None
            # At its end Tune reads back its own files, which a full disk has left empty.
            if placed.is_done:
                return
            if not isinstance(error, RayError | TuneError | OSError):
                raise
            reason = str(error).strip().rpartition("\n")[2]
            raise CannotContinue(
                f"Ray must be able to run trials, got {type(error).__name__}: {reason}; mend that, then "
                "resume the sweep"
            ) from error
        finally:
            # Ctrl-C waits: the states of the last trials are being written
            with handled(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM):
                placed.close_open_trials()

    def _bundle(self) -> dict[str, float]:
        wanted = self._resources
        bundle: dict[str, float] = {"CPU": self._cpus()}
        if wanted.gpus:
            bundle["GPU"] = wanted.gpus
        if wanted.accelerator:
            bundle[f"accelerator_type:{wanted.accelerator}"] = 0.001
        return bundle

    def _cpus(self) -> int:
        """As the file says; else one beside a GPU, and the whole of the smallest node without."""
        if self._resources.cpus is not None:
            return self._resources.cpus
        if self._resources.gpus:
            return 1
        return max(1, min(int(node.get("CPU", 0)) for node in _nodes() if node.get("CPU", 0) >= 1))

    def _threads(self) -> int | None:
        """A trial on CPUs computes with as many threads as it has CPUs."""
        return None if self._resources.gpus else self._cpus()

    def _slots(self) -> int:
        """How many trials fit at once."""
        bundle = self._bundle()
        slots = sum(_fits(bundle, node) for node in _nodes())
        if slots == 0:
            raise CannotStart(self._refusal(bundle))
        return min(slots, self._resources.parallel or slots)

    def _refusal(self, bundle: Mapping[str, float]) -> str:
        gpus = [node.get("GPU", 0) for node in _nodes()]
        kinds = sorted(
            name.removeprefix("accelerator_type:")
            for name in ray.cluster_resources()
            if name.startswith("accelerator_type:")
        )
        asked = ", ".join(f"{name} {amount:g}" for name, amount in bundle.items())
        return (
            f"one machine must hold a trial's resources ({asked}), got at most {max(gpus):g} GPUs and "
            f"{max(node.get('CPU', 0) for node in _nodes()):g} CPUs on one machine, accelerators "
            f"{kinds or 'none'}; lower resources.gpus (0 trains on the CPU), or change resources.accelerator"
        )


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _fits(bundle: Mapping[str, float], node: Mapping[str, float]) -> int:
    return min(math.floor(node.get(name, 0) / amount) for name, amount in bundle.items())


class _Placed:
    """The proposals that are on Ray, by Ray's own trial ids."""

    def __init__(self, conductor: Conductor) -> None:
        self.conductor = conductor
        self._open: dict[str, Proposal] = {}
        self._has_all = False
        self.failure: Exception | None = None
        """What the conductor raised; Tune raises only a text of it."""

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to place, and what was placed has ended."""
        return self._has_all and not self._open

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tuner writes a pickle of itself, for a restore that we never do."""
        return {}

    def take(self, trial_id: str) -> Proposal | Later | None:
        with self._noting_failure():
            proposal = self.conductor.next()
        if isinstance(proposal, Proposal):
            self._open[trial_id] = proposal
        self._has_all = proposal is None
        return proposal

    def start(self, trial_id: str) -> None:
        with self._noting_failure():
            self.conductor.started(self._open[trial_id])

    def report(self, trial_id: str, progress: Progress) -> None:
        with self._noting_failure():
            self.conductor.reported(self._open[trial_id], progress)

    def end(self, trial_id: str, otherwise: TrialResult) -> None:
        """Tell the worker's last word, or `otherwise` where it had none."""
        proposal = self._open.pop(trial_id, None)
        if proposal is not None:
            with self._noting_failure():
                self.conductor.ended(proposal, _last_word(self.conductor.folder(proposal)) or otherwise)

    @contextlib.contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.failure = error
            raise

    def close_open_trials(self) -> None:
        """End what Ray stopped midway as interrupted."""
        with contextlib.ExitStack() as each:  # one that cannot be told does not keep the others from it
            for trial_id in list(self._open):
                each.callback(self.end, trial_id, TrialResult(outcome="interrupted"))


class _Proposer(Searcher):
    """Tune's Searcher over the conductor."""

    def __init__(self, placed: _Placed) -> None:
        super().__init__()
        self._placed = placed

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        proposal = self._placed.take(trial_id)
        if isinstance(proposal, Later):
            return None
        if proposal is None:
            return str(Searcher.FINISHED)
        folder = self._placed.conductor.folder(proposal)
        return {"spec": proposal.spec.model_dump_json(), "folder": str(folder)}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Nothing: the listener has told the study."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is the ledger."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a resumed sweep is a new Tune run on the same study."""


class _Listener(Callback):
    """Tune's Callback to the conductor."""

    def __init__(self, placed: _Placed) -> None:
        self._placed = placed

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._placed.start(trial.trial_id)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        if "progress" in result:
            self._placed.report(trial.trial_id, Progress.model_validate_json(result["progress"]))
        else:
            self._placed.end(trial.trial_id, TrialResult.model_validate_json(result["result"]))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        message = "the worker was lost, or could not write its result: see the traceback"
        lost = Failure(kind="process_lost", message=message, traceback=_ray_error(trial))
        self._placed.end(trial.trial_id, TrialResult(outcome="failed", failure=lost))


class _Forgetting(FIFOScheduler):
    """First in, first out; and Tune forgets each trial that has ended, but for the last one.

    Tune keeps every trial of a run for a restore that we never do, with its parameters, results and state,
    and looks through all of them many times for each new one: memory, and what a trial costs, would grow
    without end.
    """

    def __init__(self) -> None:
        super().__init__()
        self._controller: Any = None
        self._ended: list[Trial] = []

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tuner writes a pickle of itself, for a restore that we never do."""
        return {}

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        # What Tune gives is a wrapper, which warns of whatever is private.
        self._controller = getattr(tune_controller, "_tune_controller", tune_controller)

    def ended(self, trial: Trial) -> None:
        self._ended.append(trial)

    def forget(self) -> None:
        """Between two steps of Tune, where none of its loops is under way."""
        if len(self._ended) < 2:
            return
        *over, last = self._ended
        self._ended = [trial for trial in over if not self._forgot(trial)] + [last]

    def _forgot(self, trial: Trial) -> bool:
        """Whether it is forgotten: not while its actor is still to be stopped."""
        controller = self._controller
        if not trial.is_finished() or trial in controller._trial_to_actor:
            return False
        controller._trials.remove(trial)
        for among in (
            controller._live_trials,
            controller._stopped_trials,
            controller._failed_trials,
            controller._trials_to_cache,  # what the next snapshot is to hold of it
        ):
            among.discard(trial)
        controller._trial_metadata.pop(trial.trial_id, None)
        return True


class _StepEnd(TrialProgressCallback):
    """Tells `_Forgetting` which trials have ended, and when it may forget them.

    It stands where Tune would put a printer of its own, which keeps every trial and prints nothing here.
    """

    def __init__(self, forgetting: _Forgetting) -> None:
        super().__init__()
        self._forgetting = forgetting

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Nothing is printed."""

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._forgetting.ended(trial)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._forgetting.ended(trial)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        self._forgetting.forget()


def _last_word(folder: Path) -> TrialResult | None:
    with contextlib.suppress(OSError, ValueError):  # a file that cannot be read says nothing
        return TrialFolder(folder).read_result()
    return None


def _ray_error(trial: Trial) -> str:
    with contextlib.suppress(OSError, TypeError):
        return Path(trial.error_file).read_text(encoding="utf-8", errors="replace")
    return ""


class _TrialFailed(TrialError):
    """Ends a Ray trial, so that Tune throws the actor away: after an error nothing in it is trusted."""


class TrialActor(Trainable):
    """One worker process: keeps its runner, and with it the base model, from trial to trial."""

    def setup(self, config: dict[str, Any]) -> None:
        if config["on_cpu"]:  # Ray leaves the GPUs visible to an actor that asked for none
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if config["threads"]:
            import torch

            torch.set_num_threads(config["threads"])
        self._runner = _named(config["runner"])()
        self._preempted = False
        signal.signal(signal.SIGTERM, self._hear)  # from whoever takes the node: a notice, then a SIGKILL
        self._begin(config)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._preempted = True

    def _keeping(self, config: dict[str, Any]) -> Keeping:
        stop = Path(config["stop"]) if config["stop"] else None
        return Keeping(config["checkpoint_minutes"], lambda: self._preempted or bool(stop and stop.exists()))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._trial.close()
        self._preempted = False  # the notice was for the trial before; what comes goes on until it is taken
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        self._folder = Path(config["folder"])
        spec = TrialSpec.model_validate_json(config["spec"])
        self._trial = self._runner(spec, self._folder, self._keeping(config))

    def step(self) -> dict[str, Any]:
        """One report; the last carries the result, after everything the trial had to do."""
        try:
            progress = next(self._trial, None)
        except (Interrupted, TrialError, OSError) as error:
            return self._without_a_file(error)
        except Exception as error:  # a runner writes its failures itself, unless it is broken
            TrialFolder(self._folder).write_result(_failed(error))
            raise
        if progress is not None:
            return {"progress": progress.model_dump_json()}
        result = TrialFolder(self._folder).read_result()
        assert result is not None
        if result.outcome == "failed":
            raise _TrialFailed(result.failure.message if result.failure else "")
        return {"result": result.model_dump_json(), "done": True}

    def _without_a_file(self, error: Exception) -> dict[str, Any]:
        """The end of a trial that could not write it: no space is left, or another process has the folder."""
        if isinstance(error, Interrupted):
            return {"result": TrialResult(outcome="interrupted").model_dump_json(), "done": True}
        full = disk_full(error, self._folder)
        if full is None:
            raise error
        return {"result": _failed(full).model_dump_json(), "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        return {}  # the trial keeps its own

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: the trial finds its own."""

    def cleanup(self) -> None:
        self._trial.close()


def _failed(error: Exception) -> TrialResult:
    kind = failure_class(error)
    message = f"{type(error).__name__}: {error}" if kind == "bug" else str(error)
    failure = Failure(kind=kind, message=message, traceback=traceback.format_exc())
    return TrialResult(outcome="failed", failure=failure)


def _named(path: str) -> Callable[[], Any]:
    module, name = path.split(":")
    factory: Callable[[], Any] = getattr(importlib.import_module(module), name)
    return factory
