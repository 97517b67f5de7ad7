"""The model that a user names for `moesaic doctor`, a callable or a Hugging Face configuration, and its inputs."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime import MoELayer

FORMS = "give file.py:function, package.module:callable, or a Hugging Face folder with config.json"
SEED = 0


@dataclass(frozen=True)
class Inputs:
    """The arguments of a model's forward. The first dimension of every tensor is the batch; other values are passed unchanged."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @staticmethod
    def of(value: Any) -> Inputs:
        """Inputs of a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments.

        Raises:
            ValueError: there is no tensor, or tensors have different batch sizes.
        """
        if isinstance(value, Mapping):
            inputs = Inputs((), dict(value))
        else:
            inputs = Inputs(tuple(value) if isinstance(value, tuple | list) else (value,), {})
        sizes = sorted({tensor.shape[0] if tensor.ndim else 0 for tensor in inputs._tensors()})
        if len(sizes) != 1 or sizes[0] == 0:
            found = f"batch sizes {sizes}" if sizes else "no tensor"
            raise ValueError(f"the example inputs hold {found}; give tensors [batch, ...] of one batch size")
        return inputs

    @property
    def batch_size(self) -> int:
        """The first dimension of every tensor."""
        return int(next(self._tensors()).shape[0])

    def part(self, index: int, num_parts: int) -> Inputs:
        """One of `num_parts` equal parts of the batch. Raises ValueError if the batch does not divide."""
        if self.batch_size % num_parts:
            raise ValueError(
                f"a batch of {self.batch_size} does not divide over {num_parts} ranks; give example inputs with a multiple of it"
            )
        size = self.batch_size // num_parts

        def cut(value: Any) -> Any:
            return value[index * size : (index + 1) * size] if isinstance(value, Tensor) else value

        return Inputs(tuple(map(cut, self.args)), {name: cut(value) for name, value in self.kwargs.items()})

    def to(self, device: torch.device) -> Inputs:
        """The same on a device."""

        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        return Inputs(tuple(map(move, self.args)), {name: move(value) for name, value in self.kwargs.items()})

    def _tensors(self) -> Iterator[Tensor]:
        return (value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor))

    def __str__(self) -> str:
        def show(value: Any) -> str:
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if isinstance(value, Tensor) else repr(value)

        return ", ".join([*map(show, self.args), *(f"{name}={show(value)}" for name, value in self.kwargs.items())])


@dataclass(frozen=True)
class Target:
    """A target as the user wrote it, and the model that it names, in fp32 and with the same weights every time."""

    text: str
    make: Callable[[], Any]
    count_parameters: Callable[[], int | None]
    """The number of parameters before the model is built; None if unknown."""

    def build(self) -> tuple[nn.Module, Inputs | None]:
        """Build the model; return it with its example inputs, if any. Raises ValueError if the target returns anything else."""
        torch.manual_seed(SEED)
        with self._errors_of("building the model"):
            made = self.make()
        model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
        if not isinstance(model, nn.Module):
            raise ValueError(f"--model {self.text} returned {type(model).__name__}; return a module, or (module, example inputs)")
        return model.float(), None if inputs is None else Inputs.of(inputs)

    @contextmanager
    def _errors_of(self, what: str) -> Iterator[None]:
        """Turn any exception of the user's code into a ValueError of one line."""
        try:
            yield
        except Exception as error:
            raise ValueError(f"--model {self.text}: {what} raised {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def find_target(text: str) -> Target:
    """The target that `text` names. Raises ValueError, with the cure, if there is none."""
    if Path(text).is_dir():
        return _hugging_face(text)
    where, _, name = text.rpartition(":")
    if not where or not name:
        raise ValueError(f"--model {text} is no folder and names no callable; {FORMS}")
    module = _import(text, where)
    make = getattr(module, name, None)
    if not callable(make):
        near = difflib.get_close_matches(name, [n for n, value in vars(module).items() if callable(value)], n=1)
        hint = f"did you mean '{near[0]}'?" if near else FORMS
        raise ValueError(f"--model {text}: {where} has no callable '{name}'; {hint}")
    return Target(text, make, lambda: None)


def _import(text: str, where: str) -> Any:
    """Import a file or a dotted name; modules beside it can be imported too, as under `python where`."""
    path = Path(where)
    is_file = where.endswith(".py")
    if is_file and not path.is_file():
        raise ValueError(f"--model {text}: there is no file {where}; {FORMS}")
    sys.path.insert(0, str(path.parent.resolve()) if is_file else os.getcwd())
    try:
        if not is_file:
            return importlib.import_module(where)
        spec = importlib.util.spec_from_file_location("moesaic_target", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    except Exception as error:
        raise ValueError(f"--model {text}: importing {where} raised {_first_line(error)}; {FORMS}") from error


def _hugging_face(folder: str) -> Target:
    """A causal language model with random weights, from the configuration in a folder."""
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"--model {folder} holds no config.json; {FORMS}")
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(f"--model {folder} needs transformers: pip install 'moesaic[hf]'")

    def make() -> nn.Module:
        transformers = importlib.import_module("transformers")
        transformers.logging.set_verbosity_error()
        config = transformers.AutoConfig.from_pretrained(folder)
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        return model

    def count() -> int:
        with target._errors_of("reading the configuration"), torch.device("meta"):
            return sum(parameter.numel() for parameter in make().parameters())

    target = Target(folder, make, count)
    return target


def make_inputs(model: nn.Module, num_tokens: int, ranks: int) -> Inputs:
    """Random inputs of about `num_tokens` tokens, for a model without example inputs; the batch is a multiple of `ranks`.

    The inputs are token ids if the model begins with an embedding, as models of transformers do, and vectors if it begins with a
    linear or a MoE layer. Raises ValueError for any other model.
    """
    config = getattr(model, "config", None)
    longest = getattr(config, "max_position_embeddings", None) or num_tokens
    length = max(1, min(num_tokens // (2 * ranks), longest))
    batch = max(1, round(num_tokens / length / ranks)) * ranks
    generator = torch.Generator().manual_seed(SEED)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            ids = torch.randint(module.num_embeddings, (batch, length), generator=generator)
            if getattr(model, "main_input_name", None) == "input_ids":
                return Inputs.of({"input_ids": ids, "use_cache": False})
            return Inputs.of(ids)
        if isinstance(module, nn.Linear | MoELayer):
            width = module.in_features if isinstance(module, nn.Linear) else module.dim
            return Inputs.of(torch.randn(batch, length, width, generator=generator))
    raise ValueError(
        f"{type(model).__name__} begins with neither an embedding, nor a linear, nor a MoE layer, so its inputs are unknown; "
        "return (model, inputs) from the callable, or give --input FILE"
    )


def read_inputs(path: str) -> Inputs:
    """Inputs written by `torch.save`: a tensor, a tuple, or a dict of tensors and numbers. Raises ValueError otherwise."""
    try:
        return Inputs.of(torch.load(path, weights_only=True))
    except OSError as error:
        raise ValueError(f"--input {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"--input {path}: {error}") from None
    except Exception as error:
        raise ValueError(f"--input {path} cannot be read ({_first_line(error)}); write it with torch.save") from None
