"""docs/configuration.md, made of the code; tools/update_docs.py writes it.

Defaults are those of the configs, possible values those that loading a config checks, and what a
key means is in the docstring of what the config calls there, or in the config's own comments.
"""

import inspect
import io
import re
import tokenize
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Sequence

from smca import model_zoo
from smca.config.schema import Kind
from smca.config.train import _TRAIN

from detectron2.config import LazyConfig
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf

ROOT = Path(__file__).resolve().parent.parent

MAIN = "smca_r50_50ep"
OTHERS = {
    "single scale": "smca_single_scale_r50_50ep",
    "conv": "smca_conv_r50_50ep",
    "DETR": "detr_r50_50ep",
    "demo": "smca_shapes",
}
OWN_DATA = ("custom_coco", "custom_yolo", "custom_voc")

# Of keys whose words are in no docstring or comment of this project.
WORDS = {
    "data.train_json": "annotations in COCO's format; a file, or a list of them",
    "data.train_images": "the folder of the images, or a list of folders",
    "data.val_json": "as for training; one file",
    "data.val_images": "as for training; one folder",
    "data.train_annotations": "the folder of the XML files",
    "data.val_annotations": "the folder of the XML files",
    "data.train_list": "a file with the names of the images to take; null: all",
    "data.val_list": "a file with the names of the images to take; null: all",
    "data.names": "of the classes; null: those of the training objects",
    "data.yaml": "YOLO's file with the folders and the classes",
    "dataloader.train.dataset.names": "of data sets in Detectron2's catalog, or what registers one",
    "dataloader.train.dataset.filter_empty": "leave images without objects out",
    "dataloader.test.dataset.names": "as for training",
    "dataloader.test.dataset.filter_empty": "as for training",
    "dataloader.test.num_workers": "worker processes; 0 loads in this one",
    "dataloader.evaluator": "computes AP",
    "lr_multiplier.values": "factors of the learning rate, of each step of the schedule",
    "lr_multiplier.milestones": "where the factor changes, in the unit of num_updates",
    "lr_multiplier.num_updates": "the whole training; milestones are relative to it",
    "model.decoder.num_heads": "attention heads",
    "model.embed_dim": "channels, the same in all parts",
    "model.encoder.num_heads": "attention heads",
    "model.num_classes": "number of classes",
    "model.num_queries": "number of queries: an image has at most as many detections",
    "optimizer.fused": "the optimizer's fused kernel",
    "optimizer.lr": "learning rate of all but the backbone",
    "optimizer.params": "makes the groups of parameters with their rates",
    "optimizer.params.lr_factor_func.factor": "of the backbone's learning rate",
    "optimizer.weight_decay": "of AdamW",
    "train.amp.enabled": "mixed precision",
    "train.compile": "torch.compile of backbone, encoder and decoder",
    "train.cudnn_benchmark": "let cuDNN try its algorithms for each new image size",
    "train.log_period": "iterations between two lines of the log",
    "train.model_ema.decay": "of the average, in each iteration",
    "train.model_ema.enabled": "keep an average of the weights, and evaluate it too",
}

INTRODUCTION = """\
# Configuration

Every key of the COCO configs and, at the end, of the data in those for your own, with its default
and what it is; [fine_tuning.md](fine_tuning.md#settings) has those that `fine_tune.py` adds.
`python tools/update_docs.py` writes this page from the configs, their comments and the docstrings
of what they call.

A key is set on the command line, after all options (of `demo.py` after `--opts`), and checked
before anything starts; an unknown one is an error that names the nearest:

```
python train_net.py --config-file configs/smca_r50_50ep.py model.num_queries=100 optimizer.lr=5e-5
```

Values are in [hydra's syntax](https://hydra.cc/docs/advanced/override_grammar/basic/); quote what a
shell would change: `'model.in_features=[res4,res5]'`. `+key=value` adds a key that is nowhere here.
Sections can be replaced in a config of your own, for instance by
[another backbone](../configs/README.md#settings-that-make-the-variants).
"""


class Row(NamedTuple):
    """A line of a table.

    Attributes:
        key: from the config's root.
        default: as text.
        words: what it is.
    """

    key: str
    default: str
    words: str


def table(rows: Sequence[Row], keys: str = "key") -> str:
    """In Markdown."""
    lines = [f"| {keys} | default | what it is |", "|---|---|---|"]
    for row in rows:
        default = f"`{row.default}`" if row.default and " " not in row.default else row.default
        lines.append(f"| `{row.key}` | {default} | {row.words} |".replace("  ", " "))
    return "\n".join(lines) + "\n"


# ---- Values


def value_text(node: DictConfig, name: str, path: str) -> str:
    """A key's value; of a reference to another key that key."""
    raw = OmegaConf.to_container(node, resolve=False)[name]  # type: ignore[index,call-overload]
    if isinstance(raw, str) and (match := re.fullmatch(r"\$\{(\.*)([\w.]+)\}", raw)):
        dots, target = match.groups()
        parents = path.split(".")[: -len(dots)] if dots else []
        return f"as `{'.'.join([*parents, target])}`"
    return plain_text(node[name])


def plain_text(value: Any) -> str:
    """As one writes it in an override."""
    if isinstance(value, (ListConfig, tuple, list)):
        return f"[{','.join(map(plain_text, value))}]"
    if value is None:
        return "null"
    return '""' if value == "" else str(value)


def target_of(node: Any) -> Any:
    """What a section of a config calls, None if it calls nothing."""
    if not isinstance(node, DictConfig) or node._is_none() or "_target_" not in node:
        return None
    target = node._target_
    return locate(target) if isinstance(target, str) else target


def is_ours(target: Any) -> bool:
    """Whether this project defines it."""
    return target is not None and target.__module__.split(".")[0] == "smca"


def called_text(target: Any) -> str:
    """A function or class by its name; of other libraries' not the module, which may move."""
    name = target.__qualname__
    if is_ours(target):
        return f"`{target.__module__}.{name}`"
    return f"{target.__module__.split('.')[0]}'s `{name}`"


# ---- Words


def argument_words(target: Any) -> Dict[str, str]:
    """Of each argument what the docstring's "Args:" says of it (Google's style)."""
    if not is_ours(target):
        return {}
    docs = inspect.getdoc(target) or ""
    if "Args:" not in docs and inspect.isclass(target):
        docs = inspect.getdoc(target.__init__) or ""
    if "Args:" not in docs:
        return {}
    section = re.split(r"\n\s*(?:Returns|Raises|Yields|Note|Examples?):", docs.split("Args:")[1])[0]
    text = " ".join(section.split())
    names = "|".join(map(re.escape, inspect.signature(target).parameters))
    start = rf"(?:(?<=^)|(?<=[.;] )|(?<= ))((?:{names})(?:, (?:{names}))*)(?: \([^)]*\))?: "
    parts = re.split(start, text)
    return {
        name: words.strip().rstrip(".")
        for group, words in zip(parts[1::2], parts[2::2])
        for name in group.split(", ")
    }


def comments_of(path: Path) -> Dict[str, str]:
    """Of each key of ``dict(...)`` in a config the comment above or beside it.

    Returns:
        By the key's path in the file's variable, ``amp.enabled``.
    """
    found: Dict[str, str] = {}
    above: List[str] = []
    stack: List[str] = []  # of each open bracket the key that it belongs to
    last_key, last_line = "", 0
    tokens = list(tokenize.generate_tokens(io.StringIO(path.read_text()).readline))
    for token, following in zip(tokens, [*tokens[1:], tokens[-1]]):
        if token.type == tokenize.COMMENT:
            words = token.string.lstrip("# ")
            if token.start[0] == last_line:  # beside the key
                found[last_key] = " ".join(filter(None, [found.get(last_key, ""), words]))
            else:
                above.append(words)
        elif token.type == tokenize.NAME and following.string == "=":
            last_line = token.start[0]
            last_key = ".".join(filter(None, [*stack[1:], token.string]))
            if above:
                found[last_key] = " ".join(above)
            above = []
        elif token.string in ("(", "[", "{"):
            stack.append(last_key.rpartition(".")[2])
        elif token.string in (")", "]", "}"):
            stack.pop()
    return {key: words.rstrip(".") for key, words in found.items()}


def kinds_of(kinds: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The words for the values of each key of the ``train`` section."""
    for key, kind in kinds.items():
        if isinstance(kind, Kind):
            yield prefix + key, kind.words
        else:
            yield from kinds_of(kind, f"{prefix}{key}.")


def words_of(key: str, words: Mapping[str, str]) -> str:
    """What a key is, of the words for the arguments of what is called there."""
    return WORDS.get(key) or words.get(key.rpartition(".")[2], "").replace("``", "`")


def joined(words: str, more: str) -> str:
    """One text of two, of which one may be empty."""
    return "; ".join(filter(None, [words, more]))


# ---- Sections


def rows_of(node: DictConfig, path: str) -> Iterator[Row]:
    """The rows of what a section calls and of the sections in it."""
    target = target_of(node)
    words = argument_words(target) if target is not None else {}
    for name in map(str, node.keys()):
        key = f"{path}.{name}"
        if name == "_target_":
            continue
        child = OmegaConf.select(node, name, throw_on_resolution_failure=False)
        if isinstance(child, DictConfig):
            called = target_of(child)
            if called is None and not child:
                continue
            what = f"calls {called_text(called)}" if called else "a section"
            yield Row(key, "", joined(words_of(key, words), what))
            yield from rows_of(child, key)
        else:
            yield Row(key, value_text(node, name, key), words_of(key, words))
    if is_ours(target):
        for name, parameter in inspect.signature(target).parameters.items():
            if name not in node and parameter.default is not parameter.empty:
                key = f"{path}.{name}"
                yield Row(key, plain_text(parameter.default), words_of(key, words))


def train_rows(config: DictConfig) -> Iterator[Row]:
    """The rows of the ``train`` section."""
    comments = comments_of(ROOT / "configs" / "common" / "train.py")
    kinds = dict(kinds_of(_TRAIN))

    def rows(node: DictConfig, prefix: str) -> Iterator[Row]:
        for name in map(str, node.keys()):
            key = f"{prefix}{name}"
            if isinstance(node[name], DictConfig):
                if key in comments:
                    yield Row(f"train.{key}", "", comments[key])
                yield from rows(node[name], f"{key}.")
            else:
                words = comments.get(key) or WORDS.get(f"train.{key}", "")
                values = kinds.get(key, "")
                words = f"{words} ({values})" if words and values else words or values
                yield Row(f"train.{key}", plain_text(node[name]), words)

    yield from rows(config.train, "")


def differences(main: Sequence[Row], config: DictConfig, section: str) -> List[Row]:
    """The rows of another config's section whose default is another than the main one's."""
    known = {row.key: row.default for row in main}
    return [row for row in rows_of(config[section], section) if known.get(row.key) != row.default]


def configuration_page() -> str:
    """docs/configuration.md."""
    config = model_zoo.get_config(MAIN)
    defaults = LazyConfig.load(str(ROOT / "configs" / "common" / "train.py"))
    parts = [INTRODUCTION, "## train: the run\n", table(list(train_rows(defaults)))]
    parts += [
        "The main configs set `train.init_checkpoint`, `train.max_iter`, `train.eval_period` and "
        "`train.checkpointer.period`\nby their schedule.\n"
    ]
    titles = {
        "model": "the detector",
        "dataloader": "data, augmentation, evaluation",
        "optimizer": "AdamW",
        "lr_multiplier": "the schedule",
    }
    for section, title in titles.items():
        rows = list(rows_of(config[section], section))
        called = target_of(config[section])
        parts.append(f"## {section}: {title}\n")
        parts.append(f"Defaults of `{MAIN}`.\n")
        if called:
            parts[-1] = f"Defaults of `{MAIN}`; calls {called_text(called)}.\n"
        parts.append(table(rows))
        if section == "model":
            for label, name in OTHERS.items():
                other = differences(rows, model_zoo.get_config(name), section)
                parts += [f"What differs in `{name}` ({label}):\n", table(other)]
    parts.append("## data: your own\n")
    parts.append("`???` has to be given.\n")
    for name in OWN_DATA:
        own = model_zoo.get_config(name).data
        comments = comments_of(ROOT / "configs" / f"{name}.py")
        rows = [
            Row(
                f"data.{key}",
                data_default(own, key),
                comments.get(str(key)) or WORDS.get(f"data.{key}", ""),
            )
            for key in own
        ]
        parts += [f"`{name}`:\n", table(rows)]
    return "\n".join(parts)


def data_default(node: DictConfig, key: Any) -> str:
    """The default of a key of the ``data`` section."""
    if OmegaConf.is_missing(node, key):
        return "???"
    called = target_of(node._get_node(key))
    return f"made by `{called.__name__}`" if called else plain_text(node[key])
