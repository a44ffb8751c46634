"""A trial in small, and the sweep of such trials."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sweeps.rehearsal import STEPS, StandIns, shrunk, sweep_of
from sweeps.spec import FIELDS, TrialSpec
from sweeps.sweepfile import load_sweep_text
from sweepsvc.plain import PlainStudy

GIVEN = StandIns(
    model="/stage/models/llama",
    rows="/stage/rows/0.jsonl",
    tasks=("blimp_causative",),
    data_dir="/stage/benchmarks",
    targets="all",
    most_r=64,
)


def spec_of(**sections: Any) -> TrialSpec:
    return TrialSpec.model_validate(sections)


def small(spec: TrialSpec) -> TrialSpec:
    return shrunk(spec, GIVEN)[0]


def test_a_trial_in_small_takes_two_steps_and_a_handful_of_documents() -> None:
    made = small(TrialSpec())
    assert made.steps == STEPS == 2
    assert made.evaluate.limit == 4
    assert (made.model.id, made.data.id, made.data.path) == (GIVEN.model, None, GIVEN.rows)
    assert made.evaluate.data_dir == GIVEN.data_dir


def test_what_a_rehearsal_is_about_stays_as_it_is() -> None:
    spec = spec_of(
        model={"quantization": "fp4", "double_quantization": True, "dtype": "bfloat16"},
        lora={"r": 16, "alpha": 4.0, "dropout": 0.1, "dtype": "float32"},
        optimizer={"name": "sgd", "lr": 0.1},
        schedule={"name": "constant", "warmup_steps": 0},
        train={"sampling": "epochs", "gradient_checkpointing": True, "clip_norm": 1.0, "seed": 3},
        data={"loss_on": "response", "max_length": 700, "held_out": 0.0},
        evaluate={"num_fewshot": 2, "limit": 3},
    )
    made, notes = shrunk(spec, GIVEN)
    changed = {
        path
        for path in FIELDS
        if getattr(getattr(made, path.split(".")[0]), path.split(".")[1])
        != getattr(getattr(spec, path.split(".")[0]), path.split(".")[1])
    }
    assert changed == {
        "model.id",
        "data.id",
        "data.path",
        "train.batch_size",
        "train.samples",
        "train.log_every",
        "train.eval_every",
        "train.eval_rows",
        "evaluate.tasks",
        "evaluate.data_dir",
    }
    assert notes == []


def test_a_rank_wider_than_the_small_model_is_cut_and_said_while_alpha_stays() -> None:
    made, notes = shrunk(spec_of(lora={"r": 2048, "alpha": 4096.0}), GIVEN)
    assert (made.lora.r, made.lora.alpha) == (64, 4096.0)
    assert notes == ["lora.r=2048 is wider than the small model's layers: 64 there"]


def test_what_needs_cuda_is_replaced_and_said() -> None:
    spec = spec_of(optimizer={"name": "paged_adamw"}, model={"attention": "flash_attention_2"})
    made, notes = shrunk(spec, GIVEN)
    assert (made.optimizer.name, made.model.attention) == ("adamw", "auto")
    assert notes == [
        "model.attention=flash_attention_2 needs CUDA: auto in its place",
        "optimizer.name=paged_adamw needs CUDA: adamw in its place",
    ]


def test_an_untrained_trial_stays_untrained() -> None:
    made = small(spec_of(train=None))
    assert made.train is None
    assert made.evaluate.tasks == GIVEN.tasks


@pytest.fixture
def on_disk(tmp_path: Path) -> StandIns:
    """A sweep file's paths must exist."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    return StandIns(str(tmp_path), str(rows), GIVEN.tasks, str(tmp_path), "all", 64)


@pytest.mark.parametrize(
    "specs",
    [
        [spec_of()],
        [spec_of(train=None)],
        [spec_of(lora={"r": r, "alpha": alpha}) for r, alpha in [(8, 16.0), (16, 16.0), (4, 8.0)]],
        [
            spec_of(
                lora={"targets": targets},
                data={"max_length": length, "held_out": 0.0},
                optimizer={"lr": rate},
                train={"gradient_checkpointing": True},
                evaluate={"tasks": ["blimp_causative"]},
            )
            for targets, length, rate in [("qv", None, 1e-5), (["q_proj", "v_proj"], 64, 3e-4)]
        ],
    ],
    ids=["one", "untrained", "a grid with gaps", "lists, nulls and small numbers"],
)
def test_the_small_sweep_proposes_exactly_the_trials_it_was_made_of(
    specs: list[TrialSpec], on_disk: StandIns
) -> None:
    wanted = [shrunk(spec, on_disk)[0] for spec in specs]
    real = load_sweep_text("name: real", "/sweeps/real.yaml")
    made = sweep_of(real, wanted)
    study = PlainStudy(made, "small", {})
    proposals = [proposal for _ in range(9) if (proposal := study.ask()) is not None]
    assert [proposal.spec for proposal in proposals] == wanted
    assert (made.name, made.resources.gpus, made.faults.stop_after) == ("real", 0, 0)
    assert made.faults.retries.download_failed == 0


def test_the_small_sweep_scores_the_untouched_base_only_where_the_real_one_does(on_disk: StandIns) -> None:
    spec = shrunk(TrialSpec(), on_disk)[0]
    for flag in ("true", "false"):
        real = load_sweep_text(f"name: real\nbaseline: {flag}\n", "/sweeps/real.yaml")
        assert len(sweep_of(real, [spec]).baselines()) == (flag == "true")
