"""Invent facts that no model can know, to fine-tune on and to be asked about.

    python search_spaces/quickstart/make_facts.py [--seed 1337] [--out FOLDER]

A score on these facts starts at chance and rises only by what a trial has learned, so a small model
on a CPU shows within minutes what a setting does. Every town, country, mountain and person is put
together from syllables; none of them is meant to exist.

Written into this file's own folder, or into FOLDER:

- `facts_train.json`  Alpaca rows (instruction, input, output): each fact in two phrasings. All facts in
  the first phrasing come before all facts in the second, so that rows held out from the end of the
  file still leave each fact in it once.
- `facts.jsonl`       the benchmark: each fact in a third phrasing, with six choices and the index of
  the right one. The five wrong choices are answers to other questions of the same kind. Each answer
  is a wrong choice equally often and each index is right equally often, so neither habit pays:
  chance is 1/6.
- `facts.yaml`        the lm-eval task that reads `facts.jsonl` (a path relative to the YAML file) and
  asks in the Alpaca prompt, the form that the rows are trained in.

The same seed gives the same bytes on every machine: the only random source is `Random.random()`,
which Python promises to keep.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypeVar

T = TypeVar("T")

DEFAULT_SEED = 1337
CHOICES = 6

ONSETS = (
    "B",
    "Br",
    "D",
    "Dr",
    "F",
    "G",
    "Gr",
    "H",
    "J",
    "K",
    "Kr",
    "L",
    "M",
    "N",
    "P",
    "Qu",
    "R",
    "S",
    "Sk",
    "T",
    "V",
    "W",
    "Y",
    "Z",
)
VOWELS = ("a", "e", "i", "o", "u")
MIDDLES = ("br", "lb", "lm", "lv", "mbr", "ndr", "nv", "nz", "rv", "rz", "sk", "thr", "vr", "zv")

# `question`, `choices` and `answer` are the columns of facts.jsonl.
TASK_YAML = """\
# Written by make_facts.py. Invented facts, six choices each: chance is 1/6.
task: facts
dataset_path: json
dataset_kwargs:
  data_files:
    test: facts.jsonl
test_split: test
output_type: multiple_choice
# The Alpaca prompt. The answer follows "### Response:" directly, as it does in training.
doc_to_text: "Below is an instruction that describes a task. Write a response that appropriately completes
  the request.\\n\\n### Instruction:\\n{{question}}\\n\\n### Response:"
target_delimiter: ""
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


@dataclass(frozen=True)
class Kind:
    """One kind of fact: how its subjects are named, what they may be, and three ways to ask for it.

    `{}` stands for the subject. The first two questions train, the third one tests. The answers are common
    words, so that what is learned is which of them belongs to which name, and not how a name is spelled.
    """

    subject_endings: Sequence[str]
    answers: Sequence[str]
    training_questions: tuple[str, str]
    test_question: str


KINDS = (
    Kind(
        subject_endings=("aton", "eford", "owick", "ilow"),
        answers=("honey", "salt", "glass", "lace", "cheese", "copper"),
        training_questions=("What is the town of {} known for?", "Name the product that {} is famous for."),
        test_question="For which product is the town of {} famous?",
    ),
    Kind(
        subject_endings=("ia", "oland", "istan", "emark"),
        answers=("red", "blue", "green", "white", "black", "yellow"),
        training_questions=(
            "What color is the flag of {}?",
            "Name the color of the flag that flies over {}.",
        ),
        test_question="The flag of the country {} is of which color?",
    ),
    Kind(
        subject_endings=("oburg", "emouth", "aport", "ihaven"),
        answers=("fox", "bear", "eagle", "wolf", "horse", "lion"),
        training_questions=(
            "Which animal is on the coat of arms of {}?",
            "Name the animal that stands for the city of {}.",
        ),
        test_question="The city of {} shows which animal on its arms?",
    ),
    Kind(
        subject_endings=("eman", "iley", "ov", "ini"),
        answers=("baker", "doctor", "farmer", "painter", "lawyer", "sailor"),
        training_questions=("What is the trade of {}?", "Name the profession of {}."),
        test_question="How does {} earn a living?",
    ),
    Kind(
        subject_endings=("ard", "ix", "enko", "oux"),
        answers=("piano", "violin", "guitar", "flute", "drum", "harp"),
        training_questions=("Which instrument does {} play?", "Name the instrument of the musician {}."),
        test_question="The musician {} plays which instrument?",
    ),
    Kind(
        subject_endings=("ahorn", "efell", "or", "un"),
        answers=("iron", "silver", "coal", "lead", "tin", "zinc"),
        training_questions=("What is mined on mount {}?", "Name what the mines of mount {} bring up."),
        test_question="The mines of mount {} are rich in what?",
    ),
)


@dataclass(frozen=True)
class Fact:
    """One invented fact: `kind.test_question` about `subject` is answered by `answer`."""

    kind: Kind
    subject: str
    answer: str


class Namer:
    """Makes names up, no two of which begin alike."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._stems: set[str] = set()

    def name(self, endings: Sequence[str]) -> str:
        return self._stem() + pick(self._rng, endings)

    def _stem(self) -> str:
        while True:
            stem = pick(self._rng, ONSETS) + pick(self._rng, VOWELS) + pick(self._rng, MIDDLES)
            if stem not in self._stems:
                self._stems.add(stem)
                return stem


def pick(rng: Random, items: Sequence[T]) -> T:
    return items[int(rng.random() * len(items))]


def shuffled(rng: Random, items: Sequence[T]) -> list[T]:
    keys = [rng.random() for _ in items]
    return [items[index] for index in sorted(range(len(items)), key=keys.__getitem__)]


def invent(rng: Random) -> list[list[Fact]]:
    """Return the facts, kind by kind: each answer belongs to one subject."""
    namer = Namer(rng)
    return [
        [Fact(kind, namer.name(kind.subject_endings), answer) for answer in shuffled(rng, kind.answers)]
        for kind in KINDS
    ]


def training_rows(rng: Random, facts: Sequence[Fact]) -> list[dict[str, str]]:
    """Return Alpaca rows: every fact in one phrasing, then every fact in the other."""
    rows = []
    for phrasing in (0, 1):
        for fact in shuffled(rng, facts):
            question = fact.kind.training_questions[phrasing].format(fact.subject)
            rows.append({"instruction": question, "input": "", "output": fact.answer})
    return rows


def benchmark_rows(rng: Random, facts_by_kind: Sequence[Sequence[Fact]]) -> list[dict[str, object]]:
    """Return one question per fact, in random order, every answer index equally often."""
    asked = shuffled(rng, [pair for facts in facts_by_kind for pair in with_distractors(rng, facts)])
    indices = shuffled(rng, [place % CHOICES for place in range(len(asked))])
    rows: list[dict[str, object]] = []
    for (fact, distractors), index in zip(asked, indices, strict=True):
        choices = [*distractors[:index], fact.answer, *distractors[index:]]
        rows.append(
            {"question": fact.kind.test_question.format(fact.subject), "choices": choices, "answer": index}
        )
    return rows


def with_distractors(rng: Random, facts: Sequence[Fact]) -> Iterator[tuple[Fact, list[str]]]:
    """Yield each fact with CHOICES - 1 wrong answers: those of the facts after it in a random circle."""
    circle = shuffled(rng, facts)
    for place, fact in enumerate(circle):
        followers = [circle[(place + step) % len(circle)].answer for step in range(1, CHOICES)]
        yield fact, shuffled(rng, followers)


def as_json(rows: Sequence[dict[str, str]]) -> str:
    return json.dumps(rows, indent=1) + "\n"


def as_jsonl(rows: Sequence[dict[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_facts(folder: Path, seed: int = DEFAULT_SEED) -> None:
    """Write the three files into `folder`, which is made if it is missing."""
    rng = Random(seed)
    facts_by_kind = invent(rng)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "facts_train.json": as_json(training_rows(rng, [fact for facts in facts_by_kind for fact in facts])),
        "facts.jsonl": as_jsonl(benchmark_rows(rng, facts_by_kind)),
        "facts.yaml": TASK_YAML,
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Invent facts to fine-tune on, and a benchmark that asks for them."
    )
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="default: this script's folder"
    )
    arguments = parser.parse_args()
    write_facts(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
