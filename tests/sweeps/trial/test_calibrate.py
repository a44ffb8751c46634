"""A few measured steps beside what is predicted of the very same work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from sweeps.devices import device_named
from sweeps.errors import BadModel, CannotStart, OutOfMemory
from sweeps.spec import EvaluateSpec, ModelSpec, TrialSpec
from sweeps.trial import calibrate as measuring
from sweeps.trial.base import Resident, load_base
from sweeps.trial.batches import MicroBatch
from sweeps.trial.calibrate import calibrate
from sweeps.trial.duration import Pace, Work, backward_seconds, forward_seconds
from sweeps.trial.estimate import outline, trainable_params
from sweeps.trial.lengths import scoring
from sweeps.trial.loss import ChunkedLoss
from sweeps.trial.memory import training_memory, widths
from sweeps.trial.paths import TrialFolder
from sweeps.trial.predict import predict
from sweeps.trial.prefixtree import make_plan
from sweeps.trial.run import run_trial
from sweeps.trial.scoring import CannotShare, pair_cost
from tests.tiny import changed, tiny_spec

L4 = device_named("l4")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def spec(tiny_model_dir: Path, alpaca_rows_file: Path) -> TrialSpec:
    return tiny_spec(tiny_model_dir, alpaca_rows_file)


class Seen:
    """Every micro-batch that the loop sends through the model: its rows and its padded length."""

    def __init__(self, patch: pytest.MonkeyPatch, most_tokens: int = 1 << 30) -> None:
        self.shapes: list[tuple[int, int]] = []
        plain = ChunkedLoss.backward

        def watched(loss: ChunkedLoss, batch: MicroBatch) -> torch.Tensor:
            if batch.ids.numel() > most_tokens:
                raise torch.OutOfMemoryError("CUDA out of memory")
            self.shapes.append((batch.ids.shape[0], batch.ids.shape[1]))
            return plain(loss, batch)

        patch.setattr(ChunkedLoss, "backward", watched)


def test_the_work_that_is_compared_is_the_work_that_was_done(
    spec: TrialSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen(monkeypatch)
    small = changed(spec, train__token_budget=200)
    base = load_base(small.model, torch.device("cpu"))
    steps, scored = measuring._measure(small, base)
    assert steps.spec.train is not None
    assert steps.spec.train.batch_size == 4
    sizes = [rows * length for rows, length in seen.shapes]
    assert steps.largest[0] == max(sizes)
    per_step, rows = [0, 0, 0, 0], 0
    for count, length in seen.shapes:
        per_step[rows // 4] += count * length
        rows += count
    assert rows == 16
    assert steps.work.tokens == sum(per_step[1:])
    assert steps.work.micro_batches < len(sizes)
    assert steps.seconds > 0
    plan = make_plan(measuring._requests(spec.evaluate, 2048, 300), 2048, pair_cost(base.model))
    assert plan.tokens >= 2 * 2048 - 2 * 16  # of each request the last token is not computed
    assert scored.work == Work(3 * len(plan.batches), 3 * plan.tokens)
    assert steps.peak_bytes is None


def test_requests_that_are_scored_have_as_much_in_common_as_those_of_the_benchmarks() -> None:
    asked, _ = scoring(EvaluateSpec())
    requests = measuring._requests(EvaluateSpec(), 2048, 32_000)
    plan = make_plan(requests, 2048, 1e-4)
    found, expected = plan.plain_tokens / plan.tokens, asked.tokens / asked.computed
    assert found == pytest.approx(expected, rel=0.15)
    assert {len(request.tokens) for request in requests} == {round(asked.tokens / asked.requests)}


def test_a_model_that_cannot_score_branches_is_measured_row_by_row(
    spec: TrialSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(spec.model, torch.device("cpu"))
    monkeypatch.setattr(measuring, "obstacle", lambda _: "it is odd")
    assert measuring._score(base.model, base, spec).work == Work(3, 3 * 16 * 128)

    def refuses(*_: Any) -> Any:
        raise CannotShare("it is odd")

    monkeypatch.undo()
    monkeypatch.setattr(measuring, "score", refuses)
    assert measuring._score(base.model, base, spec).work == Work(3, 3 * 16 * 128)


def test_where_memory_runs_out_the_smaller_budget_is_measured_alone(
    spec: TrialSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(spec.model, torch.device("cpu"))
    seen = Seen(monkeypatch, most_tokens=300)
    steps, _ = measuring._measure(spec, base)
    assert 150 < steps.largest[0] <= 300
    last = seen.shapes[-round(steps.work.micro_batches) :]
    assert steps.work.tokens == sum(rows * length for rows, length in last)
    Seen(monkeypatch, most_tokens=20)
    with pytest.raises(OutOfMemory, match="one row of"):
        measuring._measure(spec, base)


def test_on_a_gpu_the_factors_are_measured_over_predicted(
    spec: TrialSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA L4")
    shapes, trainable, pace = outline(spec.model), trainable_params(spec), Pace.of(L4)
    training, scoring = Work(8, 5000), Work(3, 6000)
    steps = measuring._Steps(
        spec=spec,
        work=training,
        seconds=1.5 * backward_seconds(shapes, spec, trainable, pace, training),
        largest=(900, 90),
        peak_bytes=1.1 * training_memory(shapes, spec, widths(spec, on_cpu=False), 900, 90).total,
    )
    scored = measuring._Scored(scoring, 0.7 * forward_seconds(shapes, spec, trainable, pace, scoring))
    made = measuring._compared(steps, scored, L4)
    assert made.device == "NVIDIA L4"
    assert made.operations_per_second is None
    factors = (made.time_factor, made.eval_time_factor, made.memory_factor)
    assert factors == pytest.approx((1.5, 0.7, 1.1))


def test_a_model_that_is_not_here_is_played_by_one_of_its_shapes(
    spec: TrialSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_local", lambda model: None)
    at_hand = measuring._at_hand(spec.model, tmp_path)
    assert at_hand == spec.model.model_copy(update={"id": str(tmp_path)})
    played = load_base(at_hand, torch.device("cpu"))
    assert played.layers == dict(outline(spec.model).layers)


def test_without_room_for_such_a_model_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = psutil.virtual_memory()._replace(available=10_000_000_000)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    with pytest.raises(CannotStart, match=r"takes 13\.5 GB, got 10\.0 GB free of memory"):
        measuring._at_hand(ModelSpec(id="meta-llama/Llama-2-7b-hf"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_hub_model_is_local_only_with_every_one_of_its_files(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelSpec(id="some/model")
    assert measuring._local(model) is None
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tiny_model_dir))
    assert measuring._local(model) == ModelSpec(id=str(tiny_model_dir))
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).touch()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "1.safetensors"}}')
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    assert measuring._local(model) is None


def test_a_trial_without_training_and_a_model_that_does_not_load_are_refused(
    spec: TrialSpec, tmp_path: Path
) -> None:
    with pytest.raises(CannotStart, match="measures training steps"):
        calibrate(spec.untrained(), None)
    with pytest.raises(BadModel):
        calibrate(changed(spec, model__id=str(tmp_path / "nothing")), None)


def test_a_base_that_does_not_fit_is_said(spec: TrialSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore of it")

    monkeypatch.setattr("sweeps.trial.base.load_base", full)
    with pytest.raises(OutOfMemory, match="the base must fit on cpu to be measured"):
        calibrate(spec, None)


@pytest.mark.slow
def test_a_measured_cpu_tells_how_long_a_trial_trains(spec: TrialSpec, tmp_path: Path) -> None:
    """Within a factor of two: in one of three tries, since a machine that does other work has no one pace."""
    longer = changed(spec, train__samples=160, train__eval_every=0)
    ratios = []
    for number in range(3):
        told = predict(longer, None, True, calibrate(longer, None, threads=1)).train_seconds
        for _ in run_trial(longer, Resident(torch.device("cpu")), tmp_path / str(number)):
            pass
        result = TrialFolder(tmp_path / str(number)).read_result()
        assert result is not None
        assert told is not None
        ratios.append(told / result.measured.train_seconds)
        if 0.5 < ratios[-1] < 2:
            return
    pytest.fail(f"told over taken: {ratios}")
