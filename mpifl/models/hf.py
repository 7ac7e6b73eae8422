"""Sequence classifiers of Hugging Face `transformers`, whole or through LoRA adapters of `peft` (the extra "hf").

Both libraries are imported when a model is made: only jobs that use them wait the seconds that this takes. A
checkpoint is read once per process, and all modules made of it share its frozen weights: theta, and so what travels,
is what is trained.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mpifl.config import UserError, choice
from mpifl.models.linear import classes_of, input_shape


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al. 2022): W x becomes W x + (alpha / r) B A x, with A (r, in) random and B (out, r) 0.

    dropout: of x before A, in training. targets: how the names of the adapted linear layers end, e.g. "query"; none:
    all of the encoder's. Raises UserError for a number out of its range.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.r < 1:
            raise UserError(f"lora.r is {self.r}; the rank must be at least 1")
        if not 0 < self.alpha < float("inf"):
            raise UserError(f"lora.alpha is {self.alpha}; it must be above 0")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout is {self.dropout}; it must be at least 0 and below 1")


def text_classifier(
    features: dict[str, Any],
    checkpoint: str,
    train: Literal["all", "head"] = "all",
    lora: Lora | None = None,
    pretrained: bool = True,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    download: bool = False,
) -> nn.Module:
    """A classifier of transformers, as a module from token ids x, (B, L) int64, to scores, (B, classes).

    Positions where x is the pad are masked, except the first. What the checkpoint lacks (a head, as a rule) and the
    adapters are initialised from torch's generator. Parameters keep the names that transformers (with lora, peft)
    gives them; state_dict leaves frozen ones out: `load_state_dict(tensors, strict=False)` puts an export into the
    same checkpoint (with lora, into `get_peft_model` of it, modules_to_save as the names in the export say). One
    client at a time: transformers looks at the values of masks, which vmap forbids.

    checkpoint: a folder with config.json and model.safetensors, or a name in the local cache of the hub; with
    download, any name on the hub. train: "head" freezes the encoder, as does lora. pretrained: false takes only the
    architecture from the checkpoint. dtype: of frozen weights; what is trained is float32.
    Raises UserError for a checkpoint that cannot be loaded or is made for other tokens than those of column x.
    """
    freeze = train == "head" or lora is not None
    _check_options(train, lora, pretrained, dtype)
    _need("transformers")
    classes, pad = classes_of(features), _checked_pad(features, _config(checkpoint, download), checkpoint)
    loaded, new = _load(checkpoint, classes, pad, pretrained, dtype, download)
    encoder = {id(parameter) for parameter in loaded.base_model.parameters()}
    frozen = {name for name, p in loaded.named_parameters() if freeze and id(p) in encoder} - new
    net = _copy(loaded, frozen)
    _initialize(net, new)
    if lora is not None:
        net = _adapted(net, lora, frozen)
    _train_in_float32(net)
    net.register_forward_pre_hook(partial(_arguments, pad=pad), with_kwargs=True)
    net.register_forward_hook(_scores)
    net.register_state_dict_post_hook(_leave_out_frozen)
    return net


def _check_options(train: str, lora: Lora | None, pretrained: bool, dtype: str) -> None:
    if lora is not None and train == "head":
        raise UserError('lora trains adapters and the head: leave out train = "head", or lora')
    if lora is None and train == "all" and dtype != "float32":
        raise UserError(f'dtype "{dtype}" is for frozen weights, and there are none; set lora, or train = "head"')
    if not pretrained and (train == "head" or lora is not None):
        raise UserError('pretrained = false leaves nothing worth freezing: leave out lora and train = "head"')


def _need(package: str) -> None:
    if find_spec(package) is None:
        raise UserError(f'model text_classifier needs {package}: pip install -e ".[hf]"')


def _checked_pad(features: dict[str, Any], config: Any, checkpoint: str) -> int:
    """The pad of column x, if its tokens are those that the checkpoint was made for."""
    shape, feature = input_shape(features), features["x"]
    if len(shape) != 1 or feature.pad is None:
        raise UserError(f"text_classifier reads padded rows of token ids; column 'x' has {shape}, pad {feature.pad}")
    again = f"convert the dataset again with the tokenizer of '{checkpoint}'"
    tokens = getattr(config, "vocab_size", feature.classes)
    if feature.classes and feature.classes > tokens:
        raise UserError(f"column 'x' has {feature.classes} tokens, the model {tokens}; {again}")
    expected = getattr(config, "pad_token_id", None)
    if expected not in (None, feature.pad):
        raise UserError(f"column 'x' is padded with {feature.pad}, the model expects {expected}; {again}")
    most = getattr(config, "max_position_embeddings", shape[0])
    if shape[0] > most:
        raise UserError(f"rows of column 'x' have {shape[0]} tokens, the model reads at most {most}; {again}, shorter")
    return feature.pad


def _config(checkpoint: str, download: bool) -> Any:
    from transformers import AutoConfig

    with _loading(checkpoint, download):
        return AutoConfig.from_pretrained(checkpoint, local_files_only=not download, trust_remote_code=False)


@lru_cache(maxsize=1)
def _load(
    checkpoint: str, classes: int, pad: int, pretrained: bool, dtype: str, download: bool
) -> tuple[nn.Module, frozenset[str]]:
    """The model on the CPU, read once per process, and the names of parameters that have no pretrained values."""
    from transformers import AutoModelForSequenceClassification as Classifier

    config = _config(checkpoint, download)
    config.num_labels, config.pad_token_id = classes, pad
    # The backward pass of fused attention is not deterministic on a GPU.
    options = {"dtype": getattr(torch, dtype), "attn_implementation": "eager"}
    with _loading(checkpoint, download), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if not pretrained:
            net = Classifier.from_config(config, **options)
            return net, frozenset(name for name, _ in net.named_parameters())
        net, found = Classifier.from_pretrained(
            checkpoint,
            config=config,
            local_files_only=not download,
            trust_remote_code=False,
            use_safetensors=True,  # the other format is pickle
            ignore_mismatched_sizes=True,  # a head for another number of classes is replaced
            output_loading_info=True,
            **options,
        )
    new = frozenset(found["missing_keys"]) | {name for name, *_ in found["mismatched_keys"]}
    sizes = {name: parameter.numel() for name, parameter in net.named_parameters()}
    if 2 * sum(sizes.get(name, 0) for name in new) > sum(sizes.values()):
        raise UserError(f"'{checkpoint}' lacks most weights of {type(net).__name__}; give a checkpoint of that model")
    return net, new


@contextmanager
def _loading(checkpoint: str, download: bool) -> Iterator[None]:
    """Say in one line what is wrong with a checkpoint."""
    try:
        with _quiet():
            yield
    except Exception as error:  # transformers does not say which it raises
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        known = "a name on the hub" if download else "a name in the local Hugging Face cache, or set download = true"
        allowed = f"give a folder with config.json and model.safetensors, or {known}"
        raise UserError(f"model.checkpoint '{checkpoint}' cannot be loaded: {reason}; {allowed}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without every rank's progress bars and reports, and without what the two libraries warn each other of."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _copy(net: nn.Module, frozen: set[str]) -> nn.Module:
    """A copy that has all its parameters for itself but the frozen ones, which share their storage."""
    named = net.named_parameters()
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for name, p in named if name in frozen}
    return copy.deepcopy(net, memo=shared)


def _initialize(net: Any, new: frozenset[str]) -> None:
    """Draw the parameters of modules that have only new ones, the way transformers does for this model."""
    for path, module in net.named_modules():
        own = {f"{path}.{name}".removeprefix(".") for name, _ in module.named_parameters(recurse=False)}
        if own and own <= new:
            net._init_weights(module)


def _adapted(net: Any, lora: Lora, frozen: set[str]) -> nn.Module:
    """The peft model of a net; parameters that are not frozen are trained beside the adapters."""
    _need("peft")
    from peft import LoraConfig, get_peft_model

    _check_targets(net, lora.targets, frozen)
    # peft itself trains what is called classifier or score, and would leave a new pooler at its random values.
    inside = f"{net.base_model_prefix}."
    trained = [name for name, _ in net.named_parameters() if name not in frozen]
    modules = {name.rpartition(".")[0] if name.startswith(inside) else name.partition(".")[0] for name in trained}
    config = LoraConfig(
        task_type="SEQ_CLS",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets) or "all-linear",
        modules_to_save=sorted(modules),
    )
    with _quiet():
        return get_peft_model(net, config)


def _check_targets(net: nn.Module, targets: tuple[str, ...], frozen: set[str]) -> None:
    """Refuse a target that is no layer: peft goes on as long as it finds one of them."""
    parts = [(path, part) for path, part in net.named_modules() if f"{path}.weight" in frozen]
    layers = [path for path, part in parts if part.weight.ndim == 2 and not isinstance(part, nn.Embedding)]
    for target in targets:
        if not any(f".{path}".endswith(f".{target}") for path in layers):
            choice(target, {path.rpartition(".")[2] for path in layers}, "layer for lora.targets")


def _train_in_float32(net: nn.Module) -> None:
    """Make the head of a half precision encoder float32, and what goes into it."""
    for module in net.modules():
        half = [p for p in module.parameters(recurse=False) if p.requires_grad and p.dtype != torch.float32]
        for parameter in half:
            parameter.data = parameter.data.float()
        if half:
            module.register_forward_pre_hook(_in_float32)


def _in_float32(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.float() for x in inputs)


def _arguments(module: nn.Module, inputs: tuple[Tensor], keywords: dict, pad: int) -> tuple[tuple, dict[str, Tensor]]:
    """What transformers is called with; a row that attends to nothing would give NaN."""
    (x,) = inputs
    visible = (x != pad) | (torch.arange(x.shape[1], device=x.device) == 0)
    return (), {"input_ids": x, "attention_mask": visible.long()}


def _scores(module: nn.Module, inputs: tuple, output: Any) -> Tensor:
    return output[0]


def _leave_out_frozen(module: nn.Module, tensors: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """They are in the checkpoint, and can be a thousand times what is trained."""
    for name, parameter in module.named_parameters(prefix.removesuffix("."), remove_duplicate=False):
        if not parameter.requires_grad:
            tensors.pop(name, None)
