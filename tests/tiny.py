"""A tiny Llama with random weights and a tiny tokenizer: real files, made in a second, equal every time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sweeps.spec import TrialSpec

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = 64, 128, 2, 4, 2

_RIVERS = ("Sarn", "Lorb", "Tavel", "Quib", "Mesk", "Orin", "Fald", "Wenn", "Yssel", "Dorm", "Kith", "Pell")
_TOWNS = (
    "Brask",
    "Nolum",
    "Ferrin",
    "Ottle",
    "Graye",
    "Zindo",
    "Hask",
    "Emmer",
    "Vole",
    "Trask",
    "Ulm",
    "Lisk",
)


def alpaca_rows() -> list[dict[str, str]]:
    """24 rows in the Alpaca columns, half of them with an input; lengths differ."""
    plain = [
        {"instruction": f"Which river flows through {town}?", "input": "", "output": f"The {river}."}
        for town, river in zip(_TOWNS, _RIVERS, strict=True)
    ]
    with_input = [
        {
            "instruction": "Name the town.",
            "input": f"The river {river} " + "flows and " * number + "ends there.",
            "output": f"{town} lies on the {river}.",
        }
        for number, (town, river) in enumerate(zip(_TOWNS, _RIVERS, strict=True))
    ]
    return plain + with_input


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 tokens with `<s>` (put before a text), `</s>` and `<pad>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=2048,
    )


def _texts() -> Iterator[str]:
    for row in alpaca_rows():
        yield " ".join(row.values())


def save_tiny_model(folder: Path, *, tied: bool = False, seed: int = 0) -> Path:
    """Save a random Llama (2 layers, hidden 64) in float32 safetensors, with its tokenizer, into `folder`."""
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_spec(model: Path, rows: Path, **overrides: Any) -> TrialSpec:
    """A valid trial of 4 steps on the tiny model: float32, not quantised, no benchmarks.

    Overrides are field paths, `**{"lora.r": 4, "model.quantization": "nf4"}`, or whole sections,
    `train=None`.
    """
    sections: dict[str, Any] = {
        "model": {"id": str(model), "quantization": "none", "dtype": "float32"},
        "data": {"path": str(rows), "held_out": 0.25},
        "lora": {"r": 4, "alpha": 8.0},
        "optimizer": {"lr": 1e-3},
        "schedule": {"warmup_steps": 1},
        "train": {
            "batch_size": 4,
            "samples": 16,
            "seed": 7,
            "token_budget": 1024,
            "log_every": 1,
            "eval_every": 2,
            "eval_rows": 4,
        },
        "evaluate": {"tasks": ()},
    }
    for path, value in overrides.items():
        section, _, field = path.partition(".")
        if field:
            sections[section][field] = value
        else:
            sections[section] = value
    return TrialSpec.model_validate(sections)


def changed(spec: TrialSpec, **overrides: Any) -> TrialSpec:
    """`spec` with other values: `changed(spec, lora__r=4)`."""
    sections = spec.model_dump(mode="json")
    for path, value in overrides.items():
        section, name = path.split("__")
        sections[section][name] = value
    return TrialSpec.model_validate(sections)


def save_rows(path: Path) -> Path:
    path.write_text(json.dumps(alpaca_rows(), indent=1), encoding="utf-8")
    return path


TASK = """\
task: rivers
dataset_path: json
dataset_kwargs:
  data_files:
    test: rivers.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def save_task(folder: Path) -> Path:
    """Save an lm-eval task of our own, `rivers`, with 12 documents of three choices, into `folder`."""
    documents = [
        {
            "question": f"Which river flows through {town}?",
            "choices": [f"The {_RIVERS[(number + shift) % 12]}." for shift in range(3)],
            "answer": 0,
        }
        for number, town in enumerate(_TOWNS)
    ]
    (folder / "rivers.yaml").write_text(TASK, encoding="utf-8")
    lines = "".join(json.dumps(document) + "\n" for document in documents)
    (folder / "rivers.jsonl").write_text(lines, encoding="utf-8")
    return folder


def save_tiny_gguf(model: Path, file: Path, *, without: str = "") -> Path:
    """Write the tiny model of the folder `model` as a GGUF file, less the tensor named `without`."""
    import gguf
    from safetensors.torch import load_file

    config = json.loads((model / "config.json").read_text())
    bpe = json.loads((model / "tokenizer.json").read_text())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, tensor in load_file(model / "model.safetensors").items():
        if name != without:
            writer.add_tensor(
                names.get_name(name, try_suffixes=(".weight",)), _gguf_layout(name, tensor).numpy()
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _gguf_layout(name: str, weight: torch.Tensor) -> torch.Tensor:
    """GGUF keeps the two halves of a rotary head interleaved."""
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(name.split(".")[-2])
    if heads is None:
        return weight
    rows, width = weight.shape
    return weight.view(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width).contiguous()
