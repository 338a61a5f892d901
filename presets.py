"""Presets: presets.yaml is read here, and checked. The block `paper` is the schema; the other blocks change it."""

import contextlib
import difflib
import math
import re
from decimal import Decimal

import common
from common import Refused
from folders import HERE, METHOD_NAME

import yaml


def known(word, words, what):
    """`word` if it is one of `words`; otherwise a refusal that names the nearest of them."""
    if word in (words := [str(w) for w in words]):
        return word
    close = difflib.get_close_matches(str(word), words, 1, 0.4) if len(str(word)) > 2 else []
    hint = f"; did you mean {close[0]}?" if close else ""
    raise Refused(f"unknown {what} '{word}': expected one of {', '.join(words)}{hint}")


METHODS = ("joint", "independent", "bagging", "stacking")
POLICIES = ("real", "auto", "synthetic")
MOST, REAL = 1_000_000, (int, float)    # the largest count; the types of a real number


def number(kind, low, high, words):
    """A rule (test, words) for a number of one kind in [low, high]; true and false are not numbers."""
    return lambda x: isinstance(x, kind) and not isinstance(x, bool) and low <= x <= high, words


def one_of(words):
    return lambda x: isinstance(x, str) and x in words, "one of " + ", ".join(words)


COUNT = number(int, 1, MOST, f"a whole number of at least 1, at most {MOST}")
FRACTION, RATE = number(REAL, 0, 1, "a number in [0, 1]"), number(REAL, 1e-30, 1e30, "a number above 0")
LAMBDA = (lambda x: FRACTION[0](x) and float(f"{x:g}") == x, "a number in [0, 1] of at most six digits")
SWITCH = (lambda x: isinstance(x, bool), "true or false")
RATES = (lambda x: isinstance(x, dict) and all(map(LAMBDA[0], x)) and max(x, default=0) == 1
         and all(map(RATE[0], x.values())), "learning rates per range of lambda, the last of them for 1")
COUNT_OR_ALL = (lambda x: x is None or COUNT[0](x), f"{COUNT[1]}, or null for all")
SHARED = {      # the settings that every run of an experiment has, and the rule of each
    "dataset": (lambda x: isinstance(x, str), "the name of a data set"), "epochs": COUNT, "batch": COUNT,
    "train": COUNT_OR_ALL, "test": COUNT_OR_ALL,
    "validation": number(int, 0, MOST, f"a whole number of at least 0, at most {MOST}"), "augment": SWITCH,
    "momentum": number(REAL, 0, 0.999999, "a number in [0, 1)"), "nesterov": SWITCH,
    "weight_decay": number(REAL, 0, 1e30, "a number of at least 0"),
    "decay": number(REAL, 1e-6, 1 - 1e-6, "a share of the epochs, above 0 and below 1 (the end)")}
OTHERS = {      # the rest of an experiment's block
    "trials": COUNT, "tune": RATE, "bagging": one_of(("weights", "resample")), "penalties": RATE,
    "stacking": one_of(("validation", "training")), "folds": number(int, 2, MOST, "a whole number of at least 2")}
CONFIGURATION = {
    "classes": (lambda x: x is None or number(int, 2, MOST, "")[0](x), "a whole number of at least 2, or null for all"),
    "members": COUNT, "lr": RATES, "methods": one_of(METHODS), "lambdas": LAMBDA, "weights": LAMBDA,
    "once": (lambda x: isinstance(x, str) and re.fullmatch(METHOD_NAME, x), "a method such as joint-0.5 or bagging")}
NETWORK = {     # of the networks; another key must have the type that it has in the block `paper`
    **dict.fromkeys(("hidden", "depth", "growth", "filters", "strides"), COUNT), "batchnorm": SWITCH,
    "padding": number(int, 0, 1, "0 or 1"), "precision": one_of(("fp32", "bf16", "auto"))}
LISTS = ("lambdas", "methods", "weights", "decay", "penalties", "tune", "once")
RULES = SHARED | OTHERS | CONFIGURATION | NETWORK | {"data": one_of(POLICIES), "repeats": COUNT}


def check(key, value, like, where):
    """Raises Refused unless a value follows the rule of its key, or, without a rule, has the type of `like`."""
    test, words = RULES.get(key, (lambda x: type(x) is type(like), f"a {type(like).__name__}"))
    values, empty = [value], key in ("decay", "weights", "once")
    if key in LISTS or isinstance(like, list):
        words = f"a list{'' if empty else ', not empty'}, each entry {words}"
        values = value if isinstance(value, list) and (value or empty) else [math.nan]
    if not all(map(test, values)):
        raise Refused(f"{where}: {repr(value)[:60]} is not {words}{hint(value)}")


def hint(value):
    """For 1e-4 or 1.5e4, which YAML takes for text: how to write that number."""
    text = isinstance(value, str) and re.fullmatch(r"[-+]?\d{1,9}(\.\d{0,9})?e[-+]?\d", value, re.IGNORECASE)
    return f"; YAML reads {value} as text: write {Decimal(value):f}" if text else ""


def merge(base, changes, where):
    """`base` with the values of `changes`: only keys that `base` has, each value by its rule.

    A configuration may also change what its block sets for all of them, such as `lr` or `classes`.
    """
    if not isinstance(changes, dict):
        raise Refused(f"presets.yaml: {where} is {repr(changes)[:60]}: expected a block of settings")
    merged = dict(base)
    for key, value in changes.items():
        old = base[known(key, base, f"key in presets.yaml, {where}")]
        if key == "configurations" and isinstance(value, dict):
            shared, merged[key] = {k: v for k, v in base.items() if k not in SHARED | OTHERS and k != key}, dict(old)
            for name, own in value.items():
                before = old[known(name, old, f"configuration in presets.yaml, {where}")]
                if of_all := [k for k in own if k in SHARED | OTHERS] if isinstance(own, dict) else []:
                    raise Refused(f"presets.yaml: {where}: {of_all[0]} holds for all configurations; move it out of "
                                  f"{name}")
                after = merge(shared | before, own, f"{where}.{key}.{name}")
                merged[key][name] = {k: v for k, v in after.items() if k in before or k in own}
        elif isinstance(old, dict) and key != "lr":
            merged[key] = merge(old, value, f"{where}.{key}")
        else:
            check(key, value, old, f"presets.yaml, {where}.{key}")
            merged[key] = value
    return merged


class Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice in a block is an error, and so is a whole number such as 010 or 1:30."""

    def construct_yaml_int(self, node):
        if not re.fullmatch(r"[-+]?(0|[1-9]\d*)", node.value):
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value} is not a whole number as it is written here, such as 10", node.start_mark)
        return int(node.value)

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value]
        for i, (key, _) in enumerate(node.value):
            if key.value in keys[:i]:
                raise yaml.composer.ComposerError(None, None, f"the key {key.value} stands twice", key.start_mark)
        return node


Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)


def load_preset(name, path=HERE / "presets.yaml"):
    """The block `paper` of presets.yaml with the changes of another block. `paper` is the schema."""
    try:
        presets = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise Refused(f"{path.name} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(presets, dict) or not isinstance(presets.get("paper"), dict):
        raise Refused(f"{path.name}: expected a block `paper` that the other presets change")
    paper = merge(presets["paper"], presets["paper"], "paper")
    return merge(paper, presets[known(name, presets, "preset")], name)


def experiment_settings(preset, name, experiment, changes=()):
    """The block of one experiment in a preset; each configuration has every setting of its own.

    `changes` are those of --set: KEY=VALUE for all configurations, or CONFIGURATION.KEY=VALUE.
    """
    if experiment not in preset:
        raise Refused(f"presets.yaml: {name} has no block '{experiment}'")
    block = dict(preset[experiment])
    configurations = block.pop("configurations", {})
    shared = {key: block.pop(key) for key in list(block) if key not in SHARED | OTHERS}
    block["configurations"] = {each: shared | own for each, own in configurations.items()}
    for change in changes:
        set_value(block, change)
    known(block.get("dataset"), common.DATASETS, f"data set of {name}.{experiment}")
    for each in block["configurations"].values():
        for key in [*SHARED, *OTHERS, *CONFIGURATION]:
            if key not in (each if key in CONFIGURATION else block):
                raise Refused(f"presets.yaml: {name}.{experiment}: {key} is missing")
    return block


def set_value(block, change):
    """Makes one change of --set; its value is read as YAML."""
    name, given, value = change.partition("=")
    if not given:
        raise Refused(f"--set {change}: a key and a value were expected, such as --set batch=50")
    configuration, _, key = name.rpartition(".")
    configurations = block["configurations"]
    known(key, [*SHARED, *OTHERS, *{k: 0 for own in configurations.values() for k in own}], "key in --set")
    if key in block and configuration:
        raise Refused(f"--set {change}: {key} holds for all configurations; leave '{configuration}.' out")
    with contextlib.suppress(ValueError, RecursionError, yaml.YAMLError):
        value = yaml.load(value, Loader)
    chosen = [known(configuration, configurations, "configuration in --set")] if configuration else configurations
    targets = [block] if key in block else [c for each in chosen if key in (c := configurations[each])]
    if not targets:
        raise Refused(f"--set {change}: {configuration} has no {key}")
    for target in targets:
        check(key, value, target[key], f"--set {change}")
        target[key] = value
