"""Ask an exported adapter or merged model, with the prompt that its trial was trained on."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from sweeps.errors import BadModel
from sweeps.prompts import read_prompt
from sweeps.spec import TrialSpec
from sweeps.trial.base import Base, load_base
from sweeps.trial.merge import CONFIG_FILE
from sweeps.trial.paths import TrialFolder


def generate(folder: Path, text: str, max_tokens: int, device: torch.device | None = None) -> str:
    """The answer of the model in `folder` to the instruction `text`: greedy, at most `max_tokens` tokens.

    An adapter answers on the base as it was trained on, quantised as that was; a merged model by itself, in
    the dtype that its trial computes in on this machine. Prompt and base are those of the trial's spec in
    the folder. Raises `BadModel` if the folder holds neither of the two, or the prompt needs more than one
    text.
    """
    spec = _read_spec(folder)
    prompt = _prompt(spec, text)
    if (folder / CONFIG_FILE).exists():
        base = load_base(spec.model, device)
        model = _with_adapter(base, folder)
    else:
        whole = {"id": str(folder.absolute()), "revision": None}
        base = load_base(spec.model.unquantised().model_copy(update=whole), device)
        model = base.model
    return _answer(model, base.tokenizer, prompt, max_tokens)


def _prompt(spec: TrialSpec, text: str) -> str:
    """`text` in the one field that the trial's prompt cannot do without."""
    prompt = read_prompt(spec.data.prompt)
    needed = [name for name in prompt.fields if name != prompt.optional]
    if len(needed) != 1:
        raise BadModel(
            f"one text is asked with, and the prompt of this trial needs {len(needed)}: {', '.join(needed)}; "
            "load the model with transformers and fill the prompt in spec.json yourself"
        )
    return prompt.render({**dict.fromkeys(prompt.fields, ""), needed[0]: text})


def _read_spec(folder: Path) -> TrialSpec:
    file = TrialFolder(folder).spec
    try:
        return TrialSpec.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise BadModel(
            f"a folder that `export` made is needed, got {folder}, whose {file.name} cannot be read: {reason}"
        ) from error


def _with_adapter(base: Base, folder: Path) -> Any:
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # The head's adapter is its own; the embedding keeps none.
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            # peft asks transformers by the old name.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            # In the dtype that it was trained and saved in: peft would make it float32.
            model = PeftModel.from_pretrained(base.model, folder, autocast_adapter_dtype=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise BadModel(
            f"the adapter in {folder} must fit its base {base.spec.id}: {type(error).__name__}: {error}; "
            "export it again"
        ) from error
    return model.eval()


def _answer(model: Any, tokenizer: Any, prompt: str, max_tokens: int) -> str:
    # As a row is tokenised for training: the text alone, with what begins a text before it.
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = [*before, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    given = torch.tensor([ids], device=model.device)  # (1, T)
    with torch.no_grad():
        whole = model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=max_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            temperature=None,  # what a model's generation config may say of sampling
            top_p=None,
            top_k=None,
        )
    return str(tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=True)).strip()
